"""What crosses a border between two processes: trees of tensors as flat bytes, on their way while both go on computing."""

import pickle
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from lockfree.executors.pipeline.world import Groups, World
from lockfree.values import Values

Carrier = Callable[[Groups], Any]
"""Picks one of the connections between processes."""

_ALIGNMENT = 64  # bytes; as PyTorch allocates, since vector code may round by where a tensor lies
_NUMBERS = 2  # of a header: batch and word


class Slot(NamedTuple):
    """The place of a tensor in a tree."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    carries: bool

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Layout:
    """Where the tensors of a tree lie in one piece of memory, after a header with the batch, a word, and which of them are there.

    Args:
        tree: The tree, with a `Slot` in place of each tensor.

    Attributes:
        nbytes: Size of the piece.

    Example:
        >>> layout = Layout.of((torch.ones(3), "plain"))
        >>> layout.unpack(layout.pack((torch.ones(3), "plain"), 7, -1))
        Parcel(batch=7, word=-1, values=(tensor([1., 1., 1.]), 'plain'))
    """

    def __init__(self, tree: Values) -> None:
        self._leaves, self._structure = pytree.tree_flatten(tree, is_leaf=lambda leaf: isinstance(leaf, Slot))
        self._slots = [leaf for leaf in self._leaves if isinstance(leaf, Slot)]
        self._at: list[int] = []
        end = _aligned(8 * _NUMBERS + 1 + len(self._slots))
        for slot in self._slots:
            self._at.append(end)
            end = _aligned(end + slot.nbytes)
        self.nbytes = end

    @classmethod
    def of(cls, values: Values) -> "Layout":
        """Describes a tree of tensors and plain values."""
        return cls(pytree.tree_map_only(Tensor, lambda t: Slot(t.dtype, tuple(t.shape), t.requires_grad), values))

    @property
    def tree(self) -> Values:
        """The tree, with a slot for each tensor."""
        return pytree.tree_unflatten(self._leaves, self._structure)

    def carriers(self) -> "Layout":
        """Describes a gradient for each tensor that carries credit."""
        return Layout(tuple(slot._replace(carries=False) for slot in self._slots if slot.carries))

    def fits(self, values: Values) -> bool:
        """Whether a tree is of this kind; tensors may be missing, and so may all of it."""
        if values is None:
            return True
        leaves, structure = pytree.tree_flatten(values)
        if structure != self._structure:
            return False
        return all(
            (one is None or (isinstance(one, Tensor) and (one.dtype, tuple(one.shape)) == (leaf.dtype, leaf.shape)))
            if isinstance(leaf, Slot)
            else one == leaf
            for one, leaf in zip(leaves, self._leaves, strict=True)
        )

    def pack(self, values: Values, batch: int, word: int, device: torch.device | str = "cpu") -> Tensor:
        """Returns a tree as bytes."""
        found = [None] * len(self._slots) if values is None else self._tensors(values)
        whole = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        head = torch.tensor([batch, word], dtype=torch.int64).view(torch.uint8)
        flags = torch.tensor([values is not None, *(one is not None for one in found)], dtype=torch.uint8)
        whole[: len(head) + len(flags)].copy_(torch.cat([head, flags]))
        for slot, at, one in zip(self._slots, self._at, found, strict=True):
            if one is not None:
                self._view(whole, slot, at).copy_(one.detach())
        return whole

    def unpack(self, whole: Tensor) -> "Parcel":
        """Returns the tree that lies in a piece of memory, of which its tensors are parts."""
        count = 1 + len(self._slots)
        head = whole[: 8 * _NUMBERS + count].cpu()
        batch, word = head[: 8 * _NUMBERS].view(torch.int64).tolist()
        there, *flags = head[8 * _NUMBERS :].tolist()
        if not there:
            return Parcel(batch, word, None)
        # `data`: parts of one piece that are changed in place are no business of each other.
        parts = (
            self._view(whole, slot, at).data.requires_grad_(slot.carries) if flag else None
            for slot, at, flag in zip(self._slots, self._at, flags, strict=True)
        )
        leaves = [next(parts) if isinstance(leaf, Slot) else leaf for leaf in self._leaves]
        return Parcel(batch, word, pytree.tree_unflatten(leaves, self._structure))

    def _tensors(self, values: Values) -> list[Tensor | None]:
        leaves = pytree.tree_leaves(values)
        return [one for one, leaf in zip(leaves, self._leaves, strict=True) if isinstance(leaf, Slot)]

    def _view(self, whole: Tensor, slot: Slot, at: int) -> Tensor:
        return whole[at : at + slot.nbytes].view(slot.dtype).view(slot.shape)


class Parcel(NamedTuple):
    """What came out of a piece of memory."""

    batch: int
    word: int
    values: Values


@dataclass(slots=True)
class _Awaited:
    """A parcel that is on its way, or will be."""

    batch: int
    kind: Hashable
    work: Any = None
    room: Tensor | None = None


class Channel:
    """One direction between this process and another; parcels come out in the order in which they went in.

    How a parcel is laid out depends on what kind of batch it belongs to. With the first one of a kind its layout is sent as well;
    from then on the receiver makes room before it needs a parcel, so that it arrives while both compute.

    Args:
        world: The processes.
        peer: The other one.
        carrier: Which of the `Groups` carries parcels.
        purpose: Tells this channel from others between the two.
        device: Where parcels are.
        ahead: Parcels that may be under way before the sender waits for the first of them to have been taken, 1 or more.
    """

    def __init__(self, world: World, peer: int, carrier: Carrier, purpose: int, device: torch.device, ahead: int) -> None:
        self._world, self._peer, self._tag, self._device = world, peer, world.tag(purpose), device
        self._of_groups = carrier
        self._ahead = ahead
        world.groups.channels.add(self)
        self._layouts: dict[Hashable, Layout] = {}
        self._sent: deque[tuple[Any, Tensor]] = deque()  # memory must stay until it has been taken
        self._expected: deque[_Awaited] = deque()

    def layout(self, kind: Hashable) -> Layout | None:
        """Returns how parcels of a kind are laid out, if that is known."""
        return self._layouts.get(kind)

    def agree(self, kind: Hashable, layout: Layout) -> None:
        """Says how parcels of a kind are laid out, where the other process knows that, too."""
        if kind not in self._layouts:
            self._layouts[kind] = layout
            self._make_room()

    @property
    def _carrier(self) -> Any:
        return self._of_groups(self._world.groups)

    def close(self) -> None:
        """Lets go of everything under way."""
        for awaited in self._expected:
            awaited.work = None
        self._expected.clear()
        self._sent.clear()

    # ---- sending -------------------------------------------------------------------------------------------------------------

    def send(self, kind: Hashable, batch: int, values: Values, word: int = -1) -> None:
        """Sends a parcel without waiting, unless too many are under way.

        Raises:
            ValueError: If it is laid out in another way than those before it of its kind.
        """
        layout = self._layouts.get(kind)
        if layout is None:
            layout = self._layouts[kind] = Layout.of(values)
            self._send_layout(layout)
        if not layout.fits(values):
            raise ValueError(
                "what crosses the border between two processes has another form than for a batch of the same shapes before: keep the "
                'two blocks in one process (executor=Pipeline(groups=[...])), or use executor="sequential"'
            )
        self._start(layout.pack(values, batch, word, self._device), self._carrier)
        while len(self._sent) > self._ahead:
            self._world.watching(self._sent[0][0].wait, self._peer)
            self._sent.popleft()

    def _send_layout(self, layout: Layout) -> None:
        written = torch.frombuffer(bytearray(pickle.dumps(layout.tree)), dtype=torch.uint8)
        for piece in (torch.tensor([len(written)]), written):
            self._start(piece, self._world.groups.control)

    def _start(self, piece: Tensor, group: Any) -> None:
        def start() -> None:
            self._sent.append((dist.isend(piece, self._peer, group=group, tag=self._tag), piece))

        self._world.watching(start, self._peer)

    # ---- receiving -----------------------------------------------------------------------------------------------------------

    def expect(self, kind: Hashable, batch: int) -> None:
        """Says that a parcel will be sent, so that it can arrive before it is needed."""
        self._expected.append(_Awaited(batch, kind))
        self._make_room()

    @property
    def expected(self) -> int | None:
        """The batch whose parcel comes next; ``None`` if none is expected."""
        return self._expected[0].batch if self._expected else None

    def receive(self) -> Parcel:
        """Waits for the next parcel that is expected."""
        awaited = self._expected[0]
        if awaited.work is None:
            self._layouts[awaited.kind] = self._receive_layout()
            self._make_room()
        assert awaited.work is not None, "there is room for what comes next"
        self._world.watching(awaited.work.wait, self._peer)
        self._expected.popleft()
        assert awaited.room is not None, "there was room"
        parcel = self._layouts[awaited.kind].unpack(awaited.room)
        assert parcel.batch == awaited.batch, f"batch {awaited.batch} was expected, batch {parcel.batch} came"
        return parcel

    def _make_room(self) -> None:
        """Lets all parcels come in whose layout is known, up to the first one whose is not."""
        for awaited in self._expected:
            if awaited.work is not None:
                continue
            layout = self._layouts.get(awaited.kind)
            if layout is None:
                return
            awaited.room = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._device)
            self._begin(awaited)

    def _begin(self, awaited: _Awaited) -> None:
        room = awaited.room
        assert room is not None, "there is room first"

        def begin() -> None:
            awaited.work = dist.irecv(room, self._peer, group=self._carrier, tag=self._tag)

        self._world.watching(begin, self._peer)

    def _receive_layout(self) -> Layout:
        size = torch.zeros(1, dtype=torch.int64)
        self._world.watching(lambda: dist.recv(size, self._peer, group=self._world.groups.control, tag=self._tag), self._peer)
        written = torch.empty(int(size), dtype=torch.uint8)
        self._world.watching(
            lambda: dist.recv(written, self._peer, group=self._world.groups.control, tag=self._tag), self._peer
        )
        return Layout(pickle.loads(written.numpy().tobytes()))


def _aligned(end: int) -> int:
    return -(-end // _ALIGNMENT) * _ALIGNMENT
