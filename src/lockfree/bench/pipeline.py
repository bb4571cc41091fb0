"""What two processes of one thread reach as a pipeline, beside PyTorch's own pipelines and beside all that the machine can give."""

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from lockfree.bench.step import machine
from lockfree.bench.timing import ratio
from lockfree.convert import convert
from lockfree.learner import Learner
from lockfree.processes import begin_worker
from lockfree.rule import Rule
from lockfree.rules import SyntheticGradients, get

_CLASSES = 10
_SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B"}


@dataclass(frozen=True)
class Size:
    """How large the network is: equal blocks, Linear and ReLU, the last of them with a classifier on top.

    Attributes:
        blocks: An even number, so that there is a middle to cut at.
        units: Of every block's input and output.
        batch: Samples in a batch.
    """

    blocks: int = 16
    units: int = 512
    batch: int = 256


@dataclass(frozen=True)
class Training:
    """What one process does for a contestant.

    Attributes:
        model: The network, or the part of it that this process trains.
        step: Takes the next batch, an optimizer's step included, and returns the loss if it comes to light here.
        lead: Steps from a standstill until everything is at work; not below 2, for caches to forget whoever was there before.
        settle: Finishes what is in flight.
    """

    model: nn.Module
    step: Callable[[], float | None]
    lead: int = 2
    settle: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Contestant:
    """Something to measure.

    Attributes:
        make: Maps the number of a process and the size of the network to what this process does. It is sent to the process, so it
            must be a function of a module, or `functools.partial` of one.
        ranks: The processes that take part; others sleep meanwhile.
        together: Whether they train one network together, and not one each.
    """

    make: Callable[[int, Size], Training]
    ranks: tuple[int, ...] = (0, 1)
    together: bool = False


def pipeline(
    rounds: int = 4,
    repeats: int = 3,
    size: Size = Size(),
    microbatches: Sequence[int] = (2, 4, 8),
    steps: int = 12,
    patience: float = 120.0,
) -> dict[str, Any]:
    """Times training by two processes of one thread each on this machine, which should have two idle cores.

    The network, cut in two in the middle, is trained by plain SGD on random data:

    - ``pred`` and ``dni``: the pipeline executor, a classifier on each block, or a linear synthesiser at the cut;
    - ``gpipe`` and ``1f1b``: the schedules of ``torch.distributed.pipelining``, with each number of microbatches; the fastest counts;
    - ``plain``: backpropagation in one process, while the other sleeps;
    - ``two_pred``, ``two_dni``, ``two_plain``: the ceilings. Both processes do the work of the rule, each for a network of its own, by
      the sequential executor, batch by batch. Their throughput is the sum of what each reaches while both run.

    All take turns in the same two processes, which live as long as a repeat. A turn begins with steps that fill the pipeline, is then
    timed from when both processes are ready until both are done, and empties the pipeline at the end. Filling and emptying do not
    count: in the time every block works on ``steps`` batches. GPipe and 1F1B fill and drain within every batch by their nature;
    nothing else holds them up. What they need not do is spared: outputs are not collected, and gradients come out scaled instead of
    being scaled afterwards.

    Args:
        rounds: Turns of each contestant in a repeat.
        repeats: How often everything is measured, in new processes; the medians over the repeats are returned.
        size: Of the network.
        microbatches: Numbers to try.
        steps: Timed steps in a turn.
        patience: Seconds after which a process that does not answer is given up.

    Returns:
        Ratios of throughput, each the median of the rounds' own, and their ranges over the repeats; samples a second of everything;
        the fastest number of microbatches in each repeat; the machine.

    Raises:
        ChildProcessError: If a process fails or dies.
        TimeoutError: If one does not answer.
    """
    contestants = _contestants(microbatches)
    found: dict[str, list[float]] = {}
    chosen: dict[str, list[int]] = {}
    for _ in range(repeats):
        rates = measure_rates(contestants, size, rounds=rounds, steps=steps, patience=patience)
        for schedule in _SCHEDULES:
            best = max(microbatches, key=lambda number: statistics.median(rates[f"{schedule}_{number}"]))
            rates[schedule] = rates[f"{schedule}_{best}"]
            chosen.setdefault(f"{schedule}_microbatches", []).append(best)
        for name, (over, under) in _pairs().items():
            found.setdefault(name, []).append(ratio(rates, over, under))
        for name, values in rates.items():
            found.setdefault(f"{name}_samples_per_second", []).append(statistics.median(values))
    return {
        **{name: statistics.median(values) for name, values in found.items()},
        **{f"{name}_range": [min(values), max(values)] for name, values in found.items()},
        **chosen,
        **asdict(size),
        "rounds": rounds,
        "repeats": repeats,
        **machine("cpu"),
        "threads": 1,
        "processes": 2,
        "cores": os.cpu_count(),
    }


