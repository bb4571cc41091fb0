"""The stacked executor: blocks of equal structure go as one, and every number is that of the sequential reference."""

import copy
import json
import math

import cases
import pytest
import torch
from cases import RULES, SCHEDULES, assert_same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lockfree as lf
from lockfree.cli import main
from lockfree.executors import Stacked
from lockfree.executors.stacked.alike import anatomy
from lockfree.executors.stacked.blocks import AffineBlocks, ModuleBlocks, affine
from lockfree.executors.stacked.captured import CAPTURES
from lockfree.executors.stacked.credit import OneByOne, Together
from lockfree.executors.stacked.update import ByAdam, ByGradients, BySGD

DNI = lf.rules.SyntheticGradients
WIDTH, CLASSES = 8, cases.CLASSES


class Residual(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.first, self.second, self.factor = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), factor

    def forward(self, x):
        return x + self.factor * self.second(torch.tanh(self.first(x)))


def dense(activation):
    return lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), activation())


def tower(block, count=4, below=lambda: nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU()), width=WIDTH):
    return nn.Sequential(below(), *(block() for _ in range(count)), nn.Sequential(nn.Flatten(), nn.Linear(width, CLASSES)))


def convolutions():
    return tower(
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()),
        below=lambda: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU()),
        width=3 * 16,
    )


TOWERS = {
    "affine": (lambda: tower(dense(nn.ReLU)), (6,)),
    "tanh": (lambda: tower(dense(nn.Tanh)), (6,)),
    "sigmoid": (lambda: tower(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Sigmoid())), (6,)),
    "linear": (lambda: tower(lambda: nn.Linear(WIDTH, WIDTH)), (6,)),
    "normalised": (lambda: tower(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())), (6,)),
    "residual": (lambda: tower(Residual), (6,)),
    "frozen bias": (lambda: frozen(tower(dense(nn.ReLU))), (6,)),
    "convolution": (convolutions, (1, 4, 4)),
}


def frozen(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (name.endswith("bias") and name.startswith(("1.", "2.", "3.", "4."))))
    return model


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.03)


def pair(name="affine", rule=None, *, optimizer=sgd, dtype=torch.float64, schedule=SCHEDULES[3], **more):
    """Returns the same learner twice, sequential and stacked."""
    return [
        learner(TOWERS[name], rule or DNI(learning_rate=0.01), one, optimizer=optimizer, dtype=dtype, schedule=schedule, **more)
        for one in ("sequential", "stacked")
    ]


def learner(
    made,
    rule,
    executor,
    *,
    optimizer=sgd,
    dtype=torch.float64,
    schedule=SCHEDULES[3],
    loss=nn.functional.cross_entropy,
    **more,
):
    build, shape = made
    torch.manual_seed(0)
    model = build().to(dtype)
    return lf.convert(
        model,
        rule,
        loss=loss,
        optimizer=optimizer,
        example_input=torch.zeros(2, *shape, dtype=dtype),
        schedule=schedule.schedule,
        links=schedule.links,
        executor=executor,
        **more,
    )


def batches(count, shape=(6,), *, dtype=torch.float64, samples=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(samples, *shape, generator=generator, dtype=dtype),
            torch.randint(CLASSES, (samples,), generator=generator),
        )
        for _ in range(count)
    ]


def close(one, other, atol=1e-8):
    torch.testing.assert_close(dict(one.model.state_dict()), dict(other.model.state_dict()), rtol=1e-6, atol=atol)
    for mine, theirs in zip(one.auxiliaries, other.auxiliaries, strict=True):
        torch.testing.assert_close(dict(mine.state_dict()), dict(theirs.state_dict()), rtol=1e-6, atol=atol)


def step_both(learners, x, y):
    ours, theirs = (one.step(x, y) for one in learners)
    assert ours.batch == theirs.batch
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-7, nan_ok=True)
    mine, yours = ({cell: loss.item() for cell, loss in one.auxiliary.items()} for one in (ours, theirs))
    assert mine == pytest.approx(yours, rel=1e-5, abs=1e-9)


def plan_of(learner):
    plan = learner._executor._plan
    assert plan is not None, "nothing is stacked"
    return plan


def stacked_cells(learner):
    return [[cell.place.index for cell in stack.cells] for stack in plan_of(learner).stacks]


# ---- the same numbers --------------------------------------------------------------------------------------------------------

