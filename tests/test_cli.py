"""The command line: exit codes, one line for every mistake, nothing overwritten, and a stop that can be gone on from."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lockfree
from lockfree import checkpoint, cli, experiment
from lockfree.data import write_idx
from lockfree.rules import RULES

pytestmark = pytest.mark.xdist_group("cli")  # what is started once is started in one process

DIGITS = ["--data", "digits", "--epochs", "1"]
KEYS = {
    *("rule", "data", "seed", "epochs", "test_accuracy", "test_loss", "seconds", "samples_per_second"),
    *("peak_activation_bytes", "locks"),
}


@pytest.fixture(autouse=True)
def _no_data_folder(tmp_path_factory, monkeypatch):
    """Nothing is found on this machine, and nothing lands in the repository."""
    monkeypatch.setenv("LOCKFREE_DATA", str(tmp_path_factory.mktemp("data")))
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture
def call(capsys):
    """Runs a command in this process; returns exit code, standard output, standard error."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder of one epoch of digits."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert cli.main(["train", *DIGITS, "--out", str(folder), "--rule", "cdni", "--seed", "4"]) == 0
    return folder


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def complaint(result):
    """The one line on standard error of a command that was used wrongly."""
    code, out, err = result
    assert code == 2, (code, out, err)
    assert out == ""
    assert "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == 1, err
    return lines[0]


# ---- what works --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_train_json_ends_with_one_object_with_the_fixed_keys(call, rule):
    code, out, err = call("train", *DIGITS, "--rule", rule, "--json", "--seed", "3")
    assert code == 0
    (line,) = out.splitlines()
    result = json.loads(line)
    assert set(result) >= KEYS
    assert (result["rule"], result["data"], result["seed"], result["epochs"]) == (rule, "digits", 3, 1)
    assert 0.05 < result["test_accuracy"] <= 1
    assert result["test_loss"] > 0
    assert result["seconds"] > 0
    assert result["samples_per_second"] == pytest.approx(1437 / result["seconds"])
    assert type(result["peak_activation_bytes"]) is int
    assert result["peak_activation_bytes"] > 0
    assert result["locks"] == [lock for lock in ("forward", "update", "backward") if lock in result["locks"]]
    assert re.fullmatch(r"training: epoch 1/1, loss \d+\.\d{3}, accuracy \d+\.\d\d %", err.strip())


def test_train_prints_plain_lines_when_piped(call, tmp_path):
    code, out, err = call("train", "--data", "digits", "--epochs", "2", "--out", tmp_path / "a")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "\r" not in out
    first, second, header, row, last = out.splitlines()
    assert first.startswith("training: epoch 1/2, loss ")
    assert second.startswith("training: epoch 2/2, loss ")
    assert header.split() == ["rule", "test", "accuracy", "seconds", "samples/s", "peak", "activations", "locks", "kept"]
    accuracy = json.loads((tmp_path / "a" / "result.json").read_text())["test_accuracy"]
    assert row.split()[:3] == ["backprop", f"{100 * accuracy:.2f}", "%"]
    assert last == f"report: {tmp_path / 'a' / 'report.html'}"
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        *("config.json", "metrics.jsonl", "checkpoints", "result.json", "report.html")
    }


def test_train_without_out_writes_nothing(call, tmp_path):
    assert call("train", *DIGITS)[0] == 0
    assert list(Path.cwd().iterdir()) == []


def test_equal_seeds_give_equal_numbers_and_other_seeds_do_not(call):
    found = [json.loads(call("train", *DIGITS, "--json", "--seed", seed)[1]) for seed in (1, 1, 2)]
    assert found[0]["test_loss"] == found[1]["test_loss"] != found[2]["test_loss"]


def test_settings_reach_the_rule(call, tmp_path):
    code, _, _ = call(
        *("train", *DIGITS, "--rule", "dni", "--out", tmp_path / "a"),
        *("--set", "rule.hidden_layers=1", "rule.hidden_units=32", "rule.learning_rate=0.01", "rule.borders=0,2"),
    )
    assert code == 0
    fields = json.loads((tmp_path / "a" / "config.json").read_text())["fields"]
    assert fields == {"hidden_layers": 1, "hidden_units": 32, "learning_rate": 0.01, "borders": [0, 2]}


