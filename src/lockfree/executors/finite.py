"""Training ends at the first value that is not finite, and says where it arose."""

import torch
from torch import Tensor

from lockfree.cell import Cell
from lockfree.executors.base import Assembly
from lockfree.objective import Diverged, is_finite
from lockfree.values import Values, tensors


def at_the_top(assembly: Assembly, batch: int, loss: Tensor) -> Tensor:
    """Returns the loss of a batch, detached, unless it is not finite."""
    if not is_finite(loss):
        where = f"cell {len(assembly.cells) - 1} (the top one) gave finite scores, the loss itself is not finite"
        raise Diverged(_where_it_broke(assembly, batch, f"the loss is {loss.item()}", where))
    return loss.detach()


def refuse(cell: Cell, batch: int, outputs: Values) -> None:
    """Refuses an output of a block that is not finite."""
    if not all(map(_holds_numbers, tensors(outputs))):
        raise Diverged(
            f"training broke at step {batch + 1}: cell {cell.place.index} ('{cell.block.name}') gave the first output that is not "
            "finite; look for bad values in the data, lower the learning rate, or go on from the last checkpoint"
        )


def beside(assembly: Assembly, cell: Cell, batch: int, loss: Tensor) -> Tensor:
    """Returns the loss of a network beside a block, unless it is not finite."""
    if not is_finite(loss):
        where = f"cell {cell.place.index} ('{cell.block.name}') gave finite values, the loss that it learns by is not"
        raise Diverged(_where_it_broke(assembly, batch, f"a local loss is {loss.item()}", where))
    return loss


def _where_it_broke(assembly: Assembly, batch: int, what: str, otherwise: str) -> str:
    """Names the lowest cell whose output is not finite; the batch is run once more for that."""
    where, values = otherwise, assembly.flights[batch].inputs
    with torch.no_grad():
        for cell in assembly.cells:
            values = cell.block(values)
            if not all(bool(tensor.isfinite().all()) for tensor in tensors(values)):
                where = f"cell {cell.place.index} ('{cell.block.name}') gave the first output that is not finite"
                break
    return (
        f"{what} at step {batch + 1}: {where}; look for bad values in the data, lower the learning rate, or go on from the last "
        "checkpoint"
    )


def _holds_numbers(tensor: Tensor) -> bool:
    """Whether no entry is infinite or not a number. A sum takes a tenth of the time of a look at each, and is finite only if all are."""
    if not tensor.is_floating_point():
        return not tensor.is_complex() or bool(tensor.isfinite().all())
    total = tensor.sum(dtype=torch.float32 if tensor.element_size() < 4 else None)
    return is_finite(total) or bool(tensor.isfinite().all())  # a sum of large numbers may overflow
