"""What stands for the gradient from beyond the horizon: the language in which a bootstrap is written.

A chunk of T steps ends in a state; what the losses after it would say about that state, nobody knows yet. A `Bootstrap` (settings, a frozen
dataclass) makes an `Estimator` (what is alive) that says it, and learns from what the next chunk reports about the state it began with.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from lockfree.recurrent.state import Layout
from lockfree.rule import Needs


class Site(NamedTuple):
    """What a bootstrap knows when it makes its estimator.

    Attributes:
        layout: How states become rows (m, width).
        rows: The rows of an example state.
        outputs: The core's outputs at one step of the example, (m, features).
        horizon: T, steps in a chunk.
    """

    layout: Layout
    rows: Float[Tensor, "m width"]
    outputs: Float[Tensor, "m features"]
    horizon: int


class Border(NamedTuple):
    """A state at the end of a chunk, as an estimator sees it; everything is detached.

    Attributes:
        rows: The state, (m, width).
        outputs: What the core gave at the last step, (m, features).
        ended: Samples whose sequence ends here, (m,), or ``None`` if none does: there is nothing beyond, so nothing to estimate.
        ahead: Returns the true gradient at this state of all steps of the stretch that are still to come, (m, width), at the present
            weights; what an oracle asks for. ``None`` in a stream, whose future is not there.
        begun: Samples whose sequence began inside of the chunk that ends here, (m,), or ``None`` if none did: what an estimator
            remembers of the border before is of another one.
    """

    rows: Float[Tensor, "m width"]
    outputs: Float[Tensor, "m features"]
    ended: Bool[Tensor, " m"] | None
    ahead: Callable[[], Tensor] | None
    begun: Bool[Tensor, " m"] | None = None


class Report(NamedTuple):
    """What became of a border: what an estimator learns from; everything is detached.

    Samples whose sequence ended at the border (`Border.ended`) tell nothing about it: their truth and Jacobian are zero.

    Attributes:
        border: The state that the chunk, or the chunks, began with.
        truth: The gradient at that state of the steps since, and of what the estimate said of those beyond, (m, width).
        jacobian: Of the state after the chunk by that before it, (m, width, width); only for estimators that ask for it.
    """

    border: Border
    truth: Float[Tensor, "m width"]
    jacobian: Float[Tensor, "m width width"] | None


class Estimator(nn.Module, ABC):
    r"""Estimates $\partial L_{>t} / \partial s_t$, the gradient of what comes after a border with respect to each sample's state there.

    All gradients are those of one sample's loss, not of the batch's mean, so that they do not depend on the batch's size.
    """

    @abstractmethod
    def scale(self, update: int) -> float:
        """How much of the estimate the core is given, by the number of the update from 0; 0 is truncation."""

    def gamma(self, update: int) -> float:
        """How much of the estimate at the end of a chunk counts in the truth for its beginning."""
        return self.scale(update)

    @property
    def chunks(self) -> int:
        """How many chunks the truth looks ahead before it relies on an estimate, 1 or more."""
        return 1

    @property
    def wants_jacobian(self) -> bool:
        """Whether it wants `Report.jacobian`, which takes as many backward passes as a state has numbers."""
        return False

    @abstractmethod
    def estimate(self, border: Border) -> Float[Tensor, "m width"]:
        """Returns the estimated gradient at a border, detached; it is called once for each, in the order of time."""

    def learn(self, report: Report) -> Tensor | None:
        """Learns what became of the border before the last one that was estimated; returns the loss that it descended, if any."""
        return None

    def reset(self) -> None:
        """Forgets what it remembers of the sequences: they begin anew."""

    def optimizer_state(self) -> Any:
        """Returns plain data and tensors that are not among its parameters and buffers, for checkpoints."""
        return None

    def load_optimizer_state(self, state: Any) -> None:
        """Puts back what `optimizer_state` returned."""


@dataclass(frozen=True, kw_only=True)
class Bootstrap(ABC):
    """What stands for the gradient from beyond the horizon; its fields are its hyperparameters.

    Attributes:
        needs: What must have arrived before a chunk may learn, where chunks are blocks and later ones are above.
    """

    needs: ClassVar[Needs] = Needs.TARGET

    @abstractmethod
    def estimator(self, site: Site) -> Estimator | None:
        """Makes what is alive of it; ``None``: nothing stands for it."""


@dataclass(frozen=True, kw_only=True)
class NoBootstrap(Bootstrap):
    r"""Truncated backpropagation through time: what lies beyond the horizon has no gradient, $\partial L_{>t}/\partial s_t := 0$.

    Reference:
        Williams and Peng 1990, "An efficient gradient-based algorithm for on-line training of recurrent network trajectories".
    """

    def estimator(self, site: Site) -> None:
        """Makes nothing."""
        return


class _Truth(Estimator):
    def scale(self, update: int) -> float:
        return 1.0

    def estimate(self, border: Border) -> Tensor:
        if border.ahead is None:
            raise ValueError(
                "the oracle looks at the steps to come, which a stream does not have: pass whole sequences to step"
            )
        return border.ahead()


@dataclass(frozen=True, kw_only=True)
class Oracle(Bootstrap):
    """The true gradient of the rest of the stretch, by running it: full backpropagation through time, chunk by chunk.

    It takes the time of all that is still to come at every border, so it is for tests and for measuring estimates.

    Example:
        >>> Oracle()
        Oracle()
    """

    needs: ClassVar[Needs] = Needs.ABOVE

    def estimator(self, site: Site) -> Estimator:
        """Makes one that looks ahead."""
        return _Truth()