def _pairs() -> dict[str, tuple[str, str]]:
    """Returns what is held against what."""
    return {
        **{f"{rule}_over_ceiling": (rule, f"two_{rule}") for rule in RULES},
        **{f"{rule}_over_{schedule}": (rule, schedule) for rule, schedule in itertools.product(RULES, _SCHEDULES)},
        **{f"{schedule}_over_ceiling": (schedule, "two_plain") for schedule in _SCHEDULES},
        **{f"{schedule}_over_plain": (schedule, "plain") for schedule in _SCHEDULES},
        "two_processes_over_one": ("two_plain", "plain"),
    }


# ---- who takes part ----------------------------------------------------------------------------------------------------------


def _contestants(microbatches: Sequence[int]) -> dict[str, Contestant]:
    """Returns everything to measure, each beside what it is held against."""
    ours = {
        name: contestant
        for rule in RULES
        for name, contestant in {
            f"two_{rule}": Contestant(partial(sequential, rule=rule)),
            rule: Contestant(partial(pipelined, rule=rule), together=True),
        }.items()
    }
    theirs = {
        f"{schedule}_{number}": Contestant(partial(staged, schedule=schedule, microbatches=number), together=True)
        for schedule, number in itertools.product(_SCHEDULES, microbatches)
    }
    return {**ours, **theirs, "plain": Contestant(plain, ranks=(0,)), "two_plain": Contestant(plain)}


def plain(rank: int, size: Size) -> Training:
    """Backpropagation in a loop.

    Args:
        rank: Which process this is.
        size: Of the network.
    """
    model, feed = network(size), batches(size)
    optimizer = sgd(list(model.parameters()))

    def step() -> float:
        x, y = feed()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Training(model, step)


def staged(rank: int, size: Size, *, schedule: str, microbatches: int) -> Training:
    """One of two stages of a schedule of ``torch.distributed.pipelining``.

    Args:
        rank: Which process this is; the second has the upper half.
        size: Of the network.
        schedule: gpipe or 1f1b.
        microbatches: How many pieces a batch is cut into.
    """
    from torch.distributed.pipelining import PipelineStage  # some seconds that no other command should wait for
    from torch.distributed.pipelining.schedules import get_schedule_class

    half = size.blocks // 2
    part = network(size)[:half] if rank == 0 else network(size)[half:]
    optimizer, feed = sgd(list(part.parameters())), batches(size)
    run = get_schedule_class(_SCHEDULES[schedule])(
        PipelineStage(part, rank, 2, torch.device("cpu")),
        microbatches,
        # The share of a microbatch in the batch's mean, so that gradients need not be divided afterwards.
        loss_fn=lambda scores, target: F.cross_entropy(scores, target, reduction="sum") / size.batch,
        scale_grads=False,
    )

    def step() -> float | None:
        x, y = feed()
        optimizer.zero_grad()
        losses: list[Tensor] = []
        if rank == 0:
            run.step(x)
        else:
            run.step(target=y, losses=losses, return_outputs=False)
        optimizer.step()
        return torch.stack(losses).sum().item() if losses else None

    return Training(part, step)


