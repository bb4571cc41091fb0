"""The engine on Ray: real processes that are really killed, and a run that is what it would have been without."""

import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from served import Net, a_plain_loop, assert_same, cross_entropy, data, plain, sgd, smooth

from lockfree.objective import Diverged
from lockfree.server import Ray, Simulator, read, replay, train
from lockfree.server.cluster import faults
from lockfree.server.cluster.session import session
from lockfree.staleness import BSP, SSP, DelayCompensation

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.xdist_group("ray")  # one cluster for all


def away():
    """Whether this is a process of Ray's."""
    return "default_worker" in sys.argv[0]


def slow(output, target):
    """The arithmetic of tests takes no time, and the run should not be over before everybody has died."""
    if away():
        time.sleep(0.03)
    return cross_entropy(output, target)


@pytest.fixture(scope="module")
def cluster():
    """One for all: processes that have imported PyTorch stay for the next run."""
    with session(None, 5):
        yield ray


def run(model=None, given=None, **more):
    settings = {
        "loss": cross_entropy,
        "optimizer": sgd,
        "workers": 4,
        "batch_size": 4,
        "updates": 60,
        "seed": 3,
        "engine": Ray(),
    }
    return train(model or Net(), given or data(), **{**settings, "fingerprints": 10, **more})


def replayed(result, model=None, **more):
    settings = {"loss": cross_entropy, "optimizer": sgd} | more
    return replay(result.trace, model or Net(), data(), **settings)


def test_a_run_replays_bit_for_bit(cluster, tmp_path):
    correction = DelayCompensation()
    seen = []
    result = run(loss=slow, correction=correction, trace=tmp_path, progress=seen.append)
    told = replayed(result, loss=slow, correction=correction)
    assert told.identical
    assert told.steps == 60
    assert told.compared == tuple(range(0, 61, 10))
    assert result.history == seen
    assert len(seen) == 60
    assert max(entry.delay for entry in result.history) > 0
    assert {entry.worker for entry in result.history} == {0, 1, 2, 3}
    assert result.trace[0]["engine"] == "Ray"
    assert result.trace[0]["threads"] == 1
    assert read(tmp_path) == list(result.trace)
    model = Net()
    assert not torch.equal(model.layers[0].weight, result.model.layers[0].weight)


def test_behind_a_barrier_it_is_what_the_simulator_does(cluster):
    result = run(consistency=BSP(), updates=12)
    wanted = run(consistency=BSP(), updates=12, engine=Simulator())
    assert_same(result.model, wanted.model)
    assert replayed(result, consistency=BSP()).identical


def test_one_worker_is_sequential_descent(cluster):
    result = run(workers=1, updates=12)
    model = Net()
    a_plain_loop(model, data(), sgd, batch_size=4, updates=12)
    assert_same(result.model, model)


def test_nobody_is_further_ahead_than_the_bound(cluster):
    def uneven(output, target):
        time.sleep(random.random() * 0.02 if away() else 0)
        return cross_entropy(output, target)

    result = run(loss=uneven, consistency=SSP(3), updates=80)
    clocks = Counter()
    widest = 0
    for line in result.trace:
        if line["kind"] == "pull":
            widest = max(widest, clocks[line["worker"]] - min(clocks[worker] for worker in range(4)))
        elif line["kind"] == "push" and line["outcome"] == "applied":
            clocks[line["worker"]] += 1
    assert 0 < widest <= 3
    assert replayed(result, consistency=SSP(3)).identical


def test_an_error_in_a_worker_ends_the_run_with_it(cluster):
    def broken(output, target):
        raise KeyError("no such column")

    model = Net()
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(KeyError, match="no such column") as caught:
        run(model, loss=broken)
    assert "(in worker" in caught.value.__notes__[0]
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert ray.is_initialized()  # it was before


def test_values_that_are_not_finite_go_out_again_and_end_the_run_in_the_end(cluster):
    def poisoned(output, target):
        return cross_entropy(output, target) * float("nan")

    with pytest.raises(Diverged, match=r"training broke after 0 updates: worker \d pushed a loss of nan"):
        run(loss=poisoned, refusals=4, updates=10)


