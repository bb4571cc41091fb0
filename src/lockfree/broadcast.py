"""Fixed random matrices that carry something known of a whole batch (an error, the targets) to every block."""

import torch
from torch import Tensor, nn

from lockfree.values import by_place


class Broadcast(nn.Module):
    """One fixed random matrix B for each tensor that a block hands up.

    Where signal and output are sequences of the same length, each place is served on its own, by the same matrix.

    Args:
        outputs: Examples of the tensors, shape (m, ...) each.
        signal: An example of what is broadcast, shape (m, ...).
        scale: Each unit's share has about ``scale`` times the size of the signal's norm: B is drawn from N(0, scale² / features).

    Example:
        >>> broadcast = Broadcast((torch.zeros(2, 5, 4, 4),), torch.zeros(2, 3))
        >>> broadcast(torch.ones(7, 3), (torch.zeros(7, 5, 4, 4),))[0].shape
        torch.Size([7, 5, 4, 4])
    """

    def __init__(self, outputs: tuple[Tensor, ...], signal: Tensor, *, scale: float = 1.0) -> None:
        super().__init__()
        for index, y in enumerate(outputs):
            into, out = (signal.shape[-1], y.shape[-1]) if by_place(y, signal) else (signal[0].numel(), y[0].numel())
            matrix = torch.randn(into, out, dtype=y.dtype, device=y.device) * (scale / into**0.5)
            self.register_buffer(f"feedback_{index}", matrix)

    def forward(self, signal: Tensor, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Returns the signal times B, a tensor of the shape of each output."""
        shares = []
        for y, matrix in zip(outputs, self.buffers(), strict=True):
            rows = signal if by_place(y, signal) else signal.flatten(1)
            shares.append((rows.to(matrix.dtype) @ matrix).view_as(y))
        return tuple(shares)
