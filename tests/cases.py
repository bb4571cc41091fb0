"""The tables that the common tests run over: rules, schedules, executors, models.

A new rule adds one row to `RULES`, a new schedule one to `SCHEDULES`, a new executor one to `EXECUTORS`; every common test then
runs over it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lockfree as lf
from lockfree.executors import EXECUTORS as KNOWN_EXECUTORS
from lockfree.values import tensors

# ---- rules -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RuleCase:
    """A rule in a small configuration.

    Attributes:
        name: What the test is called; the command-line name up to the first dash.
        make: Makes the rule.
        locks: What must be derived from its needs on four blocks.
        refuses: Models that it says, by a `ValueError` at conversion, that it cannot serve.
        moving: A batch on which every block of four learns, from a credit that is no longer zero.
    """

    name: str
    make: Callable[[], lf.Rule]
    locks: frozenset[str]
    refuses: tuple[str, ...] = ()
    moving: int = 3


ALL, UPDATE, FORWARD = frozenset({"forward", "update", "backward"}), frozenset({"forward", "update"}), frozenset({"forward"})
FREE: frozenset[str] = frozenset()
DNI = lf.rules.SyntheticGradients
HSIC = lf.rules.HSICBottleneck
MILD = {"balance": 3.0, "epsilon": 1e-2}  # these batches are small, and rates are those of a loss
HIDDEN = {"hidden_layers": 1, "hidden_units": 8, "kernel_size": 3}

RULES = (
    RuleCase(name="backprop", make=lf.rules.Backprop, locks=ALL),
    RuleCase(name="checkpoint", make=lf.rules.Checkpointing, locks=ALL),
    RuleCase(name="dni", make=lambda: DNI(learning_rate=0.01), locks=FORWARD),
    RuleCase(name="dni-hidden", make=lambda: DNI(hidden_layers=1, hidden_units=8, kernel_size=3), locks=FORWARD),
    RuleCase(name="dni-border", make=lambda: DNI(borders=(1,), learning_rate=0.01), locks=ALL),
    RuleCase(name="cdni", make=lambda: DNI(conditioned=True, learning_rate=0.01), locks=FORWARD, refuses=("gpt", "tied")),
    RuleCase(
        name="cdni-hidden",
        make=lambda: DNI(conditioned=True, hidden_layers=2, hidden_units=8, kernel_size=3),
        locks=FORWARD,
        refuses=("gpt", "tied"),
    ),
    RuleCase(name="dni-sparse", make=lambda: DNI(update_probability=0.5, seed=357, learning_rate=0.01), locks=FORWARD),
    RuleCase(
        name="dni-clocked",
        make=lambda: DNI(block_every=2, synthesiser_every=3, learning_rate=0.01),
        locks=FORWARD,
        moving=8,
    ),
    RuleCase(name="dni-mix", make=lambda: DNI(mix=0.3, learning_rate=0.01), locks=ALL),
    RuleCase(name="dni-noise", make=lambda: DNI(noise=0.5, learning_rate=0.01), locks=FORWARD),
    RuleCase(name="dni-gaussian", make=lambda: DNI(form="gaussian", noise=1.0, learning_rate=0.01), locks=FORWARD),
    RuleCase(
        name="cdni-per-class",
        make=lambda: DNI(conditioned=True, per_class=True, **HIDDEN),
        locks=FORWARD,
        refuses=("gpt", "tied"),
    ),
    RuleCase(name="dni-line-search", make=lambda: DNI(form="line-search", learning_rate=0.5), locks=FORWARD),
    RuleCase(
        name="cdni-critic", make=lambda: DNI(conditioned=True, form="critic", **HIDDEN), locks=FORWARD, refuses=("gpt", "tied")
    ),
    RuleCase(
        name="cdni-sobolev",
        make=lambda: DNI(conditioned=True, form="sobolev", matching=2.0, **HIDDEN),
        locks=FORWARD,
        refuses=("gpt", "tied"),
    ),
    RuleCase(
        name="cdni-unlocked",
        make=lambda: DNI(conditioned=True, synthetic_inputs=True, **HIDDEN),
        locks=FREE,
        refuses=("gpt", "tied", "dict"),
    ),
    RuleCase(name="fa", make=lf.rules.FeedbackAlignment, locks=ALL, refuses=("tied",)),
    RuleCase(name="usf", make=lf.rules.SignSymmetry, locks=ALL, refuses=("tied",)),
    RuleCase(name="brsf", make=lambda: lf.rules.SignSymmetry(magnitude="batchwise"), locks=ALL, refuses=("tied",)),
    RuleCase(name="frsf", make=lambda: lf.rules.SignSymmetry(magnitude="fixed"), locks=ALL, refuses=("tied",)),
    RuleCase(name="kickback", make=lf.rules.Kickback, locks=ALL, refuses=("tied",)),
    RuleCase(name="drtp", make=lf.rules.DirectRandomTargets, locks=FORWARD),
    RuleCase(name="predsim", make=lambda: lf.rules.LocalLoss(balance=0.5, rows=16), locks=FORWARD),
    RuleCase(name="pred", make=lambda: lf.rules.LocalLoss(loss="pred"), locks=FORWARD),
    RuleCase(name="sim", make=lambda: lf.rules.LocalLoss(loss="sim"), locks=FORWARD),
    RuleCase(name="mono", make=lf.rules.MonoForward, locks=FORWARD),
    RuleCase(name="dgl", make=lf.rules.DecoupledGreedy, locks=FORWARD),
    RuleCase(name="infopro", make=lambda: lf.rules.InfoPro(width=8), locks=FORWARD),
    RuleCase(name="infopro-loss", make=lambda: lf.rules.InfoPro(width=8, task="loss"), locks=FORWARD),
    RuleCase(name="auglocal", make=lf.rules.AugLocal, locks=FORWARD),
    RuleCase(name="hsic", make=lambda: HSIC(**MILD), locks=FORWARD),
    RuleCase(name="hsic-one-hot", make=lambda: HSIC(readout="one-hot", **MILD), locks=FORWARD, refuses=("gpt", "tied")),
    RuleCase(
        name="hsic-heads", make=lambda: HSIC(readout="heads", objective="phsic", kernel="cosine", balance=2.0), locks=FORWARD
    ),
    RuleCase(name="hsic-format", make=lambda: HSIC(format_after=6, landmarks=4, block_size=4, **MILD), locks=FORWARD),
    RuleCase(name="ff", make=lf.rules.ForwardForward, locks=FORWARD, refuses=("gpt", "unet", "dict")),
    RuleCase(
        name="ff-hard", make=lambda: lf.rules.ForwardForward(negatives="hard"), locks=UPDATE, refuses=("gpt", "unet", "dict")
    ),
    RuleCase(name="noise", make=lf.rules.Noise, locks=FORWARD),
    RuleCase(name="dfa", make=lambda: lf.rules.DirectFeedbackAlignment(scale=0.5), locks=UPDATE),
)


# ---- schedules and executors -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ScheduleCase:
    """A schedule with the delay of its links."""

    name: str
    schedule: str
    delay: int

    @property
    def links(self) -> lf.Link:
        """A link with the delay, to be copied to every border."""
        return lf.Link(delay=self.delay)

    def serves(self, rule: lf.Rule, cells: int) -> bool:
        """Whether the pair is legal: without lockstep, blocks that wait must be given late messages."""
        if self.delay and isinstance(rule, lf.rules.Checkpointing):
            return False  # it would run blocks again with other weights
        needs = [rule.needs(lf.Place(index, cells)) for index in range(cells - 1)]
        return self.schedule == "lockstep" or self.delay > 0 or max(needs) <= lf.Needs.TARGET


SCHEDULES = (
    ScheduleCase(name="lockstep", schedule="lockstep", delay=0),
    ScheduleCase(name="lockstep-late", schedule="lockstep", delay=1),
    ScheduleCase(name="lockstep-later", schedule="lockstep", delay=2),
    ScheduleCase(name="pipelined", schedule="pipelined", delay=0),
    ScheduleCase(name="pipelined-late", schedule="pipelined", delay=1),
    ScheduleCase(name="pipelined-later", schedule="pipelined", delay=2),
)


@dataclass(frozen=True, kw_only=True)
class ExecutorCase:
    """An executor with the schedules that it serves."""

    name: str
    schedules: tuple[str, ...] = ("lockstep", "pipelined")


EXECUTORS = (
    ExecutorCase(name="sequential"),
    ExecutorCase(name="stacked", schedules=("pipelined",)),
    ExecutorCase(name="pipeline", schedules=()),  # takes several processes: test_pipeline.py
)
assert {row.name for row in EXECUTORS} == set(KNOWN_EXECUTORS)


def legal_triples(cells: int) -> list[tuple[RuleCase, ScheduleCase, ExecutorCase]]:
    """Returns every rule with every schedule that can serve it on so many blocks, and every executor that can run that."""
    return [(rule, plan, one) for rule, plan in legal_pairs(cells) for one in EXECUTORS if plan.schedule in one.schedules]


def legal_pairs(cells: int) -> list[tuple[RuleCase, ScheduleCase]]:
    """Returns every rule with every schedule that can serve it on so many blocks."""
    return [(rule, schedule) for rule in RULES for schedule in SCHEDULES if schedule.serves(rule.make(), cells)]


# ---- models ------------------------------------------------------------------------------------------------------------------

CLASSES = 4
Batch = tuple[Any, Tensor]


def class_loss(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores, target)


def _token_loss(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), target.flatten())


def _features(*shape: int) -> Callable[[int, torch.Generator, torch.dtype], Batch]:
    def draw(samples: int, generator: torch.Generator, dtype: torch.dtype) -> Batch:
        x = torch.randn(samples, *shape, generator=generator, dtype=torch.float64).to(dtype)
        return x, torch.randint(CLASSES, (samples,), generator=generator)

    return draw


def _dictionaries(samples: int, generator: torch.Generator, dtype: torch.dtype) -> Batch:
    x, y = _features(6)(samples, generator, dtype)
    return {"features": x, "mask": (torch.rand(samples, 6, generator=generator) > 0.2).to(dtype)}, y


def _tokens(samples: int, generator: torch.Generator, dtype: torch.dtype) -> Batch:
    words = torch.randint(7, (samples, 6), generator=generator)
    return words[:, :-1], words[:, 1:]


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """A small model, the batches that it takes, and where it may be cut by name.

    Attributes:
        name: What the test is called.
        make: Makes the model; weights come from the global generator.
        draw: Maps (samples, generator, dtype) to a batch of inputs and targets.
        cuts: Modules at which blocks may begin.
        blocks: How many blocks its children are.
        loss: Maps (output, target) to a mean over the batch.
        samples: A good size of a batch.
    """

    name: str
    make: Callable[[], nn.Module]
    draw: Callable[[int, torch.Generator, torch.dtype], Batch] = field(repr=False)
    cuts: tuple[str, ...]
    blocks: int
    loss: Callable[[Tensor, Tensor], Tensor] = field(default=class_loss, repr=False)
    samples: int = 8

    def build(self, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Makes the model from a seed, and leaves the global generator alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().to(dtype)

    def batches(
        self, count: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, samples: int | None = None
    ) -> list[Batch]:
        """Draws batches from a private generator."""
        generator = torch.Generator().manual_seed(1000 + seed)
        return [self.draw(samples or self.samples, generator, dtype) for _ in range(count)]


def _dense(into: int, out: int, dropout: float = 0.2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(into, out), nn.BatchNorm1d(out), nn.ReLU(), nn.Dropout(dropout))


def mlp() -> nn.Sequential:
    """Four blocks with BatchNorm and Dropout."""
    return nn.Sequential(_dense(6, 10), _dense(10, 9), _dense(9, 8), nn.Linear(8, CLASSES))


def cnn() -> nn.Sequential:
    """Layers in one flat sequence, so that blocks collect activations and pooling."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.2), nn.Flatten()),
        nn.Linear(96, CLASSES),
    )


