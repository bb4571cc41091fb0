"""All-reduce: the same bits as behind a barrier of a server, whatever fails.

Most runs here fork this process, which has imported everything, instead of starting an interpreter for each worker.
"""

import contextlib
import glob
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from served import Net, adam, assert_same, cross_entropy, data, sgd, smooth, trained
from torch import nn

import lockfree as lf
from lockfree.executors import ProcessLost
from lockfree.server import AllReduce, Simulator, allreduce, child, read, replay
from lockfree.server.milestones import load
from lockfree.server.reduction import Exchange, Reduction
from lockfree.server.replica import DriftedApart
from lockfree.server.rounds import Part, mean
from lockfree.staleness import ASP, BSP, SSP, GapAware


class Forked:
    """Stands for a `subprocess.Popen`."""

    def __init__(self, pid):
        self.pid, self.code = pid, None

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)  # it is there at least until somebody has waited for it

    def wait(self, timeout=None):
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


@pytest.fixture
def forked(monkeypatch):
    """Makes workers by forking; returns those of all runs. None of them is there afterwards."""
    made = []

    @contextlib.contextmanager
    def started(rank, environment):
        ours, theirs = Pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for name in (*made[-rank:],) if rank else ():
                    name.way.close()
                ours.close()
                os.environ.update(environment, GLOO_SOCKET_IFNAME="lo")
                signal.signal(signal.SIGALRM, signal.SIG_IGN)
                child.main(theirs.fileno())
            finally:
                os._exit(70)
        theirs.close()
        process = Forked(pid)
        process.way = ours
        made.append(process)
        try:
            with ours:
                yield allreduce._Child(rank, process, ours)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill() if process.code is None else None
            process.wait()

    monkeypatch.setattr(allreduce, "_started", started)
    yield made
    for process in made:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


def both(model=Net, **settings):
    settings = {"consistency": BSP(), "workers": 2, "updates": 12, "given": data(46), **settings}
    progress = settings.pop("progress", None)
    ours = trained(model(), engine=AllReduce(), progress=progress, **settings)
    return ours, trained(model(), engine=Simulator(), **{**settings, "trace": None, "checkpoint": None})


def assert_alike(ours, theirs):
    assert_same(ours.model, theirs.model)
    told = [
        [(e.update, e.worker, e.ticket, e.applied, e.delay, e.loss, e.gap, e.ratio) for e in one.history]
        for one in (ours, theirs)
    ]
    assert told[0] == told[1]
    prints = [[(line["version"], line["sha256"]) for line in one.trace if line["kind"] == "weights"] for one in (ours, theirs)]
    assert prints[0] == prints[1]


# ---- the same bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "settings"),
    [
        (1, {}),
        (2, {"consistency": SSP(0), "optimizer": adam, "loss_scale": 64.0}),
        (3, {"clip": 0.5, "schedule": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)}),
        (2, {"batch_size": None, "model": lambda: Net().double(), "given": data(46, dtype=torch.float64)}),
        (3, {"model": lambda: smooth().bfloat16(), "given": data(46, dtype=torch.bfloat16)}),
    ],
)
def test_it_is_a_server_with_a_barrier(workers, settings, forked, tmp_path):
    ours, theirs = both(workers=workers, trace=tmp_path, **settings)
    assert len(forked) == workers
    assert_alike(ours, theirs)
    lines = read(tmp_path)
    assert lines == json.loads(json.dumps(ours.trace))
    assert {name: lines[0][name] for name in ("engine", "threads", "workers")} == {
        "engine": "AllReduce",
        "threads": 1,
        "workers": workers,
    }
    times = [line["time"] for line in lines]
    assert times == sorted(times)
    tickets = [line["ticket"] for line in lines if line["kind"] == "pull"]
    assert tickets == list(range(12 * workers))
    more = {name: settings[name] for name in ("schedule",) if name in settings}
    found = replay(
        lines,
        settings.get("model", Net)(),
        settings.get("given", data(46)),
        loss=cross_entropy,
        optimizer=settings.get("optimizer", sgd),
        consistency=settings.get("consistency", BSP()),
        **more,
    )
    assert found.identical
    assert found.compared == (0, 5, 10, 12)


class Sometimes(nn.Module):
    """A part that some batches have no gradient for, and buffers of whole numbers."""

    def __init__(self):
        super().__init__()
        self.always, self.seldom = smooth(1), smooth(2)
        self.register_buffer("most", torch.tensor(0))

    def forward(self, x):
        self.most += int(x[0, 0] > 0)
        return self.always(x) + (self.seldom(x) if x[0, 0] > 0 else 0.0)


def test_a_gradient_that_some_do_not_have_counts_as_nothing(forked):
    assert_alike(*both(Sometimes, workers=3, updates=8))


