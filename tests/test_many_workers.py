"""`lockfree train --workers`: a run folder like any other, that can be interrupted, gone on with and replayed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lockfree import many_workers
from lockfree.cli import main
from lockfree.experiment import Experiment
from lockfree.run import Run
from lockfree.server import Gamma, read

SMALL = ["--data", "digits", "--epochs", "2", "--batch-size", "64", "--optimizer", "sgd", "--learning-rate", "0.05"]
FOUR = [*SMALL, "--workers", "4", "--engine", "simulate", "--speeds", "gamma"]


def run(capsys, *arguments):
    code = main(["train", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def result_of(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("consistency", ["bsp", "ssp:1", "asp"])
def test_a_run_folder_is_written_and_replayed(consistency, tmp_path, capsys):
    folder = tmp_path / "a"
    result = result_of(capsys, *FOUR, "--consistency", consistency, "--correction", "dc-adaptive", "--out", folder)
    assert result["test_accuracy"] > 0.7
    assert result["locks"] == ["forward", "update", "backward", *(["barrier"] if consistency == "bsp" else [])]
    batches = -(-1437 // 64)  # a fifth of the 1,797 digits is the test set
    per_epoch = -(-batches // 4) if consistency == "bsp" else batches
    assert result["updates"] == 2 * per_epoch
    assert (result["mean_delay"] == 0) == (consistency == "bsp")

    found = Run.open(folder)
    epochs = found.metrics("epoch")
    assert [(line["epoch"], line["step"]) for line in epochs] == [(1, per_epoch), (2, 2 * per_epoch)]
    assert epochs[-1]["val_accuracy"] == result["test_accuracy"] == found.result["test_accuracy"]
    staleness = found.metrics("staleness")
    pushes = [line for line in read(folder) if line["kind"] == "push"]
    assert (
        sum(sum(line["delays"].values()) for line in staleness)
        == len(pushes)
        == sum(sum(line["pushes"].values()) for line in staleness)
    )
    page = (folder / "report.html").read_text()
    assert "<h2>Workers</h2>" in page
    assert "how late" in page
    assert main(["replay", str(folder), "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert replayed["identical"]
    assert replayed["steps"] == result["updates"]


def test_workers_without_a_server_do_the_same(tmp_path, capsys):
    served = result_of(capsys, *FOUR, "--workers", "2", "--consistency", "bsp", "--out", tmp_path / "served")
    alone = result_of(
        capsys, *SMALL, "--workers", "2", "--consistency", "bsp", "--engine", "allreduce", "--out", tmp_path / "alone"
    )
    for name in ("test_accuracy", "test_loss", "updates"):
        assert alone[name] == served[name]
    mine, theirs = (
        [line | {"seconds": None} for line in Run.open(tmp_path / name).metrics("epoch")] for name in ("alone", "served")
    )
    assert mine == theirs
    assert main(["replay", str(tmp_path / "alone")]) == 0


def test_one_worker_is_training_by_one_process(tmp_path, capsys):
    """The server with one worker takes the steps of a plain loop over its batches; gathered over an epoch it learns as well."""
    alone = result_of(capsys, *SMALL)
    served = result_of(capsys, *SMALL, "--engine", "simulate", "--correction", "dc-adaptive")
    assert served["updates"] == 2 * -(-1437 // 64)
    assert served["mean_delay"] == 0
    assert served["test_accuracy"] == pytest.approx(alone["test_accuracy"], abs=0.06)
    assert served["peak_activation_bytes"] == pytest.approx(alone["peak_activation_bytes"], rel=0.05)


def test_an_interrupted_run_goes_on_as_if_undisturbed(tmp_path, capsys):
    given = [*FOUR, "--epochs", "6", "--correction", "dc-adaptive", "--model", "cnn"]
    undisturbed = result_of(capsys, *given, "--out", tmp_path / "whole")
    folder = tmp_path / "broken"
    process = subprocess.Popen(
        [sys.executable, "-m", "lockfree", "train", *given, "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    trace = folder / "trace.jsonl"
    deadline = time.monotonic() + 120
    while not (trace.exists() and trace.read_text().count('"push"') > 40):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "a checkpoint was written" in err
    assert not (folder / "result.json").exists()
    resumed = result_of(capsys, "--out", folder, "--resume")
    for name in ("test_accuracy", "test_loss", "updates", "mean_delay"):
        assert resumed[name] == undisturbed[name], name
    whole, broken = (Run.open(one).metrics("epoch") for one in (tmp_path / "whole", folder))
    assert whole == broken
    assert main(["replay", str(folder)]) == 0


BAD = {
    ("--workers", "0"): "workers=0: give 1 or more",
    ("--workers", "2", "--engine", "simulat"): "simulate",
    ("--workers", "2", "--rule", "dni"): "rule=dni: workers take plain gradients",
    ("--workers", "2", "--schedule", "pipelined"): "schedule=pipelined: workers take plain gradients",
    ("--consistency", "ssp:2"): "consistency=ssp:2 is about several workers: give workers=2 or more",
    ("--workers", "2", "--consistency", "ssp:-1"): "ssp:3",
    ("--workers", "2", "--consistency", "bps"): "bsp",
    ("--workers", "2", "--engine", "simulate", "--speeds", "fast"): "give batches a second",
    ("--workers", "2", "--engine", "simulate", "--speeds", "1,1,1"): "3 speeds for 2 workers",
    ("--workers", "2", "--engine", "simulate", "--address", "auto"): "address=auto is of a Ray cluster",
    ("--workers", "2", "--correction", "dc"): "dc-adaptive",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_usage_is_one_line(arguments, tmp_path, capsys):
    code, out, err = run(capsys, *SMALL, *arguments, "--out", tmp_path / "a")
    assert code == 2
    assert out == ""
    assert BAD[arguments] in err
    assert err.count("\n") == 1


def test_speeds_are_read():
    assert many_workers.speeds_from("2") == 2.0
    assert many_workers.speeds_from("1,0.5") == [1.0, 0.5]
    assert many_workers.speeds_from("gamma") == Gamma()


def test_the_learning_rate_follows_global_updates():
    experiment = Experiment(data="digits", epochs=4, workers=2, engine="simulate", batch_size=500, optimizer="sgd")
    shape = many_workers._Shape.of(experiment, 1437)
    assert (shape.per_epoch, shape.updates) == (3, 12)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = many_workers._described(experiment, shape)["schedule"](optimizer)
    rates = []
    for _ in range(shape.updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(
        [0.5 * (1 + torch.cos(torch.tensor(torch.pi * epoch / 4)).item()) for epoch in range(4) for _ in range(3)]
    )
