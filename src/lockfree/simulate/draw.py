"""The timeline of a plan that has settled, one panel a method, in the look of the report."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lockfree.report import Span
from lockfree.schedule import Kind
from lockfree.simulate.plan import Plan
from lockfree.simulate.predict import Prediction
from lockfree.simulate.steady import Steady, steady_state

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {Kind.FORWARD: "#3f74b5", Kind.LEARN: "#d07c1c", Kind.AUXILIARY: "#7b57b8", Kind.INPUT: "#2f9e8f"}
_WORDS = {
    Kind.FORWARD: "forward",
    Kind.LEARN: "learns (backward)",
    Kind.AUXILIARY: "auxiliary network learns",
    Kind.INPUT: "learns to predict its input",
}
_INK, _MUTED, _LINE, _HATCH, _PAGE = "#171b21", "#5d6875", "#e3e7ec", "#b4bdc8", "#f6f7f9"
_MOST_LANES = 32
_MOST_BARS = 6_000


def settled_spans(plan: Plan, steady: Steady, *, until: float, lanes: Sequence[int]) -> list[Span]:
    """Returns what some workers do in a window of the steady state that begins with a new batch at the first worker.

    Args:
        plan: What happens in a period.
        steady: When.
        until: Seconds, above 0.
        lanes: Workers.

    Returns:
        Spans that begin or end within the window, cut off at its borders; microbatches are counted through, from the oldest on.
    """
    first = next(number for number, event in enumerate(plan.events) if event.on == 0 and event.kind == Kind.FORWARD)
    shown, spans = set(lanes), []
    for number, event in enumerate(plan.events):
        if event.on not in shown or event.seconds == 0:
            continue
        begin = float(steady.starts[number] - steady.starts[first])
        # The first that ends after the window begins, by more than rounding.
        period = math.floor(-(begin + event.seconds) / steady.period + 1e-9) + 1
        while begin + period * steady.period < until:
            start = begin + period * steady.period
            batch = (period - event.late) * plan.parts + event.part
            assert isinstance(event.on, int)
            spans.append(Span(event.on, str(event.kind), batch, max(start, 0.0), min(start + event.seconds, until)))
            period += 1
    least = min((span.batch for span in spans), default=0)
    return [span._replace(batch=span.batch - least) for span in spans]


def draw(folder: Path, plans: Sequence[Plan], predictions: Sequence[Prediction]) -> list[Path]:
    """Draws the timelines of several methods on one axis, into ``timeline.png`` and ``timeline.svg``.

    Args:
        folder: Where to; it must exist.
        plans: What happens under each method.
        predictions: What follows from each plan.

    Returns:
        The two files.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    stages = max(plan.stages for plan in plans)
    every = -(-stages // _MOST_LANES)
    lanes = list(range(0, stages, every))
    until = _window(plans, predictions, len(lanes))
    unit, scale = next((name, size) for name, size in _UNITS if until >= size or size == _UNITS[-1][1])
    height = min(max(0.26 * len(lanes), 0.9), 3.2)
    kinds: set[str] = set()
    rc = {"svg.hashsalt": "lockfree", "svg.fonttype": "none", "hatch.linewidth": 0.6, "font.size": 9}
    with mpl.rc_context(rc):
        figure = Figure(figsize=(11, 0.75 + (height + 0.75) * len(plans)), layout="constrained", facecolor=_PAGE)
        axes = figure.subplots(len(plans), 1, squeeze=False)[:, 0]
        for axis, plan, prediction in zip(axes, plans, predictions, strict=True):
            mine = [lane for lane in lanes if lane < plan.stages]
            spans = settled_spans(plan, steady_state(plan), until=until, lanes=mine)
            kinds |= {span.kind for span in spans}
            _panel(axis, spans, mine, every, until, scale, height)
            every_so_long = prediction.period / scale
            written = f"{every_so_long:,.0f}" if every_so_long >= 1000 else f"{every_so_long:.4g}"
            idle = f"idle {100 * prediction.bubble:.1f} %, a batch every {written} {unit}"
            axis.set_title(plan.method, loc="left", fontweight="bold", color=_INK)
            axis.set_title(idle, loc="right", fontsize=9, color=_MUTED)
        axes[-1].set_xlabel(f"{unit}, from a new batch at stage 0 on, once everything has settled", color=_MUTED)
        handles = [Patch(color=_COLOURS[kind], label=word) for kind, word in _WORDS.items() if kind in kinds]
        handles.append(Patch(facecolor="white", edgecolor=_HATCH, hatch="////", linewidth=0, label="waits"))
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)
        files = [folder / "timeline.png", folder / "timeline.svg"]
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else None
            figure.savefig(file, dpi=120, facecolor=_PAGE, metadata=metadata)
    return files


_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def _window(plans: Sequence[Plan], predictions: Sequence[Prediction], lanes: int) -> float:
    """Returns how many seconds to show: the slowest method's period, or as much as can be told apart."""
    shares = [lanes / plan.stages * len(plan.events) / found.period for plan, found in zip(plans, predictions, strict=True)]
    longest = 1.25 * max(found.period for found in predictions)
    return max(min(longest, _MOST_BARS / max(shares)), 2 * min(found.period for found in predictions))


def _panel(
    axis: "Axes", spans: Sequence[Span], lanes: Sequence[int], every: int, until: float, scale: float, height: float
) -> None:
    """Draws the lanes of one method, the bottom stage at the bottom."""
    from matplotlib.colors import to_rgb
    from matplotlib.ticker import FuncFormatter

    for lane in lanes:
        axis.broken_barh(
            [(0, until / scale)],
            (lane - 0.4 * every, 0.8 * every),
            facecolor="white",
            edgecolor=_HATCH,
            hatch="////",
            linewidth=0,
        )
    for kind, colour in _COLOURS.items():
        for shade in range(3):
            rgb = tuple(part * (1 - 0.2 * shade) for part in to_rgb(colour))
            for lane in lanes:
                bars = [
                    (span.start / scale, (span.end - span.start) / scale)
                    for span in spans
                    if (span.cell, span.kind, span.batch % 3) == (lane, kind, shade)
                ]
                axis.broken_barh(bars, (lane - 0.4 * every, 0.8 * every), facecolor=rgb, edgecolor="white", linewidth=0.4)
    inches = 9.5 / until
    if height / len(lanes) > 0.15:
        for span in spans:
            if (span.end - span.start) * inches > 0.09 * len(str(span.batch)) + 0.04:
                middle = (span.start + span.end) / 2 / scale
                axis.text(middle, span.cell, str(span.batch), color="white", ha="center", va="center_baseline", fontsize=7)
    axis.set_xlim(0, until / scale)
    axis.set_ylim(-0.6 * every, lanes[-1] + 0.6 * every)
    shown = lanes[:: -(-len(lanes) // 8)]
    axis.set_yticks(shown)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"stage {value:.0f}"))
    axis.tick_params(length=0, colors=_MUTED)
    axis.set_facecolor("white")
    for spine in axis.spines.values():
        spine.set_color(_LINE)
