"""A run's folder: nothing is overwritten, nothing is half there, and what is written reads back the same."""

import json
import logging
import math

import numpy as np
import pytest
import torch

from lockfree import checkpoint
from lockfree.checkpoint import CorruptCheckpoint
from lockfree.run import Run, version

CONFIG = {"rule": "dni", "data": "digits", "seed": 0, "learning_rate": 0.1}


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "a", CONFIG)


def test_config_reads_back_with_version_and_time(run):
    again = Run.open(run.folder)
    assert again.config == run.config
    assert {key: run.config[key] for key in CONFIG} == CONFIG
    assert run.config["lockfree"] == version()
    assert run.config["started"].endswith("+00:00")


def test_a_run_is_never_overwritten(run):
    before = (run.folder / "config.json").read_bytes()
    message = (
        rf"holds another run \(rule dni, data digits, seed 0, started {run.config['started'][:4]}.*\): "
        "choose another --out, or go on with --resume$"
    )
    with pytest.raises(ValueError, match=message) as caught:
        Run.create(run.folder, {"rule": "hsic"})
    assert "\n" not in str(caught.value)
    assert (run.folder / "config.json").read_bytes() == before


def test_a_run_with_a_broken_config_is_not_overwritten_either(run):
    (run.folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"its config\.json cannot be read"):
        Run.create(run.folder, CONFIG)
    assert (run.folder / "config.json").read_text() == "{"


def test_other_peoples_folders_and_files_are_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match="holds no run: choose another --out, or empty it"):
            Run.create(tmp_path / name, CONFIG)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["chapter1.tex", "file", "thesis"]


def test_an_empty_folder_serves(tmp_path):
    (tmp_path / "empty").mkdir()
    assert Run.create(str(tmp_path / "empty"), CONFIG).config["seed"] == 0


def test_a_config_that_json_cannot_hold_makes_no_folder(tmp_path):
    with pytest.raises(TypeError, match=r"cannot write \{1\} of type set as JSON"):
        Run.create(tmp_path / "a", {"locks": {1}})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "holds no JSON object")])
