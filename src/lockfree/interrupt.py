"""Ctrl-C that waits for the end of a step."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


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

    before = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pressed.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