class Residual(nn.Module):
    """Skips over blocks, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.first, self.second = _dense(8, 8), _dense(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = h + self.first(h)
        h = h + self.second(h)
        return self.head(F.dropout(h, 0.1, self.training))


class UNet(nn.Module):
    """Skips that cross several blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, 3, 3, padding=1)
        self.down2 = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.up2 = nn.Conv2d(8, 3, 3, padding=1)
        self.up1 = nn.Conv2d(6, 2, 3, padding=1)
        self.out = nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.down1(x))
        two = F.relu(self.down2(F.max_pool2d(one, 2)))
        low = F.relu(self.middle(F.max_pool2d(two, 2)))
        two = F.relu(self.up2(torch.cat([F.interpolate(low, scale_factor=2), two], dim=1)))
        one = F.relu(self.up1(torch.cat([F.interpolate(two, scale_factor=2), one], dim=1)))
        return self.out(one.mean(dim=(2, 3)))


class TakesDict(nn.Module):
    """Its forward takes a dictionary, part of which is needed by later blocks only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(6, 8), nn.Linear(14, 8), nn.Linear(8, CLASSES)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        h = torch.tanh(self.embed(batch["features"] * batch["mask"]))
        h = F.relu(self.norm(self.mix(torch.cat([h, batch["mask"]], dim=1))))
        return self.head(h)


class Tied(nn.Module):
    """The readout is the embedding's own matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.hidden = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU())
        self.more = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, words: Tensor) -> Tensor:
        return F.linear(self.more(self.hidden(self.embed(words))), self.embed.weight)


