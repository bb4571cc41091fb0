"""The report is one page that stands alone, escapes what it shows, and shows the right numbers."""

import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockfree.report import Entry, Span, idle_share, render, write

VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and insists that what is opened is closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open, self._inside = [], [], [], None
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def all(self, tag, **attributes):
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [found for name, found in self.tags if name == tag and wanted.items() <= found.items()]


def result(rule, accuracy, seconds, memory, locks):
    numbers = {"test_accuracy": accuracy, "seconds": seconds, "samples_per_second": 480_000 / seconds}
    numbers |= {"peak_activation_bytes": memory, "epochs": 3, "seed": 0}
    return {"rule": rule, "data": "digits", "locks": locks, **numbers}


def history(epochs, accuracy=True):
    lines = []
    for epoch in range(1, epochs + 1):
        lines += [{"kind": "step", "step": 10 * (epoch - 1) + i, "epoch": epoch, "loss": 2.0 / (epoch + i)} for i in range(10)]
        last = {"kind": "epoch", "epoch": epoch, "step": 10 * epoch, "val_loss": 1.0 / epoch, "seconds": 2.0 * epoch}
        lines.append({**last, "val_accuracy": 1 - 0.5 / epoch} if accuracy else last)
    return lines


def one_after_another(cells, batches):
    """Backpropagation's timeline: up with forwards of 1, down with learning of 2, one cell at a time."""
    order = [(cell, "F", batch) for batch in range(batches) for cell in range(cells)]
    order += [(cell, "L", batch) for batch in range(batches) for cell in reversed(range(cells))]
    order.sort(key=lambda action: (action[2], action[1]))
    spans, now = [], 0.0
    for cell, kind, batch in order:
        spans.append(Span(cell, kind, batch, now, now + (1 if kind == "F" else 2)))
        now = spans[-1].end
    return spans


BACKPROP = Entry(
    rule="backprop",
    title="Backpropagation",
    result=result("backprop", 0.9, 80.0, 3 * 2**20, ["forward", "update", "backward"]),
    history=history(3),
    timeline=one_after_another(4, 2),
    citation="Rumelhart, Hinton and Williams, 1986. https://doi.org/10.1038/323533a0.",
)
LOCAL = Entry(
    rule="hsic",
    title="HSIC bottleneck",
    result=result("hsic", 0.875, 60.0, 1.5 * 2**20, []),
    history=history(3),
    timeline=[Span(0, "F", 0, 0, 1), Span(0, "L", 0, 1, 3), Span(1, "F", 0, 1, 2), Span(1, "A", 0, 2, 4)],
    citation="Ma, Lewis and Kleijn, 2019. arXiv:1908.01580",
)


def test_the_comparison_shows_numbers_ratios_and_locks():
    page = Page(render("Two rules", [BACKPROP, LOCAL], command="lockfree compare --out b", notes=["Not tuned."]))
    for words in (
        *("Two rules", "lockfree compare --out b", "Not tuned.", "digits", "90.00 %", "87.50 % −2.50 points"),
        *("80.0 s", "60.0 s × 0.75", "6,000", "8,000 × 1.33", "3.0 MiB", "1.5 MiB × 0.50"),
    ):
        assert words in page.words
    assert len(page.all("span", class_="badge held")) == 3
    assert len(page.all("span", class_="badge none")) == 1
    assert page.words.count("no locks") == 1


def test_the_best_of_each_column_is_marked():
    html = render("Two rules", [BACKPROP, LOCAL])
    assert re.findall(r'class="best">([^<]*)<', html) == ["90.00 %", "60.0 s", "8,000", "1.5 MiB"]
    assert 'class="best"' not in render("The same twice", [BACKPROP, BACKPROP])


def test_the_page_needs_nothing_else():
    page = Page(render("Two rules", [BACKPROP, LOCAL]))
    references = [(tag, found[name]) for tag, found in page.tags for name in ("src", "href", "action") if name in found]
    assert references == [("a", "https://doi.org/10.1038/323533a0"), ("a", "https://arxiv.org/abs/1908.01580")]
    assert not page.all("script")
    assert not page.all("link")
    html = render("Two rules", [BACKPROP, LOCAL])
    assert re.findall(r"url\((?!#)|@import", html) == []


