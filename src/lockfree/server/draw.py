"""Pictures of a run by many workers: who worked when, and how late gradients were."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAID = (
    "Each bar is a worker from its pull of the weights to its push of a gradient; where there is none it waits. The delay of a "
    "gradient is the number of updates between the weights that it was taken at and those that it changed; the gap, the distance "
    "between these weights; the repair, how much the correction changed the gradient, relative to its length."
)


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
    """Draws a row for each run: its first pushes, the histogram of delays, gap and repair along training.

    Args:
        runs: For each run, by its title, the metrics lines of kind "staleness" and "workers".

    Example:
        >>> line = {"kind": "staleness", "step": 9, "delays": {"0": 3, "1": 6}, "gap": 0.1, "ratio": None}
        >>> len(draw({"a run": [line, {"kind": "workers", "spans": [[0, 0.0, 1.0], [1, 0.0, 2.0]]}]}).axes)
        4
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6 * len(runs)), layout="constrained")
    for row, (title, lines) in zip(figure.subplots(len(runs), 3, squeeze=False), runs.items(), strict=True):
        _workers(row[0], [span for line in lines if line["kind"] == "workers" for span in line["spans"]])
        row[0].set_ylabel(f"{title}\nworker")
        staleness = [line for line in lines if line["kind"] == "staleness"]
        _delays(row[1], staleness)
        _sizes(row[2], staleness)
    return figure


def _workers(axis: Any, spans: Sequence[Sequence[float | int]]) -> None:
    for worker, start, end in spans:
        axis.barh(worker, end - start, left=start, height=0.7, color=f"C{int(worker) % 10}", edgecolor="white", linewidth=0.8)
    workers = sorted({int(worker) for worker, _, _ in spans})
    axis.set(xlabel="seconds", title="from pull to push", yticks=workers if len(workers) <= 16 else [])
    axis.invert_yaxis()


def _delays(axis: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    counts: Counter[int] = Counter()
    for line in lines:
        counts.update({int(delay): count for delay, count in line["delays"].items()})
    total = sum(counts.values()) or 1
    axis.bar(list(counts), [100 * count / total for count in counts.values()], width=0.8, color="C0")
    mean = sum(delay * count for delay, count in counts.items()) / total
    axis.axvline(mean, color="#adb5bd", ls="--", lw=1)
    axis.set(xlabel=f"delay in updates (mean {mean:.2f})", ylabel="gradients, %", title="how late")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _sizes(axis: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    other = axis.twinx()
    for place, name, colour, label in ((axis, "gap", "C1", "gap"), (other, "ratio", "C2", "repair")):
        points = [(line["step"], line[name]) for line in lines if line[name] is not None]
        place.plot([step for step, _ in points], [value for _, value in points], color=colour, marker=".")
        place.set_ylabel(label, color=colour)
        place.set_ylim(bottom=0)
    axis.set(xlabel="update", title="how far off, and how much repaired")
