"""What a probe is: it looks at a run now and then, and changes nothing."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from lockfree.learner import Learner
from lockfree.probes.gradients import Gradients, estimated_and_true
from lockfree.rng import undisturbed
from lockfree.values import Values, batch_size, clone, tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class View:
    """A learner as a probe sees it, on samples of its own.

    What takes a pass through the model is made when it is first asked for and kept, so that probes that share a view share it.

    Args:
        learner: What is trained.
        inputs: The samples, as the model takes them.
        targets: Their targets.
    """

    def __init__(self, learner: Learner, inputs: Values, targets: Any) -> None:
        self.learner, self.inputs, self.targets = learner, inputs, targets

    @cached_property
    def source(self) -> Float[Tensor, "m d"]:
        """The network's input, a row for each sample."""
        return _rows(self.inputs)

    @cached_property
    def outputs(self) -> list[Values]:
        """What each block hands up, bottom to top, as it is; the top block's is the model's output."""
        values, found = self.inputs, []
        with undisturbed(self.learner.model), torch.no_grad():
            self.learner.model.eval()
            for block in self.learner.chain.blocks:
                values = block(values)
                found.append(clone(values))  # the next block may work in place
        return found

    @cached_property
    def representations(self) -> list[Float[Tensor, "m d"]]:
        """What each block hands up, bottom to top, a row for each sample."""
        return [_rows(values) for values in self.outputs]

    @cached_property
    def gradients(self) -> tuple[Gradients, Gradients]:
        """What the rule gives on all samples at once, and what backpropagation does, both in training mode."""
        return estimated_and_true(self.learner, self.inputs, self.targets)

    def outputs_of(self, layers: Sequence[str]) -> list[Float[Tensor, "m d"]]:
        """What submodules put out, in the order of their names, a row for each sample.

        Args:
            layers: Names as in ``model.named_modules()``.

        Raises:
            ValueError: If one of them is not run, is run more than once, or puts out no tensor with a row for each sample.
        """
        model, found = self.learner.model, {name: [] for name in layers}
        samples = batch_size(self.inputs)
        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda module, inputs, outputs, taken=taken: taken.append(clone(outputs))  # the next layer may work in place
            )
            for name, taken in found.items()
        ]
        try:
            with undisturbed(model), torch.no_grad():
                model.eval()
                model(self.inputs)
                for name, taken in found.items():
                    if len(taken) != 1:
                        raise ValueError(f"layer {name!r} runs {len(taken)} times on a batch: name layers that run once")
                    if not any(tensor.dim() and len(tensor) == samples for tensor in tensors(taken[0])):
                        raise ValueError(
                            f"layer {name!r} puts out no tensor with a row for each of {samples} samples: name another"
                        )
                return [_rows(found[name][0], samples) for name in layers]
        finally:
            for hook in hooks:
                hook.remove()


def _rows(values: Values, samples: int | None = None) -> Tensor:
    """Flattens all numbers of a tree into one row a sample."""
    samples = batch_size(values) if samples is None else samples
    rows = [tensor.reshape(samples, -1) for tensor in tensors(values) if tensor.dim() and len(tensor) == samples]
    return torch.cat([one if one.dtype == torch.float64 else one.float() for one in rows], dim=1)


def some_of(values: Values, rows: slice | Tensor) -> Values:
    """Returns some samples of a batch, in a tree of batched tensors.

    Args:
        values: The tree.
        rows: Which samples.
    """
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[rows] if tensor.dim() else tensor, values)


@dataclass(frozen=True, kw_only=True)
class Probe(ABC):
    """Looks at a learner and returns plain data; parameters, buffers, modes and random generators stay as they are.

    A subclass gives a ``name`` and what is ``said`` of it in the report, and implements `look` and `draw`.

    Attributes:
        every: Steps between two looks, 1 or more; ``None``: at the start and after every epoch.

    Raises:
        ValueError: If ``every`` is below 1.
    """

    name: ClassVar[str]
    said: ClassVar[str]
    every: int | None = None

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(f"every={self.every}: give a number of steps, 1 or more, or None for every epoch")

    def due(self, step: int, *, end_of_epoch: bool) -> bool:
        """Whether it is time to look, after so many steps."""
        return end_of_epoch if self.every is None else not end_of_epoch and step % self.every == 0

    def check(self, learner: Learner) -> None:  # noqa: B027, most probes serve every learner
        """Refuses a learner that this probe has nothing to see in; asked when the probe is attached.

        Raises:
            ValueError: With what to do instead.
        """

    @abstractmethod
    def look(self, view: View) -> dict[str, Any]:
        """Returns what is seen, as JSON values by name."""

    @classmethod
    @abstractmethod
    def draw(cls, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
        """Draws what was seen.

        Args:
            runs: For each run, by its title, the records in the order in which they were made: what `look` returned, with
                ``step`` and ``epoch``.
        """


def blue(part: float) -> tuple[float, float, float, float]:
    """Returns the colour of a line: the darker, the higher in the network."""
    return 0.15, 0.39, 0.92, min(1.0, 0.2 + 0.8 * part)
