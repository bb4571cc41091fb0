"""Rules under which each block descends a loss of its own output, found by a network of its own: what they have in common."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree.chain import Block
from lockfree.flight import Flight
from lockfree.objective import Objective
from lockfree.rule import Context, Needs, Place, Rule, Site
from lockfree.stacking import CreditStack, Descent, ModuleStack
from lockfree.values import Credit


@dataclass(frozen=True, kw_only=True)
class LocalRule(Rule):
    r"""A block learns from a loss of its own output, $\delta_i = \partial\ell_i/\partial y_i$, while the batch goes up; no message travels.

    The top block learns from the user's loss. Block and auxiliary network share one backward pass of the local loss.

    Attributes:
        learning_rate: Of the auxiliary networks' Adam, above 0.

    Raises:
        ValueError: If it is not positive.
    """

    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate}: give a number above 0")

    @abstractmethod
    def network(self, site: Site) -> nn.Module:
        """Makes the auxiliary network of one block.

        Args:
            site: Where the block stands, and what it hands up.
        """

    @abstractmethod
    def local_loss(self, context: Context, network: Any, outputs: list[Tensor]) -> Tensor:
        """Returns the loss of what a block has handed up, a scalar, differentiable.

        Args:
            context: What else is known of the batch.
            network: What `network` made.
            outputs: The tensors, shape (m, ...) each.
        """

    def needs(self, place: Place) -> Needs:
        return Needs.ABOVE if place.top else Needs.TARGET

    def passes_on(self, place: Place) -> bool:
        return place.top

    def auxiliary_needs(self, place: Place) -> Needs | None:
        return None if place.top else Needs.TARGET

    def build(self, site: Site) -> nn.Module | None:
        if site.place.top or not site.outputs:  # what is frozen up to here has no gradient
            return None
        # An example under autocast may be of a shorter type than what the networks are made of.
        y = site.outputs[0]
        return self.network(site).to(y.device, torch.promote_types(y.dtype, torch.float32))

    def auxiliary_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.learning_rate, fused=True)

    def credit(self, context: Context) -> Credit | None:
        if context.place.top:
            return context.above
        if not context.outputs:  # frozen up to here: there is nothing to have a gradient
            return ()
        assert context.auxiliary is not None
        with torch.enable_grad():
            leaves = [y.detach().requires_grad_() for y in context.outputs]
            loss = self.local_loss(context, context.auxiliary, leaves)
            wanted = [*leaves, *_learning(context.auxiliary)]
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
        context.memo = loss.detach(), found[len(leaves) :]
        return found[: len(leaves)]

    def credit_stack(self, auxiliaries: Sequence[nn.Module | None], objective: Objective) -> CreditStack | None:
        networks = [network for network in auxiliaries if network is not None]
        return StackedLosses(self, networks, objective) if len(networks) == len(auxiliaries) else None

    def learn(self, context: Context) -> Tensor | None:
        if context.memo is None:
            return None
        assert context.auxiliary is not None
        loss, gradients = context.memo
        for parameter, gradient in zip(_learning(context.auxiliary), gradients, strict=True):
            parameter.grad = gradient
        return loss


class _Loss(nn.Module):
    """The local loss of one block as a module."""

    def __init__(self, rule: LocalRule, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.network = network
        self._rule, self._objective = rule, objective

    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        context = Context(Place(0, 2), self.network, None, (y.detach(),), len(y), target=target)
        context.scores_shape = self._objective.scores_shape
        context.loss = lambda scores: self._objective.evaluate(scores, target)
        return self._rule.local_loss(context, self.network, [y])


class StackedLosses(CreditStack):
    """Local losses of blocks of equal structure, in one pass through their networks.

    Args:
        rule: What says what the losses are; they may look at outputs and targets.
        networks: What `LocalRule.network` made for the blocks.
        objective: The user's loss.
    """

    def __init__(self, rule: LocalRule, networks: Sequence[nn.Module], objective: Objective) -> None:
        self._losses = ModuleStack([_Loss(rule, network, objective) for network in networks])
        self.parameters = self._losses.parameters
        self._rule = rule
        self._found = torch.empty(0)

    @property
    def holds(self) -> bool:
        return self._losses.holds

    def agrees(self, contexts: Sequence[Context]) -> bool:
        if not all(isinstance(context.target, Tensor) for context in contexts):
            return False
        given = torch.stack([c.outputs[0] for c in contexts]), torch.stack([c.target for c in contexts])
        # With all that the rule may look at, which is more than a stack shows it.
        return self._losses.gives(lambda: [self._rule.local_loss(c, c.auxiliary, [c.outputs[0]]) for c in contexts], *given)

    def shown(self, flights: Sequence[Flight], outputs: Tensor) -> list[Tensor]:
        return [torch.stack([flight.target for flight in flights])]

    def credit(self, outputs: Tensor, shown: Sequence[Tensor]) -> Tensor:
        y = outputs.detach().requires_grad_()
        losses = self._losses.run(y, *shown)
        (credit,) = self._losses.differentiate(losses, torch.ones_like(losses), (y,))
        self._found = losses.detach()
        return credit

    def learn(self) -> Tensor:
        return self._found.sum()

    def losses(self) -> Tensor:
        return self._found

    def descend(self, descent: Descent) -> None:
        self._losses.descend(descent)


@dataclass(frozen=True, kw_only=True)
class HeadRule(LocalRule):
    """A local rule with a head for each tensor that a block hands up; the block descends the sum of their losses."""

    @abstractmethod
    def head(self, site: Site, y: Tensor) -> nn.Module:
        """Makes the head for one tensor.

        Args:
            site: Where the block stands.
            y: An example of the tensor, shape (m, ...).
        """

    @abstractmethod
    def head_loss(self, context: Context, head: Any, y: Tensor) -> Tensor:
        """Returns the loss of one tensor, a scalar, differentiable.

        Args:
            context: What else is known of the batch.
            head: What `head` made for this tensor.
            y: The tensor, shape (m, ...).
        """

    def network(self, site: Site) -> nn.Module:
        return nn.ModuleList(self.head(site, y) for y in site.outputs)

    def local_loss(self, context: Context, network: nn.ModuleList, outputs: list[Tensor]) -> Tensor:
        losses = [self.head_loss(context, head, y) for head, y in zip(network, outputs, strict=True)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def twin_of_readout(site: Site, y: Tensor) -> nn.Module | None:
    """Returns a copy of the top block for the block right below it, if all that it does is to read classes off.

    A readout may see less than its input holds (means over places, say); who learns for it has to look the same way.

    Args:
        site: Where the block stands.
        y: An example of what it hands up.

    Returns:
        The copy, or ``None``: the block is further down, or what is above has more than one layer with weights.
    """
    if site.place.index != site.place.count - 2 or site.handed_up is not y:
        return None
    (top,) = site.above
    assert isinstance(top, Block)
    holders = [module for module in top.modules() if any(True for _ in module.parameters(recurse=False))]
    return top.copy() if len(holders) == 1 and isinstance(holders[0], nn.Linear) else None


def _learning(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


class _OfFewValues(nn.modules.batchnorm._NormBase):
    """Normalises by the running statistics where a channel has a single value, and so none of its own."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            mean, variance = self.running_mean, self.running_var
            return F.batch_norm(input, mean, variance, self.weight, self.bias, training=False, eps=self.eps)
        return super().forward(input)


class BatchNorm1d(_OfFewValues, nn.BatchNorm1d):
    """For auxiliary networks: takes a single sample, too."""


class BatchNorm2d(_OfFewValues, nn.BatchNorm2d):
    """For auxiliary networks: takes a single value a channel, too."""


def as_input_of(network: nn.Module, y: Tensor) -> Tensor:
    """Returns y in the type that a network computes in."""
    parameter = next(network.parameters(), None)
    return y if parameter is None else y.to(parameter.dtype)