def reductions(size, weights, act):
    """Calls a function with each worker's reduction, in threads."""
    barrier, board, found = threading.Barrier(size), {}, {}

    class Threads(Exchange):
        def __init__(self, rank):
            self.rank, self.size = rank, size

        def swap(self, mine):
            board[self.rank] = mine.clone()
            barrier.wait()
            everything = [board[rank] for rank in range(size)]
            barrier.wait()
            return everything

        def to_each(self, whole, parts):
            parts.copy_(torch.cat([one.chunk(size)[self.rank] for one in self.swap(whole)]))

        def from_each(self, mine, whole):
            whole.copy_(torch.cat(self.swap(mine)))

    def work(rank):
        found[rank] = act(rank, Reduction(weights, Threads(rank)))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("kinds", [[torch.float32], [torch.bfloat16], [torch.float16, torch.float64, torch.complex64]])
def test_a_mean_in_parts_is_the_mean(size, kinds):
    generator = torch.Generator().manual_seed(size)

    def some(weight):
        return torch.empty_like(weight).copy_(torch.randn(weight.shape, generator=generator))

    shapes = [(7, 33), (1,), (), (3, 5, 3, 3), (129,), (0,), (2, 70)]
    weights = [torch.zeros(shape, dtype=kinds[place % len(kinds)]) for place, shape in enumerate(shapes)]
    weights[3] = weights[3].to(memory_format=torch.channels_last)
    buffers = [torch.zeros(5), torch.tensor(3), torch.ones(3, 2, dtype=torch.float64), torch.full((2,), -torch.inf)]
    for missing in (0.0, 0.3, 1.0):
        parts = []
        for rank in range(size):
            gradients = [None if torch.rand((), generator=generator) < missing else some(weight) for weight in weights]
            after = [some(buffers[0]), buffers[1] + rank, some(buffers[2]) if rank == 1 else buffers[2], buffers[3]]
            parts.append(Part(gradients, after, samples=3 + rank))
        there = [[gradient is not None for gradient in part.gradients] for part in parts]
        changed = [[one is not before for one, before in zip(part.buffers, buffers, strict=True)] for part in parts]

        def act(rank, reduction, parts=parts, there=there, changed=changed):
            for _ in range(2):  # memory is used again
                gradients = reduction.gradients(parts[rank].gradients, there, [part.samples for part in parts])
                kept = [None if gradient is None else gradient.clone() for gradient in gradients]
                assert not changed or reduction.buffers(parts[rank].buffers, changed)
            return kept, reduction.buffers(parts[rank].buffers, changed)

        wanted = mean(parts)
        for found in reductions(size, weights, act):
            for ours, theirs in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    assert ours.dtype == theirs.dtype
                    assert ours.stride() == theirs.stride()
                    assert torch.equal(torch.nan_to_num(ours), torch.nan_to_num(theirs))


# ---- what is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AllReduce(threads=0), "AllReduce: threads=0, give a whole number"),
        (lambda: AllReduce(timeout=0.0), "AllReduce: timeout=0.0, give seconds"),
        (lambda: both(consistency=ASP()), r"consistency=ASP\(\), but all workers step together: give BSP\(\)"),
        (lambda: both(consistency=SSP(1)), r"consistency=SSP\(bound=1\), but"),
        (lambda: both(correction=GapAware()), r"correction=GapAware\(.*\), but no gradient is late"),
        (lambda: both(loss=Unsent()), r"the loss cannot be sent to other processes \(cannot pickle '.*lock' object\)"),
        (lambda: both(lambda: nn.Linear(6, 3, device="meta")), "the model is on meta: move it"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(make, message, forked, unchecked):
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)
    assert not forked


class Unsent:
    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, scores, y):
        return cross_entropy(scores, y)


# ---- what goes wrong -----------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_is_named_and_the_run_goes_on_from_its_checkpoint(forked, tmp_path):
    settings = {"consistency": BSP(), "workers": 3, "checkpoint": tmp_path, "checkpoints": 4, "engine": AllReduce()}

    def progress(entry):
        if entry.update == 7:
            with contextlib.suppress(ProcessLookupError):
                os.kill(forked[1].pid, signal.SIGKILL)

    model = Net()
    with pytest.raises(
        ProcessLost, match=r"^worker 1 of 3 was ended by SIGKILL, so the others stopped .* last checkpoint$"
    ) as lost:
        trained(model, updates=100_000, progress=progress, **settings)
    assert lost.value.process == 1
    assert_same(model, Net())
    before = load(tmp_path)[0]["versions"]["now"]
    assert before % 4 == 0
    ours = trained(model, updates=before + 6, resume=True, **settings)
    theirs = trained(Net(), updates=before + 6, consistency=BSP(), workers=3)
    assert_same(ours.model, theirs.model)
    found = replay(read(tmp_path), Net(), data(), loss=cross_entropy, optimizer=sgd, consistency=BSP())
    assert found.identical
    assert found.steps == before + 6
    # The checkpoint is a server's: any engine goes on with it.
    more = {"consistency": BSP(), "workers": 3, "checkpoint": tmp_path, "checkpoints": 4}
    there = trained(Net(), updates=before + 9, resume=True, **more)
    assert_same(there.model, trained(Net(), updates=before + 9, consistency=BSP(), workers=3).model)


