"""The report of a run: one HTML file that needs nothing else, with a table, learning curves and who waited for whom."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from lockfree.schedule import Kind

# The table's columns in their order, and which of a column's numbers is the best one.
_QUANTITIES = {"test_accuracy": max, "test_loss": min, "seconds": min}
_QUANTITIES |= {"samples_per_second": max, "peak_activation_bytes": min}
_LABELS = {
    "test_accuracy": "test accuracy",
    "test_loss": "test loss",
    "seconds": "time",
    "samples_per_second": "samples per second",
    "peak_activation_bytes": "peak activation memory",
}
_CHARTS = {
    "loss": "Training loss",
    "train_loss": "Training loss",
    "val_accuracy": "Validation accuracy",
    "val_loss": "Validation loss",
    "synthetic_loss": "Loss of the synthetic gradient",
    "auxiliary_loss": "Loss of the auxiliary task",
}
_Point = tuple[float, float | None]


class Span(NamedTuple):
    """One action of one cell on the timeline.

    Attributes:
        cell: Which cell; 0 is the bottom one.
        kind: "F" forward, "L" learn, "M" only report, "A" the auxiliary network learns, "I" what predicts the input learns.
        batch: The number of the batch.
        start: When the action began, in units of one forward.
        end: When it was done, in the same units.

    Example:
        >>> Span(cell=0, kind="F", batch=7, start=0.0, end=1.0).kind
        'F'
    """

    cell: int
    kind: str
    batch: int
    start: float
    end: float


class Measure(NamedTuple):
    """What a task of its own kind is judged by, in place of accuracy.

    Attributes:
        key: Its name in a result.
        curve: Its name in the metrics lines of kind "epoch".
        label: Its name in words.
        larger_is_better: Whether more of it is better.

    Example:
        >>> Measure(key="test_bits", curve="bits", label="bits per character", larger_is_better=False).curve
        'bits'
    """

    key: str
    curve: str
    label: str
    larger_is_better: bool


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One rule's part of a report.

    Attributes:
        rule: The rule's command-line name.
        title: Its name in words.
        result: `test_accuracy` (0 to 1) or `test_loss`, `seconds`, `samples_per_second`, `peak_activation_bytes`,
            `locks`, `data`, `seed` and `epochs`; whatever is missing, None or nan is shown as a dash.
        history: Metrics lines: kind "step" with `step` and `loss`; kind "epoch" with `epoch`, `train_loss`, `val_loss`,
            `val_accuracy` and `seconds` since the run began, or what `measure` says; `synthetic_loss` and `auxiliary_loss` of an
            epoch are drawn, too.
        measure: What the result is judged by, if not accuracy or loss.
        timeline: What each cell did when.
        citation: Whose work it is; an arXiv number or address in it becomes a link.

    Example:
        >>> Entry(rule="dni", title="Synthetic gradients", result={"test_accuracy": 0.9}).history
        ()
    """

    rule: str
    title: str
    result: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]] = ()
    measure: Measure | None = None
    timeline: Sequence[Span] = ()
    citation: str = ""

    def __post_init__(self) -> None:
        unknown = sorted({span.kind for span in self.timeline} - set(Kind))
        if unknown:
            known = ", ".join(f"'{kind}'" for kind in Kind)
            raise ValueError(f"the timeline of {self.rule} has actions of kind {unknown[0]!r}: use one of {known}")


def idle_share(timeline: Sequence[Span]) -> float:
    """The part of their time that the cells spend waiting.

    One minus the time in which a cell does anything, averaged over cells 0 to the highest, over the time from the first
    start to the last end.

    Args:
        timeline: The spans of one rule, in any order; spans of one cell may overlap.

    Returns:
        A number from 0 (nobody waits) to 1; 0 for an empty timeline.

    Example:
        >>> idle_share([Span(0, "F", 0, 0.0, 1.0), Span(1, "F", 0, 1.0, 2.0)])
        0.5
    """
    begin, length = _extent(timeline)
    if length == 0:
        return 0.0
    busy, reached = 0.0, {}
    for span in sorted(timeline, key=lambda span: span.start):
        since = max(span.start, reached.get(span.cell, begin))
        busy += max(span.end - since, 0.0)
        reached[span.cell] = max(span.end, since)
    return 1 - busy / (length * (1 + max(span.cell for span in timeline)))


def render(title: str, entries: Sequence[Entry], *, command: str = "", notes: Sequence[str] = ()) -> str:
    """Renders a report.

    Args:
        title: The headline.
        entries: What to compare; ratios are to the first one, usually backpropagation.
        command: The command line that made it.
        notes: What else the reader should know, a sentence or two each.

    Returns:
        A whole HTML page, with its style and drawings inside.

    Raises:
        ValueError: If there are no entries.

    Example:
        >>> page = render("A run", [Entry(rule="dni", title="DNI", result={"test_accuracy": 0.875})])
        >>> "87.50" in page
        True
    """
    import jinja2

    from lockfree.run import version

    if not entries:
        raise ValueError("got no entries to report on, wanted at least one: train a rule first")
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.j2").render(
        title=title,
        command=command,
        notes=notes,
        version=version(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        entries=entries,
        columns=_columns(entries),
        charts=_charts(entries),
        timeline=_panels(entries),
        drawings=_probed(entries) + _by_workers(entries),
        # A rule that was run with several seeds is cited once.
        citations={entry.title: _linked(entry.citation) for entry in entries if entry.citation},
    )


