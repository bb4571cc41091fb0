"""Targets as numbers that a rule can compute with."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lockfree.objective import describe
from lockfree.rule import Context


def target_rows(context: Context, *, wanted_by: str) -> Tensor:
    """Returns a row for each target: one-hot for class numbers (zeros for ignored ones), real-valued targets as they are.

    Args:
        context: What the rule is shown; it must be shown targets.
        wanted_by: Who asks, for the error message.

    Returns:
        Shape (m, classes), or (m, length, classes) for sequences of class numbers, or that of real-valued targets.

    Raises:
        ValueError: If the targets are no tensor with a first dimension of samples, or the model's output does not tell the classes.
    """
    target: Any = context.target
    if not isinstance(target, Tensor) or not target.dim() or len(target) != context.samples:
        raise ValueError(
            f"{wanted_by} wants targets along the first dimension, ({context.samples}, ...), they are {describe(target)}"
        )
    shape, places = context.scores_shape, target.shape[1:]
    if target.is_floating_point():
        if shape is not None and target[0].numel() != shape.numel():
            raise ValueError(f"{wanted_by} wants a real number for each score: the targets are {describe(target)}")
        return target if places else target[:, None]
    several = target.dtype == torch.bool or places == shape
    if several or shape is None or shape.numel() % max(target[0].numel(), 1):
        raise ValueError(f"{wanted_by} wants class scores for each target: the targets are {describe(target)}")
    classes = shape.numel() // target[0].numel()
    rows = F.one_hot(target.long().clamp(0, classes - 1), classes)
    rows.masked_fill_((target < 0)[..., None], 0)
    if places and shape == (classes, *places) != (*places, classes):
        rows = rows.movedim(-1, 1)  # in the layout of the scores
    return rows.to(torch.get_default_dtype())