def test_a_worker_that_does_not_answer_is_named(forked, monkeypatch):
    monkeypatch.setattr(allreduce, "_PATIENCE", 0.5)

    def progress(entry):
        if entry.update == 3:
            os.kill(forked[1].pid, signal.SIGSTOP)

    engine = AllReduce(timeout=1.0)
    with pytest.raises(ProcessLost, match="worker 1 of 2 does not answer"):
        trained(consistency=BSP(), workers=2, updates=100_000, progress=progress, engine=engine)


class Strange(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")
        self.lock = threading.Lock()


class Bad(torch.utils.data.Dataset):
    def __init__(self, kind, *arguments):
        self.kind, self.arguments = kind, arguments

    def __len__(self):
        return 48

    def __getitem__(self, number):
        if number == 17:
            raise self.kind(*self.arguments)
        return torch.ones(6), number % 3


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (Bad(KeyError, "sample 17"), KeyError, "^'sample 17'$"),
        (Bad(RuntimeError, "out of luck"), RuntimeError, "^out of luck$"),
        (Bad(Strange, 1, 2), RuntimeError, "^Strange: 1 and 2$"),  # it cannot be sent
    ],
)
def test_an_error_of_the_users_comes_out_as_it_is(given, kind, message, forked):
    with pytest.raises(kind, match=message) as raised:
        trained(given=given, consistency=BSP(), workers=2, updates=20, engine=AllReduce())
    assert type(raised.value) is kind
    where = str(raised.value.__cause__)
    assert re.match(r"in worker [01] of 2:\nTraceback", where)
    assert "__getitem__" in where


class Moody:
    """A loss that is not finite, or whose gradient is not, when it sees some samples first."""

    def __init__(self):
        self.seen = set()

    def __call__(self, scores, y):
        kinds, numbers = y.unbind(1)
        loss = cross_entropy(scores, kinds)
        for number in sorted({3, 20, 21, 41} & set(numbers.tolist()) - self.seen):
            self.seen.add(number)
            return loss * torch.nan if number % 2 else loss + (scores * 0).abs().sqrt().sum()
        return loss


def test_values_that_are_not_finite_go_out_again(forked):
    x, y = data(48)
    given = (x, torch.stack([y, torch.arange(48)], dim=1))
    ours, theirs = (
        trained(smooth(), given, loss=Moody(), consistency=BSP(), workers=3, updates=4, engine=engine)
        for engine in (AllReduce(), Simulator())
    )
    assert_alike(ours, theirs)
    refused = [sorted((line["ticket"], line["why"]) for line in one.trace if "why" in line) for one in (ours, theirs)]
    assert refused[0] == refused[1]
    assert len(refused[0]) == 4
    assert replay(ours.trace, smooth(), given, loss=Moody(), optimizer=sgd, consistency=BSP()).identical


class Loudest(nn.Module):
    """Its buffer, and perhaps its output, cannot take what is infinite."""

    def __init__(self, kept=True):
        super().__init__()
        self.net, self.kept = smooth(), kept
        self.register_buffer("loudest", torch.tensor(0.0))

    def forward(self, x):
        if self.kept:
            self.loudest.copy_(x.max())
        return self.net(x.clamp(-9, 9)) * (0.0 if x.isinf().any() else 1.0)


def rooted(scores, y):
    return cross_entropy(scores, y) + (0.0 if scores.any() else scores.abs().sqrt().sum())