def test_open_refuses_what_is_no_run(run, tmp_path, text, message):
    with pytest.raises(ValueError, match="holds no run"):
        Run.open(tmp_path)
    (run.folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Run.open(run.folder)


def test_metrics_are_strict_json_and_read_back_exactly(run):
    values = {
        "a": 0.1,
        "b": math.inf,
        "c": -math.inf,
        "d": [1, 2.5, math.nan],
        "e": None,
        "f": "inf",
        "g": True,
        "h": 3,
    }
    run.log("step", step=1, **values)
    run.log("epoch", step=1, loss=np.float32(0.5), count=np.int64(3))
    for line in (run.folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    (found,) = run.metrics("step")
    assert math.isnan(found["d"].pop())
    assert math.isnan(values["d"].pop())
    assert found == {"kind": "step", "step": 1, **values}
    assert [line["kind"] for line in run.metrics()] == ["step", "epoch"]
    assert run.metrics("epoch") == [{"kind": "epoch", "step": 1, "loss": 0.5, "count": 3}]


def test_a_tensor_is_refused_with_the_way_out(run):
    with pytest.raises(TypeError, match=r"\.item\(\)"):
        run.log("step", loss=torch.tensor(1.0))
    assert run.metrics() == []


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_ignored_and_does_not_spoil_the_next(run, cut):
    run.log("step", step=1, loss=1.0)
    run.log("step", step=2, loss=2.0)
    path = run.folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [line["step"] for line in run.metrics()] == [1]
    run.log("step", step=3, loss=3.0)
    assert [line["step"] for line in run.metrics()] == [1, 3]


def test_a_line_that_is_torn_from_the_start_is_ignored(run):
    (run.folder / "metrics.jsonl").write_bytes(b'{"kind": "st')
    run.log("step", step=1)
    assert run.metrics() == [{"kind": "step", "step": 1}]


def test_a_broken_line_in_the_middle_is_named(run):
    (run.folder / "metrics.jsonl").write_text('{"kind": "a"}\n{"kin\n{"kind": "b"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not JSON"):
        run.metrics()


def test_rewind_drops_later_lines_only(run):
    run.log("start", note="no step")
    for step in range(1, 6):
        run.log("step", step=step, loss=math.nan)
    run.log("epoch", step=5)
    run.rewind(3)
    assert [line.get("step") for line in run.metrics()] == [None, 1, 2, 3]
    assert math.isnan(run.metrics("step")[0]["loss"])
    run.rewind(10)
    assert len(run.metrics()) == 4


def test_rewind_of_a_run_without_metrics(run):
    run.rewind(0)
    assert run.metrics() == []


def test_an_interrupted_rewind_changes_nothing(run, monkeypatch):
    run.log("step", step=1)
    run.log("step", step=2)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run.rewind(1)
    assert [line["step"] for line in run.metrics()] == [1, 2]


def names(run):
    return sorted(path.name for path in (run.folder / "checkpoints").iterdir())


def test_the_newest_two_checkpoints_stay(run):
    assert run.load_checkpoint() is None
    for step in (10, 20, 30):
        assert run.save_checkpoint(step, {"step": step}) == run.folder / "checkpoints" / f"{step:08d}"
    assert names(run) == ["00000020", "00000030"]
    assert run.load_checkpoint() == (30, {"step": 30})
    run.save_checkpoint(40, {"step": 40}, keep=1)
    assert names(run) == ["00000040"]


def test_steps_beyond_eight_digits_are_ordered_as_numbers(run):
    run.save_checkpoint(99_999_999, {"a": 1})
    run.save_checkpoint(100_000_000, {"a": 2})
    assert run.load_checkpoint() == (100_000_000, {"a": 2})


def test_the_old_ones_go_only_when_the_new_one_is_whole(run, monkeypatch):
    for step in (1, 2):
        run.save_checkpoint(step, {"step": step})

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_files", full)
        with pytest.raises(OSError, match="no space left"):
            run.save_checkpoint(3, {"step": 3})
    assert names(run) == ["00000001", "00000002"]


def test_a_corrupt_newest_checkpoint_is_skipped_with_a_warning(run, caplog):
    for step in (1, 2):
        run.save_checkpoint(step, {"weights": torch.full((4,), float(step))})
    path = run.folder / "checkpoints" / "00000002" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, logger="lockfree.run"):
        step, state = run.load_checkpoint()
    assert step == 1
    assert state["weights"].tolist() == [1.0] * 4
    (record,) = caplog.records
    assert "step 2" in record.getMessage()
    assert str(path) in record.getMessage()


def test_going_on_from_before_a_corrupt_checkpoint_drops_it(run):
    for step in (10, 20):
        run.save_checkpoint(step, {"step": step})
    (run.folder / "checkpoints" / "00000020" / "state.json").unlink()
    run.save_checkpoint(15, {"step": 15})
    assert names(run) == ["00000010", "00000015"]


def test_if_all_checkpoints_are_corrupt_it_says_so(run, caplog):
    for step in (1, 2):
        run.save_checkpoint(step, {"step": step})
        (run.folder / "checkpoints" / f"{step:08d}" / "state.json").write_text("")
    with pytest.raises(CorruptCheckpoint, match=r"all checkpoints are corrupt \(steps 2, 1\)"):
        run.load_checkpoint()
    assert len(caplog.records) == 2


def test_leftovers_of_killed_writers_are_understood_and_cleared(run):
    for step in (1, 2):
        run.save_checkpoint(step, {"step": step})
    folder = run.folder / "checkpoints"
    # Killed between the renames that replace step 2, and earlier while writing step 7; and somebody's own note.
    (folder / "00000002").rename(folder / ".00000002.old")
    (folder / ".00000007.new").mkdir()
    (folder / "note.txt").write_text("mine")
    assert run.load_checkpoint() == (2, {"step": 2})
    run.save_checkpoint(3, {"step": 3})
    assert names(run) == ["00000002", "00000003", "note.txt"]
    assert run.load_checkpoint() == (3, {"step": 3})


@pytest.mark.parametrize("wrong", [{"step": -1}, {"step": 1, "keep": 0}])
def test_steps_and_counts_out_of_range_are_refused(run, wrong):
    with pytest.raises(ValueError, match="at least"):
        run.save_checkpoint(state={}, **wrong)
    assert not (run.folder / "checkpoints").exists()


def test_the_result_is_there_when_the_run_has_finished(run):
    assert run.result is None
    run.finish({"test_loss": math.inf, "locks": ("forward",), "seconds": 1.25})
    assert Run.open(run.folder).result == {"test_loss": math.inf, "locks": ["forward"], "seconds": 1.25}
    (run.folder / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json is not JSON"):
        _ = run.result