RULES: dict[str, Callable[[Size], tuple[Rule, list[str] | None]]] = {
    "pred": lambda size: (get("pred"), None),
    # At the default rate a chain without normalisation diverges sooner or later.
    "dni": lambda size: (SyntheticGradients(learning_rate=1e-3), [str(size.blocks // 2)]),
}
"""Our rules by name, and where each cuts the network."""


def sequential(rank: int, size: Size, *, rule: str) -> Training:
    """A rule's work in one process.

    Args:
        rank: Which process this is.
        size: Of the network.
        rule: pred or dni.
    """
    learner, feed = _learner(size, rule), batches(size)
    return Training(learner.model, lambda: learner.step(*feed()).loss)


def pipelined(rank: int, size: Size, *, rule: str) -> Training:
    """A rule's work as a pipeline over the processes.

    Args:
        rank: Which process this is; the last learns the loss.
        size: Of the network.
        rule: pred or dni.
    """
    learner, feed = _learner(size, rule, schedule="pipelined", executor="pipeline"), batches(size)

    def step() -> float | None:
        result = learner.step(*feed())
        return result.loss if rank == 1 else None

    return Training(learner.model, step, lead=1 + learner.schedule.depth, settle=learner.drain)


def _learner(size: Size, rule: str, *, schedule: str = "lockstep", executor: str = "sequential") -> Learner:
    how, blocks = RULES[rule](size)
    return convert(
        network(size),
        how,
        loss=F.cross_entropy,
        optimizer=sgd,
        blocks=blocks,
        example_input=torch.zeros(2, size.units),
        schedule=schedule,
        executor=executor,
    )


def network(size: Size) -> nn.Sequential:
    """Makes the network, the same one whenever it is asked for.

    Args:
        size: How large.
    """
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(size.units, size.units), nn.ReLU()) for _ in range(size.blocks)]
    blocks[-1].append(nn.Linear(size.units, _CLASSES))
    return nn.Sequential(*blocks)


def batches(size: Size) -> Callable[[], tuple[Tensor, Tensor]]:
    """Makes what hands out batches, the same ones in every process.

    Args:
        size: How large they are.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, size.batch, size.units, generator=generator)
    targets = torch.randint(0, _CLASSES, (8, size.batch), generator=generator)
    turns = itertools.cycle(zip(inputs, targets, strict=True))
    return lambda: next(turns)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Makes the optimizer of everybody's blocks.

    Args:
        parameters: What it steps.
    """
    return torch.optim.SGD(parameters, lr=0.01)


# ---- taking turns ------------------------------------------------------------------------------------------------------------


def measure_rates(
    contestants: Mapping[str, Contestant], size: Size, *, rounds: int, steps: int, patience: float
) -> dict[str, list[float]]:
    """Returns the samples a second of each contestant in every round."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    with workers(size, patience) as both:
        for name, contestant in contestants.items():
            both.ask(contestant.ranks, "make", name, contestant.make)
        for turn, (name, contestant) in itertools.product(range(1 + rounds), contestants.items()):
            both.ask(contestant.ranks, "lead", name)
            start = time.perf_counter()
            seconds = both.ask(contestant.ranks, "run", name, steps)
            if contestant.together:
                seconds = [time.perf_counter() - start]
            both.ask(contestant.ranks, "settle", name)
            if turn:  # the first round is for whatever is made once
                rates[name].append(sum(steps * size.batch / each for each in seconds))
    return rates


@dataclass(frozen=True)
class Workers:
    """Two processes that do what they are asked. One that dies, fails or does not answer ends everything, with the reason.

    Attributes:
        processes: They.
        connections: To each of them.
        patience: Seconds to wait for an answer.
    """

    processes: list[BaseProcess]
    connections: list[Connection]
    patience: float

    def ask(self, ranks: Sequence[int], what: str, name: str, *more: Any) -> list[Any]:
        """Has some of the processes do something at the same time, and returns their answers once all have done it.

        Args:
            ranks: Numbers of the processes.
            what: make, lead, run, settle or weights.
            name: Of the contestant.
            *more: Whatever else ``what`` takes.

        Raises:
            ChildProcessError: If a process fails or dies.
            TimeoutError: If one does not answer.
        """
        doing = f"{what} of {name}"
        for rank in ranks:
            with contextlib.suppress(BrokenPipeError):  # it is dead, which is found below
                self.connections[rank].send((what, name, *more))
        answers: dict[int, Any] = {}
        end = time.monotonic() + self.patience
        while missing := [rank for rank in ranks if rank not in answers]:
            sources = {self.connections[rank]: rank for rank in missing}
            ready = wait([*sources, *(process.sentinel for process in self.processes)], end - time.monotonic())
            if not ready:
                raise TimeoutError(f"no answer from process {', '.join(map(str, missing))} in {self.patience:g} s: {doing}")
            for connection in ready:
                if isinstance(connection, Connection):
                    answers[sources[connection]] = self._answer(connection, doing)
            self._check_alive(doing)
        return [answers[rank] for rank in ranks]

    def _answer(self, connection: Connection, doing: str) -> Any:
        try:
            answer = connection.recv()
        except (EOFError, ConnectionResetError):
            answer = Failure("it is gone")
        if isinstance(answer, Failure):
            self._check_alive(doing, seconds=1.0)  # a process whose neighbour has died fails, too, and is not the one to name
            raise ChildProcessError(f"process {self.connections.index(connection)} failed at {doing}: {answer.words}")
        return answer

    def _check_alive(self, doing: str, seconds: float = 0.0) -> None:
        ranks = {process.sentinel: rank for rank, process in enumerate(self.processes)}
        for sentinel in wait([*ranks], seconds):
            rank = ranks[sentinel]  # pyrefly: ignore[bad-index]
            process = self.processes[rank]
            process.join()  # it has let go of its files, and may still be on its way out
            code = process.exitcode or 0
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise ChildProcessError(f"process {rank} {how}: {doing}")


@dataclass(frozen=True)
class Failure:
    """What a process answers that could not do what it was asked.

    Attributes:
        words: Why.
    """

    words: str


@contextlib.contextmanager
def workers(size: Size, patience: float) -> Iterator[Workers]:
    """Starts two processes of one thread each, joined by gloo on the loopback; afterwards they are gone, whatever happens.

    Args:
        size: Of the network.
        patience: Seconds to wait for an answer, and for each other.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    connections: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME=_loopback()):
                for rank in range(2):
                    ours, theirs = context.Pipe()
                    connections.append(ours)
                    process = context.Process(target=_serve, args=(rank, theirs, folder, size, patience), daemon=True)
                    process.start()
                    processes.append(process)
                    theirs.close()  # or its end would never be seen
            yield Workers(processes, connections, patience)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for connection in connections:
                connection.close()


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Sets variables of the environment for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _loopback() -> str:
    """Returns the name of the loopback interface: left alone, gloo takes the one that the host's name leads to, if it leads anywhere."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _serve(rank: int, connection: Connection, folder: str, size: Size, patience: float) -> None:
    """What a process does: what it is asked, until it is ended."""
    begin_worker()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    worker = None
    with contextlib.suppress(EOFError):  # nobody is left to ask
        while True:
            what, *how = connection.recv()
            try:
                worker = worker or _Worker(rank, Path(folder), size, patience)
                answer = getattr(worker, what)(*how)
            except Exception as error:
                lines = str(error).strip().splitlines()
                answer = Failure(f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}")
            connection.send(answer)


class _Worker:
    """One of the two processes."""

    def __init__(self, rank: int, folder: Path, size: Size, patience: float) -> None:
        self.rank, self.size = rank, size
        self.trainings: dict[str, Training] = {}
        distributed.init_process_group(
            "gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2, timeout=timedelta(seconds=patience)
        )

    def make(self, name: str, make: Callable[[int, Size], Training]) -> None:
        self.trainings[name] = make(self.rank, self.size)

    def lead(self, name: str) -> None:
        training = self.trainings[name]
        for _ in range(training.lead):
            training.step()

    def run(self, name: str, steps: int) -> float:
        """Takes steps, and returns the seconds that this process was at it."""
        step = self.trainings[name].step
        start = time.perf_counter()
        losses = [step() for _ in range(steps)]
        seconds = time.perf_counter() - start
        if any(loss is not None and math.isnan(loss) for loss in losses):
            raise RuntimeError("what was timed was no full pipeline: a step came to no loss")
        return seconds

    def settle(self, name: str) -> None:
        self.trainings[name].settle()

    def weights(self, name: str) -> dict[str, np.ndarray]:
        return {key: value.detach().numpy() for key, value in self.trainings[name].model.named_parameters()}
