"""Where classes are read out of a network whose blocks learn from objectives of their own."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from lockfree.heads import Head
from lockfree.objective import describe
from lockfree.rule import Context, Needs, Pace, Place, Site, Trained
from lockfree.values import Values, carrying, tensors


class Readout(ABC):
    """How the class scores come about, and what has to learn for it."""

    def supervises(self, place: Place) -> bool:
        """Whether the block learns from the user's loss, not from the rule's own objective.

        Args:
            place: The block's.
        """
        return False

    def pace(self, place: Place, batch: int) -> Pace:
        """What a block does with a batch.

        Args:
            place: The block's.
            batch: The batch's number, from 0.
        """
        return Pace.LEARN

    @property
    def paced(self) -> bool:
        """Whether `pace` is ever anything but LEARN."""
        return False

    def auxiliary_needs(self, place: Place) -> Needs | None:
        """What the auxiliary network must have received before it may learn; ``None``: there is none, or it never does.

        Args:
            place: The block's.
        """
        return None

    def build(self, site: Site) -> nn.Module | None:
        """Makes the auxiliary network of one cell, if it has one.

        Args:
            site: The cell's place, and an example of what its block hands up.

        Raises:
            ValueError: If the model's output cannot be read out in this way.
        """
        return None

    def learn(self, context: Context) -> Tensor | None:
        """Lets the auxiliary network learn; returns its loss, if it has one.

        Args:
            context: The block's output, the targets and the loss.
        """
        return None

    @abstractmethod
    def predict(self, trained: Trained, inputs: Values) -> Values:
        """Returns the scores of a batch.

        Args:
            trained: The model, its blocks, and the auxiliary networks.
            inputs: What the model is called with.
        """


@dataclass(frozen=True, kw_only=True)
class Classifier(Readout):
    """The top block learns from the loss, on what the blocks below hand up: along with them, or once they are frozen.

    With ``after`` this is format training: the blocks learn for so many batches while the top one rests, then they are frozen, in
    evaluation mode, and the top one learns alone.

    Attributes:
        after: Batches before the top block begins, 0 or more; 0: it learns along.

    Reference:
        Ma, Lewis, Kleijn 2019, arXiv 1908.01580, section 3 (format training).
    """

    after: int = 0

    @property
    def paced(self) -> bool:
        return self.after > 0

    def supervises(self, place: Place) -> bool:
        return place.top

    def pace(self, place: Place, batch: int) -> Pace:
        if batch < self.after:
            return Pace.REST if place.top else Pace.LEARN
        return Pace.LEARN if place.top or not self.after else Pace.FREEZE

    def predict(self, trained: Trained, inputs: Values) -> Values:
        return trained.model(inputs)


@dataclass(frozen=True, kw_only=True)
class OneHot(Readout):
    """The top block's own units are the classes, in an order that is found on the training set.

    Its mean output for each class is kept over the last hundred batches or so; each class is given the unit of its own with
    which the sum of the means is largest (the assignment problem).

    Attributes:
        classes: How many; as many as the model has outputs if ``None``.

    Reference:
        Ma, Lewis, Kleijn 2019, arXiv 1908.01580, section 3 (unformatted training). The authors find the order on the evaluated
        samples, with their labels: `order_on_evaluated` is for comparing with that.
    """

    classes: int | None = None

    def auxiliary_needs(self, place: Place) -> Needs | None:
        return Needs.TARGET if place.top else None

    def build(self, site: Site) -> nn.Module | None:
        if not site.place.top:
            return None
        if site.scores.dim() != 2:
            raise ValueError(
                f"classes are read out of class scores (batch, units), this model gives {tuple(site.scores.shape)}"
            )
        units = site.scores.shape[1]
        classes = units if self.classes is None else self.classes
        if classes > units:
            raise ValueError(f"{classes} classes cannot be read out of {units} outputs: widen the model's last layer")
        return _ClassMeans(classes, units).to(site.scores.device, torch.promote_types(site.scores.dtype, torch.float32))

    def learn(self, context: Context) -> Tensor | None:
        means, (outputs,) = cast("_ClassMeans", context.auxiliary), context.outputs
        means.take(outputs.flatten(1), context.target)
        return None

    def predict(self, trained: Trained, inputs: Values) -> Values:
        means = cast("_ClassMeans", trained.auxiliaries[-1])
        return trained.model(inputs).flatten(1)[:, order_of(means.means())]


class _ClassMeans(nn.Module):
    """Running sums of outputs by class."""

    def __init__(self, classes: int, units: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(classes, units))
        self.register_buffer("counts", torch.zeros(classes, 1))

    def take(self, outputs: Float[Tensor, "m units"], target: Tensor) -> None:
        """Adds a batch; what was there counts for a hundredth less."""
        sums, counts = cast("Tensor", self.sums), cast("Tensor", self.counts)
        if target.shape != outputs.shape[:1] or target.is_floating_point():
            raise ValueError(f"classes are read out of class numbers of shape (batch,), the targets are {describe(target)}")
        known = target >= 0  # cross entropy ignores others, too
        if int(target.max()) >= len(sums):
            raise ValueError(f"targets hold class {int(target.max())}, but classes={len(sums)}: raise it, or mend the labels")
        for total, value in ((sums, outputs.to(sums.dtype)), (counts, torch.ones_like(outputs[:, :1], dtype=sums.dtype))):
            total.mul_(0.99).index_add_(0, target[known], value[known])

    def means(self) -> Float[Tensor, "classes units"]:
        """Returns the mean output for each class; 0 for one that has not been seen."""
        sums, counts = cast("Tensor", self.sums), cast("Tensor", self.counts)
        return sums / counts.clamp_min(torch.finfo(counts.dtype).tiny)


def order_of(means: Float[Tensor, "classes units"]) -> Int64[Tensor, " classes"]:
    """Gives each class a unit of its own so that the sum of the class means is largest.

    Args:
        means: Mean output of each unit for each class; as many units as classes, or more.

    Example:
        >>> order_of(torch.tensor([[0.1, 0.9], [0.2, 0.3]])).tolist()
        [1, 0]
    """
    _, units = linear_sum_assignment(means.cpu().numpy(), maximize=True)
    return torch.from_numpy(units).to(means.device)


def order_on_evaluated(
    outputs: Float[Tensor, "m units"], target: Int64[Tensor, " m"], classes: int
) -> Int64[Tensor, " classes"]:
    """Gives classes units greedily, by their mean output on the evaluated samples themselves, as the authors of the paper do.

    It uses the labels that it is judged by, so it is for comparing with published numbers alone.

    Args:
        outputs: The top block's outputs.
        target: The classes.
        classes: How many; at most as many as units.

    Example:
        >>> order_on_evaluated(torch.tensor([[0.1, 0.9], [0.8, 0.3]]), torch.tensor([0, 1]), 2).tolist()
        [1, 0]

    Reference:
        Ma, Lewis, Kleijn 2019, arXiv 1908.01580; the authors' code.
    """
    member = nn.functional.one_hot(target, classes).to(outputs.dtype)
    means = (member.T @ outputs) / member.sum(0).clamp_min(1)[:, None]
    order = torch.zeros(classes, dtype=torch.int64, device=outputs.device)
    for _ in range(classes):
        label, unit = divmod(int(means.argmax()), means.shape[1])
        order[label] = unit
        means[label], means[:, unit] = -torch.inf, -torch.inf
    return order


@dataclass(frozen=True, kw_only=True)
class Heads(Readout):
    """Each block has a linear head on its detached output, which learns from the user's loss; one of them gives the scores.

    Attributes:
        head: The block whose head is read; negative numbers count from the top.
    """

    head: int = -1

    def auxiliary_needs(self, place: Place) -> Needs | None:
        return Needs.TARGET

    def build(self, site: Site) -> nn.Module | None:
        if not -site.place.count <= self.head < site.place.count:
            raise ValueError(f"head={self.head}: this model has blocks 0 to {site.place.count - 1}")
        return _SummedHeads(site)

    def learn(self, context: Context) -> Tensor | None:
        if not context.outputs:
            return None
        assert context.auxiliary is not None
        assert context.loss is not None
        with torch.enable_grad():
            loss = context.loss(context.auxiliary(context.outputs))
            loss.backward()
        return loss.detach()

    def predict(self, trained: Trained, inputs: Values) -> Values:
        top = range(len(trained.blocks))[self.head]
        values = inputs
        for block in trained.blocks[: top + 1]:
            values = block(values)
        heads = cast("_SummedHeads", trained.auxiliaries[top])
        return heads([tensor for tensor, carries in zip(tensors(values), heads.carrying, strict=True) if carries])


class _SummedHeads(nn.Module):
    """A head for each tensor that a block hands up; the scores are their sum."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.carrying = carrying(site.handed_up)
        self.heads = nn.ModuleList(Head(y, site.scores) for y in site.outputs)

    def forward(self, outputs: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        scores = [head(y) for head, y in zip(self.heads, outputs, strict=True)]
        return torch.stack(scores).sum(0)
