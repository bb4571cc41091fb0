"""What gradients blocks are given: by the rule, and by backpropagation of the loss."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lockfree.learner import Learner
from lockfree.rng import get_rng, set_rng, undisturbed
from lockfree.values import Values, carriers


class Gradients(NamedTuple):
    """What one batch gives.

    Attributes:
        credits: The gradient of each block's output, all its tensors in one vector; ``None`` where none was taken that can be seen.
        parameters: The gradient of each parameter that is given one, by name.
    """

    credits: list[Tensor | None]
    parameters: dict[str, Tensor]


def estimated_and_true(learner: Learner, x: Values, y: Any) -> tuple[Gradients, Gradients]:
    """Returns the rule's gradients and those of the loss, in training mode and from the same random numbers; changes nothing.

    Args:
        learner: Whose blocks are given them.
        x: As for `Learner.step`.
        y: As for `Learner.step`.
    """
    with undisturbed(learner.model):  # generators, too
        learner.model.train()
        random = get_rng()
        estimate = _heard(learner, partial(learner.gradients, x, y))
        set_rng(random)
        return estimate, _heard(learner, partial(_true, learner, x, y))


def _heard(learner: Learner, run: Callable[[], dict[str, Tensor]]) -> Gradients:
    """Runs something that differentiates, and listens to what gradient each block's output is given."""
    taken: list[dict[int, Tensor]] = [{} for _ in learner.chain.blocks]

    def listen(seen: dict[int, Tensor], forward: Callable[..., Values], *inputs: Any) -> Values:
        outputs = forward(*inputs)
        for index, tensor in enumerate(carriers(outputs)):
            tensor.register_hook(lambda gradient, index=index: seen.__setitem__(index, gradient.detach().clone()))
        return outputs

    blocks = list(learner.chain.blocks)
    before = [block.__dict__.get("forward") for block in blocks]
    for block, seen in zip(blocks, taken, strict=True):
        # Not a hook of the module: where exact credit crosses its borders the engine calls a block's forward itself.
        block.forward = partial(listen, seen, block.forward)
    try:
        parameters = run()
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.forward  # the class's own is seen again
            else:
                block.forward = own
    return Gradients([flat(seen[index] for index in sorted(seen)) if seen else None for seen in taken], parameters)


def _true(learner: Learner, x: Values, y: Any) -> dict[str, Tensor]:
    trained = {name: parameter for name, parameter in learner.model.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        values = x
        for block in learner.chain.blocks:
            values = block(values)
        found = torch.autograd.grad(learner.loss(values, y), list(trained.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(trained, found, strict=True) if gradient is not None}


def flat(parts: Iterable[Tensor]) -> Tensor:
    """Returns the numbers of several tensors in one vector of double precision."""
    rows = [part.double().flatten() for part in parts]
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.float64)
