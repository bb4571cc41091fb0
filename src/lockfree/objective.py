"""The loss at the top of the chain, and what goes wrong there."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lockfree.chain import output_tensors
from lockfree.values import Credit, Values, as_leaves, carriers, detach, tensors

Loss = Callable[[Any, Any], Tensor]


class Diverged(ValueError):  # noqa: N818  (it is what happened, not a mistake in the call)
    """Training met a value that is not finite."""


class Objective:
    """The user's loss: the neighbour above the top cell, whose message is the error.

    Args:
        loss: Maps the model's output and the batch's targets to a scalar, a mean over the batch.

    Attributes:
        scores_shape: Shape of the model's output for one sample, if it is one tensor and has been seen.

    Raises:
        TypeError: If ``loss`` cannot be called.
    """

    def __init__(self, loss: Loss) -> None:
        if not callable(loss):
            raise TypeError(
                f"loss must be a function of (output, target), such as torch.nn.functional.cross_entropy, got {loss!r}"
            )
        self._loss = loss
        self.scores_shape: torch.Size | None = None

    @property
    def is_cross_entropy(self) -> bool:
        """Whether the loss is PyTorch's cross entropy with its default settings."""
        loss = self._loss
        if isinstance(loss, nn.CrossEntropyLoss):
            defaults = (
                loss.weight is None and loss.reduction == "mean" and not loss.label_smoothing and loss.ignore_index == -100
            )
            return type(loss) is nn.CrossEntropyLoss and defaults
        return loss is F.cross_entropy

    def __call__(self, outputs: Values, target: Any) -> tuple[Tensor, Credit]:
        """Returns the loss and the error, its gradient for each tensor of the output, shape of that tensor.

        Raises:
            ValueError: If the targets do not fit the output.
        """
        if not tensors(outputs):
            kind = type(outputs).__name__
            raise ValueError(f"the model gives a {kind}, whose tensors cannot be found: return them in a tuple, list or dict")
        leaves = as_leaves(detach(outputs), outputs)
        loss = self.evaluate(leaves, target)
        carrying = carriers(leaves)
        if not loss.requires_grad:
            return loss, (None,) * len(carrying)
        return loss.detach(), torch.autograd.grad(loss, carrying, allow_unused=True)

    def evaluate(self, outputs: Values, target: Any) -> Tensor:
        """Returns the loss alone.

        Raises:
            ValueError: If the targets do not fit the output, or the loss is not a scalar.
        """
        try:
            loss = self._loss(outputs, target)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"the loss does not accept these targets: {reason} (the model gives {describe(outputs)}, the targets are "
                f"{describe(target)}; cross entropy wants int64 class numbers of shape (batch,))"
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"the loss must return one scalar tensor, a mean over the batch; it returned {describe(loss)}")
        return loss.reshape(()) if loss.dim() else loss

    def sample_losses(self, outputs: Values, target: Any) -> Tensor:
        """Returns the loss of each sample alone, shape (batch,); of one that the loss ignores, 0.

        Raises:
            ValueError: If the loss cannot be taken sample by sample.
        """

        def one(output: Values, wanted: Any) -> Tensor:
            alone = pytree.tree_map_only(Tensor, lambda tensor: tensor[None], (output, wanted))
            return self.evaluate(*alone)

        try:
            losses = torch.func.vmap(one, randomness="different")(outputs, target)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"a critic needs the loss of each sample alone, which this loss does not give ({reason}): write it with torch "
                "operations, as a mean over samples"
            ) from error
        return losses.nan_to_num(nan=0.0)

    def see(self, outputs: Values) -> None:
        """Takes down the shape of the model's output."""
        found = output_tensors(outputs)
        self.scores_shape = found[0].shape[1:] if len(found) == 1 else None

    def check(self, outputs: Values, target: Any) -> None:
        """Checks, before anything is learnt, that targets like these fit the model's output.

        Raises:
            ValueError: If they do not; class numbers out of range are named.
        """
        scores = output_tensors(outputs)
        self.see(outputs)
        if len(scores) == 1 and scores[0].dim() == 2 and _are_class_numbers(target, scores[0]):
            labels, classes = target[target != -100], scores[0].shape[1]
            if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
                raise ValueError(
                    f"targets hold class numbers from {int(labels.min())} to {int(labels.max())}, but the model gives scores for "
                    f"{classes} classes, 0 to {classes - 1}: mend the labels or widen the model's last layer"
                )
        self.evaluate(outputs, target)


def _are_class_numbers(target: Any, scores: Tensor) -> bool:
    return isinstance(target, Tensor) and target.dtype == torch.int64 and target.shape == scores.shape[:1]


def describe(values: Any) -> str:
    """Says in a few words what a tree of tensors is."""
    found = [f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in tensors(values)]
    return " and ".join(found) if found else type(values).__name__


def is_finite(loss: Tensor) -> bool:
    """Whether a scalar is a number."""
    return math.isfinite(loss.item())