def test_everything_is_escaped():
    nasty = '<script>alert("1")</script>&\'"><b x="'
    entry = Entry(
        rule=nasty,
        title=nasty,
        result={"data": nasty, "seed": nasty, "test_loss": 1.0, "locks": [nasty]},
        history=history(2),
        timeline=BACKPROP.timeline,
        citation=f"{nasty} https://a.example/{nasty}",
    )
    for entries in ([entry], [entry, BACKPROP]):
        page = Page(render(nasty, entries, command=nasty, notes=[nasty]))
        assert not page.all("script")
        assert not page.all("b")
        assert {len(found) for found in page.all("a")} == {1}
        assert nasty in "".join(page.text)


def test_idle_shares_of_hand_made_timelines():
    assert idle_share(BACKPROP.timeline) == pytest.approx(0.75)
    # Cell 0 works 3 of 4, cell 1 works 3 of 4.
    assert idle_share(LOCAL.timeline) == pytest.approx(0.25)
    words = Page(render("Two rules", [BACKPROP, LOCAL])).words
    assert "idle 75.0 % done after 24" in words
    assert "idle 25.0 % done after 4" in words


def test_idle_share_counts_overlaps_once_and_starts_anywhere():
    spans = [Span(0, "F", 0, 10, 12), Span(0, "A", 0, 11, 13), Span(0, "L", 0, 11, 12), Span(1, "F", 0, 18, 20)]
    assert idle_share(spans) == pytest.approx(1 - (3 + 2) / 20)
    assert idle_share([]) == 0.0
    assert idle_share([Span(0, "F", 0, 1, 1)]) == 0.0
    # Cell 0 never does anything, and waits all the same.
    assert idle_share([Span(1, "F", 0, 0, 1)]) == pytest.approx(0.5)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(1, 9)).map(
            lambda drawn: Span(drawn[0], "F", 0, drawn[1], drawn[1] + drawn[2])
        ),
        min_size=1,
    )
)
def test_idle_share_equals_counting_unit_by_unit(spans):
    begin, end = min(span.start for span in spans), max(span.end for span in spans)
    cells = 1 + max(span.cell for span in spans)
    busy = {(span.cell, unit) for span in spans for unit in range(span.start, span.end)}
    assert idle_share(spans) == pytest.approx(1 - len(busy) / (cells * (end - begin)), abs=1e-12)


def test_all_panels_share_one_time_axis():
    page = Page(render("Two rules", [BACKPROP, LOCAL]))
    assert [found["x1"] for found in page.all("line", class_="end")] == ["100.000%", f"{100 * 4 / 24:.3f}%"]
    bars = [found for tag, found in page.tags if tag == "rect" and "x" in found]
    assert len(bars) == len(BACKPROP.timeline) + len(LOCAL.timeline)
    first, *_, last = bars
    assert (first["class"], first["x"], first["width"]) == ("F s0", "0.000%", f"{100 / 24:.3f}%")
    assert (last["class"], last["x"], last["width"]) == ("A s0", f"{200 / 24:.3f}%", f"{200 / 24:.3f}%")
    # The bottom cell is at the bottom.
    assert float(first["y"]) > float(bars[1]["y"])
    assert "cell 1 auxiliary network learns, batch 0: 2 to 4" in page.words


def test_curves_end_where_the_numbers_say():
    page = Page(render("A run", [BACKPROP]))
    labels = [found["aria-label"] for found in page.all("svg", role="img")]
    assert labels == [
        "Training loss by step",
        "Validation accuracy by epoch",
        "Validation accuracy by seconds",
        "timeline of Backpropagation",
    ]
    paths = [found["d"] for found in page.all("path") if "class" not in found and found["d"].startswith("M")]
    curves = [path for path in paths if path.count("L") == 2]
    assert len(curves) == 2
    # 0.5, 0.75 and 0.8333 on an axis from 0.5 to 0.85 or the like: the axis' ends are printed as ticks.
    for curve in curves:
        xs, ys = zip(*(map(float, place.split()) for place in curve[1:].split("L")), strict=True)
        assert xs == pytest.approx((1000 / 3, 2000 / 3, 1000), abs=0.1)
        assert (ys[0] - ys[1]) / (ys[0] - ys[2]) == pytest.approx(0.25 / (1 / 3), abs=1e-3)