PIPELINED = [plan for plan in SCHEDULES if plan.schedule == "pipelined"]
LATE = ("dni", "dni-hidden", "backprop", "dfa", "pred")
PAIRS = [
    (rule, plan)
    for rule in RULES
    for plan in PIPELINED
    if plan.serves(rule.make(), 6) and (not plan.delay or rule.name in LATE)
]


@pytest.mark.parametrize(("rule", "schedule"), [pytest.param(r, s, id=f"{r.name}-{s.name}") for r, s in PAIRS])
def test_every_legal_pair_trains_as_the_reference_does(rule, schedule):
    # Not Adam: it makes a step of the rounding error where a bias has no gradient, below a normalisation.
    learners = pair("affine", rule.make(), schedule=schedule, auxiliary_optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    for x, y in batches(learners[0].schedule.depth + 5):
        step_both(learners, x, y)
    close(*learners)
    plan = learners[1].schedule
    usual = plan.clock is None and not any(plan.synthetic) and type(learners[1].rule).run is lf.Rule.run
    if usual and max(plan.needs[:-1]) <= lf.Needs.TARGET:
        # Right below the top the auxiliary network may be another one, and the cell by itself.
        assert [1, 2, 3] in [run[:3] for run in stacked_cells(learners[1])]
    else:
        assert learners[1]._executor._plan is None
    for one in learners:
        one.drain()
    close(*learners)


FEW = {
    "dni": DNI(learning_rate=0.01),
    "cdni": DNI(conditioned=True),
    "pred": lf.rules.get("pred"),
    "drtp": lf.rules.get("drtp"),
}


@pytest.mark.parametrize("rule", FEW)
@pytest.mark.parametrize("name", TOWERS)
def test_every_kind_of_block_trains_as_the_reference_does(name, rule):
    learners = pair(name, FEW[rule])
    for x, y in batches(14, TOWERS[name][1]):
        step_both(learners, x, y)
    by_hand = name in ("affine", "tanh", "sigmoid", "linear")
    (stack,) = (stack for stack in plan_of(learners[1]).stacks if len(stack.cells) == 4)
    assert type(stack.blocks) is (AffineBlocks if by_hand else ModuleBlocks)
    at_once = rule == "pred" or (rule in ("dni", "cdni") and name != "convolution")  # synthesisers of images are convolutions
    assert type(stack.credits) is (Together if at_once else OneByOne)
    close(*learners)


def test_sequences():
    made = (
        lambda: nn.Sequential(nn.Linear(6, WIDTH), *(dense(nn.ReLU)() for _ in range(3)), nn.Linear(WIDTH, CLASSES)),
        (5, 6),
    )
    learners = [learner_of_sequences(made, executor) for executor in ("sequential", "stacked")]
    for x, _ in batches(9, (5, 6)):
        step_both(learners, x, torch.arange(40).view(8, 5) % CLASSES)
    assert [1, 2, 3] in stacked_cells(learners[1])
    close(*learners)


def learner_of_sequences(made, executor):
    build, shape = made
    torch.manual_seed(0)
    return lf.convert(
        build().double(),
        DNI(learning_rate=0.01),
        loss=lambda scores, y: nn.functional.cross_entropy(scores.flatten(0, 1), y.flatten()),
        optimizer=sgd,
        example_input=torch.zeros(2, *shape, dtype=torch.float64),
        schedule="pipelined",
        executor=executor,
    )


@pytest.mark.parametrize("rule", FEW)
def test_losses_beside_can_be_read_at_any_time_after(rule):
    learners = pair(rule=FEW[rule])
    kept = [[one.step(x, y) for one in learners] for x, y in batches(14)]
    for ours, theirs in kept:
        assert {cell: loss.item() for cell, loss in ours.auxiliary.items()} == pytest.approx(
            {cell: loss.item() for cell, loss in theirs.auxiliary.items()}, rel=1e-5, abs=1e-9
        )


OPTIMIZERS = {
    "sgd": (sgd, BySGD),
    "decay": (lambda p: torch.optim.SGD(p, lr=0.03, weight_decay=0.1), BySGD),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, dampening=0.5, weight_decay=0.1), BySGD),
    "nesterov": (lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True), ByGradients),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1), ByAdam),
    "amsgrad": (lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True), ByAdam),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.01), ByAdam),
    "rprop": (lambda p: torch.optim.Rprop(p, lr=0.001), ByGradients),
    "adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.01), ByGradients),
    "two groups": (lambda p: torch.optim.SGD([{"params": p[:5]}, {"params": p[5:], "lr": 0.01}], lr=0.03), ByGradients),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tower", ["affine", "residual"])
