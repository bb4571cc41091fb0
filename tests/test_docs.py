"""What the documentation says runs, and nothing public is without a word."""

import inspect
import re
import runpy
from pathlib import Path

import pytest

import lockfree as lf

ROOT = Path(__file__).parent.parent
HEADINGS = ["Use", "Hyperparameters", "What is logged", "Differences from the paper", "Ours against the paper's"]


def test_the_readme_s_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["learner"].model is names["model"]
    assert names["learner"].locks == {"forward"}
    assert names["learner"].steps == 100
    assert "torch.Size([256, 3])" in capsys.readouterr().out


def test_the_example_of_many_workers_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "workers.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["result"].model is names["model"]
    assert sum(lf.server.delays(names["result"].history).values()) == 100
    assert capsys.readouterr().out.startswith("{0: ")


def test_the_example_of_recurrent_networks_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "recurrent.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    learner = names["learner"]
    assert (learner.updates, learner.locks) == (20 * 5, {"forward"})  # 40 steps are 5 chunks
    assert "'bits_per_character'" in capsys.readouterr().out


def test_a_bootstrap_from_outside_the_package_learns():
    names = runpy.run_path(str(ROOT / "examples" / "own_bootstrap.py"))
    before, after = names["main"]()
    assert after < before - 0.5  # bits per character


def test_a_rule_from_outside_the_package_learns():
    names = runpy.run_path(str(ROOT / "examples" / "own_rule.py"))
    accuracy = names["main"]()
    assert accuracy > 0.5  # chance is 0.1


@pytest.mark.parametrize("name", [name for name in lf.__all__ if not inspect.ismodule(getattr(lf, name))])
def test_a_public_name_is_documented(name):
    thing = getattr(lf, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            if not member.startswith("_") and callable(value):
                assert inspect.getdoc(getattr(thing, member)), f"{name}.{member}"


def test_every_rule_has_a_page_with_the_fixed_outline():
    index = (ROOT / "docs" / "rules" / "README.md").read_text()
    for name in lf.rules.RULES:
        (row,) = [line for line in index.splitlines() if f"`{name}`" in line and line.startswith("|")]
        page = ROOT / "docs" / "rules" / re.search(r"\(([\w.]+)\)", row)[1]
        assert [line.removeprefix("## ") for line in page.read_text().splitlines() if line.startswith("## ")] == HEADINGS


def test_every_rule_can_be_cited():
    for name in lf.rules.RULES:
        card = lf.rules.get(name).card
        assert re.search(r"\b(19|20)\d\d\b", card.reference)
        assert card.bibtex.startswith("@")
        assert card.bibtex.count("{") == card.bibtex.count("}")


def test_links_in_the_documentation_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