def write(path: Path, title: str, entries: Sequence[Entry], *, command: str = "", notes: Sequence[str] = ()) -> None:
    """Renders a report into a file, which is the old one or the whole new one at every moment.

    Args:
        path: The HTML file; its folder must exist.
        title: The headline.
        entries: What to compare; ratios are to the first one.
        command: The command line that made it.
        notes: What else the reader should know.

    Raises:
        ValueError: If there are no entries.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "report.html"
        >>> write(path, "A run", [Entry(rule="dni", title="DNI", result={})])
        >>> path.read_text()[:15]
        '<!doctype html>'
    """
    from lockfree.checkpoint import write_atomically

    write_atomically(path, render(title, entries, command=command, notes=notes))


def _measures(entries: Sequence[Entry]) -> list[Measure]:
    """What entries are judged by beside accuracy and loss, each once."""
    return list(dict.fromkeys(entry.measure for entry in entries if entry.measure is not None))


def _columns(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The table's numbers, column by column, with the best one where they differ."""
    measures = _measures(entries)
    quantities = {one.key: max if one.larger_is_better else min for one in measures} | _QUANTITIES
    labels = {one.key: f"test {one.label}" if one.key != one.curve else one.label for one in measures} | _LABELS
    results, columns = [entry.result for entry in entries], []
    for key, better in quantities.items():
        given = [result.get(key) is not None for result in results]
        if key.startswith("test_") and not any(given):
            continue
        values = [_number(result.get(key)) for result in results]
        finite = [value for value in values if value is not None]
        best = better(finite) if len(set(finite)) > 1 else None
        columns.append({"key": key, "label": labels[key], "values": values, "given": given, "best": best})
    return columns


def _charts(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    def curves(kind: str, x: str, y: str) -> list[list[_Point]]:
        return [_points([line for line in entry.history if line.get("kind") == kind], x, y) for entry in entries]

    accuracies, losses = (curves("epoch", "epoch", y) for y in ("val_accuracy", "val_loss"))
    titles = _CHARTS | {one.curve: one.label.capitalize() for one in _measures(entries)}
    wanted = [one.curve for one in _measures(entries)]
    wanted += ["val_accuracy"] if any(accuracies) else []
    # A loss is drawn as well where accuracy alone would leave a rule out.
    if any(loss and not accuracy for accuracy, loss in zip(accuracies, losses, strict=True)):
        wanted.append("val_loss")
    steps = curves("step", "step", "loss")
    # Where steps were not logged, epochs have their mean.
    found = [("loss", "step", steps)] if any(steps) else [("train_loss", "epoch", curves("epoch", "epoch", "train_loss"))]
    found += [(y, x, curves("epoch", x, y)) for y in wanted for x in ("epoch", "seconds")]
    found += [(y, "epoch", curves("epoch", "epoch", y)) for y in ("synthetic_loss", "auxiliary_loss")]
    charts = [(y, _chart(y, x, lines)) for y, x, lines in found]
    return [{"title": titles[y], **chart} for y, chart in charts if chart]


def _points(lines: Sequence[Mapping[str, Any]], x: str, y: str) -> list[_Point]:
    """At most 300 points of a curve, each the mean of its neighbours; without a finite one there is no curve."""
    points = [(at, _number(line.get(y))) for line in lines if (at := _number(line.get(x))) is not None]
    size = -(-len(points) // 300) or 1
    means: list[_Point] = []
    for group in (points[start : start + size] for start in range(0, len(points), size)):
        finite = [value for _, value in group if value is not None]
        means.append((fmean(at for at, _ in group), fmean(finite) if finite else None))
    return means if any(value is not None for _, value in means) else []


def _chart(y: str, x: str, curves: Sequence[Sequence[_Point]]) -> dict[str, Any] | None:
    """Lays out a chart in thousandths of its width and height, so that the page can stretch it, not its lettering."""
    from matplotlib.ticker import MaxNLocator

    heights = [value for curve in curves for _, value in curve if value is not None]
    if not heights:
        return None
    low, high = min(heights), max(heights)
    # Losses that span decades would hide every difference but the largest.
    decades = y != "val_accuracy" and low > 0 and high / low > 30
    scale = math.log10 if decades else float
    margin = 0.0 if high > low else max(abs(high) / 10, 0.05)
    steps = [1, 10] if decades else [1, 2, 2.5, 5, 10]
    whole = all(value.is_integer() for value in heights)  # a count has no parts
    places = MaxNLocator(5, steps=steps, integer=whole)
    y_ticks = [float(t) for t in places.tick_values(scale(low) - margin, scale(high) + margin)]
    right = max(at for curve in curves for at, _ in curve) or 1.0
    x_ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=x != "seconds").tick_values(0, right)

    def place(at: float, value: float | None) -> str | None:
        if value is None:
            return None
        return f"{1000 * at / right:.1f} {1000 * (y_ticks[-1] - scale(value)) / (y_ticks[-1] - y_ticks[0]):.1f}"

    return {
        "y": y,
        "x": x,
        "x_ticks": [(100 * t / right, _short(t)) for t in x_ticks if 0 <= t <= right * 1.001],
        "y_ticks": [(100 * (t - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]), _short(10**t if decades else t, y)) for t in y_ticks],
        "lines": [_path([place(*point) for point in curve]) for curve in curves],
        "dots": [[place(*p) for p in curve if p[1] is not None] if len(curve) <= 30 else [] for curve in curves],
    }


def _path(places: Sequence[str | None]) -> str:
    """An SVG path through the places, broken where there is none."""
    parts = [f"{'L' if before else 'M'}{place}" for before, place in zip([None, *places], places, strict=False) if place]
    return "".join(parts)


def _short(value: float, y: str = "") -> str:
    if y == "val_accuracy":
        return f"{100 * value:g} %"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _panels(entries: Sequence[Entry]) -> dict[str, Any]:
    """The timelines on one axis, in per cent of the longest one."""
    from matplotlib.ticker import MaxNLocator

    longest = max(_extent(entry.timeline)[1] for entry in entries) or 1.0
    panels = []
    for index, entry in enumerate(entries):
        begin, length = _extent(entry.timeline)
        if length == 0:
            continue
        share = 100 / longest
        bars = [(span, share * (span.start - begin), share * (span.end - span.start)) for span in entry.timeline]
        rows = 1 + max(span.cell for span in entry.timeline)
        panel = {"index": index, "bars": bars, "rows": rows, "length": length, "width": share * length}
        panels.append({**panel, "idle": idle_share(entry.timeline), "kinds": {span.kind for span in entry.timeline}})
    ticks = MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]).tick_values(0, longest)
    return {"rules": panels, "ticks": [(100 * t / longest, _short(t)) for t in ticks if 0 <= t <= longest]}


