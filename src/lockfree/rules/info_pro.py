"""InfoPro: each block keeps what it needs of the input, and tells the classes apart."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree.choose import choose
from lockfree.local import BatchNorm2d, HeadRule, as_input_of
from lockfree.rule import Card, Context, Place, Site
from lockfree.values import by_place, tensors

_TASKS = ("contrast", "loss")


class _Networks(nn.Module):
    """The decoder, if there is something to decode, and the task's network."""

    def __init__(self, decoder: nn.Module | None, task: nn.Module) -> None:
        super().__init__()
        self.decoder, self.task = decoder, task


class _ImageDecoder(nn.Module):
    """Enlarges to the source's size, then two convolutions; values from 0 to 1 as logits."""

    def __init__(self, channels: int, source: torch.Size) -> None:
        super().__init__()
        self._size = tuple(source[1:])
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 12, 3, padding=1), BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, source[0], 3, padding=1)
        )

    def forward(self, y: Tensor) -> Tensor:
        if y.shape[2:] != self._size:
            y = F.interpolate(y, self._size, mode="bilinear", align_corners=True)
        return self.layers(y)


def _decoder(y: Tensor, source: Any) -> nn.Module | None:
    """Makes what brings the network's input back; ``None`` if that is no tensor of real numbers."""
    if not isinstance(source, Tensor) or not source.is_floating_point():
        return None
    if y.dim() == 4 and source.dim() == 4:
        return _ImageDecoder(y.shape[1], source.shape[1:])
    return nn.Sequential(nn.Flatten(), nn.Linear(y[0].numel(), source[0].numel()), nn.Unflatten(1, source.shape[1:]))


