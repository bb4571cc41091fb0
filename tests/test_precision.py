"""Low precision by autocast, and double precision."""

from dataclasses import replace

import cases
import pytest
import torch
from cases import MODELS, OPTIMIZERS, RULES, assert_same, learner_for

import lockfree as lf
from lockfree.schedule import Kind

MLP = MODELS["mlp"]


@pytest.fixture(autouse=True)
def _own_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


def autocast(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def mixed_losses(model, loss, optimizer, batches):
    """The loop of PyTorch's own recipe: forward and loss under autocast, backward and update outside."""
    optimizer = optimizer(list(model.parameters()))
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        with autocast():
            value = loss(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("spanning", [False, True], ids=["a context a step", "one context"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("blocks", [None, 2])
@pytest.mark.parametrize("model", ["mlp", "cnn", "residual", "unet", "tied", "gpt", "resnet20"])
@pytest.mark.thinned(3)
def test_backprop_under_autocast_equals_the_plain_mixed_loop(model, blocks, optimizer, spanning):
    case = MODELS[model]
    batches = case.batches(10)
    reference = case.build()
    torch.manual_seed(3)
    losses = mixed_losses(reference, case.loss, OPTIMIZERS[optimizer], batches)
    learner = learner_for(case, lf.rules.Backprop(), optimizer=OPTIMIZERS[optimizer], blocks=blocks)
    torch.manual_seed(3)
    seen = []
    with autocast(spanning):
        for x, y in batches:
            with autocast():
                seen.append(learner.step(x, y).loss)
    assert seen == losses
    assert_same(dict(learner.model.state_dict()), dict(reference.state_dict()))
    assert {parameter.dtype for parameter in learner.model.parameters()} == {torch.float32}


def test_autocast_is_really_on():
    (batch,) = MLP.batches(1)
    losses = []
    for low in (False, True):
        learner = learner_for(MLP, lf.rules.Backprop())
        torch.manual_seed(3)
        with autocast(low):
            losses.append(learner.step(*batch).loss)
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


PAIRS = [
    pytest.param(rule, schedule, id=f"{rule.name}-{schedule.name}")
    for rule, schedule in cases.legal_pairs(4)
    if schedule.name in ("lockstep", "pipelined-late")
]


@pytest.mark.parametrize("model", ["mlp", "unet"])
@pytest.mark.parametrize(("rule", "schedule"), PAIRS)
@pytest.mark.thinned(3)
def test_every_rule_trains_under_autocast(rule, schedule, model):
    """All of the state stays finite and in float32; on the batch that it sees all the time the network gets better."""
    case = MODELS[model]
    if rule.name.startswith("ff") and model == "unet":
        pytest.skip("Forward-Forward wants borders of one tensor")
    learner = learner_for(case, rule.make(), schedule=schedule)
    (batch,) = case.batches(1, samples=16)
    before = cases.copy_of(learner.model)
    torch.manual_seed(3)
    steps = 30 if rule.name == "dni-sparse" else 18  # until every block has learnt once what is not zero
    with autocast():
        results = [learner.step(*batch) for _ in range(steps)]
        learner.drain()
    losses = [result.loss for result in results if result.batch is not None]
    # Nobody waits for activations from below that runs on synthetic inputs.
    assert len(losses) == steps - (case.blocks - 1 if schedule.schedule == "pipelined" and rule.locks else 0)
    assert torch.tensor(losses).isfinite().all()
    if model == "mlp" and learner.cells[-1].needs == lf.Needs.ABOVE:  # or nothing descends this loss
        assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    elif model == "mlp" and rule.name == "hsic-heads":
        assert results[-1].auxiliary[0] < 0.98 * results[0].auxiliary[0]
    for name, parameter in learner.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert bool(parameter.isfinite().all())
        assert not torch.equal(parameter, before[name])
    for network in [network for cell in learner.cells for network in (cell.auxiliary, cell.inputs) if network is not None]:
        for value in [*network.parameters(), *network.buffers()]:
            assert value.dtype in (torch.float32, torch.int64)
            assert bool(value.isfinite().all())


@pytest.mark.parametrize(("rule", "schedule"), PAIRS)
@pytest.mark.thinned(3)
def test_one_context_for_all_steps_gives_what_one_a_step_gives(rule, schedule):
    batches = MLP.batches(8)
    states = []
    for spanning in (False, True):
        learner = learner_for(MLP, rule.make(), schedule=schedule)
        torch.manual_seed(3)
        with autocast(spanning):
            for x, y in batches:
                with autocast():
                    learner.step(x, y)
            with autocast():
                learner.drain()
        states.append(learner.state_dict())
    assert_same(*states)


@pytest.mark.parametrize(("rule", "schedule"), PAIRS)
@pytest.mark.thinned(3)
def test_resume_under_autocast_is_bit_identical(rule, schedule):
    batches = MLP.batches(6)
    whole = learner_for(MLP, rule.make(), schedule=schedule)
    other = learner_for(MLP, rule.make(), schedule=schedule, seed=1)
    torch.manual_seed(3)
    with autocast():
        for x, y in batches[:3]:
            whole.step(x, y)
        middle = whole.state_dict()
        for x, y in batches[3:]:
            whole.step(x, y)
        end = whole.state_dict()
    other.load_state_dict(middle)  # outside: what is in flight remembers its own autocast
    with autocast():
        for x, y in batches[3:]:
            other.step(x, y)
    assert_same(other.state_dict(), end)


def gently(parameters):
    """Descent at a rate at which a regression on whole images is stable."""
    return torch.optim.SGD(parameters, lr=1e-3)


@pytest.mark.parametrize("model", ["mlp", "cnn", "unet", "dict"])
@pytest.mark.parametrize("rule", RULES, ids=lambda row: row.name)
@pytest.mark.thinned(3)
def test_every_rule_keeps_double_precision(rule, model):
    """All of the state is float64, carries more digits than float32 has, and follows the float32 run."""
    case = MODELS[model]
    if model in rule.refuses:
        with pytest.raises(ValueError, match=r"one input tensor|Forward-Forward wants|writes the label"):
            learner_for(case, rule.make())
        return
    made = rule.make()
    made = replace(made, noise=0.0) if getattr(made, "noise", 0) else made  # draws depend on the dtype
    helper = gently if getattr(made, "synthetic_inputs", False) else cases.sgd
    double, single = (
        learner_for(case, made, optimizer=cases.sgd, auxiliary_optimizer=helper, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    for learner in (double, single):
        for module in learner.model.modules():
            if isinstance(module, torch.nn.modules.dropout._DropoutNd):
                module.p = 0.0  # masks depend on the dtype, and so do random weights
    pairs = [
        pair
        for wide, narrow in zip(double.cells, single.cells, strict=True)
        for pair in ((wide.block, narrow.block), (wide.auxiliary, narrow.auxiliary), (wide.inputs, narrow.inputs))
        if pair[0] is not None
    ]
    for wide, narrow in pairs:
        wide.load_state_dict(narrow.state_dict())
    for wide, narrow in zip(case.batches(4, dtype=torch.float64), case.batches(4), strict=True):
        assert double.step(*wide).loss == pytest.approx(single.step(*narrow).loss, rel=1e-4)
    for part, other in pairs:
        assert {value.dtype for value in part.state_dict().values()} <= {torch.float64, torch.int64}
        torch.testing.assert_close(dict(part.state_dict()), dict(other.state_dict()), rtol=1e-3, atol=1e-4, check_dtype=False)
    # the top block learns from the first step on, unless it rests
    learnt = any(action.kind is Kind.LEARN and action.cell == len(double.cells) - 1 for action in double.schedule.actions(4))
    assert learnt or rule.name in ("dni-sparse", "hsic-format")
    moved = [not torch.equal(weight, weight.float().double()) for weight in double.cells[-1].block.parameters()]
    # HSIC does not change when a bias shifts all samples alike, so that one stays.
    assert any(moved) == learnt
    assert all(moved) == learnt or double.cells[-1].needs < lf.Needs.ABOVE
