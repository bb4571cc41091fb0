"""Ctrl-C that waits: for the end of a step, or until whoever is to heed it is ready."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""The signals to stop."""


@contextlib.contextmanager
def held_back(*signals: signal.Signals) -> Iterator[None]:
    """Holds signals back: one that comes meanwhile takes effect afterwards.

    A process that is started meanwhile holds them back too, until it calls `let_through`.

    Args:
        signals: Which.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_through(*signals: signal.Signals) -> None:
    """Lets signals take effect that were held back when this process was started, those that have come as well.

    Args:
        signals: Which.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


@contextlib.contextmanager
def deferred_interrupt(*, heeded: bool = True) -> Iterator[Callable[[], bool]]:
    """Lets a step finish before Ctrl-C takes effect, since half a step could not be resumed; a second one is not held back.

    Args:
        heeded: Whether this process decides; one that does not is told when to stop.

    Yields:
        What says whether it was pressed.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def press(number: int, frame: FrameType | None) -> None:
        if not heeded:
            return
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = {number: signal.signal(number, press) for number in SIGNALS}
    try:
        yield pressed.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
