"""What a server of the engine Ray costs beside Ray itself, and what a repaired update costs beside moving its bytes."""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lockfree.bench.step import machine
from lockfree.bench.timing import interleaved, ratio
from lockfree.server.cluster.actors import ServerActor, Setting, ask
from lockfree.server.cluster.parcel import pack_push, unpack_pulled
from lockfree.server.cluster.session import find_ray, session
from lockfree.server.core import Server
from lockfree.server.job import Job
from lockfree.server.messages import Pulled, Push
from lockfree.staleness import ASP, DelayCompensation, NoCorrection

_MEGABYTE = 2**20
_PATIENCE = 60.0
_TOUCHED = 6  # weights now and then, gradient and mean square are read, weights and mean square are written


def server(
    rounds: int = 10, workers: int = 4, pairs: int = 50, megabytes: int = 1, parameters: int = 25_000_000
) -> dict[str, Any]:
    """Times messages between workers and server, and the update itself.

    Messages: ``workers`` processes that compute nothing push and pull in turn, all at the same time, weights of so many megabytes.
    ``server`` is the engine's own, which applies each gradient by SGD and takes it down before it acknowledges it; ``synced`` flushes
    it to the disk, too; ``bare`` is an actor of Ray's that returns an array of that size when it is asked to, and a number when it
    is given one. All take turns on one cluster.

    Update: a gradient that is one update late is repaired by DC-ASGD-a and applied by SGD, in one process with PyTorch's present
    number of threads. It must read the weights then and now, the gradient and the mean square, and write the last two of what comes
    of them: 6 numbers a parameter. That is held against copying weights, which moves 2, in the same turns.

    Args:
        rounds: Timed turns.
        workers: How many processes.
        pairs: Pushes and pulls of each of them in a turn.
        megabytes: Size of the weights.
        parameters: How many the updated model has.

    Returns:
        Pairs a second of each, their ratios, the median of the rounds' own; milliseconds of an update and of a copy, and how many times
        the time it takes to move its bytes the update takes; the machine.

    Raises:
        ImportError: If Ray is not installed.
    """
    find_ray()
    messages = _messages(rounds, workers, pairs, megabytes)
    update = interleaved(_update(parameters), rounds=rounds, warm_up=3)
    return {
        "server_over_bare": ratio(messages, "bare", "server"),
        "synced_over_bare": ratio(messages, "bare", "synced"),
        **{f"{name}_pairs_per_second": workers * pairs / statistics.median(values) for name, values in messages.items()},
        "update_over_moving_its_bytes": ratio(update, "update", "copy") * 2 / _TOUCHED,
        **{f"{name}_milliseconds": 1e3 * statistics.median(values) for name, values in update.items()},
        "copy_gigabytes_per_second": 2 * 4 * parameters / statistics.median(update["copy"]) / 1e9,
        "rounds": rounds,
        "workers": workers,
        "pairs": pairs,
        "megabytes": megabytes,
        "parameters": parameters,
        **machine("cpu"),
    }


# ---- messages ------------------------------------------------------------------------------------------------------------------


class Bare:
    """An actor that does nothing but return an array, and take one.

    Args:
        bytes_: Size of the array.
    """

    def __init__(self, bytes_: int) -> None:
        self._array = np.zeros(bytes_, np.uint8)

    async def pull(self) -> np.ndarray:
        """Returns the array."""
        return self._array

    async def push(self, array: np.ndarray) -> int:
        """Takes an array."""
        return len(array)


def exchange_bare(actor: Any, number: int, pairs: int) -> None:
    """Pulls from a `Bare` and pushes what has come.

    Args:
        actor: Its handle.
        number: Of this process.
        pairs: How often.
    """
    ray = find_ray()
    for _ in range(pairs):
        ray.get(actor.push.remote(ray.get(actor.pull.remote())))


def exchange(actor: Any, number: int, pairs: int) -> None:
    """Pulls from a server, and pushes the weights that have come as if they were a gradient.

    Args:
        actor: Its handle.
        number: Of this process.
        pairs: How often.
    """
    incarnation = ask(actor.join, number, patience=_PATIENCE)
    for _ in range(pairs):
        pulled = unpack_pulled(ask(actor.pull, number, incarnation, patience=_PATIENCE))
        ask(actor.push, pack_push(_push(pulled, pulled.weights)), patience=_PATIENCE)


def _messages(rounds: int, workers: int, pairs: int, megabytes: int) -> dict[str, list[float]]:
    ray = find_ray()
    with tempfile.TemporaryDirectory() as folder, session(None, workers + 3):
        actors = {
            "bare": ray.remote(Bare).options(max_concurrency=1000).remote(megabytes * _MEGABYTE),
            "server": _server(ray, workers, megabytes, Path(folder) / "plain", sync=False),
            "synced": _server(ray, workers, megabytes, Path(folder) / "synced", sync=True),
        }
        tasks = {name: ray.remote(exchange_bare if name == "bare" else exchange) for name in actors}
        things: dict[str, Callable[[], object]] = {
            name: lambda name=name: ray.get([tasks[name].remote(actors[name], number, pairs) for number in range(workers)])
            for name in actors
        }
        return interleaved(things, rounds=rounds, warm_up=1)


def _server(ray: Any, workers: int, megabytes: int, folder: Path, *, sync: bool) -> Any:
    job = _job(megabytes * _MEGABYTE // 4, workers)
    setting = Setting(folder=folder, header=job.header(), start=0.0, snapshots=1000, sync=sync, threads=1)
    return ray.remote(ServerActor).options(max_concurrency=1000).remote(job, setting)


def _job(parameters: int, workers: int) -> Job:
    return Job(
        model=_model(parameters),
        data=(torch.zeros(1), torch.zeros(1)),
        loss=nn.functional.mse_loss,
        optimizer=_sgd,
        consistency=ASP(),
        correction=NoCorrection(),
        workers=workers,
        updates=10**9,
        batch_size=1,
    )


# ---- the update ----------------------------------------------------------------------------------------------------------------


def _update(parameters: int) -> dict[str, Callable[[], object]]:
    """Two workers in turn, each of them one update late."""
    core = Server(_model(parameters), optimizer=_sgd, correction=DelayCompensation(), every=10**9)
    pulled = [core.pull(number, core.join(number)) for number in range(2)]
    gradient = [torch.full_like(weight, 1e-3) for weight in core.weights]
    turn = 0

    def update() -> None:
        nonlocal turn
        number, turn = turn % 2, turn + 1
        found = pulled[number]
        assert found is not None
        core.push(_push(found, gradient))
        pulled[number] = core.pull(number, found.incarnation)

    source, goal = (torch.ones(parameters) for _ in range(2))
    return {"update": update, "copy": lambda: goal.copy_(source)}


def _model(parameters: int) -> nn.Module:
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(torch.ones(parameters)))
    return model


def _sgd(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=1e-6)


def _push(pulled: Pulled, gradients: Any) -> Push:
    which = {name: getattr(pulled, name) for name in ("worker", "incarnation", "sequence", "version", "ticket")}
    return Push(**which, gradients=gradients, buffers=list[Tensor](), samples=1, loss=0.0)