def test_every_optimizer_steps_as_it_does_by_itself(tower, name):
    make, kind = OPTIMIZERS[name]
    learners = pair(tower, optimizer=make, auxiliary_optimizer=make if name not in ("rprop", "two groups") else None)
    for x, y in batches(16):
        step_both(learners, x, y)
    assert type(plan_of(learners[1]).blocks) is kind
    close(*learners)


@pytest.mark.parametrize("make", [sgd, cases.adam])
@pytest.mark.parametrize("hooked_at", [0, 8])
def test_a_hooked_optimizer_takes_its_own_steps(make, hooked_at):
    counts, learners = [], pair(optimizer=make)
    for index, (x, y) in enumerate(batches(12)):
        for one in learners if index == hooked_at else ():
            one.optimizer.register_step_post_hook(lambda *_, one=one: counts.append(one))
        step_both(learners, x, y)
    assert counts.count(learners[0]) == counts.count(learners[1]) == 12 - hooked_at
    assert type(plan_of(learners[1]).blocks) is ByGradients
    close(*learners)


@pytest.mark.parametrize("settings", [{"accumulate": 3}, {"clip_norm": 0.05}, {"accumulate": 2, "clip_norm": 0.05}], ids=str)
def test_gradients_are_gathered_and_clipped(settings):
    learners = pair(**settings, optimizer=cases.adam)
    for x, y in batches(16):
        step_both(learners, x, y)
    assert stacked_cells(learners[1]) == [[0], [1, 2, 3, 4]]  # the top block has a layer that is not affine
    close(*learners)


def test_a_learning_rate_schedule_is_followed():
    learners = pair(optimizer=OPTIMIZERS["momentum"][0])
    plans = [torch.optim.lr_scheduler.OneCycleLR(one.optimizer, max_lr=0.1, total_steps=30) for one in learners]
    for x, y in batches(20):
        step_both(learners, x, y)
        for plan in plans:
            plan.step()
    close(*learners)


# ---- the user's own objects are always current -------------------------------------------------------------------------------


def test_model_and_optimizer_hold_what_is_learnt_at_every_step():
    learners = pair(optimizer=OPTIMIZERS["momentum"][0])
    parameters = list(learners[1].model.parameters())
    for x, y in batches(12):
        step_both(learners, x, y)
        close(*learners)
        ours, theirs = (one.optimizer.state_dict()["state"] for one in learners)
        for key, state in ours.items():
            torch.testing.assert_close(theirs[key], state, rtol=1e-7, atol=1e-10)
    assert all(a is b for a, b in zip(parameters, learners[1].model.parameters(), strict=True))
    x = batches(1)[0][0]
    torch.testing.assert_close(*(one.predict(x) for one in learners), rtol=1e-8, atol=1e-8)


def test_weights_and_states_that_the_user_replaces_are_taken_up():
    learners = pair(optimizer=OPTIMIZERS["momentum"][0])
    feed = iter(batches(40))
    for _ in range(8):
        step_both(learners, *next(feed))
    kept = [copy.deepcopy(one.optimizer.state_dict()) for one in learners]
    for one in learners:
        one.model[2][0].weight.data = torch.ones(WIDTH, WIDTH, dtype=torch.float64) / WIDTH
    for _ in range(3):
        step_both(learners, *next(feed))
    for one, state in zip(learners, kept, strict=True):
        one.optimizer.load_state_dict(state)
    for _ in range(3):
        step_both(learners, *next(feed))
    for one in learners:
        one.auxiliaries[1][0].weight.data = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for _ in range(3):
        step_both(learners, *next(feed))
    close(*learners)
    assert [1, 2, 3, 4] in stacked_cells(learners[1])


def test_a_change_of_mode_is_followed():
    learners = pair("normalised")
    for index, (x, y) in enumerate(batches(20)):
        if index in (9, 14):
            for one in learners:
                one.model.train(index == 14)
        step_both(learners, x, y)
    close(*learners)


def test_buffers_move():
    learners = pair("normalised")
    for x, y in batches(12):
        step_both(learners, x, y)
    assert int(learners[1].model[2][1].num_batches_tracked) == 10
    close(*learners)


# ---- what interrupts a full pipeline -----------------------------------------------------------------------------------------


def test_batches_of_another_size_and_drains():
    learners = pair()
    sizes = [8] * 9 + [3] + [8] * 9 + [5, 5, 5, 8, 8]
    for index, size in enumerate(sizes):
        step_both(learners, *batches(1, samples=size, seed=index)[0])
        if index in (8, 15):
            for one in learners:
                one.drain()
    close(*learners)