def test_no_epochs_only_evaluate(call):
    result = json.loads(call("train", "--data", "digits", "--epochs", "0", "--json")[1])
    assert (result["epochs"], result["peak_activation_bytes"], result["samples_per_second"]) == (0, None, 0.0)
    assert result["test_accuracy"] < 0.5


def test_compare(call, tmp_path):
    code, out, err = call("compare", *DIGITS, "--rules", "backprop,dfa", "--out", tmp_path / "c", "--json")
    assert code == 0
    (line,) = out.splitlines()
    results = json.loads(line)["results"]
    assert [result["rule"] for result in results] == ["backprop", "dfa"]
    assert all(set(result) >= KEYS for result in results)
    assert [line.split(":")[0] for line in err.splitlines()] == ["backprop", "dfa"]
    report = (tmp_path / "c" / "report.html").read_text()
    assert "Backpropagation" in report
    assert "Direct feedback alignment" in report
    assert 'src="http' not in report
    alone = json.loads(call("train", *DIGITS, "--rule", "dfa", "--json")[1])
    assert alone["test_loss"] == results[1]["test_loss"]


def test_compare_goes_on_where_it_was(call, tmp_path):
    arguments = ("compare", *DIGITS, "--rules", "backprop,fa", "--out", tmp_path / "c", "--json")
    first = json.loads(call(*arguments)[1])
    shutil.rmtree(tmp_path / "c" / "fa")
    code, out, err = call(*arguments, "--resume")
    assert code == 0
    again = json.loads(out)
    assert [line.split(":")[0] for line in err.splitlines()] == ["fa"]  # backprop was finished
    assert [one["test_loss"] for one in again["results"]] == [one["test_loss"] for one in first["results"]]
    assert again["results"][0] == first["results"][0]


def test_compare_of_one_rule_has_the_same_form(call, tmp_path):
    out = call("compare", *DIGITS, "--rules", "backprop", "--out", tmp_path / "c", "--json")[1]
    assert [result["rule"] for result in json.loads(out)["results"]] == ["backprop"]


