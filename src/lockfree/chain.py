"""The model as a chain of blocks, bottom to top."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, nn

from lockfree.balance import balanced_names
from lockfree.cut import CannotCutError, Piece, ancestors, cut, names_for
from lockfree.recompute import run_in_parts
from lockfree.rng import get_rng, set_rng, undisturbed
from lockfree.values import Values, as_leaves, clone, detach, tensors

_IN_TRAINING = attrgetter("training")


class _Forms:
    """The traced forms of a model, cut: one for each combination of modes that its traced-through modules are found in.

    A forward pass may differ between training and evaluation (functional dropout, say), and a trace holds one of the two.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, strict: bool) -> None:
        self._model, self._names = model, list(names)
        through = [model, *(model.get_submodule(name) for name in sorted(ancestors(names)))] if names else []
        self._through = tuple(through)
        self._pieces: dict[tuple[bool, ...], list[Piece]] = {}
        with undisturbed(model):
            for training in (True, False):
                model.train(training)
                self._add(cut(model, names, strict=strict))

    @property
    def mode(self) -> tuple[bool, ...]:
        """The modes that the traced-through modules are in."""
        return tuple(map(_IN_TRAINING, self._through))

    def now(self) -> list[Piece]:
        """Returns the pieces for the present modes."""
        return self.of(self.mode)

    def of(self, mode: tuple[bool, ...]) -> list[Piece]:
        """Returns the pieces for what `mode` is at present."""
        if mode not in self._pieces:
            self._add(cut(self._model, self._names, strict=False))
        return self._pieces[mode]

    def _add(self, pieces: list[Piece]) -> None:
        known = next(iter(self._pieces.values()), pieces)
        if len(pieces) != len(known):
            raise CannotCutError(
                f"{type(self._model).__name__} runs {len(known)} of the blocks in training and {len(pieces)} in other modes: "
                "begin blocks only at modules that always run"
            )
        self._pieces[self.mode] = pieces

    def all(self) -> Iterator[list[Piece]]:
        """Yields the pieces for every combination of modes met so far."""
        return iter(self._pieces.values())


class Block(nn.Module):
    """A piece of the user's model that learns on its own.

    It calls the user's own modules, in their present mode, and owns nothing. Several values may cross its borders; they travel
    as a tuple.

    Attributes:
        name: The module that the block begins with, as the user's model calls it.
    """

    def __init__(self, index: int, model: nn.Module, forms: _Forms, *, recompute: bool = False) -> None:
        super().__init__()
        self._recompute = recompute
        pieces = [pieces[index] for pieces in forms.all()]
        self.name = pieces[0].name
        self._bodies = nn.ModuleList(piece.body for piece in pieces)  # so that the block's parameters are found
        self._index, self._forms = index, forms
        self._model = (model,)  # in a tuple: the block is a view of the model, not its parent
        # By the modes that the model's modules are in.
        self._runs: dict[tuple[bool, ...], Callable[[Values], Values]] = {}
        self._works_in_place = False

    def forward(self, values: Values) -> Values:
        """Runs the block on what crosses its lower border, and returns what crosses its upper one."""
        run = self._runs.get(self._forms.mode)
        return self._first_call(values) if run is None else run(values)

    def _first_call(self, values: Values) -> Values:
        """Finds out whether the block changes its input in place; what crosses a border is shared with the block below."""
        piece = self._forms.now()[self._index]
        run: Callable[[Values], Values] = piece.body if piece.takes == 1 else partial(_spread, piece.body)
        if self._recompute:
            run = partial(_in_parts, piece, run)
        if _leaves_inputs_alone(piece.body):
            self._runs[self._forms.mode] = run
            return run(values)
        copies = clone(values)
        before = [tensor._version for tensor in tensors(copies)]
        outputs = run(copies)
        in_place = before != [tensor._version for tensor in tensors(copies)]
        self._runs[self._forms.mode] = partial(_on_a_copy, run) if in_place else run
        self._works_in_place |= in_place
        return outputs

    @property
    def body(self) -> nn.Module | None:
        """What runs the block in its present modes, if that is a module that takes one value and leaves it as it is."""
        piece = self._forms.now()[self._index]
        return piece.body if piece.takes == 1 and not self._works_in_place and not self._recompute else None

    def copy(self) -> nn.Module:
        """Returns what the block runs in its present modes as a module with weights of its own."""
        in_place = self._works_in_place or not self._runs  # who has not run might
        return _Copy(self._forms.now()[self._index], in_place=in_place)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Lets the block run as in evaluation; training flags are afterwards as before."""
        modes = [(module, module.training) for module in self._model[0].modules()]
        self._model[0].eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields the modules inside, each with what the user's model calls it."""
        inside = {id(module) for module in self.modules()}
        for name, module in self._model[0].named_modules():
            if id(module) in inside:
                yield name, module


