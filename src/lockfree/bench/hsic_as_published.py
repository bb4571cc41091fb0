"""The HSIC bottleneck as its authors compute it: the reference that ours is measured against. Nothing else uses it.

Facts of their code, kept on purpose: for each block the whole network runs forward again and the gradient goes back through all blocks
below; kernels are centred on one side; Gram matrices and inverses of input and targets are made anew for each block, that of the
block's own output twice; the optimizer is made anew for each block and batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def published_step(
    blocks: nn.Sequential,
    *,
    classes: int,
    balance: float = 500.0,
    sigma: float = 5.0,
    epsilon: float = 1e-5,
    learning_rate: float = 1e-3,
) -> Callable[[Tensor, Tensor], None]:
    """Returns a function that takes one training step of (inputs, class numbers).

    Args:
        blocks: The network, a block for each child.
        classes: How many.
        balance: The weight of the targets' term.
        sigma: Of all kernels.
        epsilon: The ridge.
        learning_rate: Of plain descent.

    Reference:
        Ma, Lewis, Kleijn 2019, arXiv 1908.01580, and the authors' code.
    """

    def run(x: Tensor, y: Tensor) -> None:
        onehot = F.one_hot(y, classes).float()
        _outputs(blocks, x)
        for index, block in enumerate(blocks):
            outputs = _outputs(blocks, x)
            optimizer = torch.optim.SGD(block.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-3)
            z = outputs[index].flatten(1)
            loss = normalised(z, x.flatten(1), sigma, epsilon) - balance * normalised(z, onehot, sigma, epsilon)
            blocks.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def normalised(x: Tensor, y: Tensor, sigma: float, epsilon: float) -> Tensor:
    """Returns nHSIC of rows, each side inverted."""
    sides = []
    for rows in (x, y):
        centred = _gram(rows, sigma) @ _centring(rows)
        sides.append(centred @ torch.inverse(centred + epsilon * len(rows) * torch.eye(len(rows), device=rows.device)))
    return (sides[0] * sides[1].T).sum()


def _gram(rows: Tensor, sigma: float) -> Tensor:
    norms = rows.square().sum(1, keepdim=True)
    distances = (norms - 2 * rows @ rows.T + norms.T).abs()
    return torch.exp(-distances / (2 * sigma**2 * rows.shape[1]))


def _centring(rows: Tensor) -> Tensor:
    return torch.eye(len(rows), device=rows.device) - 1 / len(rows)


def _outputs(blocks: nn.Sequential, x: Tensor) -> list[Tensor]:
    outputs = []
    for block in blocks:
        x = block(x)
        outputs.append(x)
    return outputs