def test_a_job_that_cannot_be_sent_is_an_error_of_one_line(cluster):
    lock = __import__("threading").Lock()
    with pytest.raises(ValueError, match="cannot be sent to another process") as caught:
        run(loss=lambda output, target: (lock, cross_entropy(output, target))[1])
    assert "\n" not in str(caught.value)


class Fatal(torch.utils.data.Dataset):
    """Kills whoever reads it, but for one worker."""

    def __init__(self, spared):
        self.x, self.y = data()
        self.spared = spared

    def __len__(self):
        return len(self.x)

    def __getitem__(self, place):
        if away() and not self._claimed():
            os.kill(os.getpid(), signal.SIGKILL)
        return self.x[place], self.y[place]

    def _claimed(self):
        """The first process that comes here may live."""
        if self.spared is None:
            return False
        try:
            with open(self.spared, "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return Path(self.spared).read_text() == str(os.getpid())
        return True


def test_a_worker_that_cannot_be_started_is_left_out(cluster, tmp_path, caplog):
    given = Fatal(str(tmp_path / "spared"))
    result = run(given=given, workers=2, updates=20, consistency=SSP(2), engine=Ray(restarts=0))
    assert "has died 1 times in a row without a gradient" in caplog.text
    assert "training goes on without it" in caplog.text
    assert len(result.history) == 20
    assert len({entry.worker for entry in result.history}) == 1
    assert sum(line["kind"] == "evict" for line in result.trace) == 1


def test_no_worker_left_is_an_error_that_names_it(cluster):
    with pytest.raises(RuntimeError, match=r"no worker is left: worker \d has died 1 times in a row without a gradient"):
        run(given=Fatal(None), workers=1, updates=5, engine=Ray(restarts=0))


def check_faults(folder, *, worker_kills, server_kills, updates, seed):
    schedule = faults.Schedule.at_random(folder, seed=seed, workers=4, worker_kills=worker_kills, server_kills=server_kills)
    engine = Ray(restarts=50, snapshots=40, _faults=schedule)

    def patient(output, target):
        """The run must not be over before all have died, however long a machine takes to start them again."""
        if away() and len(list(folder.glob("*/*.death"))) < worker_kills + server_kills:
            time.sleep(0.5)
        return cross_entropy(output, target)

    settings = {"model": smooth(), "loss": patient, "optimizer": plain, "consistency": SSP(3), "batch_size": 8}
    result = run(**settings, updates=updates, engine=engine, every=1)
    assert sum(schedule.of_worker(number).suffered for number in range(4)) == worker_kills
    assert schedule.of_server().suffered == server_kills
    taken = [line for line in result.trace if line["kind"] == "push" and line["outcome"] in ("applied", "dropped")]
    assert len(taken) == updates  # all, and each of them once
    keys = [(line["worker"], line["incarnation"], line["sequence"]) for line in taken]
    assert len(set(keys)) == updates
    assert len({line["ticket"] for line in taken}) == updates
    by_key = dict(zip(keys, taken, strict=True))
    acknowledged = 0
    for number in range(4):
        for note in schedule.of_worker(number).notes:
            incarnation, sequence, ticket, applied, version = map(int, note.split())
            line = by_key[number, incarnation, sequence]  # it would raise if it were lost
            assert (line["ticket"], line["version"], line["outcome"] == "applied") == (ticket, version, bool(applied))
            acknowledged += 1
    assert updates - worker_kills - server_kills - 4 <= acknowledged <= updates
    assert sum(line["kind"] == "restore" for line in result.trace) == server_kills
    assert sum(line["kind"] == "evict" for line in result.trace) == worker_kills
    told = replay(result.trace, smooth(), data(), loss=patient, optimizer=plain, consistency=SSP(3))
    assert told.identical
    calm = run(**settings | {"model": smooth()}, updates=updates, engine=Simulator())
    x, y = data()
    with torch.no_grad():
        losses = [float(cross_entropy(model(x), y)) for model in (result.model, calm.model, smooth())]
    assert abs(losses[0] - losses[1]) < 0.1 * (losses[2] - losses[1])
    return result


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("worker_kills", "server_kills", "updates"), [(4, 1, 500), pytest.param(20, 3, 2500, marks=pytest.mark.slow)]
)
def test_deaths_of_workers_and_server_lose_nothing(cluster, tmp_path, worker_kills, server_kills, updates):
    check_faults(tmp_path, worker_kills=worker_kills, server_kills=server_kills, updates=updates, seed=4)