def _leaves_inputs_alone(body: nn.Module) -> bool:
    """Whether that is known from what a body is made of: PyTorch's own layers say so when they work in place."""
    return all(
        type(m).__module__.startswith("torch.nn.") and not (getattr(m, "inplace", False) or m._forward_pre_hooks)
        for m in body.modules()
    )


def _spread(body: nn.Module, values: Values) -> Values:
    return body(*values)


def _in_parts(piece: Piece, run: Callable[[Values], Values], values: Values) -> Values:
    if not torch.is_grad_enabled():
        return run(values)
    return run_in_parts(piece.body, *((values,) if piece.takes == 1 else values))


def _on_a_copy(run: Callable[[Values], Values], values: Values) -> Values:
    return run(clone(values))


class _Copy(nn.Module):
    """What a block runs, with weights of its own."""

    def __init__(self, piece: Piece, *, in_place: bool) -> None:
        super().__init__()
        self.body = deepcopy(piece.body)
        self._takes, self._in_place = piece.takes, in_place

    def forward(self, values: Values) -> Values:
        values = clone(values) if self._in_place else values
        return self.body(values) if self._takes == 1 else self.body(*values)


class Chain:
    """A model cut into blocks; the model itself stays the user's own object.

    Args:
        model: Any `torch.nn.Module` whose forward takes one object (a tensor, or a tree of tensors).
        blocks: ``None``: a block begins at each child that holds weights (one with a normalisation, an activation, a pooling
            only joins the one before it). A list of module names: a new block begins at each. A number K: K pieces whose saved
            activations take about the same memory.
        example_input: A small batch; needed for a number of blocks.
        recompute: Whether blocks run again, part by part, when they are differentiated, instead of keeping their activations.

    Raises:
        CannotCutError: If the model cannot be cut there; the message names the line and the way out.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [block.name for block in Chain(model).blocks]
        ['1', '3']
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: int | Sequence[str] | None = None,
        *,
        example_input: Values | None = None,
        recompute: bool = False,
    ) -> None:
        self.model, self.recompute = model, recompute
        if isinstance(blocks, str):
            raise TypeError(f"blocks={blocks!r} is one name: pass a list of names, blocks=[{blocks!r}]")
        if isinstance(blocks, int):
            if example_input is None:
                raise ValueError(f"blocks={blocks} balances pieces by measured memory: pass example_input, a small batch")
            names = balanced_names(model, blocks, example_input)
        else:
            names = names_for(model, blocks)
        forms = _Forms(model, names, strict=isinstance(blocks, Sequence))
        self.blocks = [Block(index, model, forms, recompute=recompute) for index in range(len(forms.now()))]

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


def output_tensors(values: Values) -> tuple[Tensor, ...]:
    """Returns the floating-point tensors of a model's output: those that a loss can have a gradient for."""
    return tuple(tensor for tensor in tensors(values) if tensor.is_floating_point())