def test_gaps_break_the_line_and_long_curves_are_thinned():
    losses = [1.0, math.nan, 2.0, None, 3.0, 4.0]
    lines = [{"kind": "step", "step": step, "loss": loss} for step, loss in enumerate(losses)]
    html = render("Gaps", [Entry(rule="a", title="A", result={}, history=lines)])
    (curve,) = re.findall(r'<path d="(M[^"]*M[^"]*)"', html)
    assert (curve.count("M"), curve.count("L")) == (3, 1)
    lines = [{"kind": "step", "step": step, "loss": float(step)} for step in range(100_000)]
    html = render("Long", [Entry(rule="a", title="A", result={}, history=lines)])
    assert len(html) < 40_000
    assert "80k" in Page(html).words


def test_losses_over_decades_get_a_logarithmic_axis():
    lines = [{"kind": "step", "step": step, "loss": 10.0**-step} for step in range(4)]
    page = Page(render("Decades", [Entry(rule="a", title="A", result={}, history=lines)]))
    (curve,) = (found["d"] for found in page.all("path") if "class" not in found and found["d"].count("L") == 3)
    ys = [float(place.split()[1]) for place in curve[1:].split("L")]
    assert ys == pytest.approx([0, 1000 / 3, 2000 / 3, 1000], abs=0.1)
    assert "0.001 0.01 0.1 1" in page.words


@pytest.mark.parametrize("cells", [1, 2, 50])
def test_any_number_of_cells(cells):
    page = Page(render("Cells", [Entry(rule="a", title="A", result={}, timeline=one_after_another(cells, 2))]))
    assert len(page.all("rect", class_="idle")) == cells + 1
    assert f"idle {100 * (1 - 1 / cells):.1f} %" in page.words


@pytest.mark.parametrize("count", [1, 2, 20])
def test_missing_and_broken_numbers(count):
    odd = Entry(
        rule="odd",
        title="Odd",
        result={"test_accuracy": None, "seconds": math.nan, "test_loss": math.inf, "locks": None},
        history=[{"kind": "epoch", "epoch": 1, "val_loss": None}, {"kind": "step"}, {"kind": "other"}],
    )
    page = Page(render("Odd", [odd] * count))
    assert page.words.count("diverged") == count
    assert "nan" not in page.words
    assert "No step was logged" in page.words
    assert "Who waited for whom" not in page.words
    assert "Citations" not in page.words


def test_rules_with_a_loss_only_stand_beside_rules_with_accuracy():
    loss_only = Entry(
        rule="bptt", title="BPTT", result={"test_loss": 0.125, "locks": ["barrier"]}, history=history(2, accuracy=False)
    )
    page = Page(render("Mixed", [BACKPROP, loss_only]))
    assert "90.00 %" in page.words
    assert "0.125" in page.words
    assert "barrier" in page.words
    labels = {found["aria-label"] for found in page.all("svg", role="img")}
    assert {"Validation accuracy by epoch", "Validation loss by epoch", "Validation loss by seconds"} <= labels


def test_several_seeds_are_told_apart_and_cited_once():
    entries = [Entry(**{**vars(LOCAL), "result": {**LOCAL.result, "seed": seed}}) for seed in (0, 1)]
    words = Page(render("Seeds", entries)).words
    assert "seeds 0, 1" in words
    assert "hsic, seed 1" in words
    assert words.count("Lewis and Kleijn") == 1


def test_a_single_run_has_tiles_and_no_ratios():
    words = Page(render("One", [LOCAL])).words
    assert "training run" in words
    assert "test accuracy 87.50 %" in words
    assert "×" not in words


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="got no entries"):
        render("None", [])
    with pytest.raises(ValueError, match="timeline of dni has actions of kind 'B': use one of 'F', 'L', 'M', 'A', 'I'"):
        Entry(rule="dni", title="DNI", result={}, timeline=[Span(0, "B", 0, 0, 1)])


def test_write_makes_the_file_at_once(tmp_path):
    path = tmp_path / "report.html"
    write(path, "One", [LOCAL], command="lockfree train", notes=["A note."])
    assert "A note." in Page(path.read_text(encoding="utf-8")).words
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]


def test_importing_the_module_does_not_import_the_drawing_libraries():
    code = "import sys, lockfree.report; print(sorted({'matplotlib', 'jinja2'} & set(sys.modules)))"
    base = "import sys, lockfree; print(sorted({'matplotlib', 'jinja2'} & set(sys.modules)))"
    outputs = [subprocess.run([sys.executable, "-c", text], capture_output=True, text=True) for text in (code, base)]
    assert outputs[0].stdout == outputs[1].stdout, outputs[0].stderr
