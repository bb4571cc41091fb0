"""`lockfree train --processes`: processes that die, that are interrupted, that are told nonsense; and `lockfree replay`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import pytest
import torch

from lockfree import checkpoint, launch, trace
from lockfree.cli import main
from lockfree.run import Run

pytestmark = pytest.mark.xdist_group("pipeline cli")  # what is started once is started in one process

RUN = ["--rule", "cdni", "--data", "digits", "--schedule", "pipelined", "--batch-size", "64"]
EPOCHS = 24
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "lockfree", *map(str, arguments)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def epochs_done(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum('"kind": "epoch"' in line for line in lines)


def wait_for_epochs(run, folder, count):
    end = time.monotonic() + 120
    while epochs_done(folder) < count:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end, "training did not get that far"
        time.sleep(0.02)


def process_of(run, rank):
    """Returns the process id of one of the processes that a command has launched."""
    wanted = f"RANK={rank}".encode()
    for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
        if wanted in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("there is no such process")


def said(run):
    _, words = run.communicate(timeout=120)
    return [line for line in words.splitlines() if line]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the run comes to in one process."""
    whole = tmp_path_factory.mktemp("undisturbed") / "run"
    run = start("train", *RUN, "--epochs", EPOCHS, "--out", whole, "--json")
    out, words = run.communicate(timeout=240)
    assert run.returncode == 0, words
    return json.loads(out), Run.open(whole).load_checkpoint()


@pytest.mark.parametrize(
    "victims",
    [pytest.param([(1, 3)], id="upper"), pytest.param([(0, 2), (1, 5), (0, 8)], id="again and again", marks=pytest.mark.slow)],
)
def test_a_run_survives_what_happens_to_its_processes_and_ends_as_if_nothing_had(tmp_path, victims, undisturbed, capsys):
    theirs, (same, plain) = undisturbed
    torn = tmp_path / "torn"
    resume = ("train", "--out", torn, "--resume", "--json")
    run = start("train", *RUN, "--epochs", EPOCHS, "--processes", 2, "--out", torn, "--json")
    for rank, count in victims:
        wait_for_epochs(run, torn, count)
        os.kill(process_of(run, rank), signal.SIGKILL)
        *_, line = said(run)
        assert run.returncode == 3
        assert line.startswith(f"lockfree train: process {rank} of 2 was ended by SIGKILL")
        assert "--resume" in line
        run = start(*resume)
    wait_for_epochs(run, torn, victims[-1][1] + 3)
    run.send_signal(signal.SIGINT)
    *_, line = said(run)
    assert run.returncode == 130, line
    assert "a checkpoint was written" in line
    run = start(*resume)
    out, words = run.communicate(timeout=240)
    assert run.returncode == 0, words

    mine = json.loads(out)
    for name in ("test_accuracy", "test_loss", "epochs", "parameters", "locks"):
        assert mine[name] == theirs[name]
    steps, ours = Run.open(torn).load_checkpoint()
    assert steps == same == EPOCHS * 23
    for name, weight in plain["learner"]["model"].items():
        assert torch.equal(ours["learner"]["model"][name], weight), name
    # No batch is lost or repeated: the trace goes through all of them, and what it says leads to the same weights.
    ticks = [line for line in trace.read(torn) if line["kind"] == "tick" and not line["process"]]
    assert [line["tick"] for line in ticks if line["tick"] == line["last"]] == list(range(steps))
    assert main(["replay", str(torn)]) == 0
    assert "bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_stop_is_heeded_while_the_processes_load(tmp_path, number):
    run = start("train", *RUN, "--processes", 2, "--out", tmp_path / "a")
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    while len(children.read_text().split()) < 2:
        time.sleep(0.01)
    run.send_signal(number)
    assert said(run) == ["interrupted; nothing has been learnt yet, start again with the same command"]
    assert run.returncode == 130


@pytest.mark.parametrize(
    ("ends", "code", "word"),
    [
        (["exit(130)", "os.abort()"], 130, ""),  # the checkpoint is there, whatever becomes of the other
        (["exit(0)", "time.sleep(60)"], 0, ""),
        (["exit(2)", "exit(1)"], 2, ""),  # the first has said why
        (["exit(3)", "os.abort()"], 3, "process 1 of 2 was ended by SIGABRT"),
        (["exit(3)", "exit('no room')"], 3, "process 1 of 2 ended with exit code 1 (no room)"),
        (["os.abort()", "exit(3)"], 3, "process 0 of 2 was ended by SIGABRT"),
        (["exit(3)", "exit(0)"], 3, "process 0 of 2 lost its connection to another"),
        (["time.sleep(60)", "exit(2)"], 3, "process 1 of 2 ended with exit code 2"),
    ],
)
def test_the_first_process_speaks_for_all_and_else_who_is_to_blame(ends, code, word, capsys, monkeypatch):
    monkeypatch.setattr(launch, "_PATIENCE", 1.0)
    with contextlib.ExitStack() as stack:
        children = []
        for end in ends:
            file = stack.enter_context(tempfile.TemporaryFile())
            command = [sys.executable, "-I", "-c", f"import os, time; {end}"]
            process = stack.enter_context(subprocess.Popen(command, stderr=file))
            stack.callback(process.kill)
            children.append(launch._Child(process, file))
        launch._wait(children, deque())
        assert launch._conclude("train", children) == code
    line = capsys.readouterr().err
    assert word in line if word else not line


def test_what_one_process_finds_wrong_is_said_once(tmp_path):
    run = start("train", *RUN, "--processes", 2, "--learning-rate", "1e30", "--out", tmp_path / "a")
    (line,) = said(run)
    assert run.returncode == 2
    assert "at step" in line
    assert "lower the learning rate" in line


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--processes", "0"], "processes=0"),
        (["--processes", "2", "--executor", "stacked"], "trains in one process"),
        (["--correction", "nonsense"], "nonsense"),
        (["--delay", "1", "--correction", "drop:x"], "no number"),
    ],
)
def test_bad_usage_is_refused_before_anything_starts(more, word, capsys, tmp_path):
    assert main(["train", *RUN, "--out", str(tmp_path / "a"), *more]) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_replay_refuses_what_is_no_trace(tmp_path, capsys):
    assert main(["replay", str(tmp_path)]) == 2
    assert "holds no trace" in capsys.readouterr().err
    (tmp_path / "trace.jsonl").write_text('{"kind": "tick"}\n')
    assert main(["replay", str(tmp_path)]) == 2
    assert "does not begin with a header" in capsys.readouterr().err
    (tmp_path / "trace.jsonl").write_text("nonsense\n")
    assert main(["replay", str(tmp_path)]) == 2
    assert "line 1" in capsys.readouterr().err
    with pytest.raises(checkpoint.CorruptCheckpoint):
        checkpoint.load(tmp_path / "checkpoints")
