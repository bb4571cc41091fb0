"""Synthesisers that remember the borders before: a recurrent network over chunks predicts the gradient of what comes after each."""

from abc import abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lockfree.recurrent.bootstrap import Border, Report, Site
from lockfree.recurrent.synthetic import StateSynthesiser, Synthesised
from lockfree.synthesisers.base import zero


@dataclass(frozen=True, kw_only=True)
class RecurrentSynthesiser(Synthesised):
    r"""Predicts by a gated recurrent unit over borders: $r_k = \mathrm{GRU}(s_k, r_{k-1})$, $G(s_k) = W r_k + b$.

    It descends $\frac{1}{2m}\sum_n\lVert G(s_k)-g_k\rVert^2$ by backpropagation through one border: $r_{k-1}$ is as it was, and takes no
    gradient. It begins at zero with every sequence. W and b start at zero, so the first step is that of truncated backpropagation
    through time.

    Attributes:
        hidden_units: Of the unit; as many as the synthesiser sees if ``None``.
        learning_rate: Of its Adam, above 0.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> RecurrentSynthesiser(scale=0.1, hidden_units=32).reads
        'state'

    Reference:
        Our own; a synthesiser with a memory that is shared by all coordinates is Shang and Zhang's 2019, arXiv 1902.10630.
    """

    hidden_units: int | None = None
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.hidden_units is not None and self.hidden_units < 1) or not self.learning_rate > 0:
            raise ValueError(
                f"hidden_units={self.hidden_units}, learning_rate={self.learning_rate}: give 1 or more units and a rate above 0"
            )

    def estimator(self, site: Site) -> "StateSynthesiser":
        """Makes the network."""
        return _Recurrent(self, site)


class Remembering(StateSynthesiser):
    """A synthesiser with a memory of each sample, carried from border to border and renewed with its sequence.

    It learns by running once more, from the memory as it was, over what it saw of the border; a subclass puts its networks on itself
    and sets ``optimizer``.

    Args:
        settings: Of it.
        site: Where it stands.

    Attributes:
        memory: After the last border, (m, ...); ``None`` where all sequences begin.
        kept: Of each border whose truth is still to come, oldest first: what was seen of it, and the memory before.
        optimizer: Of its parameters.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, settings: Synthesised, site: Site) -> None:
        super().__init__(settings, site)
        self.memory: Tensor | None = None
        self.kept: deque[tuple[Tensor, Tensor]] = deque(maxlen=self.chunks + 1)

    @abstractmethod
    def look(self, border: Border) -> Float[Tensor, "m seen"]:
        """Returns what is seen of a border; called once for each."""

    @abstractmethod
    def blank(self, seen: Float[Tensor, "m seen"]) -> Float[Tensor, "m ..."]:
        """Returns the memory with which sequences begin."""

    @abstractmethod
    def run(self, seen: Float[Tensor, "m seen"], memory: Float[Tensor, "m ..."]) -> tuple[Tensor, Tensor]:
        """Returns the estimate, (m, width), and the memory after it, (m, ...)."""

    @torch.no_grad()
    def estimate(self, border: Border) -> Tensor:
        seen = self.look(border)
        before = self.blank(seen) if self.memory is None else _without(self.memory, border.begun)
        estimate, after = self.run(seen, before)
        self.kept.append((seen, before))
        self.memory = _without(after, border.ended)
        return estimate

    def learn(self, report: Report) -> Tensor | None:
        (seen, memory), truth = self.kept[0], report.truth
        if report.border.ended is not None:
            going = ~report.border.ended
            seen, memory, truth = seen[going], memory[going], truth[going]
        if not len(seen):
            return None
        with torch.enable_grad():
            loss = 0.5 * (self.run(seen, memory)[0] - truth).square().sum() / len(seen)
        parameters = list(self.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        return loss.detach()

    def reset(self) -> None:
        self.memory = None
        self.kept.clear()

    def optimizer_state(self) -> Any:
        return {"optimizer": self.optimizer.state_dict(), "memory": self.memory, "kept": [list(pair) for pair in self.kept]}

    def load_optimizer_state(self, state: Any) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.memory = state["memory"]
        self.kept.clear()
        self.kept.extend((seen, before) for seen, before in state["kept"])


def _without(memory: Tensor, forgotten: Bool[Tensor, " m"] | None) -> Tensor:
    """Returns the memory with that of some samples begun anew."""
    return memory if forgotten is None else memory.masked_fill(forgotten.view(-1, *[1] * (memory.dim() - 1)), 0.0)


class _Recurrent(Remembering):
    def __init__(self, settings: RecurrentSynthesiser, site: Site) -> None:
        super().__init__(settings, site)
        units = settings.hidden_units or self.seen
        place: dict[str, Any] = {"dtype": site.rows.dtype, "device": site.rows.device}
        self.cell = nn.GRUCell(self.seen, units, **place)
        self.last = zero(nn.Linear(units, self.width, **place))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=settings.learning_rate, fused=True)

    def look(self, border: Border) -> Tensor:
        return self._see(border)

    def blank(self, seen: Tensor) -> Tensor:
        return seen.new_zeros(len(seen), self.cell.hidden_size)

    def run(self, seen: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        after = self.cell(seen, memory)
        return self.last(after), after
