"""Traces: what happened can be repeated bit for bit, and what cannot be repeated is said clearly."""

import json
import shutil

import pytest
import torch
from served import Net, adam, assert_same, cross_entropy, data, served, sgd, smooth, trained
from torch import nn

import lockfree as lf
from lockfree.server import Failure, Gamma, Point, Recorder, ServerFailure, Simulator, Straggler, read, replay
from lockfree.staleness import ASP, BSP, SSP, DelayCompensation, DropStale, GapAware, NoCorrection, WeightPrediction

SPEEDS = Gamma(shape=2)
SETTINGS = {
    "bsp": {"consistency": BSP()},
    "asp": {"correction": DelayCompensation(), "memory_per_worker": True},
    "ssp": {"consistency": SSP(1), "correction": GapAware(), "optimizer": adam, "clip": 0.5},
    "drop": {"correction": DropStale(bound=3)},
    "predict": {"correction": WeightPrediction(), "optimizer": adam},
    "schedule": {"schedule": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)},
    "fallback": {"correction": DelayCompensation(strength=1e6), "patience": 3, "every": 1},
    "failures": {
        "engine": Simulator(
            speeds=SPEEDS,
            stragglers=[Straggler(worker=3, factor=3)],
            failures=[Failure(worker=number % 4, batch=number + 2, point=point) for number, point in enumerate(Point)]
            + [ServerFailure(update=5), ServerFailure(update=9, snapshot=3)],
        )
    },
    "rounds that fail": {
        "consistency": BSP(),
        "engine": Simulator(
            speeds=SPEEDS,
            failures=[Failure(worker=number % 4, batch=number + 2, point=point) for number, point in enumerate(Point)]
            + [ServerFailure(update=5), ServerFailure(update=9, snapshot=3)],
        ),
    },
}
"""Runs of which each has something that a replay must not miss."""


def run(name, model=None, **more):
    return trained(model, **{"engine": Simulator(speeds=SPEEDS), "updates": 12, "fingerprints": 3, **SETTINGS[name], **more})