def _probed(entries: Sequence[Entry]) -> list[tuple[str, str, Any]]:
    """What probes saw, a drawing for each kind of probe; its lettering takes the colour of the page's."""
    from markupsafe import Markup

    from lockfree.probes import PROBES

    drawings = []
    for name, probe in PROBES.items():
        seen = {
            entry.title: [line for line in entry.history if line.get("kind") == "probe" and line["probe"] == name]
            for entry in entries
        }
        # Looks at checkpoints are logged after the run.
        seen = {title: sorted(records, key=lambda line: line["step"]) for title, records in seen.items() if records}
        if seen:
            costs = [cost for entry in entries if entry.title in seen and (cost := _cost(entry, seen[entry.title]))]
            said = " ".join([probe.said, *costs])
            drawings.append((f"Probe: {name}", said, Markup(_svg(probe.draw(seen)))))
    return drawings


def _cost(entry: Entry, records: Sequence[Mapping[str, Any]]) -> str:
    """Says how long a probe took, and what share of the training time that is."""
    spent, trained = sum(record.get("seconds", 0.0) for record in records), entry.result.get("seconds")
    if not spent or not trained:
        return ""
    return f"Looking took {spent:.2g} s, {100 * spent / trained:.1f} % of the training time ({entry.title})."


def _by_workers(entries: Sequence[Entry]) -> list[tuple[str, str, Any]]:
    """What many workers did, if there were any."""
    from markupsafe import Markup

    from lockfree.server.draw import SAID, draw

    lines = {entry.title: [line for line in entry.history if line.get("kind") in ("staleness", "workers")] for entry in entries}
    lines = {title: found for title, found in lines.items() if found}
    return [("Workers", SAID, Markup(_svg(draw(lines))))] if lines else []


def _svg(figure: Any) -> str:
    """Returns a figure as inline SVG, transparent, its black replaced by the text colour around it."""
    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lockfree"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = stream.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace("#000000", "currentColor")
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*"', r'<svg \1width="100%"', re.sub(r'height="[\d.]+pt"', "", drawn, count=1), count=1
    )


def _extent(timeline: Sequence[Span]) -> tuple[float, float]:
    """When the first action begins, and how long it is from there to the end of the last."""
    begin = float(min((span.start for span in timeline), default=0.0))
    return begin, float(max((span.end for span in timeline), default=0.0)) - begin


def _number(value: Any) -> float | None:
    """The value as a float, or None where there is no finite number."""
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


def _linked(text: str) -> Any:
    """Escapes a citation and makes links of its addresses and arXiv numbers."""
    from markupsafe import Markup, escape

    def link(match: re.Match[str]) -> str:
        target = match[0] if match["arxiv"] is None else f"https://arxiv.org/abs/{match['arxiv']}"
        return f'<a href="{target}">{match[0]}</a>'

    # The pattern runs over escaped text, in which an address can hold no quote or angle bracket of its own.
    return Markup(re.sub(r"https?://[^\s<>{}&]*[^\s<>{}&.,;)]|arXiv:(?P<arxiv>\d{4}\.\d{4,5}(v\d+)?)", link, str(escape(text))))
