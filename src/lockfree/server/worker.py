"""A worker: what turns weights and the number of a batch into a gradient."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lockfree.rng import generators_apart, seed_generators
from lockfree.server.batches import Batches, count, to_device
from lockfree.server.core import trained
from lockfree.server.messages import Pulled, Push


@dataclass(frozen=True, slots=True, eq=False)
class Gradient:
    """What a worker found out.

    Attributes:
        gradients: Gradient of the mean loss, a tensor for each weight; ``None`` where the loss does not depend on it.
        buffers: The buffers after the batch; those that it left alone are the ones that came.
        samples: How many samples the batch had.
        loss: The mean loss.
    """

    gradients: list[Tensor | None]
    buffers: list[Tensor]
    samples: int
    loss: float


class Worker:
    r"""A replica of the model. It remembers nothing from batch to batch, so one of them may stand for any number of workers.

    What it draws at random (dropout, the augmentation of a dataset) depends on seed and ticket alone, so that a batch gives the same
    gradient at the same weights, whoever works on it. The global generators are left as they were.

    Args:
        model: The model, which is copied and set to training; or one that may be used as it is.
        batches: The batch of each ticket.
        loss: Maps the model's output and the targets to a scalar, the mean over the batch.
        loss_scale: What the loss is multiplied by before it is differentiated, and gradients divided by, above 0.
        own: Whether the model is this worker's own already, and need not be copied.

    Raises:
        ValueError: If the loss scale is not above 0.

    Example:
        >>> data = (torch.ones(4, 1), torch.zeros(4, 1))
        >>> model = nn.Linear(1, 1, bias=False)
        >>> worker = Worker(model, Batches(data, batch_size=2, seed=0), loss=nn.functional.mse_loss)
        >>> worker.gradient([torch.full((1, 1), 3.0)], [], ticket=0).gradients
        [tensor([[6.]])]
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        *,
        loss: Callable[[Any, Any], Tensor],
        loss_scale: float = 1.0,
        own: bool = False,
    ) -> None:
        if not loss_scale > 0:
            raise ValueError(f"loss_scale={loss_scale!r}: give a number above 0")
        self._model = (model if own else copy.deepcopy(model)).train()
        self._batches, self._loss, self._scale = batches, loss, loss_scale
        self._parameters = trained(self._model)
        self._buffers = list(self._model.buffers())
        self._device = self._parameters[0].device

    def answer(self, pulled: Pulled) -> Push:
        """Answers a pull.

        Args:
            pulled: What the server has handed out.
        """
        found = self.gradient(pulled.weights, pulled.buffers, pulled.ticket)
        return Push(
            worker=pulled.worker,
            incarnation=pulled.incarnation,
            sequence=pulled.sequence,
            version=pulled.version,
            ticket=pulled.ticket,
            gradients=found.gradients,
            buffers=found.buffers,
            samples=found.samples,
            loss=found.loss,
        )

    def gradient(self, weights: Sequence[Tensor], buffers: Sequence[Tensor], ticket: int) -> Gradient:
        """Takes the gradient of a batch.

        Args:
            weights: The weights to take it at. They are used where they are, without a copy, and not written to.
            buffers: The buffers to begin with, which are copied.
            ticket: Number of the batch, 0 or more.

        Raises:
            ValueError: If the loss is not a scalar that depends on the weights.
        """
        for parameter, weight in zip(self._parameters, weights, strict=True):
            parameter.data = weight
            parameter.grad = None
        with torch.no_grad():
            for buffer, value in zip(self._buffers, buffers, strict=True):
                buffer.copy_(value)
        with generators_apart():
            seed_generators(self._batches.tickets.seed_at(ticket))
            x, y = self._batches(ticket)
            samples = count(x)
            with torch.enable_grad():
                loss = self._loss(self._model(to_device(x, self._device)), to_device(y, self._device))
                if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                    raise ValueError("the loss is not one number that depends on the weights: return the mean over the batch")
                (loss if self._scale == 1.0 else loss * self._scale).backward()
        gradients = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        if self._scale != 1.0:
            torch._foreach_div_([gradient for gradient in gradients if gradient is not None], self._scale)
        # Masks and the like never change, and are not copied. Version counters would not tell: batch normalisation leaves them alone.
        after = [
            value if torch.equal(buffer, value) else buffer.detach().clone()
            for buffer, value in zip(self._buffers, buffers, strict=True)
        ]
        return Gradient(gradients, after, samples, float(loss.detach()))
