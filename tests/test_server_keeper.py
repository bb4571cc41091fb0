"""A server that outlives its process: what it has acknowledged is not lost, whatever happens, and nothing counts twice."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from served import Net, adam, cross_entropy, data, sgd

from lockfree.server import Applied, Refused, replay
from lockfree.server.cluster import faults, journal
from lockfree.server.cluster.keeper import Keeper
from lockfree.server.cluster.parcel import pack, pack_pulled, pack_push, unpack, unpack_pulled, unpack_push
from lockfree.server.job import Job
from lockfree.staleness import ASP, BSP, SSP, DelayCompensation, NoCorrection


class Died(BaseException):
    pass


class Faults(faults.Faults):
    """In one process, whose death must not be real."""

    def die(self):
        raise Died


def job(**more):
    settings = {"updates": 60, "workers": 3, "batch_size": 8, "consistency": ASP(), "correction": NoCorrection()}
    settings |= {"optimizer": sgd, "loss": cross_entropy, "fingerprints": 7, "model": Net(), "data": data()}
    return Job(**settings | more)


def lines(keeper):
    return [json.loads(line) for line in keeper.trace(0, most=2**30).splitlines()]


class Run:
    """Workers in turn, at random; they ask again when the server has died, and look at the trace all the time."""

    def __init__(self, job, folder, *, seed, deaths=(), **options):
        self.job, self.folder, self.options = job, folder, options
        self.draw = random.Random(seed)
        self.deaths = deaths
        self.acknowledged = []
        self.seen = b""
        self.died = -1
        self.revive()

    def revive(self):
        while True:
            self.died += 1
            plan = Faults(self.folder / "faults", self.deaths)
            try:
                self.keeper = Keeper(self.job, self.folder / "state", header=self.job.header(), faults=plan, **self.options)
                return
            except Died:
                continue

    def ask(self, what, *arguments):
        while True:
            try:
                return getattr(self.keeper, what)(*arguments)
            except Died:
                self.revive()
            finally:
                whole = self.keeper.trace(0, most=2**30)
                assert whole.startswith(self.seen), "what was shown has changed"
                self.seen = whole

    def go(self):
        worker = self.job.worker()
        incarnations = {number: self.ask("join", number) for number in range(self.job.workers)}
        pulled = {}
        while not self.keeper.finished:
            number = self.draw.choice(list(incarnations))
            if self.draw.random() < 0.02:
                self.ask("evict", number)
                incarnations[number] = self.ask("join", number)
                pulled.pop(number, None)
            elif number not in pulled:
                found = self.ask("pull", number, incarnations[number])
                if found is not None:
                    pulled[number] = unpack_pulled(pack_pulled(found))
            else:
                push = unpack_push(pack_push(worker.answer(pulled.pop(number))))
                answer = self.ask("push", push)
                self.acknowledged.append((push.worker, push.incarnation, push.sequence, answer))
        return self


def check(run, **how):
    """Every acknowledged push is in the trace, once, with the answer that its worker got; the trace replays."""
    told = lines(run.keeper)
    taken = [line for line in told if line["kind"] == "push" and line["outcome"] in ("applied", "dropped")]
    keys = [(line["worker"], line["incarnation"], line["sequence"]) for line in taken]
    assert max(Counter(keys).values()) == 1
    by_key = dict(zip(keys, taken, strict=True))
    for *key, answer in run.acknowledged:
        line = by_key[tuple(key)]
        assert (line["version"], line["outcome"] == "applied") == (answer.version, isinstance(answer, Applied))
    tickets = [line["ticket"] for line in taken]
    assert max(Counter(tickets).values()) == 1
    assert replay(told, run.job.model, run.job.data, loss=run.job.loss, optimizer=run.job.optimizer, **how).identical


def kills(seed, count=8):
    draw = random.Random(seed)
    places = [draw.choice(faults.SERVER) for _ in range(count)]
    return [faults.Kill(place, draw.randint(1, 2 if place is faults.Place.IN_SNAPSHOT else 6)) for place in places]


@pytest.mark.parametrize("consistency", [ASP(), SSP(2), BSP()], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_eight_deaths_lose_nothing(tmp_path, consistency, seed):
    correction = DelayCompensation() if seed else NoCorrection()
    what = job(consistency=consistency, correction=correction, updates=60 if seed != 2 else 30, optimizer=adam if seed else sgd)
    run = Run(what, tmp_path, seed=seed, deaths=kills(seed), snapshots=5).go()
    assert run.died == 8
    assert sum(line["kind"] == "restore" for line in lines(run.keeper)) >= 1
    check(run, consistency=consistency, correction=correction)


@pytest.mark.parametrize("place", faults.SERVER)
def test_a_death_anywhere_changes_no_weight(tmp_path, place):
    whole = Run(job(), tmp_path / "a", seed=0, snapshots=7).go()
    broken = Run(job(), tmp_path / "b", seed=0, deaths=[faults.Kill(place, 2)], snapshots=7).go()
    assert (whole.died, broken.died) == (0, 1)
    for one, other in zip(whole.keeper.server.weights, broken.keeper.server.weights, strict=True):
        assert torch.equal(one, other)
    plain = [line for line in lines(broken.keeper) if line["kind"] not in ("snapshot", "restore")]
    wanted = [line for line in lines(whole.keeper) if line["kind"] not in ("snapshot", "restore")]
    duplicate = place is faults.Place.AFTER_LOGGING  # it has been answered, and nobody has heard
    assert len(plain) == len(wanted) + duplicate
    assert sum(line.get("outcome") == "duplicate" for line in plain) == duplicate


def test_a_journal_that_grows_too_large_makes_a_snapshot(tmp_path, monkeypatch):
    monkeypatch.setattr("lockfree.server.cluster.keeper._AT_LEAST", 0)
    monkeypatch.setattr("lockfree.server.cluster.keeper._TIMES_A_SNAPSHOT", 1)
    run = Run(job(), tmp_path, seed=0).go()
    assert sum(line["kind"] == "snapshot" for line in lines(run.keeper)) >= 3
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "state").iterdir()) == ["journal", "snapshot", "trace.jsonl"]


def test_values_that_are_not_finite_are_taken_down_as_such(tmp_path):
    run = Run(job(), tmp_path, seed=0, deaths=[faults.Kill(faults.Place.AFTER_LOGGING, 2)])
    incarnation = run.ask("join", 0)
    push = run.job.worker().answer(run.ask("pull", 0, incarnation))
    run.ask("push", push)
    push = run.job.worker().answer(run.ask("pull", 0, incarnation))
    push.gradients[0].fill_(float("nan"))
    with pytest.raises(Refused, match="without a pull"):  # it has been refused, and nobody has heard why
        run.ask("push", push)
    assert run.died == 1
    assert [line.get("outcome") for line in lines(run.keeper)[-4:]] == ["not finite", None, None, "refused"]
    again = run.ask("pull", 0, incarnation)
    assert (again.ticket, again.version) == (1, 1)
    run.ask("push", run.job.worker().answer(again))
    assert replay(lines(run.keeper), Net(), data(), loss=cross_entropy, optimizer=sgd).differing == {}


@pytest.mark.parametrize("gone", ["folder", "journal", "trace"])
def test_a_folder_that_vanishes_is_made_again(tmp_path, gone, caplog):
    run = Run(job(), tmp_path, seed=0)
    run.ask("join", 0)
    state = tmp_path / "state"
    if gone == "folder":
        shutil.rmtree(state)
    else:
        next(state.glob(f"{gone}*")).unlink()
    run.ask("join", 1)
    assert "making it anew" in caplog.text
    before = run.keeper.server.clocks
    run.revive()
    assert run.keeper.server.clocks == before
    assert replay(lines(run.keeper), Net(), data(), loss=cross_entropy, optimizer=sgd).differing == {}


def test_a_folder_that_cannot_be_made_is_an_error_that_stays(tmp_path):
    run = Run(job(), tmp_path, seed=0)
    run.ask("join", 0)
    shutil.rmtree(tmp_path / "state")
    (tmp_path / "state").write_text("in the way")
    for _ in range(2):
        with pytest.raises(OSError, match=r"the server cannot write to .*state: .*; make room or give another folder"):
            run.ask("join", 1)
    assert run.keeper.server.clocks == {0: 0}


def test_a_folder_of_another_run_is_refused(tmp_path):
    Run(job(), tmp_path, seed=0)
    with pytest.raises(ValueError, match="is of another run: give an empty folder"):
        Run(job(seed=1), tmp_path, seed=0)


def test_a_trace_that_was_cut_is_refused(tmp_path):
    Run(job(), tmp_path, seed=0)
    (tmp_path / "state" / "trace.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"trace\.jsonl is shorter than it was"):
        Run(job(), tmp_path, seed=0)


def test_a_journal_is_read_up_to_where_it_was_cut(tmp_path):
    path = tmp_path / "journal"
    parts = [pack([torch.arange(3.0), None]), pack([])]
    taken = journal.Journal(path, sync=True)
    ends = []
    for number in range(3):
        taken.append({"number": number, "loss": 0.1 + number}, parts)
        ends.append(taken.size)
    taken.close()
    text = path.read_bytes()
    assert len(text) == ends[-1]
    for length in range(len(text) + 1):
        path.write_bytes(text[:length])
        records = list(journal.read(path))
        assert [head["number"] for head, _ in records] == list(range(sum(end <= length for end in ends)))
    assert records[2][0]["loss"] == 2.1
    first, missing = unpack(records[2][1][0], own=True)
    assert torch.equal(first, torch.arange(3.0))
    assert missing is None
    path.write_bytes(text[:-1] + b"?")
    assert len(list(journal.read(path))) == 2
    assert list(journal.read(tmp_path / "none")) == []


TENSORS = {
    "transposed": torch.randn(3, 4).T,
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "one number": torch.tensor(2.5),
    "nothing": torch.empty(0, 3),
    "half": torch.randn(5).to(torch.bfloat16),
    "truth": torch.tensor([True, False]),
    "whole": torch.arange(6, dtype=torch.int64).reshape(2, 3),
    "double": torch.randn(7, dtype=torch.float64),
}
SPARSE = {
    "every other": torch.randn(4, 6)[:, ::2],
    "expanded": torch.randn(3).expand(2, 3),
    "conjugate": torch.randn(2, 2, dtype=torch.complex64).conj(),
}


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", [*TENSORS, *SPARSE])
def test_tensors_come_out_as_they_went_in(name, own):
    tensor = (TENSORS | SPARSE)[name]
    (parcel,) = pack([tensor])
    parcel.data.flags.writeable = False
    (found,) = unpack([parcel], own=own)
    assert found.dtype == tensor.dtype
    assert torch.equal(found, tensor)
    assert found.data_ptr() % 64 == 0
    if name in TENSORS:
        assert found.stride() == tensor.stride()
    if own:
        before = tensor.clone()
        found.zero_()
        assert torch.equal(tensor, before)


def test_a_schedule_of_deaths_is_that_of_its_seed():
    options = {"seed": 5, "workers": 4, "worker_kills": 20, "server_kills": 3}
    one, same = (faults.Schedule.at_random(Path("x"), **options) for _ in range(2))
    assert one == same
    assert [len(share) for share in one.workers] == [5, 5, 5, 5]
    assert len(one.server) == 3
    assert one != faults.Schedule.at_random(Path("x"), **options | {"seed": 6})