@pytest.mark.parametrize(
    ("what", "model", "loss"),
    [
        ("a loss of nan", smooth, cross_entropy),
        ("a gradient that is not finite", lambda: Loudest(kept=False), rooted),
        ("a buffer that is not finite", Loudest, cross_entropy),
    ],
)
def test_values_that_stay_bad_end_training_and_the_batch_is_named(what, model, loss, forked, tmp_path):
    x, y = data(48)
    x[17] = torch.inf
    (ticket,) = [n for n in range(12) if 17 in lf.server.Tickets(seed=3, length=48, batch_size=4).samples(n)]
    given = model()
    settings = {"loss": loss, "consistency": BSP(), "workers": 2, "updates": 6}
    with pytest.raises(lf.Diverged, match=rf"worker {ticket % 2} pushed {what}, 10 times for batch {ticket};") as raised:
        trained(given, (x, y), engine=AllReduce(), trace=tmp_path, **settings)
    assert "\n" not in str(raised.value)
    assert_same(given, model())
    with pytest.raises(lf.Diverged) as also:
        trained(model(), (x, y), **settings)
    assert str(raised.value) == str(also.value)
    lines = read(tmp_path)
    assert sum(line.get("outcome") == "not finite" for line in lines) == 10
    found = replay(lines, model(), (x, y), loss=loss, optimizer=sgd, consistency=BSP())
    assert found.identical
    assert found.steps == ticket // 2


def test_copies_that_drift_apart_are_noticed_before_they_are_kept(forked, tmp_path):
    class Drifting(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            self.param_groups[0]["params"][0].data.view(-1)[0] += os.getpid()

    with pytest.raises(DriftedApart, match=r"^after 5 updates the weights of worker 1, 2 are not those of worker 0"):
        trained(
            optimizer=lambda weights: Drifting(weights, lr=0.1),
            consistency=BSP(),
            workers=3,
            engine=AllReduce(),
            checkpoint=tmp_path,
            checkpoints=5,
        )
    assert load(tmp_path)[0]["versions"]["now"] == 0


def test_an_interruption_leaves_no_process_and_the_model_as_it_was(forked):
    def progress(entry):
        if entry.update == 4:
            signal.raise_signal(signal.SIGINT)

    model = Net()
    with pytest.raises(KeyboardInterrupt):
        trained(model, consistency=BSP(), workers=3, updates=100_000, engine=AllReduce(), progress=progress)
    assert len(forked) == 3
    assert_same(model, Net())


def test_what_the_first_process_warns_of_is_heard_here(forked, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        trained(
            consistency=BSP(), workers=2, updates=3, engine=AllReduce(), trace=tmp_path, checkpoint=tmp_path / "file" / "run"
        )
    assert [record.message.partition(",")[0] for record in caplog.records][-1] == "no checkpoint after 3 updates"


# ---- processes that are started ------------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, torch
torch.set_num_threads(1)
from torch import nn
import lockfree as lf

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
    def forward(self, x):
        return self.net(x)

torch.manual_seed(0)
x = torch.randn(30, 4)
state = Own().state_dict()
def run(engine, updates=20, progress=None):
    model = Own()
    model.load_state_dict(state)
    scale = 0.5
    lf.server.train(
        model, (x, x[:, :2] * 3), loss=lambda a, b: scale * nn.functional.mse_loss(a, b), workers=2, batch_size=4, seed=2,
        optimizer=lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9), updates=updates, engine=engine,
        consistency=lf.staleness.BSP(), progress=progress,
    )
    return model.state_dict()
if len(sys.argv) > 1:
    run(lf.server.AllReduce(), 10**6, lambda entry: entry.update == 3 and os.kill(os.getpid(), signal.SIGKILL))
ours, theirs = run(lf.server.AllReduce()), run(lf.server.Simulator())
assert all(torch.equal(ours[name], theirs[name]) for name in ours)
print("the same bits")
"""


def test_processes_that_are_started_are_given_what_is_local_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Own(Net):
        pass

    class Ours(torch.utils.data.TensorDataset):
        pass

    settings = {"consistency": BSP(), "workers": 2, "loss": lambda scores, y: 0.5 * cross_entropy(scores, y)}
    ours = trained(Own(), Ours(*data(46)), engine=AllReduce(), **settings)
    assert_alike(ours, trained(Own(), Ours(*data(46)), **settings))
    assert not workers_of_anybody(str(tmp_path))


@pytest.mark.slow
def test_a_script_without_a_guard_and_with_lambdas(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("the same bits\n", "")


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    with subprocess.Popen([sys.executable, str(tmp_path / "script.py"), "die"], stdout=subprocess.PIPE, cwd=tmp_path) as parent:
        assert parent.communicate(timeout=200)[0] == b""  # returns when nobody is left who could write
    assert parent.returncode == -signal.SIGKILL
    assert not workers_of_anybody(str(tmp_path))


def workers_of_anybody(folder):
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"lockfree.server.child" in Path(path).read_bytes() and os.readlink(path[:-7] + "cwd") == folder:
                found.append(path)
    return found


def test_an_interruption_while_processes_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        trained(consistency=BSP(), workers=2, updates=100_000, engine=AllReduce())
    assert time.monotonic() - began < 20
    assert not workers_of_anybody(str(tmp_path))