class Attention(nn.Module):
    """A decoder's layer: causal attention and a perceptron, both with skips."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind()
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(mixed)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A tiny language model whose readout layer shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 8), nn.Embedding(5, 8)
        self.layers = nn.ModuleList([Attention(8, 2), Attention(8, 2)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        h = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h))


def in_place() -> nn.Sequential:
    """Blocks begin with an activation that overwrites what the block below has handed up."""
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)),
        nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(8), nn.Linear(8, 8)),
        nn.Sequential(nn.LeakyReLU(0.1, inplace=True), nn.Linear(8, CLASSES)),
    )


MODELS = {
    case.name: case
    for case in (
        ModelCase(name="mlp", make=mlp, draw=_features(6), cuts=("1", "3"), blocks=4),
        ModelCase(name="cnn", make=cnn, draw=_features(1, 8, 8), cuts=("4", "6"), blocks=3),
        ModelCase(name="residual", make=Residual, draw=_features(6), cuts=("first.0", "second.1"), blocks=4),
        ModelCase(name="unet", make=UNet, draw=_features(1, 8, 8), cuts=("down2", "middle", "up1"), blocks=6),
        ModelCase(name="dict", make=TakesDict, draw=_dictionaries, cuts=("mix",), blocks=3),
        ModelCase(name="tied", make=Tied, draw=_tokens, cuts=("hidden", "more.0"), blocks=3, loss=_token_loss),
        ModelCase(name="gpt", make=GPT, draw=_tokens, cuts=("layers.0", "layers.1.mlp"), blocks=5, loss=_token_loss),
        ModelCase(name="in_place", make=in_place, draw=_features(6), cuts=("1", "3"), blocks=4),
        ModelCase(
            name="resnet20",
            make=lambda: lf.models.resnet20((1, 8, 8), CLASSES),
            draw=_features(1, 8, 8),
            cuts=("layer1.2", "layer2", "layer3.1.conv2"),
            blocks=5,
            samples=4,
        ),
    )
}


# ---- helpers -----------------------------------------------------------------------------------------------------------------


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Plain descent."""
    return torch.optim.SGD(parameters, lr=0.1)


def momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Descent with momentum and weight decay."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def descent(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Plain descent with rate 1: a step takes off the gradient itself."""
    return torch.optim.SGD(parameters, lr=1.0)


def draw(*shape: int, seed: int = 1) -> Tensor:
    """Draws normal numbers in double precision from a seed of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape: int, classes: int = CLASSES, seed: int = 2) -> Tensor:
    """Draws class numbers from a seed of their own."""
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam."""
    return torch.optim.Adam(parameters, lr=0.01)


OPTIMIZERS = {"momentum": momentum, "adam": adam}


def learner_for(
    case: ModelCase,
    rule: lf.Rule,
    *,
    schedule: ScheduleCase = SCHEDULES[0],
    executor: str = EXECUTORS[0].name,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = adam,
    blocks: int | list[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> lf.Learner:
    """Converts a model of the table; auxiliary networks are drawn from the seed too, the global generator is left alone."""
    model = case.build(seed=seed, dtype=dtype)
    example, _ = case.batches(1, seed=99, dtype=dtype)[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100 + seed)
        return lf.convert(
            model,
            rule,
            loss=case.loss,
            optimizer=optimizer,
            blocks=blocks,
            example_input=example,
            schedule=schedule.schedule,
            executor=executor,
            links=schedule.links,
            **more,
        )


def assert_same(one: Any, other: Any, *, path: str = "") -> None:
    """Asserts that two trees of plain data and tensors are equal bit for bit (NaN equals NaN)."""
    if isinstance(one, Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        assert torch.equal(one.detach().nan_to_num(nan=12345.0), other.detach().nan_to_num(nan=12345.0)), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], path=f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, path=f"{path}.{index}")
    else:
        assert one == other or (one != one and other != other), path


def differs(one: Any, other: Any) -> bool:
    """Whether two trees of the same shape differ in a tensor."""
    return any(not torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies a module's parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