def test_a_dead_worker_is_noticed_at_once(cluster, tmp_path):
    schedule = faults.Schedule(folder=tmp_path, workers=[[], [faults.Kill(faults.Place.BEFORE_PUSH, 3)]])
    result = run(loss=slow, workers=2, consistency=BSP(), updates=100, engine=Ray(_faults=schedule))
    pushes = [line["time"] for line in result.trace if line["kind"] == "push"]
    waited = max(later - earlier for earlier, later in itertools.pairwise(pushes))
    (evicted,) = (line["time"] for line in result.trace if line["kind"] == "evict")
    last = max(time for time in pushes if time < evicted)
    assert evicted - last < 2
    assert waited < 2
    assert replayed(result, loss=slow, consistency=BSP()).identical


def test_checkpoints_are_those_of_train(cluster, tmp_path):
    first = run(updates=20, workers=2, consistency=BSP(), checkpoint=tmp_path)
    more = run(updates=40, workers=2, consistency=BSP(), checkpoint=tmp_path, resume=True)
    whole = run(updates=40, workers=2, consistency=BSP(), engine=Simulator())
    assert first.trace[-1]["kind"] == "snapshot"
    assert_same(more.model, whole.model)
    assert replayed(more, consistency=BSP()).identical
    assert (tmp_path / "server.pt").is_file()


def test_a_run_is_watched_stopped_and_gone_on_with(cluster, tmp_path):
    seen, told = {}, []

    def watch(version, weights, buffers):
        seen[version] = ([weight.clone() for weight in weights], len(told))

    settings = {"consistency": BSP(), "loss": slow, "updates": 24, "checkpoint": tmp_path, "workers": 2}
    settings |= {"watch": watch, "watch_every": 10, "progress": told.append}
    with pytest.raises(KeyboardInterrupt):
        run(**settings, stop=lambda: len(told) > 16)
    assert set(seen) <= {0, 10}
    result = run(**settings, resume=True)
    assert sorted(seen) == [0, 10, 20, 24]
    for version, (weights, pushes) in seen.items():
        if version:
            assert pushes >= 2 * version  # what has led to them was told before
            wanted = run(consistency=BSP(), workers=2, updates=version, engine=Simulator()).model
            assert all(map(torch.equal, weights, wanted.parameters()))
    assert_same(result.model, run(consistency=BSP(), workers=2, updates=24, engine=Simulator()).model)
    assert replayed(result, loss=slow, consistency=BSP()).identical


def test_a_detached_server_goes_on_with_another_driver(cluster, tmp_path):
    def interrupt(entry):
        if entry.update == 10:
            raise KeyboardInterrupt

    settings = {"loss": slow, "workers": 2, "updates": 40, "checkpoint": tmp_path, "consistency": SSP(2)}
    engine = Ray(detached=True, name="mine")
    with pytest.raises(KeyboardInterrupt):
        run(**settings, engine=engine, progress=interrupt)
    with pytest.raises(ValueError, match="the server 'mine' trains something else"):
        run(**settings | {"updates": 50, "checkpoint": tmp_path / "other"}, engine=engine)
    result = run(**settings, engine=engine)
    assert [entry.update for entry in result.history] == list(range(1, 41))  # those of the first driver, too
    assert sum(line["kind"] == "join" for line in result.trace) == 4
    assert replayed(result, loss=slow, consistency=SSP(2)).identical
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor("mine", namespace="lockfree")


def test_a_detached_server_needs_a_folder(cluster):
    with pytest.raises(ValueError, match="give one as checkpoint="):
        run(engine=Ray(detached=True))


def test_another_cluster_than_the_one_joined_is_an_error(cluster):
    with pytest.raises(ValueError, match=r"this process is part of the cluster at 127\.0\.0\.1:\d+: call ray\.shutdown"):
        run(engine=Ray("10.0.0.1:6379"))


# ---- what surrounds it ---------------------------------------------------------------------------------------------------------


