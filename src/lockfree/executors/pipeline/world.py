"""The processes that train one model together, and what becomes of them."""

import contextlib
import itertools
import os
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist

from lockfree.processes import ProcessLost

T = TypeVar("T")

_serials = itertools.count()
_TAGS_OF_A_LEARNER = 64


class FailedElsewhere(ValueError):  # noqa: N818
    """Training has ended because of an error in another process, which the message repeats."""


class World:
    """The processes of one learner, all of which take the same steps.

    They are those of `torch.distributed`: the group that is there, or the one that the environment of ``torchrun`` describes, or this
    process alone.

    Args:
        device: Where tensors are that go from one to another.
        timeout: Seconds after which a process that says nothing counts as gone.

    Attributes:
        rank: Number of this process.
        size: How many there are.
        waited: Seconds that this process has waited for others.
    """

    def __init__(self, device: torch.device, timeout: float) -> None:
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self._tag = next(_serials) * _TAGS_OF_A_LEARNER
        self.waited = 0.0
        self._broken: Exception | None = None
        self._groups: Groups | None = None
        if self.size > 1:
            # Up and down each have a group: on an accelerator, what is sent within one comes out in the order in which it went in.
            self._groups = Groups.shared("nccl" if device.type == "cuda" else "gloo", timeout)

    @property
    def groups(self) -> "Groups":
        """What connects the processes."""
        self.refuse_broken()
        assert self._groups is not None, "there are several processes"
        return self._groups

    def tag(self, purpose: int) -> int:
        """Returns what tells messages of one purpose of this learner from all others."""
        assert 0 <= purpose < _TAGS_OF_A_LEARNER, "a learner has few purposes"
        return self._tag + purpose

    # ---- all at once ---------------------------------------------------------------------------------------------------------

    def from_first(self, make: Callable[[], T]) -> T:
        """Returns in every process what the first one makes."""
        found: list[Any] = [make() if self.rank == 0 else None]
        if self.size > 1:
            self.watching(lambda: dist.broadcast_object_list(found, src=0, group=self.groups.control))
        return found[0]

    def from_each(self, mine: T) -> list[T]:
        """Returns in every process what each of them gives."""
        found: list[Any] = [None] * self.size
        self.watching(lambda: dist.all_gather_object(found, mine, group=self.groups.control))
        return found

    def spread(self, tensors: list[torch.Tensor], source: int) -> None:
        """Writes into each tensor what it is in one process; those of a kind travel as one."""
        alike: dict[Any, list[torch.Tensor]] = {}
        for tensor in tensors:
            alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for parts in alike.values():
            whole = torch.cat([part.detach().reshape(-1) for part in parts])
            self.watching(lambda whole=whole: dist.broadcast(whole, src=source, group=self.groups.up))
            if self.rank != source:
                with torch.no_grad():
                    for part, now in zip(parts, whole.split([part.numel() for part in parts]), strict=True):
                        part.copy_(now.view(part.shape))

    # ---- when something goes wrong -------------------------------------------------------------------------------------------

    @property
    def broken(self) -> bool:
        """Whether something went wrong, here or elsewhere, after which the processes have parted."""
        return self._broken is not None

    def refuse_broken(self) -> None:
        """Refuses to go on after something went wrong here or elsewhere.

        Raises:
            RuntimeError: If it did.
        """
        if self._broken is not None:
            raise RuntimeError(
                "these processes cannot go on together after an error in one of them: start them again, from the last checkpoint"
            ) from self._broken

    def break_off(self, error: Exception) -> None:
        """Remembers what went wrong in this process, and tells the others, who may be waiting for it."""
        if self._broken is not None or self._groups is None:
            return
        if not isinstance(error, ProcessLost | FailedElsewhere):
            self._groups.note("failed", f"{self.rank} {error}")
        self._broken = error
        self._groups.close()
        self._groups = None

    def watching(self, wait: Callable[[], Any], peer: int | None = None) -> None:
        """Waits for a message; finds out what has happened if it does not come.

        Args:
            wait: Waits.
            peer: Whom for; any of the others if left out.

        Raises:
            ProcessLost: If a process has gone.
            FailedElsewhere: If one has ended with an error.
        """
        began = time.perf_counter()
        try:
            wait()
        except RuntimeError as error:
            del wait  # a connection is closed once nobody holds on to it
            found = self._what_happened(peer)
            self.break_off(found)
            raise found from error
        self.waited += time.perf_counter() - began

    def _what_happened(self, peer: int | None) -> Exception:
        if self._groups is None:
            return RuntimeError("the processes have parted")
        failed = self._groups.noted("failed")
        if failed is not None:
            number, _, message = failed.partition(" ")
            return FailedElsewhere(f"{message} (in process {number} of {self.size})")
        if peer is not None:
            self._groups.note("lost", str(peer))
        first = self._groups.noted("lost")  # who is at the end of a chain only sees that its neighbour has stopped
        return ProcessLost(int(first) if first is not None else (peer or 0), self.size)


class Groups:
    """The connections between the processes, which all learners of a process share.

    Attributes:
        control: For objects and losses, on the CPU.
        up: For what goes up the chain.
        down: For what goes down.
        channels: What waits for something here.
    """

    _open: ClassVar[dict[tuple[str, float], "Groups"]] = {}
    _made: ClassVar[int] = 0

    def __init__(self, backend: str, timeout: float) -> None:
        Groups._made += 1  # the same in every process, since all of them make groups together
        self._notes = f"lockfree/{Groups._made}"
        patience = timedelta(seconds=timeout)
        self.control: Any = dist.new_group(backend="gloo", timeout=patience)
        self.up: Any = dist.new_group(backend=backend, timeout=patience)
        self.down: Any = dist.new_group(backend=backend, timeout=patience)
        self.channels: weakref.WeakSet[Closable] = weakref.WeakSet()

    @classmethod
    def shared(cls, backend: str, timeout: float) -> "Groups":
        """Returns those that are open, or opens some."""
        if (backend, timeout) not in cls._open:
            cls._open[backend, timeout] = cls(backend, timeout)
        return cls._open[backend, timeout]

    def close(self) -> None:
        """Closes the connections, so that nobody waits at the other end."""
        Groups._open = {key: one for key, one in Groups._open.items() if one is not self}
        for channel in self.channels:
            channel.close()
        groups, self.control, self.up, self.down = (self.control, self.up, self.down), None, None, None
        for group in groups:
            with contextlib.suppress(RuntimeError, ValueError):
                dist.destroy_process_group(group)

    def note(self, about: str, text: str) -> None:
        """Leaves a note for the other processes, unless there is one; whoever keeps notes may be gone."""
        with contextlib.suppress(RuntimeError):
            dist.distributed_c10d._get_default_store().compare_set(f"{self._notes}/{about}", "", text)

    def noted(self, about: str) -> str | None:
        """Returns the note that some process has left."""
        with contextlib.suppress(RuntimeError):
            store, key = dist.distributed_c10d._get_default_store(), f"{self._notes}/{about}"
            if store.check([key]):
                return store.get(key).decode()
        return None


@runtime_checkable
class Closable(Protocol):
    """What holds on to connections."""

    def close(self) -> None:
        """Lets go of them."""
        ...
