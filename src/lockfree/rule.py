"""The language in which a credit-assignment rule is written: what it needs, what it sees, what it answers.

A rule is one file. It says what a block must have received before it may learn (`Needs`), and turns what the block has seen
(`Context`) into the gradient of the block's output (the credit). Everything else, locks, schedules, memory, pictures, follows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lockfree.objective import Objective
from lockfree.stacking import CreditStack
from lockfree.values import Credit, Values, carriers


class Needs(IntEnum):
    """What must have arrived before a block may learn on a batch; each level includes the ones before it.

    Attributes:
        NOTHING: The block's own input and output suffice; it learns the moment that it has run forward.
        TARGET: The batch's targets, too, the network's input and the loss of any scores. They are known from the start, so
            nobody waits for them.
        ERROR: The gradient of the loss at the model's output: every block above must have run *forward*.
        ABOVE: The message of the next block: every block above must have run forward *and* learnt.
    """

    NOTHING = 0
    TARGET = 1
    ERROR = 2
    ABOVE = 3


class Pace(Enum):
    """What a block does with its credit for one batch.

    Attributes:
        LEARN: It updates its weights, and reports dL/dx to the block below.
        REPORT: It reports only.
        REST: Neither; it has run forward, and that is all.
        FREEZE: It rests and has run as in evaluation, so that its running statistics do not change either.
    """

    LEARN = "learn"
    REPORT = "report"
    REST = "rest"
    FREEZE = "freeze"


@dataclass(frozen=True)
class Clock:
    """Which cells work on which batch: pure functions of (cell, batch), so that every executor and every resume agrees.

    Attributes:
        pace: What the block does with its credit. One that needs ABOVE rests with the one above it, whatever is said here.
        auxiliary: Whether its auxiliary networks learn.
    """

    pace: Callable[[int, int], Pace]
    auxiliary: Callable[[int, int], bool]


class Place(NamedTuple):
    """Where a cell stands in its chain.

    Attributes:
        index: Number of the cell, 0 at the bottom.
        count: Number of cells in the chain.
    """

    index: int
    count: int

    @property
    def top(self) -> bool:
        """Whether this is the last cell, whose neighbour above is the loss itself."""
        return self.index == self.count - 1


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a rule knows when it builds the auxiliary network of one cell.

    Attributes:
        place: Where the cell stands.
        block: The piece of the user's model.
        above: The pieces above it, bottom to top.
        rehearsal: What each block hands up for the example batch, bottom to top; ``None`` if no example was given.
        example: The example batch itself, the network's input.
        late: Whether the block's weights may change between its forward pass and its learning on a batch.
    """

    place: Place
    block: nn.Module
    above: Sequence[nn.Module] = ()
    rehearsal: Sequence[Values] | None
    example: Values | None = None
    late: bool = False

    @property
    def handed_up(self) -> Values:
        """What the block hands up for the example batch; tensors that carry credit require a gradient.

        Raises:
            ValueError: If no example batch was given.
        """
        return self._rehearsed()[self.place.index]

    @property
    def inputs(self) -> Values:
        """What the block is given for the example batch.

        Raises:
            ValueError: If no example batch was given.
        """
        outputs = self._rehearsed()
        return outputs[self.place.index - 1] if self.place.index else self.example

    def handed_to(self, index: int) -> Values:
        """What the block of that number, above this one, is given for the example batch.

        Raises:
            ValueError: If no example batch was given.
        """
        return self._rehearsed()[index - 1]

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """Tensors of the block's output that carry credit, as an example batch gave them, shape (m, ...) each.

        Raises:
            ValueError: If no example batch was given.
        """
        return carriers(self.handed_up)

    @property
    def scores(self) -> Float[Tensor, "m classes ..."]:
        """The model's output for the example batch.

        Raises:
            ValueError: If it is not one batched tensor, or no example batch was given.
        """
        scores = self._rehearsed()[-1]
        if not isinstance(scores, Tensor) or scores.dim() < 2:
            given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"this rule needs a model whose output is one tensor (batch, classes), this model gives {given}")
        return scores

    def _rehearsed(self) -> Sequence[Values]:
        if self.rehearsal is None:
            raise ValueError(
                "this rule sizes its auxiliary networks by an example: pass example_input, a small batch such as x[:2]"
            )
        return self.rehearsal


