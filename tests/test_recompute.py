"""Running again instead of keeping: the same numbers, and less kept."""

import cases
import pytest
import torch
from cases import assert_same
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree.memory import ActivationMeter

LOCAL = ["drtp", "hsic", "predsim", "dgl", "auglocal", "cdni"]


def trained(model, rule, batches, *, blocks=None, loss=F.cross_entropy, **more):
    torch.manual_seed(0)
    learner = lf.convert(model, rule, loss=loss, optimizer=cases.momentum, example_input=batches[0][0], blocks=blocks, **more)
    meter = ActivationMeter(learner.model)
    torch.manual_seed(3)
    with meter.watch():
        losses = [learner.step(*batch).loss for batch in batches]
    assert meter.now == 0
    return losses, dict(learner.model.state_dict()), meter.peak


@pytest.mark.parametrize("blocks", [1, 2, None])
@pytest.mark.parametrize("model", cases.MODELS)
def test_blocks_that_run_again_learn_the_same_bit_for_bit(model, blocks):
    case = cases.MODELS[model]
    found = [
        trained(case.build(), "backprop", case.batches(4), blocks=blocks, loss=case.loss, recompute=recompute)
        for recompute in (False, True)
    ]
    assert_same(found[0][:2], found[1][:2])
    assert all("forward" not in module.__dict__ for module in case.build().modules())


@pytest.mark.parametrize("rule", LOCAL)
def test_so_they_do_under_local_rules(rule):
    case = cases.MODELS["resnet20"]
    found = [trained(case.build(), rule, case.batches(3), recompute=recompute) for recompute in (False, True)]
    assert_same(found[0][:2], found[1][:2])


def deep(kind):
    torch.manual_seed(0)
    layers = [layer for _ in range(16) for layer in (nn.Linear(32, 32), nn.BatchNorm1d(32), nn.LeakyReLU(0.1, inplace=True))]
    if kind == "flat":
        return nn.Sequential(nn.Sequential(*layers), nn.Linear(32, 4))
    groups = [nn.Sequential(*layers[3 * i : 3 * i + 3]) for i in range(16)]
    return nn.Sequential(nn.Sequential(*groups), nn.Linear(32, 4))


class Traced(nn.Module):
    """Skips, so that a block is a graph and no sequence."""

    def __init__(self):
        super().__init__()
        self.groups = deep("grouped")[0]
        self.readout = nn.Linear(32, 4)

    def forward(self, x):
        for group in self.groups:
            x = x + group(x)
        return self.readout(x)


@pytest.mark.parametrize(
    ("make", "part"),
    [(lambda: deep("flat"), 0.5), (lambda: deep("grouped"), 0.5), (Traced, 0.75)],
    ids=["flat", "grouped", "traced"],
)
@pytest.mark.parametrize("rule", ["backprop", "dgl"])
def test_less_is_kept(make, part, rule):
    batches = [(torch.randn(64, 32), torch.randint(4, (64,))) for _ in range(3)]
    plain, again = (
        trained(make(), rule, batches, blocks=["readout"] if make is Traced else None, recompute=one) for one in (False, True)
    )
    assert_same(plain[:2], again[:2])
    assert again[2] < part * plain[2]


def test_what_cannot_run_again_is_refused():
    case = cases.MODELS["mlp"]
    with pytest.raises(
        ValueError, match=r"^Feedback alignment runs blocks in a way of its own, which recompute would not repeat"
    ):
        cases.learner_for(case, lf.rules.FeedbackAlignment(), recompute=True)
    with pytest.raises(ValueError, match=r"^recompute runs blocks again with their present weights, which late links"):
        cases.learner_for(case, lf.rules.Backprop(), schedule=cases.SCHEDULES[1], recompute=True)
    cases.learner_for(case, lf.rules.LocalLoss(), schedule=cases.SCHEDULES[3], recompute=True).step(*case.batches(1)[0])