def processes(folder):
    """The processes of Ray that a script with this folder for temporary files has started, by their numbers."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ")
            mine = f"TMPDIR={folder}".encode() in (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mine and (b"raylet" in line or b"gcs_server" in line or line.startswith(b"ray::")):
            found.add(int(process.name))
    return found


SCRIPT = """
import torch
from torch import nn
from lockfree.server import Ray, train

def loss(output, target):
    {loss}
    return nn.functional.mse_loss(output, target)

if __name__ == "__main__":
    train(
        nn.Linear(2, 1), (torch.randn(8, 2), torch.randn(8, 1)), loss=loss, workers=2, batch_size=2, updates=100000,
        optimizer=lambda weights: torch.optim.SGD(weights, lr=0.01), engine=Ray(),
        progress=lambda entry: print("pushed", flush=True) if entry.update == 1 else None,
    )
"""


def start(tmp_path, loss="pass"):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(loss=loss))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    return subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )


def left(folder, seconds=10):
    end = time.monotonic() + seconds
    while (new := processes(folder)) and time.monotonic() < end:
        time.sleep(0.2)
    return new


def addresses_of(pids):
    """Where processes listen: the lines of /proc/net/tcp of their sockets."""
    sockets = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(file).removeprefix("socket:[").removesuffix("]"))
            except OSError:
                continue
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                found.append(fields[1].split(":")[0])
    return found


def test_control_c_leaves_nothing_behind(tmp_path):
    process = start(tmp_path)
    assert process.stdout.readline() == "pushed\n"
    mine = processes(tmp_path)
    listening = addresses_of(mine)
    assert listening
    assert set(listening) <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1
    tokens = list(tmp_path.glob("lockfree-token-*/token"))
    assert all(token.stat().st_mode & 0o777 == 0o600 for token in tokens)
    assert all(token.parent.stat().st_mode & 0o777 == 0o700 for token in tokens)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert not left(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_an_error_leaves_nothing_behind_and_says_what_it_was(tmp_path):
    process = start(tmp_path, loss="raise RuntimeError('what a loss')")
    printed, errors = process.communicate(timeout=100)
    assert printed == ""
    assert errors.splitlines()[-2:] == ["RuntimeError: what a loss", "(in worker 0)"] or "what a loss" in errors
    assert not left(tmp_path)


def test_without_ray_it_says_how_to_install_it():
    code = """
        import sys
        sys.modules["ray"] = None
        import lockfree.server, torch
        try:
            lockfree.server.train(
                torch.nn.Linear(1, 1), (torch.ones(1, 1), torch.ones(1, 1)), loss=torch.nn.functional.mse_loss, workers=1,
                batch_size=1, updates=1, optimizer=lambda weights: torch.optim.SGD(weights, lr=0.1), engine=lockfree.server.Ray(),
            )
        except ImportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=100)
    assert done.stdout == "the engine Ray needs the package ray: pip install 'lockfree[cluster]'\n"


def test_an_address_that_does_not_answer_is_an_error_at_once():
    code = """
        import time, torch
        from lockfree.server import Ray, train
        for address in ("127.0.0.1:1", "ray://somewhere:1", "somewhere"):
            start = time.monotonic()
            try:
                train(
                    torch.nn.Linear(1, 1), (torch.ones(1, 1), torch.ones(1, 1)), loss=torch.nn.functional.mse_loss, workers=1,
                    batch_size=1, updates=1, optimizer=lambda weights: torch.optim.SGD(weights, lr=0.1), engine=Ray(address),
                )
            except (ConnectionError, ValueError) as error:
                print(type(error).__name__, time.monotonic() - start < 10, error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=200)
    first, *others = done.stdout.splitlines()
    assert first.startswith("ConnectionError True no cluster answers at 127.0.0.1:1 within 5 s (Connection refused): start one")
    assert len(others) == 2
    assert all("give host and port of a cluster's head node, as in 10.0.0.1:6379" in line for line in others)


def test_the_package_does_not_import_ray():
    code = "import lockfree, sys; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100).stdout == "False\n"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threads": 0}, "threads=0"),
        ({"restarts": -1}, "restarts=-1"),
        ({"snapshots": True}, "snapshots=True"),
        ({"patience": 0}, "patience=0"),
        ({"cpus": -1}, "cpus=-1"),
    ],
)
def test_a_field_out_of_range_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        Ray(**fields)