def test_autocast_runs_as_the_reference_does():
    learners = pair(dtype=torch.float32)
    for x, y in batches(9, dtype=torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            step_both(learners, x, y)
    assert_same(*(one.state_dict() for one in learners))


@pytest.mark.parametrize("rule", ["dni", "cdni", "dni-hidden", "pred", "drtp", "cdni-sobolev"])
@pytest.mark.parametrize("tower", ["affine", "normalised"])
def test_resume_is_bit_identical_and_saving_changes_nothing(tower, rule):
    make = next(row.make for row in RULES if row.name == rule)
    whole, saving = (
        learner(TOWERS[tower], make(), "stacked", optimizer=OPTIMIZERS["momentum"][0], dtype=torch.float32) for _ in range(2)
    )
    fed = batches(12, dtype=torch.float32)
    for index, (x, y) in enumerate(fed):
        whole.step(x, y)
        saving.step(x, y)
        state = saving.state_dict()
        if index in (3, 7, 9):
            resumed = learner(TOWERS[tower], make(), "stacked", optimizer=OPTIMIZERS["momentum"][0], dtype=torch.float32)
            resumed.load_state_dict(state)
            for later in fed[index + 1 :]:
                resumed.step(*later)
            final = resumed
    assert_same(whole.state_dict(), saving.state_dict())
    assert_same(whole.state_dict(), final.state_dict())


def test_a_state_passes_from_one_executor_to_the_other():
    learners = pair(optimizer=cases.adam)
    feed = iter(batches(40))
    for _ in range(10):
        step_both(learners, *next(feed))
    states = [one.state_dict() for one in learners]
    for one, state in zip(reversed(learners), states, strict=True):
        one.load_state_dict(state)
    for _ in range(10):
        step_both(learners, *next(feed))
    close(*learners)


def test_a_gradient_can_be_looked_at():
    learners = pair()
    for x, y in batches(9):
        step_both(learners, x, y)
    found = [one.gradients(*batches(1, seed=5)[0]) for one in learners]
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)
    step_both(learners, *batches(1, seed=6)[0])


# ---- what cannot go as one ---------------------------------------------------------------------------------------------------


def test_lockstep_and_early_updates_are_refused():
    build, shape = TOWERS["affine"]
    settings = {
        "loss": nn.functional.cross_entropy,
        "optimizer": sgd,
        "executor": "stacked",
        "example_input": torch.zeros(2, *shape),
    }
    with pytest.raises(ValueError, match=r"each block needs, in the same tick, what the one below makes \(the forward lock\)"):
        lf.convert(build(), "dni", **settings)
    with pytest.raises(ValueError, match='leave out update="block"'):
        lf.convert(build(), "dni", schedule="pipelined", update="block", **settings)
    with pytest.raises(ValueError, match="cannot serve block 0, which needs ABOVE"):
        lf.convert(build(), "backprop", schedule="pipelined", **settings)


def unlike():
    """Six blocks of 8 units, of which the last two compute alike."""
    shared = nn.Linear(WIDTH, WIDTH)
    hooked = nn.Linear(WIDTH, WIDTH)
    hooked.register_forward_hook(lambda module, given, made: 2 * made)
    return (
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)),
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)),
        Residual(1.0),
        Residual(2.0),
        nn.Sequential(shared, nn.ReLU()),
        nn.Sequential(shared, nn.ReLU()),
        nn.Sequential(hooked, nn.ReLU()),
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.1)),
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2)),
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2)),
    )


def test_only_blocks_that_compute_alike_are_stacked():
    made = (lambda: nn.Sequential(*unlike(), nn.Linear(WIDTH, CLASSES)), (WIDTH,))
    names = [str(index) for index in range(11)]
    learners = [learner(made, "pred", one, blocks=names) for one in ("sequential", "stacked")]
    for x, y in batches(20, (WIDTH,)):
        state = torch.get_rng_state()
        ours = learners[0].step(x, y)
        torch.set_rng_state(state)  # both drop the same units
        assert learners[1].step(x, y).loss == pytest.approx(ours.loss, rel=1e-7, nan_ok=True)
    assert stacked_cells(learners[1])[:-1] == [[8, 9]]
    close(*learners)


def test_nothing_to_stack_is_said_once(caplog):
    made = (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.GELU()), nn.GELU(), nn.Linear(8, 7), nn.GELU(), Top()),
        (6,),
    )
    learners = [learner(made, "pred", one) for one in ("sequential", "stacked")]
    for x, y in batches(8):
        step_both(learners, x, y)
    assert [record.message[:16] for record in caplog.records] == ["nothing to stack"]
    assert learners[1]._executor._plan is None


