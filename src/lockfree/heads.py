"""Linear classifiers of what single blocks hand up, one by one and as one stack."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree.flight import Flight
from lockfree.objective import Objective
from lockfree.rule import Context
from lockfree.stacking import CreditStack, Descent, ParameterStack
from lockfree.values import by_place

_MOST_FEATURES = 2048


class Head(nn.Module):
    """A linear map from a block's output to scores of the model's own shape; it starts at 0.

    Of images no more than 2,048 features are kept, by taking means over patches. Where output and scores are sequences of the same
    length, each place is read out on its own.

    Args:
        y: An example of the output, shape (m, ...).
        scores: An example of the model's output, shape (m, ...).

    Attributes:
        pool: Takes the means.
        linear: The map.
        by_place: Whether each place of a sequence is read out on its own.
        shape: Of the scores of one sample.

    Example:
        >>> Head(torch.zeros(2, 64, 14, 14), torch.zeros(2, 10))(torch.ones(3, 64, 14, 14)).shape
        torch.Size([3, 10])

    Reference:
        Nøkland, Eidnes 2019, arXiv 1901.06656, section 2.1, whose local classifier this is.
    """

    def __init__(self, y: Tensor, scores: Tensor) -> None:
        super().__init__()
        self.pool: nn.Module = nn.Identity()
        if y.dim() == 4 and y[0].numel() > _MOST_FEATURES:
            side = max(1, int((_MOST_FEATURES / y.shape[1]) ** 0.5))
            self.pool = nn.AdaptiveAvgPool2d((min(side, y.shape[2]), min(side, y.shape[3])))
        self.by_place = by_place(y, scores)
        self.shape = scores.shape[1:]
        if self.by_place:
            self.linear = nn.Linear(y.shape[-1], scores.shape[-1])
        else:
            self.linear = nn.Linear(self.pool(y[:1]).numel(), scores[0].numel())
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.to(y.device, torch.promote_types(y.dtype, torch.float32))  # an example under autocast may be of less

    def forward(self, y: Tensor) -> Tensor:
        """Returns the scores."""
        y = y.to(self.linear.weight.dtype)
        if self.by_place:
            return self.linear(y)
        return self.linear(self.pool(y).flatten(1)).unflatten(1, self.shape)


class StackedHeads(CreditStack):
    r"""The heads of n cells under cross entropy, in one batched product each way.

    $$p = \mathrm{softmax}(W f + b), \qquad d = (p - \mathrm{onehot}(c))/m, \qquad \partial L/\partial f = d\,W, \qquad
    \partial L/\partial W = d^T f$$

    f are the features, pooled where the heads pool.

    Args:
        heads: The heads, bottom to top, of one structure.
    """

    def __init__(self, heads: Sequence[Head]) -> None:
        self._weight = ParameterStack([head.linear.weight for head in heads])
        self._bias = ParameterStack([head.linear.bias for head in heads])
        self.parameters = [self._weight, self._bias]
        self._pool = heads[0].pool
        self._offset, self._transposed = self._bias.value[:, None], self._weight.value.mT
        self._features = self._missed = self._losses = torch.empty(0)

    @staticmethod
    def of(heads: Sequence[nn.Module], objective: Objective) -> "StackedHeads | None":
        """Returns the heads as one; ``None`` if they are something else, or the loss is."""
        plain = [head for head in heads if isinstance(head, Head) and not head.by_place and len(head.shape) == 1]
        learning = all(parameter.requires_grad for head in plain for parameter in head.parameters())
        return StackedHeads(plain) if len(plain) == len(heads) and learning and objective.is_cross_entropy else None

    def agrees(self, contexts: Sequence[Context]) -> bool:
        """Whether targets are class numbers, one a sample."""
        return all(isinstance(c.target, Tensor) and c.target.dtype == torch.int64 and c.target.dim() == 1 for c in contexts)

    def shown(self, flights: Sequence[Flight], outputs: Tensor) -> list[Tensor]:
        return [torch.stack([flight.target for flight in flights])]

    def credit(self, outputs: Tensor, shown: Sequence[Tensor]) -> Tensor:
        outputs = outputs.detach()
        pooled = not isinstance(self._pool, nn.Identity)
        with torch.set_grad_enabled(pooled):
            leaf = outputs.requires_grad_() if pooled else outputs
            features = self._pool(leaf.flatten(0, 1)).reshape(*outputs.shape[:2], -1) if pooled else leaf.flatten(2)
        self._features = features.detach()
        scores = torch.baddbmm(self._offset, self._features, self._transposed).requires_grad_()
        (targets,) = shown
        counted = (targets != _IGNORED).sum(1)
        each = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        losses = each.sum(1) / counted
        (self._missed,) = torch.autograd.grad(losses.sum(), scores)
        self._losses = losses.detach()
        credit = torch.bmm(self._missed, self._weight.value)
        return torch.autograd.grad(features, leaf, credit)[0] if pooled else credit.view_as(outputs)

    def learn(self) -> Tensor:
        return self._losses.sum()

    def losses(self) -> Tensor:
        return self._losses

    def descend(self, descent: Descent) -> None:
        descent.follow_product(self._weight, self._missed.mT, self._features)
        descent.follow(self._bias, self._missed.sum(1))


_IGNORED = -100
"""The class number that PyTorch's cross entropy leaves out."""
