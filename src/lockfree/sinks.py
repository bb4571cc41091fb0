"""Places that training can report to, beside the run folder."""

from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes scalars for TensorBoard; optional, from the extra ``tensorboard``.

    Args:
        folder: Where TensorBoard will look (``tensorboard --logdir``).

    Raises:
        ImportError: If the package tensorboard is missing; the message says how to install it.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('the TensorBoard sink needs tensorboard: pip install "lockfree[tensorboard]"') from error
        self._make = lambda: SummaryWriter(str(folder))
        self._writer: SummaryWriter | None = None  # made with the first record, so that a run that is refused leaves nothing

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        """Writes the numbers of one record."""
        if self._writer is None:
            self._writer = self._make()
        for name, value in values.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                self._writer.add_scalar(f"{kind}/{name}", value, values["step"])
        self._writer.flush()  # training may be interrupted at any step, and the writer does not flush when Python ends