class Top(nn.Module):
    def __init__(self):
        super().__init__()
        self.read = nn.Linear(7, CLASSES)

    def forward(self, x):
        return self.read(x).neg()


def test_anatomy():
    assert anatomy(Residual()) == anatomy(Residual())
    assert anatomy(dense(nn.ReLU)()) != anatomy(dense(nn.Tanh)())
    assert anatomy(nn.Dropout(0.1)) != anatomy(nn.Dropout(0.2))
    assert anatomy(nn.BatchNorm1d(3)) != anatomy(nn.BatchNorm1d(3).eval())
    assert affine(nn.Linear(2, 3)) is not None
    assert affine(nn.Sequential(nn.Sequential(nn.Linear(2, 3)), nn.ReLU())) is not None
    assert affine(nn.Sequential(nn.Linear(2, 3), nn.GELU())) is None
    assert affine(Residual()) is None


@pytest.mark.parametrize("where", ["input", "weights", "loss"])
def test_what_is_not_finite_ends_training_and_nothing_has_changed(where):
    learners = pair()
    for x, y in batches(9):
        step_both(learners, x, y)
    x, y = batches(1, seed=3)[0]
    with torch.no_grad():
        for one in learners:
            if where == "weights":
                one.model[3][0].weight[2, 2] = math.inf
            if where == "loss":
                one.model[5][1].weight[0, 0] = math.nan
    if where == "input":
        x[0, 0] = math.nan
    before = [copy.deepcopy(one.model.state_dict()) for one in learners]
    said = []
    for one in learners:
        with pytest.raises(lf.Diverged) as info:
            one.step(x, y)
        said.append(str(info.value))
    assert said[0].split(";")[0] == said[1].split(";")[0]
    for one, state in zip(learners, before, strict=True):
        torch.testing.assert_close(dict(one.model.state_dict()), dict(state), rtol=0, atol=0, equal_nan=True)


def infinite_for_class_2(scores, target):
    return nn.functional.cross_entropy(scores, target) + (math.inf if target[0] == 2 else 0.0)


def test_an_infinite_loss_of_finite_scores_is_refused():
    layers = [nn.Linear(6, WIDTH), *(dense(nn.ReLU)() for _ in range(3)), nn.Linear(WIDTH, CLASSES)]
    made = learner((lambda: nn.Sequential(*layers), (6,)), DNI(), "stacked", loss=infinite_for_class_2)
    x, target = batches(1)[0][0], torch.zeros(8, dtype=torch.int64)
    for index in range(12):
        made.step(x, target + 2 if index == 8 else target)
    assert stacked_cells(made)[-1] == [4]
    before = copy.deepcopy(made.model.state_dict())
    with pytest.raises(lf.Diverged, match="the loss is inf at step 9"):
        made.step(x, target)
    torch.testing.assert_close(dict(made.model.state_dict()), dict(before), rtol=0, atol=0)


def test_it_is_one_of_the_executors():
    assert isinstance(pair()[1]._executor, Stacked)


def test_the_command_line_stacks(tmp_path, capsys):
    settings = ["--data", "digits", "--rule", "pred", "--epochs", "1", "--schedule", "pipelined", "--json"]
    found = []
    for executor in ("sequential", "stacked"):
        assert main(["train", *settings, "--executor", executor, "--out", str(tmp_path / executor)]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found[0]["test_loss"] == pytest.approx(found[1]["test_loss"], rel=1e-3)
    assert json.loads((tmp_path / "stacked" / "config.json").read_text())["executor"] == "stacked"


# ---- captured ticks ----------------------------------------------------------------------------------------------------------


class Tape(TorchDispatchMode):
    """Captures on a CPU as CUDA does: operations are noted with the memory that they read and write, and undone.

    Nothing has been computed when it returns. A replay runs the operations again, on the same memory and without Python around them.
    """

    def __init__(self):
        super().__init__()
        self.steps, self.before = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for written in self._written(function, args, kwargs):
            self.before.setdefault(written.untyped_storage().data_ptr(), (written, self._bytes(written).clone()))
        made = function(*args, **kwargs)
        self.steps.append((function, args, kwargs, made))
        return made

    @staticmethod
    def _bytes(tensor):
        return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())

    @staticmethod
    def _written(function, args, kwargs):
        for place, argument in enumerate(function._schema.arguments):
            given = kwargs.get(argument.name, args[place] if place < len(args) else None)
            if argument.alias_info is not None and argument.alias_info.is_write and given is not None:
                yield from given if isinstance(given, (list, tuple)) else [given]

    def undo(self):
        for tensor, contents in self.before.values():
            self._bytes(tensor).copy_(contents)

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():  # as when they were noted
            for function, args, kwargs, made in self.steps:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def taped(function):
    tape = Tape()
    with tape:
        function()
    tape.undo()
    return tape.replay


