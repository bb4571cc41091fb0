"""Reading, setting and protecting the state of the global random generators."""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn


def get_rng() -> dict[str, Tensor]:
    """Returns the state of the CPU's generator and, once CUDA is in use, of every CUDA device's."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state |= {f"cuda:{index}": torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())}
    return state


def set_rng(state: dict[str, Tensor]) -> None:
    """Sets the generators to a state that `get_rng` returned; devices that are not here are left out."""
    torch.set_rng_state(state["cpu"].cpu())
    for device, value in state.items():
        if device != "cpu" and torch.cuda.is_available() and torch.device(device).index < torch.cuda.device_count():
            torch.cuda.set_rng_state(value.cpu(), torch.device(device))


def seed_of(*numbers: int) -> int:
    """Mixes whole numbers into one seed: with a sum, epoch 1 of seed 0 would be epoch 0 of seed 1.

    Example:
        >>> seed_of(0, 1) == seed_of(1, 0)
        False
    """
    mixed = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(mixed, "little")


def seed_generators(seed: int) -> None:
    """Sets the CPU's generator and, once CUDA is in use, every CUDA device's.

    Args:
        seed: From 0 to below 2^64.
    """
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` takes a hundred times as long
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def generators_apart() -> Iterator[None]:
    """Leaves the global generators afterwards as they were."""
    before = get_rng()
    try:
        yield
    finally:
        set_rng(before)


class Streams:
    """Random numbers of every action by themselves: what is drawn depends on a seed, the action and the batch alone.

    Where blocks work on several batches at a time, no plain loop says in which order they would draw from one generator; so that
    every executor draws alike, each action begins with the global generators set to a seed of its own.

    Args:
        seed: What all of them go back to.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._first: dict[tuple[int, str], int] = {}  # seeds of batch 0

    def begin(self, cell: int, kind: str, batch: int) -> None:
        """Sets the global generators for an action: what kind of thing a cell does on a batch."""
        first = self._first.get((cell, kind))
        if first is None:
            first = self._first[cell, kind] = seed_of(self.seed, cell, ord(kind))
        seed_generators((first + batch) % 2**64)

    def apart(self) -> AbstractContextManager[None]:
        """Leaves the global generators afterwards as they were."""
        return generators_apart()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Lets a model be run for a look: random generators, buffers and training flags are afterwards as before."""
    random = get_rng()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        set_rng(random)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.data.copy_(value)  # unseen by graphs that hold the buffer: for them it has not changed
        for module, training in modes:
            module.training = training