@dataclass(slots=True)
class Context:
    """All that a rule may look at of one cell and one batch; what the rule does not need stays ``None``.

    Attributes:
        place: Where the cell stands.
        auxiliary: The network (or the buffers) that `Rule.build` made for this cell.
        inputs: The block's input, detached.
        outputs: Tensors of the block's output that carry credit, detached, shape (batch, ...) each.
        samples: Number of samples in the batch.
        target: The batch's targets; only where the rule needs TARGET or more.
        error: dL/d(model output), a gradient for each tensor of it; only where the rule needs ERROR or more.
        above: dL/dy as the next block (or, at the top, the loss) reports it; only where the rule needs ABOVE.
        shared: Scratch space of the batch, common to all its cells: what follows from inputs and targets alone is computed once.
        memo: Whatever `Rule.credit` wants to hand on to `Rule.learn`; ``None`` if the block took no credit for this batch.
        batch: Number of the batch; draws that depend on it alone are the same in every executor and after a resume.
        sample_losses: Returns the loss of each sample, shape (batch,); only where the rule wants it and needs ERROR or more.
        source: The network's input; only where the rule needs TARGET or more.
        scores_shape: Shape of the model's output for one sample, if that is one tensor; only where the rule needs TARGET or more.
        loss: Returns the user's loss of any scores for this batch, a scalar; only where the rule needs TARGET or more.
    """

    place: Place
    auxiliary: nn.Module | None
    inputs: Values
    outputs: tuple[Tensor, ...]
    samples: int
    target: Any = None
    error: Credit | None = None
    above: Credit | None = None
    shared: dict[str, Any] = field(default_factory=dict, repr=False)
    memo: Any = field(default=None, repr=False)
    batch: int = 0
    sample_losses: Callable[[], Tensor] | None = field(default=None, repr=False)
    source: Values = None
    scores_shape: torch.Size | None = None
    loss: Callable[[Values], Tensor] | None = field(default=None, repr=False)