def again(lines, name, model=None, given=None, **more):
    known = ("consistency", "correction", "optimizer", "schedule")
    settings = {"optimizer": sgd, **{key: value for key, value in SETTINGS[name].items() if key in known}, **more}
    return replay(lines, Net() if model is None else model, data() if given is None else given, loss=cross_entropy, **settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_repeated_bit_for_bit(name, tmp_path):
    result = run(name, trace=tmp_path / "new" / "trace.jsonl")
    lines = read(tmp_path / "new")
    assert lines == json.loads(json.dumps(result.trace))
    found = again(lines, name)
    assert found.identical
    assert (found.steps, found.processes) == (12, 4)
    assert set(found.compared) == {0, 3, 6, 9, 12}
    assert any(line["kind"] == "fallback" for line in lines) == (name == "fallback")


def test_values_that_were_not_finite_are_repeated_as_such():
    """A machine that fails now and then: the values of a replay are good, but the batch has to go out again all the same."""
    calls = []

    def now_and_then(scores, y):
        calls.append(None)
        return cross_entropy(scores, y) * (float("nan") if len(calls) in (3, 7, 8) else 1.0)

    for consistency in (BSP(), ASP()):
        calls.clear()
        result = trained(smooth(), loss=now_and_then, consistency=consistency, updates=12)
        assert sum(line.get("outcome") == "not finite" for line in result.trace) == 3
        found = replay(result.trace, smooth(), data(), loss=cross_entropy, optimizer=sgd, consistency=consistency)
        assert found.identical


def test_a_run_that_ended_badly_is_repeated_up_to_there(tmp_path):
    def broken(scores, y):
        return cross_entropy(scores, y) / 0.0

    with pytest.raises(lf.Diverged):
        trained(smooth(), loss=broken, trace=tmp_path)
    found = replay(read(tmp_path), smooth(), data(), loss=broken, optimizer=sgd)
    assert found.identical
    assert found.steps == 0


def test_a_trace_that_ends_early_is_repeated_up_to_there(tmp_path):
    result = run("asp", trace=tmp_path)
    file = tmp_path / "trace.jsonl"
    whole = file.read_text()
    (middle,) = [place for place, line in enumerate(result.trace) if line["kind"] == "weights" and line["version"] == 6]
    for extra in (1, 2, 3):
        rows = whole.splitlines(keepends=True)
        file.write_text("".join(rows[: middle + extra]) + rows[middle + extra][:20])  # the last line half written
        found = again(read(tmp_path), "asp")
        assert found.identical
        assert found.compared == (0, 3, 6)
        assert 6 <= found.steps <= 8


@pytest.mark.parametrize("kind", ["join", "pull", "push"])
@pytest.mark.parametrize("name", ["bsp", "asp", "ssp"])
@pytest.mark.usefixtures("unchecked")  # for speed
def test_a_trace_that_lacks_lines_is_a_clear_error(kind, name):
    lines = run(name).trace
    places = [place for place, line in enumerate(lines[:-12]) if line["kind"] == kind]
    for place in (places[0], places[len(places) // 2], places[-1]):
        with pytest.raises(ValueError, match=r"^line \d+ of the trace .*missing") as raised:
            again([*lines[:place], *lines[place + 1 :]], name)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="lines before it are missing"):
        again([*lines[:20], *lines[30:]], name)


@pytest.mark.usefixtures("unchecked")  # for speed
def test_an_eviction_that_is_lacking_is_an_error():
    lines = run("rounds that fail").trace
    for place in [place for place, line in enumerate(lines) if line["kind"] == "evict"]:
        with pytest.raises(ValueError, match="missing"):
            again([*lines[:place], *lines[place + 1 :]], "rounds that fail")


def test_a_snapshot_that_is_lacking_is_an_error():
    lines = [line for line in run("failures").trace if line["kind"] != "snapshot"]
    with pytest.raises(ValueError, match=r"snapshot 2 is not in the trace; lines before it are missing"):
        again(lines, "failures")


def test_other_data_other_weights_or_another_loss_are_found_to_differ():
    lines = run("asp").trace
    x, y = data()
    assert again(lines, "asp").differing == {}
    assert again(lines, "asp", given=(x + 1e-3, y)).differing == {0: 0}
    assert again(lines, "asp", model=Net(seed=5)).differing == {0: 0}
    assert again(lines, "asp", optimizer=adam).differing.keys() == {0}
    bad = x.clone()
    ticket = next(line for line in reversed(lines) if line["kind"] == "push")["ticket"]
    bad[lf.server.Tickets(seed=3, length=48, batch_size=4).samples(ticket)[0], 0] += 0.5
    assert not again(lines, "asp", given=(bad, y)).identical
    gone = x.clone()
    gone[:] = torch.nan
    assert again(lines, "asp", given=(gone, y)).differing == {0: 0}


def test_another_kind_of_run_is_refused():
    lines = run("ssp").trace
    for more, message in (
        ({"consistency": ASP()}, "the run's consistency was {'name': 'SSP', 'bound': 1}, given is {'name': 'ASP'}"),
        ({"correction": NoCorrection()}, "the run's correction was {'name': 'GapAware', 'decay': 0.999}, given is"),
        ({"given": data(40)}, "the run's data were 48 samples, given are 40"),
    ):
        with pytest.raises(ValueError, match=message):
            again(lines, "ssp", **more)
    with pytest.raises(ValueError, match="does not begin with the header of a server's"):
        again(lines[1:], "ssp")
    with pytest.raises(ValueError, match="there is a second header"):
        again([*lines[:3], lines[0]], "ssp")


def test_a_file_that_is_no_trace_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="holds no trace"):
        read(tmp_path)
    run("bsp", trace=tmp_path)
    file = tmp_path / "trace.jsonl"
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*rows[:5], "half a li\n", *rows[5:]]))
    with pytest.raises(ValueError, match="line 6 is not of a trace"):
        read(tmp_path)
    file.write_text('{"kind": "tick"}\n')
    with pytest.raises(ValueError, match="line 1 is not of a trace"):
        read(tmp_path)


def test_what_is_written_is_in_the_file_as_soon_as_it_happens(tmp_path):
    recorder = Recorder(tmp_path / "a.jsonl")
    recorder.note({"kind": "join", "worker": 0})
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"kind": "join", "worker": 0, "time": 0.0}
    recorder.close()


def test_the_history_is_what_the_trace_says():
    seen = []
    result = run("failures", progress=seen.append)
    assert seen == result.history
    taken = [line for line in result.trace if line.get("outcome") == "applied"]
    assert [(entry.update, entry.worker, entry.delay, entry.time) for entry in seen] == [
        (line["version"], line["worker"], line["delay"], line["time"]) for line in taken
    ]
    assert all(entry.delay == entry.update - 1 - line["read"] for entry, line in zip(seen, taken, strict=True))
    assert result.trace[0]["samples"] == 48
    assert result.trace[0]["engine"] == "Simulator"


def test_anybody_may_keep_the_trace_of_a_server():
    """As an engine of somebody else's would: the lines alone make a replay."""
    lines = []
    job = lf.server.Job(
        model=smooth(),
        data=data(),
        loss=cross_entropy,
        optimizer=sgd,
        consistency=ASP(),
        correction=NoCorrection(),
        workers=2,
        updates=6,
        batch_size=4,
        seed=3,
    )
    server, worker = job.server(lines.append), job.worker()
    server.fingerprint()
    for number in range(2):
        server.join(number)
    for number in (0, 0, 1, 0, 1, 1):
        server.push(worker.answer(server.pull(number, 1)))
    server.fingerprint()
    found = replay([job.header(), *lines], smooth(), data(), loss=cross_entropy, optimizer=sgd)
    assert found.identical
    assert found.compared == (0, 6)