@pytest.fixture
def captured(monkeypatch):
    """Ticks are captured on this device, too; returns how often."""
    count = []
    monkeypatch.setitem(CAPTURES, "cpu", lambda: lambda function: count.append(function) or taped(function))
    return count


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.03, momentum=0.9, weight_decay=1e-3)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


CAPTURED = {
    "dni": DNI(learning_rate=0.01),
    "cdni": DNI(conditioned=True),
    "pred": lf.rules.get("pred"),
    "predsim": lf.rules.get("predsim"),
}


@pytest.mark.parametrize("optimizer", [sgd, momentum, adam])
@pytest.mark.parametrize("rule", CAPTURED)
def test_captured_ticks_are_the_ticks(captured, rule, optimizer):
    learners = pair("affine", CAPTURED[rule], optimizer=optimizer, auxiliary_optimizer=optimizer)
    for x, y in batches(24):
        step_both(learners, x, y)
    close(*learners)
    assert len(captured) == 2
    for one in learners:
        one.drain()
    close(*learners)


@pytest.mark.parametrize("name", ["normalised", "residual", "convolution"])
def test_captured_ticks_of_other_blocks(captured, name):
    learners = pair(name, lf.rules.get("pred"), auxiliary_optimizer=sgd)
    for x, y in batches(24, TOWERS[name][1]):
        step_both(learners, x, y)
    close(*learners)
    assert len(captured) == 2


def test_captured_ticks_can_be_saved_and_gone_on_from(captured):
    learners = pair(auxiliary_optimizer=sgd)
    data = batches(40)
    for x, y in data[:20]:
        step_both(learners, x, y)
    state = copy.deepcopy(learners[1].state_dict())
    for x, y in data[20:]:
        step_both(learners, x, y)
    close(*learners)
    (resumed,) = pair(auxiliary_optimizer=sgd)[1:]
    resumed.load_state_dict(state)
    for x, y in data[20:]:
        resumed.step(x, y)
    close(learners[0], resumed)


def test_a_changed_learning_rate_is_captured_anew(captured):
    learners = pair(auxiliary_optimizer=sgd)
    for number, (x, y) in enumerate(batches(30)):
        if number in (15, 20):
            for one in learners:
                one.optimizer.param_groups[0]["lr"] *= 0.5
        step_both(learners, x, y)
    close(*learners)
    assert len(captured) == 6


def test_a_learning_rate_that_never_rests_is_not_captured_for_ever(captured, caplog):
    learners = pair(auxiliary_optimizer=sgd)
    for x, y in batches(40):
        for one in learners:
            one.optimizer.param_groups[0]["lr"] *= 0.99
        step_both(learners, x, y)
    close(*learners)
    assert len(captured) == 16
    assert [record.message for record in caplog.records if "learning rate" in record.message][1:] == []
    assert "one by one from now on" in caplog.text


def test_what_cannot_be_captured_runs_all_the_same(captured, caplog):
    def looked_at(scores, target):
        loss = nn.functional.cross_entropy(scores, target)
        return loss if math.isfinite(loss.item()) else loss * 2

    learners = pair(auxiliary_optimizer=sgd, loss=looked_at)
    for x, y in batches(20):
        step_both(learners, x, y)
    close(*learners)
    assert len(captured) == 1
    assert "could not be captured, so operations are launched one by one" in caplog.text


def test_a_captured_tick_that_diverges_has_changed_no_weight(captured):
    learners = pair(auxiliary_optimizer=sgd)
    for x, y in batches(15):
        step_both(learners, x, y)
    before = copy.deepcopy(learners[1].model.state_dict())
    x, y = batches(1, seed=1)[0]
    with pytest.raises(lf.Diverged, match="cell 0"):
        learners[1].step(x.fill_(math.nan), y)
    assert_same(dict(learners[1].model.state_dict()), dict(before))
    learners[0].step(*batches(1, seed=2)[0])
    learners[1].step(*batches(1, seed=2)[0])