def test_rules(call):
    code, out, err = call("rules", "--json")
    assert (code, err) == (0, "")
    rows = {row["rule"]: row for row in json.loads(out)["rules"]}
    assert list(rows) == list(RULES)
    needs = {name: row["needs"] for name, row in rows.items()}
    known = {
        "backprop": "ABOVE",
        "dni": "NOTHING",
        "cdni": "TARGET",
        "fa": "ABOVE",
        "usf": "ABOVE",
        "dfa": "ERROR",
        "pred": "TARGET",
    }
    assert needs | known == needs
    assert rows["dfa"]["locks"] == ["forward", "update"]
    table = call("rules")[1].splitlines()
    assert [line.split()[0] for line in table[1:]] == list(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_cite(call, rule):
    code, out, err = call("cite", rule)
    assert (code, err) == (0, "")
    reference, empty, bibtex = out.splitlines()[:3]
    assert re.search(r"(19|20)\d\d", reference)
    assert empty == ""
    assert re.match(r"@\w+\{\w+, title=", bibtex)
    assert bibtex.count("{") == bibtex.count("}")


def test_data_list(call):
    code, out, _ = call("data", "list", "--json")
    assert code == 0
    rows = {row["name"]: row["status"] for row in json.loads(out)["data"]}
    assert rows == {
        **{"digits": "embedded", "fashion-mnist-sample": "embedded", "fashion-mnist": "embedded"},
        **{"mnist": "missing", "cifar10": "missing"},
    }
    texts = {row["name"]: row["status"] for row in json.loads(out)["texts"]}
    assert texts == {"tinyshakespeare": "embedded", "austen": "missing", "brown": "missing", "shakespeare-sample": "embedded"}
    table = call("data", "list")[1]
    assert "fashion-mnist-sample" in table
    assert "shakespeare-sample" in table


@pytest.mark.parametrize("command", ["train", "compare", "rules", "cite", "data", "bench"])
def test_help(call, command):
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    assert f"lockfree {command}" in out


def test_usage(call):
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    assert {line.split()[0] for line in out.splitlines() if line.startswith("  ")} >= {
        *("train", "compare", "rules", "cite", "data", "bench")
    }
    assert call()[0] == 2


# ---- what does not -----------------------------------------------------------------------------------------------------------

WRONG = {
    "unknown command": (["trian"], r"lockfree trian: unknown command 'trian': did you mean 'train'\?"),
    "unknown flag": (["train", "--ruel", "dni"], r"lockfree train: .*--ruel.* \(see lockfree train --help\)"),
    "flag without a value": (["train", "--rule"], r"lockfree train: .*--rule.*"),
    "bad number": (["train", "--epochs", "many"], r"lockfree train: .*--epochs.*'many'"),
    "unknown rule": (["train", *DIGITS, "--rule", "dnl"], "unknown rule 'dnl': did you mean 'dni'"),
    "unknown data": (["train", "--data", "digit"], "unknown data set 'digit': did you mean 'digits'"),
    "unknown model": (["train", *DIGITS, "--model", "mpl"], "unknown model 'mpl': did you mean 'mlp'"),
    "unknown optimizer": (["train", *DIGITS, "--optimizer", "adm"], "unknown optimizer 'adm': did you mean 'adam'"),
    "unknown schedule": (["train", *DIGITS, "--schedule", "pipeline"], "unknown schedule 'pipeline': did you mean 'pipelined'"),
    "missing data": (["train", "--data", "mnist"], "no mnist in .*: run `lockfree data fetch mnist`"),
    "set without a value": (["train", *DIGITS, "--rule", "dni", "--set", "rule.borders"], "write rule.FIELD=VALUE"),
    "set without rule.": (["train", *DIGITS, "--rule", "dni", "--set", "borders=1"], "write rule.FIELD=VALUE"),
    "set of an unknown field": (
        ["train", *DIGITS, "--rule", "dni", "--set", "rule.hiden_layers=1"],
        "unknown field of rule 'dni' 'hiden_layers': did you mean 'hidden_layers'",
    ),
    "set of a field of no field": (["train", *DIGITS, "--set", "rule.scale=1"], "unknown field of rule 'backprop' 'scale'"),
    "set of another type": (
        ["train", *DIGITS, "--rule", "dni", "--set", "rule.hidden_layers=two"],
        "--set 'rule.hidden_layers=two': hidden_layers is int, not 'two'",
    ),
    "set out of range": (
        ["train", *DIGITS, "--rule", "dni", "--set", "rule.hidden_layers=-1"],
        "hidden_layers=-1 must be 0 or more",
    ),
    "border out of range": (
        ["train", *DIGITS, "--rule", "dni", "--set", "rule.borders=7"],
        "4 blocks have borders 0 to 2, not 7",
    ),
    "epochs": (["train", *DIGITS, "--epochs", "-1"], "epochs=-1: give 0 or more"),
    "batch size": (["train", *DIGITS, "--batch-size", "0"], "batch_size=0: give 1 or more"),
    "learning rate": (["train", *DIGITS, "--learning-rate", "0"], r"learning_rate=0\.0: give a number above 0"),
    "learning rate nan": (["train", *DIGITS, "--learning-rate", "nan"], "learning_rate=nan: give a number above 0"),
    "delay": (["train", *DIGITS, "--delay", "-2"], "a link's delay is a whole number of ticks, 0 or more, got -2"),
    "no blocks": (["train", *DIGITS, "--blocks", "0"], "blocks=0: the number of blocks must be at least 1"),
    "too many blocks": (["train", *DIGITS, "--blocks", "99"], "into at most 7 blocks with weights, asked for 99"),
    "model too large": (["train", *DIGITS, "--model", "vgg8b"], "expected inputs of 16x16 or larger, got 8x8"),
    "pipelined backprop": (["train", *DIGITS, "--schedule", "pipelined"], "cannot serve block 0, which needs ABOVE"),
    "unknown executor": (["train", *DIGITS, "--executor", "stack"], "unknown executor 'stack': did you mean 'stacked'"),
    "stacked lockstep": (
        ["train", *DIGITS, "--executor", "stacked"],
        r"one below makes \(the forward lock\); use schedule=",
    ),
    "last batch of one": (["train", *DIGITS, "--batch-size", "1436"], "one sample cannot be normalised by BatchNorm"),
    "unknown device": (["train", *DIGITS, "--device", "gpu"], "gpu"),
    "absent device": (["train", *DIGITS, "--device", "cuda:77"], "cuda"),
    "resume without out": (["train", *DIGITS, "--resume"], "--resume needs the folder of the run: give --out"),
    "resume of nothing": (["train", "--resume", "--out", "nowhere"], r"nowhere holds no run \(it has no config.json\)"),
    "tensorboard without out": (["train", *DIGITS, "--tensorboard"], "--tensorboard writes into the run folder: give --out"),
    "compare an unknown rule": (["compare", *DIGITS, "--rules", "backprop,dna"], "unknown rule 'dna': did you mean 'dni'"),
    "compare a rule twice": (["compare", *DIGITS, "--rules", "fa,fa"], "--rules 'fa,fa': give each rule once"),
    "compare nothing": (["compare", *DIGITS, "--rules", ","], "--rules ',': give each rule once"),
    "compare unknown data": (["compare", "--data", "digit"], "unknown data set 'digit'"),
    "compare an unknown model": (["compare", *DIGITS, "--model", "mpl"], "unknown model 'mpl'"),
    "cite an unknown rule": (["cite", "bakprop"], "unknown rule 'bakprop': did you mean 'backprop'"),
    "cite nothing": (["cite"], "lockfree cite: .*"),
    "data without an action": (["data"], "lockfree data: .*"),
    "data, unknown action": (["data", "lost"], r"lockfree data: .*(list|fetch).*"),
    "fetch nothing": (["data", "fetch"], "which set\\?"),
    "fetch a text that nobody offers": (["data", "fetch", "brown"], "'brown' cannot be fetched, .*put brown.train.txt"),
    "fetch an unknown set": (["data", "fetch", "minst"], "unknown .*'minst': did you mean 'mnist'"),
    "unknown benchmark": (["bench", "stp"], "unknown benchmark 'stp': did you mean 'step'"),
    "rules with an argument": (["rules", "all"], "lockfree rules: .*all"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_is_one_line_and_exit_code_2(call, case):
    arguments, message = WRONG[case]
    try:
        result = call(*arguments)
    except (RuntimeError, AssertionError) as error:
        pytest.fail(f"a traceback: {type(error).__name__}: {str(error).splitlines()[0]}")
    if case == "last batch of one":
        result = (result[0], "", result[2])
    line = complaint(result)
    assert re.search(message, line), line
    assert line.startswith(f"lockfree {arguments[0]}: ")
    # Comparing starts by making its folder; whoever misspelt something else finds no trace of it.
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", *DIGITS],
        ["train", *DIGITS, "--rule", "cdni", "--seed", "4"],  # the very same run again
        ["train", *DIGITS, "--tensorboard"],
        ["compare", *DIGITS, "--rules", "fa"],
        ["train", "--resume", "--seed", "5"],
        ["train", "--resume", "--rule", "fa"],
        ["train", "--resume", "--batch-size", "100"],
        ["train", "--resume", "--set", "rule.hidden_layers=1"],
        ["compare", *DIGITS, "--rules", "fa", "--resume"],
    ],
    ids=" ".join,
)
def test_a_folder_that_holds_another_run_is_left_as_it_is(call, finished, arguments):
    before = tree(finished)
    line = complaint(call(*arguments, "--out", finished))
    if "--resume" in arguments:
        assert "was started with" in line
    else:
        assert "holds another run (rule cdni, data digits, seed 4, started 20" in line
        assert "choose another --out, or go on with --resume" in line
    assert tree(finished) == before


def test_a_folder_with_other_peoples_files_is_left_as_it_is(call, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    line = complaint(call("train", *DIGITS, "--out", tmp_path))
    assert "is not an empty folder and holds no run: choose another --out, or empty it" in line
    assert tree(tmp_path) == {"thesis.tex": b"x"}


def test_tensorboard_into_a_new_folder(call, tmp_path):
    pytest.importorskip("tensorboard")
    code, _, err = call("train", *DIGITS, "--out", tmp_path / "a", "--tensorboard")
    assert (code, err) == (0, "")
    assert len(list((tmp_path / "a" / "tensorboard").glob("events.*"))) == 1


def test_a_missing_tensorboard_is_one_line(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    line = complaint(call("train", *DIGITS, "--out", tmp_path / "a", "--tensorboard"))
    assert 'pip install "lockfree[tensorboard]"' in line
    assert not (tmp_path / "a").exists()


def fashion(folder, samples=20):
    """A tiny set laid out as Fashion-MNIST."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name in ("train", "t10k"):
        images = torch.randint(0, 256, (samples, 8, 8), generator=generator, dtype=torch.uint8)
        write_idx(raw / f"{name}-images-idx3-ubyte", images)
        write_idx(raw / f"{name}-labels-idx1-ubyte", torch.arange(samples, dtype=torch.uint8) % 10)
    return raw


def cut_short(path):
    os.truncate(path, path.stat().st_size - 3)


def bad_label(path):
    content = bytearray(path.read_bytes())
    content[-1] = 10
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("train-images-idx3-ubyte", cut_short, r"train-images-idx3-ubyte: "),
        ("t10k-labels-idx1-ubyte", cut_short, r"t10k-labels-idx1-ubyte: "),
        ("train-labels-idx1-ubyte", bad_label, r"train-labels-idx1-ubyte: .*10"),
        ("train-labels-idx1-ubyte", Path.unlink, r"is incomplete: expected train-labels-idx1-ubyte"),
        (
            "t10k-images-idx3-ubyte",
            lambda path: path.write_bytes(b"\x1f\x8b" + bytes(30)),
            r"t10k-images-idx3-ubyte: .*damaged",
        ),
        ("t10k-images-idx3-ubyte", lambda path: path.write_bytes(b""), r"t10k-images-idx3-ubyte: "),
    ],
    ids=["truncated images", "truncated labels", "label out of range", "missing file", "corrupt compression", "empty file"],
)
def test_damaged_files_in_the_data_folder(call, tmp_path, monkeypatch, name, spoil, message):
    monkeypatch.setenv("LOCKFREE_DATA", str(tmp_path / "data"))
    raw = fashion(tmp_path / "data")
    arguments = ("train", "--data", "fashion-mnist", "--epochs", "1", "--out", tmp_path / "a")
    spoil(raw / name)
    line = complaint(call(*arguments))
    assert re.search(message, line), line
    assert not (tmp_path / "a").exists()


def test_a_whole_set_in_the_data_folder_is_used(call, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKFREE_DATA", str(tmp_path))
    fashion(tmp_path)
    result = json.loads(call("train", "--data", "fashion-mnist", "--epochs", "1", "--batch-size", "10", "--json")[1])
    assert "20 training and 20 test images" in result["data_source"]
    assert "files that differ from the official set" in result["data_source"]


def test_another_data_folder_is_looked_at_anew(call, tmp_path, monkeypatch):
    found = []
    for samples in (20, 30):
        monkeypatch.setenv("LOCKFREE_DATA", str(tmp_path / str(samples)))
        fashion(tmp_path / str(samples), samples)
        arguments = ("train", "--data", "fashion-mnist", "--epochs", "1", "--batch-size", "10", "--json")
        found.append(json.loads(call(*arguments)[1])["data_source"])
    assert "20 training" in found[0]
    assert "30 training" in found[1]


def test_divergence_is_one_line_and_the_last_good_checkpoint_stays(call, tmp_path):
    arguments = ("train", *DIGITS, "--optimizer", "sgd", "--learning-rate", "1e30", "--out", tmp_path / "a")
    code, _, err = call(*arguments)
    assert code == 2
    (line,) = err.splitlines()
    assert re.search(r"the loss is \w+ at step \d+: cell \d .*lower the learning rate", line)
    step, state = lockfree.Run.open(tmp_path / "a").load_checkpoint()
    assert step == 0
    assert all(value.isfinite().all() for value in state["learner"]["model"].values())


# ---- going on ----------------------------------------------------------------------------------------------------------------


def weights(folder):
    step, state = lockfree.Run.open(folder).load_checkpoint()
    return step, state["learner"]["model"]


def assert_same_run(one, other):
    assert weights(one)[0] == weights(other)[0]
    for (name, mine), theirs in zip(weights(one)[1].items(), weights(other)[1].values(), strict=True):
        assert torch.equal(mine, theirs), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for key in ("epochs", "test_loss", "test_accuracy"):
        assert results[0][key] == results[1][key]


@pytest.mark.parametrize("spelling", [["--out", "{}"], ["--out={}"]], ids=["apart", "with ="])
def test_resume_needs_no_other_settings(call, finished, tmp_path, spelling):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    code, _, err = call("train", "--resume", *(part.format(folder) for part in spelling), "--epochs", "2")
    assert (code, err) == (0, "")
    undisturbed = tmp_path / "b"
    call("train", "--data", "digits", "--epochs", "2", "--rule", "cdni", "--seed", "4", "--out", undisturbed)
    assert_same_run(folder, undisturbed)
    config = json.loads((folder / "config.json").read_text())
    assert (config["rule"], config["seed"]) == ("cdni", 4)


def test_resuming_with_the_same_command_is_fine(call, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {name: content for name, content in tree(folder).items() if not name.startswith(("report", "result"))}
    code, _, _ = call("train", *DIGITS, "--rule", "cdni", "--seed", "4", "--out", folder, "--resume")
    assert code == 0
    after = {name: content for name, content in tree(folder).items() if not name.startswith(("report", "result"))}
    assert after == before
    assert_same_run(folder, finished)


def test_resume_with_fewer_epochs_trains_no_further(call, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    code, out, _ = call("train", "--out", folder, "--resume", "--epochs", "0", "--json")
    assert code == 0
    assert json.loads(out)["epochs"] == 1


def test_resume_when_every_checkpoint_is_corrupt(call, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for path in (folder / "checkpoints").iterdir():
        os.truncate(path / "state.safetensors", 100)
    before = tree(folder)
    assert "all checkpoints are corrupt" in complaint(call("train", "--out", folder, "--resume", "--epochs", "2"))
    assert tree(folder) == before


def test_resume_from_the_checkpoint_before_a_half_written_one(call, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    call("train", "--out", folder, "--resume", "--epochs", "3")
    shutil.copytree(folder, tmp_path / "whole")
    newest = max((folder / "checkpoints").iterdir())
    os.truncate(newest / "state.safetensors", 100)
    with pytest.raises(checkpoint.CorruptCheckpoint):
        checkpoint.load(newest)
    assert call("train", "--out", folder, "--resume", "--epochs", "3")[0] == 0
    assert_same_run(folder, tmp_path / "whole")


def test_an_interrupted_run_without_a_folder_promises_no_checkpoint(call, monkeypatch):
    def press(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment.Experiment, "run", press)
    code, out, err = call("train", *DIGITS)
    assert (code, out) == (130, "")
    (line,) = err.splitlines()
    assert "interrupted" in line
    assert "a checkpoint was written" not in line


# ---- real processes ----------------------------------------------------------------------------------------------------------


def environment():
    source = str(Path(lockfree.__file__).parents[1])
    return os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def process(*arguments, **options):
    command = [sys.executable, "-m", "lockfree", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True, **options
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_writes_a_checkpoint_and_resume_ends_as_if_undisturbed(tmp_path):
    settings = ["train", "--data", "digits", "--epochs", "40", "--rule", "cdni", "--batch-size", "16", "--seed", "2"]
    stopped = process(*settings, "--out", tmp_path / "a")
    metrics = tmp_path / "a" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"epoch"' in metrics.read_text()):
        assert stopped.poll() is None, stopped.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 130, (out, err)
    assert err.splitlines() == ["interrupted; a checkpoint was written, go on with the same command and --resume"]
    step, _ = weights(tmp_path / "a")
    assert 0 < step < 40 * 90
    assert not (tmp_path / "a" / "result.json").exists()

    # Both go on for two epochs more than were begun, so that the test does not take long.
    epochs = str(step // 90 + 2)
    go_on = process("train", "--resume", "--out", tmp_path / "a", "--epochs", epochs, "--json")
    settings[4] = epochs
    undisturbed = process(*settings, "--out", tmp_path / "b", "--json")
    results = []
    for one in (go_on, undisturbed):
        out, err = one.communicate(timeout=200)
        assert one.returncode == 0, err
        results.append(json.loads(out.splitlines()[-1]))
    assert results[0]["test_loss"] == results[1]["test_loss"]
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_process_used_wrongly_exits_with_2_and_one_line():
    wrong = process("train", "--rule", "bakprop")
    out, err = wrong.communicate(timeout=60)
    assert wrong.returncode == 2
    assert complaint((2, out, err)).startswith("lockfree train: unknown rule 'bakprop': did you mean 'backprop'?")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX pipes")
def test_a_reader_that_goes_away_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lockfree", "cite", "dni"]
    with os.fdopen(writer, "w") as gone:
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_network_port_is_opened(call, monkeypatch, tmp_path):
    import socket

    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "__init__", refuse)
    assert call("compare", *DIGITS, "--rules", "backprop,cdni", "--out", tmp_path / "a")[0] == 0