def test_weights_of_the_model_are_those_of_the_last_line():
    model = nn.Linear(6, 3)
    result = trained(model)
    assert result.model is model
    assert result.trace[-1]["kind"] == "weights"
    assert lf.trace.fingerprint(model.parameters()) == result.trace[-1]["sha256"]
    assert served(model)[0].fingerprint() == result.trace[-1]["sha256"]


# ---- checkpoints ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bsp", "asp", "ssp", "schedule"])
def test_a_run_goes_on_from_its_checkpoint_and_is_replayed_as_a_whole(name, tmp_path):
    settings = {"checkpoint": tmp_path, "checkpoints": 4}
    run(name, updates=10, **settings)
    half = (tmp_path / "trace.jsonl").read_text()
    (tmp_path / "trace.jsonl").write_text(half + '{"kind": "pu')  # the machine went down as it wrote
    result = run(name, updates=16, resume=True, **settings)
    lines = read(tmp_path)
    assert lines == json.loads(json.dumps(result.trace))
    found = again(lines, name)
    assert found.identical
    assert found.steps == found.compared[-1] == 16
    assert_same(result.model, run(name, updates=16).model)
    applied = [line for line in lines if line.get("outcome") == "applied"]
    assert len({line["ticket"] for line in applied}) == len(applied) == (64 if name == "bsp" else 16)


def test_a_run_that_broke_off_goes_on_from_its_last_checkpoint(tmp_path):
    calls = []

    def loss(scores, y):
        calls.append(None)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return cross_entropy(scores, y)

    settings = {"checkpoint": tmp_path, "checkpoints": 3, "updates": 15, "consistency": BSP()}
    model = smooth()
    with pytest.raises(KeyboardInterrupt):
        trained(model, loss=loss, **settings)
    assert_same(model, smooth())
    result = trained(model, loss=loss, resume=True, **settings)
    assert_same(result.model, trained(smooth(), consistency=BSP(), updates=15).model)
    assert replay(read(tmp_path), smooth(), data(), loss=cross_entropy, optimizer=sgd, consistency=BSP()).identical


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("stops", [(1,), (7, 20, 21)], ids=["early", "three times"])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(name, stops, tmp_path):
    """Whatever the workers were about, and whatever is to go wrong yet."""
    undisturbed = run(name)
    asked = []

    def stop():
        asked.append(None)
        return len(asked) in stops

    resume = False
    while True:
        try:
            result = run(name, checkpoint=tmp_path, checkpoints=1000, resume=resume, stop=stop)
            break
        except KeyboardInterrupt:
            resume = True
    assert resume
    assert_same(result.model, undisturbed.model)
    assert [(one.update, one.worker, one.delay, one.loss) for one in result.history] == [
        (one.update, one.worker, one.delay, one.loss) for one in undisturbed.history
    ]
    assert again(read(tmp_path), name).identical


def test_a_folder_that_vanishes_is_made_anew(tmp_path, caplog):
    folder = tmp_path / "run"

    def progress(entry):
        if entry.update == 5:
            shutil.rmtree(folder)

    result = trained(checkpoint=folder, checkpoints=4, updates=10, progress=progress)
    assert [record.message for record in caplog.records] == [
        f"the folder {folder} for checkpoints is not there: it is made",
        f"the trace {folder / 'trace.jsonl'} is not there any more: it is written anew",
    ]
    assert read(folder) == json.loads(json.dumps(result.trace))
    trained(checkpoint=folder, checkpoints=4, updates=12, resume=True)
    assert replay(read(folder), Net(), data(), loss=cross_entropy, optimizer=sgd).identical


def test_a_folder_that_cannot_be_written_to_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    result = trained(checkpoint=tmp_path / "file" / "run", trace=tmp_path / "a.jsonl", updates=6, checkpoints=3)
    assert result.history[-1].update == 6
    assert sum("no checkpoint after" in record.message for record in caplog.records) == 3


def test_what_cannot_be_gone_on_with_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="resume=True without a checkpoint"):
        trained(resume=True)
    with pytest.raises(ValueError, match=r"holds no checkpoint server\.pt: give the folder of a run"):
        trained(resume=True, checkpoint=tmp_path)
    trained(checkpoint=tmp_path, updates=4)
    before = (tmp_path / "trace.jsonl").read_text()
    for more, message in (({"workers": 3}, "the run had workers=4, given is 3"), ({"consistency": BSP()}, "consistency=")):
        with pytest.raises(ValueError, match=message):
            trained(checkpoint=tmp_path, resume=True, **more)
    assert (tmp_path / "trace.jsonl").read_text() == before
