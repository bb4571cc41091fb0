"""The picture of a recipe's table."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lockfree.recipes.recipe import Recipe

_MOST_TICKS = 12  # more would be written over each other
_ROOM = 0.6  # that the methods take up between two places without a number


def draw(recipe: "Recipe", summary: Mapping[str, Any]) -> "Figure":
    """Draws what is shown against x, a panel each, a line for each method, dashed where the paper's numbers are.

    Args:
        recipe: Says what the axes are.
        summary: Its `Recipe.summary`.
    """
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(entry["panel"] for entry in summary["entries"]))
    series = list(dict.fromkeys(entry["series"] for entry in summary["entries"]))
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    shown: dict[str, Any] = {}
    for panel, axis in zip(panels, axes.flat, strict=False):
        entries = [entry for entry in summary["entries"] if entry["panel"] == panel and entry["mean"] is not None]
        ticks = sorted({entry["x"] for entry in summary["entries"] if entry["panel"] == panel})
        axis.set(title=panel, xlabel=recipe.x_labels.get(panel, recipe.x_label), ylabel=recipe.y_labels.get(panel, ""))
        axis.grid(alpha=0.25)
        if len(ticks) == 1:
            shown |= _side_by_side(axis, entries, series)
        elif panel in recipe.x_names:
            shown |= _at_places(axis, entries, series)
            axis.set_xticks(ticks, [recipe.x_names[panel][tick] for tick in ticks], rotation=45, ha="right", fontsize=7)
        else:
            shown |= _lines(axis, entries, series)
            _set_ticks(axis, ticks, logarithmic=recipe.log_x and panel not in recipe.x_labels)
        if recipe.from_zero:
            axis.set_ylim(0, None)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for line in axes:
        if not line[0].get_ylabel():
            line[0].set_ylabel(recipe.y_label)
    ordered = [one for one in series if one in shown]
    handles = [shown[one] for one in ordered]
    figure.legend(handles, ordered, frameon=False, fontsize=8, ncols=3 if columns == 1 else 5, loc="outside lower center")
    note = f", {recipe.paper_note}" if recipe.paper_note else ""
    dashed = f"; dashed: the paper{note}" if recipe.paper else ""
    between = "\n" if columns == 1 else " "
    figure.suptitle(f"{recipe.title}{between}({recipe.budget}{dashed})", fontsize=10)
    return figure


def _lines(axis: "Axes", entries: Sequence[Mapping[str, Any]], series: Sequence[str]) -> dict[str, Any]:
    """Draws a line for each method; returns what stands for each in the legend."""
    shown = {}
    for index, one in enumerate(series):
        points = [entry for entry in entries if entry["series"] == one]
        if not points:
            continue
        x, mean, deviations = ([entry[key] or 0 for entry in points] for key in ("x", "mean", "sd"))
        shown[one] = axis.errorbar(x, mean, deviations, color=f"C{index}", marker="o", ms=4, capsize=2)
        paper = [(entry["x"], entry["paper"]) for entry in points if entry["paper"] is not None]
        if paper:
            axis.plot(*zip(*paper, strict=True), color=f"C{index}", ls="--", lw=1, alpha=0.6)
    return shown


def _at_places(axis: "Axes", entries: Sequence[Mapping[str, Any]], series: Sequence[str]) -> dict[str, Any]:
    """Draws points side by side at each place, which has a name and no number."""
    shown = {}
    for index, one in enumerate(series):
        points = [entry for entry in entries if entry["series"] == one]
        shift = _ROOM * ((index + 0.5) / len(series) - 0.5)
        x, mean = [entry["x"] + shift for entry in points], [entry["mean"] for entry in points]
        deviations = [entry["sd"] or 0 for entry in points]
        if points:
            shown[one] = axis.errorbar(x, mean, deviations, color=f"C{index}", marker="o", ms=4, capsize=2, ls="")
    return shown


def _side_by_side(axis: "Axes", entries: Sequence[Mapping[str, Any]], series: Sequence[str]) -> dict[str, Any]:
    """Draws one point for each method, with its number, where there is but one place."""
    shown, here = {}, {entry["series"]: entry for entry in entries}
    for index, one in enumerate(series):
        entry = here.get(one)
        if entry is None:
            continue
        shown[one] = axis.errorbar(index, entry["mean"], entry["sd"] or 0, color=f"C{index}", marker="o", ms=5, capsize=2)
        axis.annotate(
            f"{entry['mean']:.3g}", (index, entry["mean"]), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7
        )
        if entry["paper"] is not None:
            axis.plot([index - 0.3, index + 0.3], [entry["paper"]] * 2, color=f"C{index}", ls="--", lw=1, alpha=0.6)
    axis.set_xticks([])
    axis.margins(x=0.1, y=0.15)
    if len(here) == len(entries) and entries:
        axis.set_xlabel(f"{axis.get_xlabel()}: {entries[0]['x']:g}")
    return shown


def _set_ticks(axis: "Axes", ticks: Sequence[float | int], *, logarithmic: bool) -> None:
    if len(ticks) <= _MOST_TICKS:
        axis.set_xticks(ticks)
    if logarithmic:
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
