"""Starting several processes of a command that train one learner together, on this machine."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from lockfree.interrupt import SIGNALS, held_back, let_through

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LOST = 3
"""The exit code where a process is lost."""

_PARENT = "LOCKFREE_PARENT"
_LOOKS = 0.05  # seconds between two looks
_PATIENCE = 20.0  # seconds for the others to stop at the end of a batch
_FAREWELL = 2.0  # seconds for the others to end once the first has
_SPOKEN = (0, 2, 130)  # exit codes of a first process that has done, or said, all that there is


@dataclass(slots=True)
class _Child:
    """One of the processes, with what it says where nobody looks."""

    process: subprocess.Popen[bytes]
    said: IO[bytes] | None

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def last_words(self) -> str:
        """Returns the last line that it has written of an error."""
        if self.said is None:
            return ""
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


def launched() -> bool:
    """Whether this process is one of several that `launch` has started."""
    return _PARENT in os.environ


def begin_launched() -> None:
    """Begins a process that `launch` has started: it heeds signals to stop from here on, and ends with its launcher, however that ends.

    Raises:
        KeyboardInterrupt: If one came while Python was loading.
    """
    parent = int(os.environ[_PARENT])

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(LOST)

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    let_through(*SIGNALS)


def launch(arguments: Sequence[str], processes: int) -> int:
    """Runs a command of this package in several processes at once, joined on the loopback; the first one prints.

    A signal to stop is passed on to the first process, which tells the others, at any moment: while they load, too. When one dies, the
    others get time to stop at the end of a batch, and one line says which it was.

    Args:
        arguments: Of the command, its name first.
        processes: How many, 2 or more.

    Returns:
        The exit code: that of the first process, if it came to an end of its own; 3 where one was lost before.
    """
    store = loopback_store()
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, where it outlives any of them
        "WORLD_SIZE": str(processes),
        "GLOO_SOCKET_IFNAME": loopback(),
        _PARENT: str(os.getpid()),
    }
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(_noted())
        with held_back(*SIGNALS):  # and so by the processes, until they are ready for them
            children = [
                stack.enter_context(_started(arguments, rank, {"OMP_NUM_THREADS": threads, **os.environ, **shared}))
                for rank in range(processes)
            ]
        _wait(children, signals)
        return _conclude(arguments[0], children)


def loopback_store() -> "TCPStore":
    """Returns a store by which processes on this machine find each other, and that nobody else can reach."""
    import socket

    from torch.distributed import TCPStore

    with socket.create_server(("127.0.0.1", 0)) as listening:  # left to itself, a store listens to the whole network
        port = listening.getsockname()[1]
        return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def loopback() -> str:
    """Returns the name of the network interface that leads nowhere but to this machine."""
    import socket

    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), names[0])


@contextlib.contextmanager
def _started(arguments: Sequence[str], rank: int, environment: dict[str, str]) -> Iterator[_Child]:
    """Starts one process; afterwards it is gone, whatever happens."""
    command = [sys.executable, "-m", "lockfree", *arguments]
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with contextlib.ExitStack() as stack:
        said = None if rank == 0 else stack.enter_context(tempfile.TemporaryFile())
        # In a session of its own, so that Ctrl-C on the terminal reaches it through us alone.
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=None if rank == 0 else subprocess.DEVNULL, stderr=said
        )
        try:
            yield _Child(process, said)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


@contextlib.contextmanager
def _noted() -> Iterator[deque[int]]:
    """Notes signals to stop, to be passed on, instead of heeding them."""
    signals: deque[int] = deque()
    before = {number: signal.signal(number, lambda number, _: signals.append(number)) for number in SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: Sequence[_Child], signals: deque[int]) -> None:
    """Waits until all have ended, passing signals on to the first; once one has come to its end, the others get a while."""
    end = float("inf")
    while any(child.code is None for child in children) and time.monotonic() < end:
        while signals:
            children[0].process.send_signal(signals.popleft())
        if children[0].code in _SPOKEN:
            end = min(end, time.monotonic() + _FAREWELL)
        elif end == float("inf") and any(child.code not in (None, 0, 130) for child in children):
            end = time.monotonic() + _PATIENCE
        time.sleep(_LOOKS)


def _conclude(command: str, children: Sequence[_Child]) -> int:
    """Says what has happened, where no process has; returns the exit code."""
    first = children[0].code
    if first is not None and first in _SPOKEN:  # how the others end, which write nothing, is of no consequence then
        return first
    # Rather one is to blame that was killed than one that has lost it.
    codes = [(rank, child.code) for rank, child in enumerate(children) if child.code]
    rank, code = min(codes, key=lambda found: (found[1] > 0, found[1] == LOST, found[0]))
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    elif code == LOST:
        how = "lost its connection to another"
    else:
        words = children[rank].last_words()
        how = f"ended with exit code {code}" + (f" ({words})" if words else "")
    print(
        f"lockfree {command}: process {rank} of {len(children)} {how}; the others stopped at the end of a batch, go on from the last "
        "checkpoint with the same command and --resume",
        file=sys.stderr,
    )
    return LOST