def _task(y: Tensor, out: torch.Size, width: int) -> nn.Module:
    """One convolution (or layer) and two layers, to an output of the shape."""
    if len(out) == 2 and y.dim() == 3:
        return nn.Sequential(nn.Linear(y.shape[2], width), nn.ReLU(), nn.Linear(width, out[1]))
    layers: list[nn.Module] = [nn.Flatten()]
    into = y[0].numel()
    if y.dim() == 4:
        channels = y.shape[1]
        layers = [nn.Conv2d(channels, channels, 3, padding=1), BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        into = channels
    return nn.Sequential(*layers, nn.Linear(into, width), nn.ReLU(), nn.Linear(width, out.numel()), nn.Unflatten(1, out))


@dataclass(frozen=True, kw_only=True)
class InfoPro(HeadRule):
    r"""Each block descends $\lambda_i\,\mathrm{BCE}(D_i(y_i), x) + \mu_i\,\ell_i$: it keeps what it needs to bring the input x back.

    $\ell_i$ is the supervised contrastive loss of a projection $z = P_i(y_i)$ on the unit sphere,
    $-\sum_a\frac1{|P(a)|}\sum_{p\in P(a)}\log\frac{\exp(z_a^Tz_p/\tau)}{\sum_{b\ne a}\exp(z_a^Tz_b/\tau)}/m$ with P(a) the others of a's
    class, or the user's loss of a small classifier. Weights go evenly from the first block's to that of the last but one.

    Attributes:
        reconstruction: $\lambda$ of the first and of the last local block, 0 or more. Real-valued inputs alone are brought back;
            images with their values between the batch's smallest and largest taken as 0 to 1, all else by squared error.
        supervision: $\mu$ of the first and of the last local block, 0 or more.
        task: "contrast" (for class numbers, one a sample) or "loss".
        temperature: $\tau$ of the contrast, above 0.
        width: Of the projection and of the layer before it, 1 or more.
        learning_rate: Of the auxiliary networks' Adam.

    Raises:
        ValueError: If a number is out of range or the name misspelt; in a step, if contrast is asked of other targets.

    Example:
        >>> import lockfree as lf
        >>> lf.rules.InfoPro(task="loss").needs(lf.Place(0, 4)).name
        'TARGET'

    Reference:
        Wang, Ni, Song, Yang, Huang 2021, "Revisiting locally supervised learning: an alternative to end-to-end training", arXiv
        2101.10832, equations 6 to 8; the contrast is Khosla et al. 2020's, arXiv 2004.11362, equation 2.
    """

    reconstruction: tuple[float, float] = (1.0, 0.0)
    supervision: tuple[float, float] = (1.0, 1.0)
    task: str = "contrast"
    temperature: float = 0.07
    width: int = 128

    card: ClassVar[Card] = Card(
        title="InfoPro",
        summary="Each block tells the classes apart and keeps what it needs to bring the input back.",
        reference="Wang, Ni, Song, Yang, Huang 2021, Revisiting locally supervised learning: an alternative to end-to-end training, arXiv "
        "2101.10832",
        bibtex=(
            "@inproceedings{wang2021revisiting, title={Revisiting Locally Supervised Learning: an Alternative to End-to-end Training}, "
            "author={Wang, Yulin and Ni, Zanlin and Song, Shiji and Yang, Le and Huang, Gao}, booktitle={International Conference on "
            "Learning Representations}, year={2021}}"
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reconstruction", "supervision"):
            ends = getattr(self, name)
            if len(ends) != 2 or not all(0 <= end < math.inf for end in ends):
                raise ValueError(f"{name}={ends}: give two numbers, 0 or more, of the first and of the last local block")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: give a number above 0")
        if self.width < 1:
            raise ValueError(f"width={self.width}: give 1 or more")
        choose(dict.fromkeys(_TASKS), self.task, "task")

    def head(self, site: Site, y: Tensor) -> nn.Module:
        decoder = _decoder(y, site.example) if _at(self.reconstruction, site.place) else None
        contrasts = self.task == "contrast" and not by_place(y, site.scores)
        out = torch.Size([self.width]) if contrasts else site.scores.shape[1:]
        return _Networks(decoder, _task(y, out, self.width))

    def head_loss(self, context: Context, head: _Networks, y: Tensor) -> Tensor:
        y = as_input_of(head.task, y)
        made = head.task(y)
        assert context.loss is not None
        if self.task == "contrast" and made.dim() == 2:
            told = contrast(F.normalize(made, dim=1), _labels(context), self.temperature)
        else:
            told = context.loss(made)
        loss = _at(self.supervision, context.place) * told
        if head.decoder is None:
            return loss
        return loss + _at(self.reconstruction, context.place) * _distance(head.decoder(y), self._source(context))

    def _source(self, context: Context) -> Tensor:
        """Returns the network's input, images from 0 to 1; made once a batch."""
        key = "source to bring back"
        if key not in context.shared:
            (source,) = tensors(context.source)
            if source.dim() == 4:
                low, high = source.min(), source.max()
                source = (source - low) / (high - low).clamp_min(torch.finfo(source.dtype).tiny)
            context.shared[key] = source
        return context.shared[key]


def _distance(made: Tensor, source: Tensor) -> Tensor:
    source = source.to(made.dtype)
    return F.binary_cross_entropy_with_logits(made, source) if made.dim() == 4 else F.mse_loss(made, source)


def _at(ends: tuple[float, float], place: Place) -> float:
    """Returns the weight of a local block: evenly from the first to the last of them."""
    last = place.count - 2
    part = place.index / last if last else 0.0
    return ends[0] + (ends[1] - ends[0]) * part


def _labels(context: Context) -> Tensor:
    target = context.target
    if not isinstance(target, Tensor) or target.is_floating_point() or target.shape != (context.samples,):
        raise ValueError('InfoPro contrasts classes, and these targets are no class numbers of shape (batch,): set task="loss"')
    return target


def contrast(z: Float[Tensor, "m d"], labels: Int64[Tensor, " m"], temperature: float) -> Float[Tensor, ""]:
    """The supervised contrastive loss of unit vectors; a sample that is alone in its class counts as 0.

    Args:
        z: Unit vectors as rows.
        labels: Their classes; negative ones are in no class.
        temperature: Above 0.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> round(contrast(z, torch.tensor([0, 0, 1]), 1.0).item(), 4)  # log(1 + 1/e) for two of three
        0.2088

    Reference:
        Khosla et al. 2020, "Supervised contrastive learning", arXiv 2004.11362, equation 2.
    """
    alike = z @ z.T / temperature
    alike = alike.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    likely = alike.log_softmax(1)
    partner = (labels[:, None] == labels) & (labels >= 0)
    partner.fill_diagonal_(False)
    found = likely.masked_fill(~partner, 0).sum(1) / partner.sum(1).clamp_min(1)
    return -found.mean()
