"""One small recurrent network for all numbers of a state: each is told its own value, and predicts its own gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lockfree.choose import choose
from lockfree.recurrent.bootstrap import Border, Site
from lockfree.recurrent.remembering import Remembering
from lockfree.recurrent.synthetic import StateSynthesiser, Synthesised
from lockfree.rng import seed_of
from lockfree.synthesisers.base import zero


@dataclass(frozen=True)
class _Kind:
    """A recurrent cell whose memory is one row.

    Attributes:
        make: Makes it: units in, units out.
        step: Runs it on values and rows of memory, both (n, units of it); returns its outputs and the rows after.
        rows: How many times its units a row of memory has.
    """

    make: Callable[..., nn.Module]
    step: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    rows: int


def _gru(cell: nn.Module, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    after = cell(values, memory)
    return after, after


def _lstm(cell: nn.Module, values: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    output, inner = cell(values, tuple(memory.chunk(2, dim=1)))
    return output, torch.cat([output, inner], dim=1)


CELLS = {"gru": _Kind(nn.GRUCell, _gru, 1), "lstm": _Kind(nn.LSTMCell, _lstm, 2)}
"""The cells that a memory can be of, by name."""


@dataclass(frozen=True, kw_only=True)
class CoordinatewiseSynthesiser(Synthesised):
    r"""Predicts each number's gradient from it: $G_i = c^T r_{ki} + d$ with $r_{ki} = \mathrm{GRU}(a\,\epsilon s_{ki} + b,\ r_{k-1,i})$.

    The network is the same for all i, so it is small whatever the width of the state; what tells the numbers apart is their memory
    $r_i$, which runs from chunk to chunk and begins at zero with every sequence. It learns as `RecurrentSynthesiser` does. The noise
    $\epsilon \sim N(1, \sigma)$ multiplies what it sees, whenever it sees it.

    Attributes:
        hidden_units: Of the cell and of the layer below, 1 or more.
        cell: ``"gru"`` or ``"lstm"``.
        noise: σ, the standard deviation, 0 or more.
        zero_start: Whether c starts at zero, so that the first step is that of truncated backpropagation through time; else it starts
            uniform from −0.1 to 0.1, as theirs. d starts at zero.
        learning_rate: Of its Adam, above 0.
        weight_decay: Of its Adam, 0 or more: an L2 penalty.
        seed: Of the noise, which is drawn by a generator of its own.

    Raises:
        ValueError: If a number is out of range, or it is to read anything but the state.

    Example:
        >>> CoordinatewiseSynthesiser().discount
        0.1

    Reference:
        Shang and Zhang 2019, arXiv 1902.10630; the sizes, the scale of 0.1 (which is the target's, too), the rates and the noise are
        those of the authors' code; its N(1, 0.5) is taken to have a standard deviation of 0.5, as PyTorch's normal. Theirs draws noise
        at evaluation, too, and forgets at the end of an epoch alone.
    """

    scale: float = 0.1
    hidden_units: int = 50
    cell: str = "gru"
    noise: float = 0.5
    zero_start: bool = False
    learning_rate: float = 1e-3
    weight_decay: float = 1.2e-6
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(CELLS, self.cell, "cell")
        if self.reads != "state":
            raise ValueError(
                f"reads={self.reads!r}: each number of the state predicts its own gradient, so it reads the 'state'"
            )
        if self.hidden_units < 1 or not self.learning_rate > 0 or not self.weight_decay >= 0 or not self.noise >= 0:
            raise ValueError(
                f"hidden_units={self.hidden_units}, learning_rate={self.learning_rate}, weight_decay={self.weight_decay}, "
                f"noise={self.noise}: give 1 or more units, a rate above 0, and 0 or more of the others"
            )

    def estimator(self, site: Site) -> "StateSynthesiser":
        """Makes the network."""
        return _Coordinatewise(self, site)


class _Coordinatewise(Remembering):
    def __init__(self, settings: CoordinatewiseSynthesiser, site: Site) -> None:
        super().__init__(settings, site)
        units, self._noise, self._seed = settings.hidden_units, settings.noise, settings.seed
        self._kind = CELLS[settings.cell]
        place: dict[str, Any] = {"dtype": site.rows.dtype, "device": site.rows.device}
        self.first = nn.Linear(1, units, **place)
        self.cell = self._kind.make(units, units, **place)
        self.last = nn.Linear(units, 1, **place)
        zero(self.last)
        if not settings.zero_start:
            nn.init.uniform_(self.last.weight, -0.1, 0.1)
        self.register_buffer("drawn", torch.zeros((), dtype=torch.int64))  # borders that noise has been drawn for
        self.optimizer = torch.optim.Adam(
            self.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )

    def look(self, border: Border) -> Tensor:
        rows = border.rows
        if not self._noise:
            return rows
        # Every border's noise is by itself, so that a checkpoint keeps a number; drawn on the CPU, it is the same on every device.
        generator = torch.Generator().manual_seed(seed_of(self._seed, int(self.drawn)))
        self.drawn += 1
        drawn = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
        return rows * drawn.mul_(self._noise).add_(1).to(rows.device)

    def blank(self, seen: Tensor) -> Tensor:
        return seen.new_zeros(*seen.shape, self._kind.rows * self.first.out_features)

    def run(self, seen: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        outputs, after = self._kind.step(self.cell, self.first(seen.reshape(-1, 1)), memory.flatten(0, 1))
        return self.last(outputs).view_as(seen), after.view_as(memory)