class Trained(NamedTuple):
    """A model as it stands, which `Rule.predict` reads classes out of.

    Attributes:
        model: The user's own.
        blocks: Its pieces, bottom to top.
        auxiliaries: What `Rule.build` made for each.
    """

    model: nn.Module
    blocks: tuple[nn.Module, ...]
    auxiliaries: tuple[nn.Module | None, ...]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a catalogue says about a rule.

    Attributes:
        title: Name in words.
        summary: One sentence: where the credit comes from.
        reference: Authors, year, title, arXiv number.
        bibtex: Entry to paste.
    """

    title: str
    summary: str
    reference: str
    bibtex: str


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    r"""How blocks get their credit $\partial L/\partial y$. The fields of a rule are its hyperparameters.

    A subclass implements `needs` and `credit`, gives a `card`, and answers those of the remaining questions that concern it:
    each of them has a neutral answer here ("no auxiliary network", "run the block as it is", ...).

    Credit is the gradient of the loss *as the user wrote it*, a mean over the batch. A rule that regresses gradients multiplies
    by `Context.samples`, so that what it learns does not move with the batch size.

    Example:
        >>> import lockfree as lf
        >>> lf.rules.Backprop().needs(lf.Place(0, 3)).name
        'ABOVE'
    """

    card: ClassVar[Card]

    @property
    def title(self) -> str:
        """The rule's name in words, with what sets this variant apart."""
        return self.card.title

    @abstractmethod
    def needs(self, place: Place) -> Needs:
        """What the block at ``place`` must have received before it may learn."""

    @abstractmethod
    def credit(self, context: Context) -> Credit | None:
        """Returns a gradient for each tensor of ``context.outputs``, or ``None``: not yet."""

    def passes_on(self, place: Place) -> bool:
        """Whether the credit here is exactly what the block above reports, so that the engine may leave the border uncut."""
        return False

    def auxiliary_needs(self, place: Place) -> Needs | None:
        """What the auxiliary network must have received before *it* may learn; ``None`` if there is nothing that learns."""
        return None

    def wants_sample_losses(self) -> bool:
        """Whether auxiliary networks learn from the loss of each sample, `Context.sample_losses`."""
        return False

    def clock(self, cells: int) -> Clock | None:
        """Says which of so many cells work on which batch; ``None``: all on all."""
        return None

    def phases(self) -> tuple[tuple[int, "Rule"], ...]:
        """The rules in force, each with the batch from which on it is; most rules are the same from start to end.

        Batches in flight are finished before the next phase begins. Auxiliary networks are built by the whole rule and serve
        every phase; `needs` of the whole rule are those of its last phase.
        """
        return ((0, self),)

    def synthesises_inputs(self, place: Place) -> bool:
        """Whether the block is trained on a prediction of its input, made from the network's; this takes off the forward lock."""
        return False

    def build_inputs(self, site: Site) -> nn.Module:
        """Makes the network that predicts ``site.inputs`` from ``site.example``; it learns by the engine's regression."""
        raise NotImplementedError(f"{type(self).__name__} says that it synthesises inputs, but does not build what does")

    def build(self, site: Site) -> nn.Module | None:
        """Makes the auxiliary network of one cell: trained things are parameters, fixed random ones are buffers."""
        return None

    def auxiliary_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Makes the optimizer of the auxiliary networks."""
        return torch.optim.Adam(parameters)

    def run(self, block: nn.Module, context: Context) -> Values:
        """Runs the block forward on ``context.inputs``; rules that change how a layer differentiates do it here.

        What is drawn here must depend on the batch and the place alone, so that the order in which blocks run is no matter.
        """
        return block(context.inputs)

    def learn(self, context: Context) -> Tensor | None:
        """Leaves gradients on the auxiliary network's parameters; returns the loss that they descend, for the record."""
        return None

    def credit_stack(self, auxiliaries: Sequence[nn.Module | None], objective: Objective) -> CreditStack | None:
        """Says how n cells of equal structure, one tensor out of each, take their credit in one operation; ``None``: one by one.

        The numbers must be those of `credit` and `learn`.

        Args:
            auxiliaries: What `build` made for them, bottom to top.
            objective: The loss.
        """
        return None

    def keeps_plain_memos(self, auxiliary: nn.Module | None) -> bool:
        """Whether what `credit` remembers for `learn` is plain data that holds no graph of autograd.

        It can then be stored as it is (`memo_state`), and the weights that it was made with may change at will.
        """
        return False

    def memo_state(self, auxiliary: nn.Module | None, memo: Any) -> Any:
        """Returns a plain memo as lists, dicts and tensors."""
        raise NotImplementedError(f"{type(self).__name__} says that its memos are plain, but does not store them")

    def memo_from(self, auxiliary: nn.Module | None, state: Any) -> Any:
        """Returns the memo that `memo_state` stored."""
        raise NotImplementedError(f"{type(self).__name__} says that its memos are plain, but does not read them")

    def feed(self, trained: Trained, inputs: Values, target: Any, batch: int) -> Values:
        """Returns what enters the chain for a batch: the network's input, or whatever the blocks are to tell apart instead.

        It sees the whole model, as whoever prepares data may, and changes nothing in it.
        """
        return inputs

    def predict(self, trained: Trained, inputs: Values) -> Values:
        """Returns the class scores of a batch; everything is in evaluation mode and no graph is kept."""
        return trained.model(inputs)


LOCKS = ("forward", "update", "backward")
"""The locks in the order in which a batch meets them."""


def locks(needs: Sequence[Needs], synthetic: Sequence[bool] = ()) -> frozenset[str]:
    """Derives the locks that training keeps from what its blocks need and from what they run on.

    The forward lock stays as long as any block but the first processes real inputs. The block under the loss needs the loss
    alone, which locks nobody; so the last entry of ``needs`` does not count.

    Args:
        needs: One entry a cell, bottom to top.
        synthetic: For each cell, whether it runs on a synthetic input; none does if left out.

    Returns:
        A subset of ``{"forward", "update", "backward"}``.

    Example:
        >>> sorted(locks([Needs.ERROR, Needs.ABOVE]))
        ['forward', 'update']
        >>> sorted(locks([Needs.TARGET, Needs.ABOVE], [False, True]))
        []

    Reference:
        Jaderberg et al. 2016, arXiv 1608.05343, section 1 names the three locks.
    """
    worst = max(needs[:-1], default=Needs.NOTHING)
    free = len(needs) > 1 and len(synthetic) == len(needs) and all(synthetic[1:])
    held = (not free, worst >= Needs.ERROR, worst >= Needs.ABOVE)
    return frozenset(name for name, on in zip(LOCKS, held, strict=True) if on)
