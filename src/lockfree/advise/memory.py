"""What a step of training takes in memory, and limits on it."""

import math
import re
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lockfree.advise.task import Candidate, Task
from lockfree.learner import Learner
from lockfree.memory import ActivationMeter
from lockfree.values import tensors

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The bytes that training takes.

    Attributes:
        parameters: The model's parameters and buffers.
        gradients: One for each trained parameter.
        optimizer: The states of the model's optimizer.
        auxiliary: The rule's own networks and fixed matrices, with their gradients and optimizer.
        batch: One batch of inputs and targets.
        saved: Most that autograd keeps for backward passes at once, weights and batch left out; of checkpointing without what it
            makes again.
        total: The most that is ever held at once, everything counted: also what is made on the way and thrown away.

    Example:
        >>> Memory(parameters=40, gradients=40, optimizer=80, auxiliary=0, batch=16, saved=24, total=210).fixed
        160
    """

    parameters: int
    gradients: int
    optimizer: int
    auxiliary: int
    batch: int
    saved: int
    total: int

    @property
    def fixed(self) -> int:
        """What stays however small the batch is."""
        return self.parameters + self.gradients + self.optimizer + self.auxiliary


class AllocationMeter(TorchDispatchMode):
    """Counts the bytes of every tensor that operations make while it is active, for as long as the tensor lives.

    Example:
        >>> meter = AllocationMeter()
        >>> with meter:
        ...     y = (torch.ones(3) + 1).sum()
        >>> meter.now, meter.peak
        (4, 24)

    Attributes:
        now: Bytes alive at this moment.
        peak: Most bytes that were ever alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def ignore(self, held: Iterable[Tensor]) -> None:
        """Leaves out tensors that are there already."""
        for tensor in held:
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = weakref.ref(storage, partial(self._free, storage._cdata, 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            size = storage.nbytes()
            self._alive[storage._cdata] = weakref.ref(storage, partial(self._free, storage._cdata, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int, _: weakref.ref) -> None:
        self._alive.pop(key, None)
        self.now -= size


def measure(task: Task, candidate: Candidate) -> tuple[Learner, Memory]:
    """Makes a learner, and takes down what its training holds once its optimizer has its states.

    On CUDA the peak is what PyTorch's allocator saw; elsewhere it is what is held before a step and what the step allocates.

    Args:
        task: What is to be learnt.
        candidate: How.
    """
    cuda = task.device.type == "cuda"
    task.forget_learners()
    before = torch.cuda.memory_allocated(task.device) if cuda else 0
    learner, (x, y) = task.learner(candidate), task.batch(0)
    learner.step(x, y)
    total = None
    if cuda:
        torch.cuda.reset_peak_memory_stats(task.device)
        learner.step(x, y)
        total = torch.cuda.max_memory_allocated(task.device) - before
    model, networks = learner.model, nn.ModuleList(learner.auxiliaries)
    held = {
        "parameters": _bytes([*model.parameters(), *model.buffers()]),
        "optimizer": _bytes(_states(learner.optimizer)),
        "auxiliary": _bytes([*networks.parameters(), *networks.buffers(), *_states(learner.auxiliary_optimizer)]),
        "batch": _bytes(tensors((x, y))),
    }
    meter, allocations = ActivationMeter(model, networks), AllocationMeter()
    allocations.ignore([*model.parameters(), *model.buffers(), *networks.parameters(), *networks.buffers(), *tensors((x, y))])
    with meter.watch(tensors((x, y))), allocations:
        learner.step(x, y)
    total = sum(held.values()) + allocations.peak if total is None else total
    held["auxiliary"] += _bytes([p for p in networks.parameters() if p.requires_grad])
    gradients = _bytes([p for p in model.parameters() if p.requires_grad])
    return learner, Memory(**held, gradients=gradients, saved=meter.peak, total=total)


def _bytes(held: Iterable[Tensor]) -> int:
    """Returns what tensors take; memory that they share counts once."""
    return sum({storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in held)}.values())


def _states(optimizer: torch.optim.Optimizer | None) -> tuple[Tensor, ...]:
    return () if optimizer is None else tensors([dict(state) for state in optimizer.state.values()])


def parse_memory(memory: int | float | str) -> int:
    """Reads an amount of memory.

    Args:
        memory: Bytes, or a number with a unit: kB, MB, GB, TB are powers of 1000, KiB, MiB, GiB, TiB of 1024.

    Returns:
        Bytes.

    Raises:
        ValueError: If it is written otherwise, or is less than one byte.

    Example:
        >>> parse_memory("2GB"), parse_memory("0.5 KiB"), parse_memory(1e6)
        (2000000000, 512, 1000000)
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:e\+?\d+)?|\.\d+)\s*(?:([kmgt]i?)?b?)\s*", str(memory), re.IGNORECASE)
    size = float(found[1]) * _UNITS[(found[2] or "").lower()] if found else 0.0
    if not 1 <= size < math.inf:
        raise ValueError(f"memory {memory!r}: give bytes, or a number with a unit, such as 2GB, 512MiB or 1.5GiB")
    return round(size)
