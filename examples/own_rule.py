"""A rule of your own in one file: the error arrives at every block as one signed number a sample, as in Kickback.

Every unit of a block gets the same credit, the error of the score of the true class; nothing else
about the blocks above is needed. The point here is not the rule but that this file is all it takes: cutting, schedules, locks,
checkpoints, the trainer and the report work with it.

    python examples/own_rule.py
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

import lockfree as lf


@dataclass(frozen=True, kw_only=True)
class Broadcast(lf.Rule):
    """Each block gets the error of the true class's score, the same for all its units."""

    strength: float = 1.0

    card: ClassVar[lf.Card] = lf.Card(
        title="Scalar broadcast",
        summary="The credit of every unit is the error of the sample's true class.",
        reference="after Balduzzi, Vanchinathan, Buhmann 2015, Kickback cuts backprop's red-tape, arXiv 1411.6191",
        bibtex="@inproceedings{balduzzi2015kickback, title={Kickback cuts Backprop's red-tape}, booktitle={AAAI}, year={2015}}",
    )

    def needs(self, place: lf.Place) -> lf.Needs:
        """The output error; the last block has the loss itself above it."""
        return lf.Needs.ABOVE if place.top else lf.Needs.ERROR

    def credit(self, context: lf.Context) -> tuple[torch.Tensor | None, ...] | None:
        """Returns the scalar of each sample for each of its units."""
        if context.place.top:
            return context.above
        assert context.error is not None
        (error,) = context.error
        assert error is not None
        scalar = self.strength * error.gather(1, context.target[:, None])  # (batch, 1), negative until the class is certain
        return tuple(scalar.view(-1, *[1] * (y.dim() - 1)).expand_as(y).contiguous() for y in context.outputs)


def main() -> float:
    """Trains on digits by the new rule and returns the accuracy."""
    torch.manual_seed(0)
    dataset = lf.data.load("digits")
    learner = lf.convert(
        lf.models.build("mlp", input_shape=dataset.input_shape, classes=10),
        Broadcast(strength=0.1),
        loss=F.cross_entropy,
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3),
        example_input=dataset.train.inputs[:2],
    )
    lf.Trainer(learner).fit(lf.data.TensorLoader(*dataset.train, batch_size=32), epochs=10)
    found = lf.evaluate(learner, lf.data.TensorLoader(*dataset.test, batch_size=360, shuffle=False))
    print(f"locks kept: {', '.join(sorted(learner.locks))}; accuracy {found.accuracy:.3f}")
    return found.accuracy or 0.0


if __name__ == "__main__":
    main()
