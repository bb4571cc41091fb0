"""The model as a chain of blocks, bottom to top."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lockfree.balance import balanced_names
from lockfree.cut import CannotCutError, cut, names_for
from lockfree.rng import get_rng, set_rng, undisturbed
from lockfree.values import Values, as_leaves, clone, detach, tensors


class Block(nn.Module):
    """A piece of the user's model that learns on its own.

    It calls the user's own modules, in their present mode, and owns nothing. Several values may cross its borders; they travel
    as a tuple.

    Attributes:
        name: The module that the block begins with, as the user's model calls it.
    """

    def __init__(self, name: str, model: nn.Module, training: tuple[nn.Module, int], evaluation: tuple[nn.Module, int]) -> None:
        super().__init__()
        self.name = name
        self._bodies = nn.ModuleList([evaluation[0], training[0]])
        self._takes = (evaluation[1], training[1])
        self._mutates: list[bool | None] = [None, None]
        self._model = (model,)  # in a tuple: the block is a view of the model, not its parent

    def forward(self, values: Values) -> Values:
        """Runs the block on what crosses its lower border, and returns what crosses its upper one."""
        mode = int(self._model[0].training)
        if self._mutates[mode] is None:
            return self._first_call(mode, values)
        if self._mutates[mode]:
            values = clone(values)
        return self._call(mode, values)

    def _call(self, mode: int, values: Values) -> Values:
        body = self._bodies[mode]
        return body(values) if self._takes[mode] == 1 else body(*values)

    def _first_call(self, mode: int, values: Values) -> Values:
        """Finds out whether the block changes its input in place; what crosses a border is shared with the block below."""
        copies = clone(values)
        before = [tensor._version for tensor in tensors(copies)]
        outputs = self._call(mode, copies)
        self._mutates[mode] = before != [tensor._version for tensor in tensors(copies)]
        return outputs


class Chain:
    """A model cut into blocks; the model itself stays the user's own object.

    Args:
        model: Any `torch.nn.Module` whose forward takes one object (a tensor, or a tree of tensors).
        blocks: ``None``: a block begins at each child that holds weights (one with a normalisation, an activation, a pooling
            only joins the one before it). A list of module names: a new block begins at each. A number K: K pieces whose saved
            activations take about the same memory.
        example_input: A small batch; needed for a number of blocks.

    Raises:
        CannotCutError: If the model cannot be cut there; the message names the line and the way out.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [block.name for block in Chain(model).blocks]
        ['1', '3']
    """

    def __init__(
        self, model: nn.Module, blocks: int | Sequence[str] | None = None, *, example_input: Values | None = None
    ) -> None:
        self.model = model
        if isinstance(blocks, int):
            if example_input is None:
                raise ValueError(f"blocks={blocks} balances pieces by measured memory: pass example_input, a small batch")
            names = balanced_names(model, blocks, example_input)
        else:
            names = names_for(model, blocks)
        self.blocks = _blocks(model, names, strict=isinstance(blocks, Sequence))

    def __len__(self) -> int:
        return len(self.blocks)

    def __repr__(self) -> str:
        return f"Chain({' | '.join(block.name or type(self.model).__name__ for block in self.blocks)})"

    def rehearse(self, example_input: Values, reports: Sequence[bool] | None = None) -> list[Values]:
        """Runs an example batch through the blocks in evaluation mode, and changes nothing.

        Args:
            example_input: A small batch.
            reports: For each block, whether it will be asked for dL/dx; all of them if left out.

        Returns:
            What each block hands up; tensors that carry credit require a gradient.

        Raises:
            CannotCutError: If the blocks together do not compute what the model computes.
        """
        outputs, random = [], get_rng()
        with undisturbed(self.model), torch.enable_grad():
            self.model.eval()
            values = example_input
            for block, wanted in zip(self.blocks, reports or [True] * len(self), strict=True):
                made = block(values if wanted else detach(values))
                values = as_leaves(detach(made), made)
                outputs.append(values)
            set_rng(random)
            whole = self.model(example_input)
        pairs = zip(tensors(outputs[-1]), tensors(whole), strict=True)
        if not all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True) for a, b in pairs):
            raise CannotCutError(
                f"the blocks of {type(self.model).__name__} do not compute what the model computes: its forward depends on Python "
                "values that tracing cannot see; cut only outside of the module that does so"
            )
        return outputs


def _blocks(model: nn.Module, names: Sequence[str], *, strict: bool) -> list[Block]:
    """Cuts a model once as it trains and once as it evaluates, since a forward pass may differ (functional dropout, say)."""
    modes = {}
    with undisturbed(model):
        for training in (True, False):
            model.train(training)
            modes[training] = cut(model, names, strict=strict)
    if len(modes[True]) != len(modes[False]):
        raise CannotCutError(
            f"{type(model).__name__} runs {len(modes[True])} of the blocks in training and {len(modes[False])} in evaluation: "
            "begin blocks only at modules that run in both"
        )
    return [
        Block(name, model, (body, takes), (other, other_takes))
        for (name, body, takes), (_, other, other_takes) in zip(modes[True], modes[False], strict=True)
    ]


def output_tensors(values: Values) -> tuple[Tensor, ...]:
    """Returns the floating-point tensors of a model's output: those that a loss can have a gradient for."""
    return tuple(tensor for tensor in tensors(values) if tensor.is_floating_point())
