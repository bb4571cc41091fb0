"""The invariants of docs/architecture.md, each over the tables of `cases`."""

import copy
import itertools
from collections import Counter
from random import Random

import cases
import pytest
import torch
from cases import MODELS, OPTIMIZERS, RULES, SCHEDULES, assert_same, learner_for
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree import checkpoint
from lockfree.memory import ActivationMeter
from lockfree.rng import Streams
from lockfree.schedule import Kind
from lockfree.stash import Stash

MLP = MODELS["mlp"]
BY_NAME = {case.name: case for case in RULES}
LOCKSTEP, PIPELINED = SCHEDULES[0], SCHEDULES[3]


def named(rows):
    """Runs a test over rows of a table."""
    return pytest.mark.parametrize("case", [pytest.param(row, id=row.name) for row in rows])


@pytest.fixture(autouse=True)
def _own_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


def test_every_rule_has_a_row():
    assert set(lf.rules.RULES) <= {case.name.split("-")[0] for case in RULES}


# ---- 1: backprop is backprop -------------------------------------------------------------------------------------------------


def plain_losses(model, loss, optimizer, batches):
    """The loop that everybody writes."""
    optimizer = optimizer(list(model.parameters()))
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("blocks", [None, "names", 2, 3])
@named(MODELS.values())
@pytest.mark.thinned(3)
def test_backprop_equals_a_plain_loop(case, blocks, optimizer, dtype):
    double = dtype == torch.float64
    if case.name == "resnet20" and (double, optimizer == "adam") != (blocks in (3, "names"), blocks in (2, "names")):
        pytest.skip("one combination for each cut is enough for the largest model")
    batches = case.batches(20, dtype=dtype)
    learner = learner_for(
        case,
        lf.rules.Backprop(),
        optimizer=OPTIMIZERS[optimizer],
        blocks=list(case.cuts) if blocks == "names" else blocks,
        dtype=dtype,
    )
    wanted = {None: case.blocks, "names": len(case.cuts) + 1}.get(blocks, blocks)
    assert len(learner.cells) == wanted
    reference = case.build(dtype=dtype)
    torch.manual_seed(3)
    losses = plain_losses(reference, case.loss, OPTIMIZERS[optimizer], batches)
    torch.manual_seed(3)
    assert [learner.step(x, y).loss for x, y in batches] == losses
    assert_same(dict(learner.model.state_dict()), dict(reference.state_dict()))


def test_one_block_is_backprop_for_every_rule_without_feedback_weights():
    batches = MLP.batches(5)
    reference = MLP.build()
    torch.manual_seed(3)
    losses = plain_losses(reference, MLP.loss, cases.adam, batches)
    for name in ("dni", "cdni", "dfa"):
        learner = learner_for(MLP, BY_NAME[name].make(), blocks=1)
        torch.manual_seed(3)
        assert [learner.step(x, y).loss for x, y in batches] == losses
        assert_same(dict(learner.model.state_dict()), dict(reference.state_dict()))


# ---- 2: declared needs are true ----------------------------------------------------------------------------------------------


class Withheld:
    """Stands before a cell's rule and puts garbage wherever the rule says that it does not look."""

    def __init__(self, rule, garbage):
        self._rule, self._garbage = rule, garbage
        self.poisoned = 0

    def __getattr__(self, name):
        return getattr(self._rule, name)

    def credit(self, context):
        needs = self._rule.needs(context.place)
        kept = context.target, context.error, context.above
        if needs < lf.Needs.TARGET:
            assert context.target is None
            context.target = self._garbage
        if needs < lf.Needs.ERROR:
            assert context.error is None
            context.error = (self._garbage,)
        if needs < lf.Needs.ABOVE:
            assert context.above is None
            context.above = tuple(torch.full_like(y, torch.nan) for y in context.outputs)
            self.poisoned += 1
        credit = self._rule.credit(context)
        context.target, context.error, context.above = kept
        return credit


@pytest.mark.parametrize("model", ["mlp", "unet", "dict", "residual", "gpt"])
@named(RULES)
@pytest.mark.thinned(2)
def test_what_a_rule_does_not_need_is_not_looked_at(case, model):
    model = MODELS[model]
    if model.name in case.refuses:
        with pytest.raises(
            ValueError, match=r"class scores|register_feedback|one input tensor|Forward-Forward wants|writes the label"
        ):
            learner_for(model, case.make())
        return
    honest, poisoned = learner_for(model, case.make()), learner_for(model, case.make())
    for cell in poisoned.cells:
        cell.rule = Withheld(cell.rule, torch.tensor(torch.nan))
    batches = model.batches(4)
    for learner in (honest, poisoned):
        torch.manual_seed(3)
        for x, y in batches:
            learner.step(x, y)
    assert_same(poisoned.state_dict(), honest.state_dict())
    taken = Counter(action.cell for action in poisoned.schedule.actions(4) if action.kind in (Kind.LEARN, Kind.MESSAGE))
    assert set(taken.values()) == {4} or case.name == "dni-sparse"
    below = [cell.needs < lf.Needs.ABOVE for cell in poisoned.cells]
    assert [cell.rule.poisoned for cell in poisoned.cells] == [taken[index] * one for index, one in enumerate(below)]


@pytest.mark.parametrize("schedule", [LOCKSTEP, PIPELINED, SCHEDULES[1]], ids=lambda row: row.name)
@named(RULES)
@pytest.mark.thinned(2)
def test_messages_that_nobody_needs_never_arrive(case, schedule):
    """Garbage on the way to a cell that does not wait for it: nothing changes, not even in the auxiliary networks."""
    if not schedule.serves(case.make(), MLP.blocks):
        pytest.skip("this rule cannot run without waiting")
    honest, poisoned = (learner_for(MLP, case.make(), schedule=schedule) for _ in range(2))
    garbage = (torch.tensor(torch.nan),)
    for cell in poisoned.cells:
        original = cell.learn

        def learn(batch, above, error, kind, *, cell=cell, original=original):
            above = above if cell.needs >= lf.Needs.ABOVE else garbage
            return original(batch, above, error if cell.needs >= lf.Needs.ERROR else garbage, kind)

        cell.learn = learn
    for learner in (honest, poisoned):
        torch.manual_seed(3)
        for x, y in MLP.batches(5):
            learner.step(x, y)
        learner.drain()
    assert_same(poisoned.state_dict(), honest.state_dict())


def parameters_below(learner, cell):
    return [p.detach().clone() for below in learner.cells[:cell] for p in below.block.parameters()]


def scramble(learner, cell, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for above in learner.cells[cell:]:
            for parameter in above.block.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter))


def linear_loss(scores, target):
    """Its gradient does not depend on the scores, so that a broadcast error stays the same whatever the model computes."""
    return -(scores * F.one_hot(target, scores.shape[-1]).to(scores.dtype)).sum(dim=-1).mean()


@pytest.mark.parametrize("border", [1, 2, 3])
@pytest.mark.parametrize("model", ["mlp", "residual", "in_place"])
@named(RULES)
@pytest.mark.thinned(4)
def test_no_gradient_crosses_a_border_unless_it_is_needed(case, model, border):
    """Other weights above, the same update below; under backprop, another one."""
    model = MODELS[model]
    after = []
    for seed in (1, 2):
        learner = learner_for(model, case.make(), optimizer=cases.sgd)
        learner._assembly.objective._loss = linear_loss
        torch.manual_seed(3)
        for x, y in model.batches(case.moving):  # so that synthesisers are no longer zero
            learner.step(x, y)
        before = parameters_below(learner, border)
        scramble(learner, border, seed)
        learner.step(*model.batches(1, seed=5)[0])
        after.append(parameters_below(learner, border))
        assert cases.differs(before, after[-1])
    if case.name == "ff-hard":
        return  # what is above has a say in which wrong label is drawn, by its scores alone
    if learner.cells[border - 1].needs < lf.Needs.ABOVE:
        assert_same(*after)
    elif case.name == "backprop":
        assert cases.differs(*after)


@pytest.mark.thinned(1)
@named(RULES)
def test_locks_are_derived(case):
    assert learner_for(MLP, case.make()).locks == case.locks


def test_locks_of_rules_by_hand():
    every, update, forward = {"forward", "update", "backward"}, {"forward", "update"}, {"forward"}
    wanted = {"backprop": every, "fa": every, "dfa": update, "dni": forward, "cdni": forward}
    assert {name: set(learner_for(MLP, lf.rules.get(name)).locks) for name in wanted} == wanted
    one_border = learner_for(MLP, lf.rules.SyntheticGradients(borders=(1,)))
    assert [cell.needs.name for cell in one_border.cells] == ["ABOVE", "NOTHING", "ABOVE", "ABOVE"]
    assert set(one_border.locks) == every


# ---- 3: schedules and executors ----------------------------------------------------------------------------------------------


class Naive:
    """Replays a list of actions the slow way: the whole model is copied for each call, and autograd does the rest.

    Every block is a sequence that begins with its only `Linear`. Weights are stepped at the end of each tick.
    """

    def __init__(self, learner, model, kind, loss, optimizer, auxiliary_optimizer):
        self.kind, self.rule, self.loss = kind, learner.rule, loss
        self.model = model
        self.streams = Streams(learner._assembly.streams.seed) if learner.schedule.overlapping else None
        self.auxiliaries, self.imaginations = (
            nn.ModuleList(nn.ModuleList() if one is None else copy.deepcopy(one) for one in parts)
            for parts in ([cell.auxiliary for cell in learner.cells], map(imagination_of, learner.cells))
        )
        self.optimizer = optimizer(list(self.model.parameters()))
        learning = [*self.auxiliaries.parameters(), *self.imaginations.parameters()]
        self.auxiliary_optimizer = auxiliary_optimizer(learning) if learning else None
        self.calls, self.ups, self.downs, self.errors, self.predictions, self.guesses = {}, {}, {}, {}, {}, {}
        self.sample_losses, self.losses = {}, []

    def tick(self, actions, batches):
        for cell, kind, batch in actions:
            if self.streams is not None:
                self.streams.begin(cell, kind, batch)
            getattr(self, kind.name.lower())(cell, batch, batches)
        for optimizer in (self.optimizer, self.auxiliary_optimizer):
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    @property
    def top(self):
        return len(self.model) - 1

    def forward(self, cell, batch, batches):
        whole = copy.deepcopy(self.model)
        if len(self.imaginations[cell]):
            x = self.imagine(cell, batch, batches[batch][0]).clone().requires_grad_()
        else:
            x = (self.ups[cell - 1, batch] if cell else batches[batch][0]).clone().requires_grad_()
        block = whole[cell]
        layers = list(block) if isinstance(block, nn.Sequential) else [block]
        z = layers[0](x)
        y = nn.Sequential(*layers[1:])(z)
        keep_buffers(self.model[cell], block)
        self.calls[cell, batch] = x, z, y, list(block.parameters())
        self.ups[cell, batch] = y.detach()
        if cell == self.top:
            scores, target = y.detach().requires_grad_(), batches[batch][1]
            value = self.loss(scores, target)
            (self.errors[batch],) = torch.autograd.grad(value, [scores])
            self.losses.append(value.item())
            if self.loss is cases.class_loss:
                self.sample_losses[batch] = F.cross_entropy(scores.detach(), target, reduction="none")

    def imagine(self, cell, batch, source):
        network = copy.deepcopy(self.imaginations[cell])
        guess = network[0](source)
        keep_buffers(self.imaginations[cell], network)
        self.guesses[cell, batch] = guess, list(network.parameters())
        return guess.detach()

    def credit(self, cell, batch, target):
        if cell == self.top:
            return self.errors[batch]
        if self.kind == "dfa":
            return self.errors[batch] @ self.auxiliaries[cell].feedback_0
        if self.kind in ("backprop", "fa"):
            return self.downs[cell, batch]
        synthetic = self.predict(cell, batch, target)
        mix = self.rule.mix
        return (1 - mix) * synthetic + mix * self.downs[cell, batch] if mix else synthetic

    def predict(self, cell, batch, target):
        y = self.ups[cell, batch].clone().requires_grad_()
        synthesiser = copy.deepcopy(self.auxiliaries[cell][0])
        label = F.one_hot(target, cases.CLASSES).to(y.dtype) if self.kind == "cdni" else None
        made = synthesiser(y, label)
        keep_buffers(self.auxiliaries[cell][0], synthesiser)
        value, prediction = None, made
        if self.rule.form in ("critic", "sobolev"):
            value, (prediction,) = made, torch.autograd.grad(made.sum(), y, create_graph=True)
        self.predictions[cell, batch] = value, prediction, list(synthesiser.parameters())
        return prediction.detach() / len(y)

    def learn(self, cell, batch, batches):
        gradients = self.message(cell, batch, batches)
        for parameter, gradient in zip(self.model[cell].parameters(), gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def message(self, cell, batch, batches):
        _, z, y, weights = self.calls.pop((cell, batch))
        credit = self.credit(cell, batch, batches[batch][1])
        at_z, *gradients = torch.autograd.grad(y, [z, *weights], credit, retain_graph=True)
        if cell:
            matrix = self.auxiliaries[cell].feedbacks[0].weights if self.kind == "fa" else weights[0].detach()
            self.downs[cell - 1, batch] = at_z @ matrix
        return gradients

    def auxiliary(self, cell, batch, batches):
        if (cell, batch) not in self.predictions:  # the block is at rest
            self.predict(cell, batch, batches[batch][1])
        value, prediction, weights = self.predictions.pop((cell, batch))
        m, loss = len(prediction), 0.0
        if self.rule.form != "critic":
            truth = self.downs[cell, batch] if cell < self.top else self.errors[batch]
            loss = (prediction - m * truth).square().sum() / (2 * m)
        if self.rule.form in ("critic", "sobolev"):
            loss = self.rule.matching * loss
            if batch in self.sample_losses:
                loss = loss + (value - self.sample_losses[batch]).square().sum() / (2 * m)
        give_gradients(self.auxiliaries[cell], loss, weights)

    def input(self, cell, batch, batches):
        guess, weights = self.guesses.pop((cell, batch))
        give_gradients(self.imaginations[cell], (guess - self.ups[cell - 1, batch]).square().sum() / (2 * len(guess)), weights)


def imagination_of(cell):
    """The networks that predict a cell's input, if there are any."""
    return None if cell.inputs is None else cell.inputs.networks


def keep_buffers(module, used):
    for kept, changed in zip(module.buffers(), used.buffers(), strict=True):
        kept.copy_(changed)


def give_gradients(module, loss, weights):
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)  # a class may be missing from a batch
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = gradient


def small_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.5)


def replay(learner, model, kind, loss, batches, optimizer):
    """Runs learner and naive reference over the same batches and asserts that they agree to 1e-12."""
    naive = Naive(learner, model, kind, loss, optimizer, small_sgd)
    losses = []
    torch.manual_seed(3)
    for x, y in batches:
        result = learner.step(x, y)
        if result.batch is not None:
            losses.append(result.loss)
    learner.drain()
    torch.manual_seed(3)
    plan, count = learner.schedule, len(batches)
    ticks = [plan.tick(tick, 0, count - 1) for tick in range(count + plan.depth)]
    assert [action for tick in ticks for action in tick] == plan.actions(count)
    for tick in ticks:
        naive.tick(tick, batches)
    torch.testing.assert_close(losses, naive.losses[: len(losses)], rtol=0, atol=1e-12)
    torch.testing.assert_close(dict(learner.model.state_dict()), dict(naive.model.state_dict()), rtol=0, atol=1e-12)
    for cell, auxiliary, imagination in zip(learner.cells, naive.auxiliaries, naive.imaginations, strict=True):
        for mine, other in ((cell.auxiliary, auxiliary), (imagination_of(cell), imagination)):
            if mine is not None:
                torch.testing.assert_close(dict(mine.state_dict()), dict(other.state_dict()), rtol=0, atol=1e-12)
    return naive


NAIVE_PLAIN = ("backprop", "fa", "dfa", "dni", "dni-hidden", "cdni", "cdni-hidden")
NAIVE_NEW = ("dni-sparse", "dni-clocked", "dni-mix", "cdni-per-class", "cdni-critic", "cdni-sobolev", "cdni-unlocked")
NAIVE_RULES = NAIVE_PLAIN + NAIVE_NEW
NAIVE_FEW = (*NAIVE_PLAIN, "dni-sparse", "cdni-unlocked")
NAIVE_TRIPLES = [triple for triple in cases.legal_triples(4) if triple[0].name in NAIVE_RULES]


@pytest.mark.parametrize(
    ("rule", "schedule", "executor"),
    [pytest.param(r, s, e.name, id=f"{r.name}-{s.name}-{e.name}") for r, s, e in NAIVE_TRIPLES],
)
def test_a_schedule_alone_decides_the_mathematics(rule, schedule, executor):
    """Gradients at the weights of the forward pass, one update a tick, messages from before it, Dropout and BatchNorm included."""
    learner = learner_for(
        MLP,
        rule.make(),
        schedule=schedule,
        executor=executor,
        optimizer=cases.momentum,
        auxiliary_optimizer=small_sgd,
        dtype=torch.float64,
    )
    start = cases.copy_of(learner.model)
    batches = MLP.batches(8 + 2 * rule.moving, dtype=torch.float64)
    replay(learner, MLP.build(dtype=torch.float64), rule.name.split("-")[0], MLP.loss, batches, cases.momentum)
    assert all(not torch.equal(value, start[name]) for name, value in learner.model.named_parameters())


@pytest.mark.parametrize("delays", [(1, 0, 2), (0, 2, 0), (0, 0, 3)])
@pytest.mark.parametrize("rule", [row for row in RULES if row.name in NAIVE_FEW], ids=lambda row: row.name)
def test_every_link_has_its_own_delay(rule, delays):
    """Some borders are late, others are not even cut."""
    model, example = MLP.build(dtype=torch.float64), MLP.batches(1, dtype=torch.float64)[0][0]
    links = [lf.Link(delay=delay) for delay in delays]
    learner = lf.convert(
        model,
        rule.make(),
        loss=MLP.loss,
        optimizer=cases.momentum,
        auxiliary_optimizer=small_sgd,
        example_input=example,
        links=links,
    )
    batches = MLP.batches(10, dtype=torch.float64)
    replay(learner, MLP.build(dtype=torch.float64), rule.name.split("-")[0], MLP.loss, batches, cases.momentum)


@pytest.mark.parametrize("schedule", [SCHEDULES[2], SCHEDULES[4]], ids=lambda row: row.name)
@pytest.mark.parametrize("rule", [row for row in RULES if row.name in NAIVE_FEW], ids=lambda row: row.name)
def test_training_goes_on_after_a_drain(rule, schedule):
    learner = learner_for(MLP, rule.make(), schedule=schedule, auxiliary_optimizer=small_sgd, dtype=torch.float64)
    kind, start = rule.name.split("-")[0], MLP.build(dtype=torch.float64)
    naive = Naive(learner, start, kind, MLP.loss, cases.adam, small_sgd)
    batches = MLP.batches(7, dtype=torch.float64)
    torch.manual_seed(3)
    for count in (3, 1, 3):
        for x, y in batches[learner.steps : learner.steps + count]:
            learner.step(x, y)
        learner.drain()
    torch.manual_seed(3)
    for first, last in ((0, 2), (3, 3), (4, 6)):
        for tick in range(first, last + 1 + learner.schedule.depth):
            naive.tick(learner.schedule.tick(tick, first, last), batches)
    torch.testing.assert_close(dict(learner.model.state_dict()), dict(naive.model.state_dict()), rtol=0, atol=1e-12)


class RunningScale(nn.Module):
    """Divides by a running mean size, which it changes in place at each forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        self.scale.mul_(0.5).add_(x.detach().abs().mean(), alpha=0.5)
        return x / self.scale


@pytest.mark.parametrize("schedule", [SCHEDULES[0], SCHEDULES[1], SCHEDULES[4]], ids=lambda row: row.name)
def test_buffers_that_change_under_a_call_in_flight(schedule):
    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            blocks = [nn.Sequential(nn.Linear(6, 6), RunningScale(), nn.Tanh()) for _ in range(3)]
            return nn.Sequential(*blocks, nn.Linear(6, cases.CLASSES)).double()

    learner = lf.convert(
        make(), "backprop", loss=F.cross_entropy, optimizer=cases.sgd, schedule=schedule.schedule, links=schedule.links
    )
    replay(learner, make(), "backprop", F.cross_entropy, MLP.batches(8, dtype=torch.float64), cases.sgd)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda row: row.name)
@pytest.mark.parametrize("kind", ["backprop", "dfa", "dni"])
def test_blocks_that_share_a_weight_keep_the_one_that_they_ran_with(kind, schedule):
    def make():
        generator = torch.Generator().manual_seed(5)
        layers = [nn.Linear(6, 6, dtype=torch.float64) for _ in range(4)]
        for layer in layers:
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
            layer.weight = layers[0].weight
        return nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in layers))

    rule = BY_NAME[kind].make()
    if not schedule.serves(rule, 4):
        pytest.skip("this rule cannot run without waiting")
    model = make()
    batches = MLP.batches(9, dtype=torch.float64)
    learner = lf.convert(
        model,
        rule,
        loss=F.cross_entropy,
        optimizer=small_sgd,
        auxiliary_optimizer=small_sgd,
        example_input=batches[0][0],
        schedule=schedule.schedule,
        links=schedule.links,
    )
    assert len({id(cell.block.get_parameter(name)) for cell in learner.cells for name, _ in cell.block.named_parameters()}) == 5
    replay(learner, make(), kind, F.cross_entropy, batches, small_sgd)


@named([case for case in RULES if PIPELINED.serves(case.make(), 4)])
def test_pipelining_keeps_the_order_of_each_cell(case, monkeypatch):
    """F and L of a cell come in lockstep's order, as far as the clock wants them; its auxiliary network learns when the truth is there.

    That is one tick late where the block above reports it, once the batch is at the top where the error is enough, and at once
    where the targets are enough or nobody waits for real inputs.
    """
    taken = {}
    for schedule in (LOCKSTEP, PIPELINED):
        learner = learner_for(MLP, case.make(), schedule=schedule)
        run, seen = learner._executor.run, []

        def spy(assembly, actions, *, run=run, seen=seen):
            seen.extend(actions)
            return run(assembly, actions)

        monkeypatch.setattr(learner._executor, "run", spy)
        for x, y in MLP.batches(6):
            learner.step(x, y)
        learner.drain()
        assert seen == learner.schedule.actions(6)
        taken[schedule.name] = seen
    rule, kinds = case.make(), wanted_kinds(case.make(), 4, 6)
    for cell in range(4):
        own = [
            [str(a) for a in taken[name] if a.cell == cell and a.kind is not Kind.AUXILIARY]
            for name in ("lockstep", "pipelined")
        ]
        assert (
            own[0] == own[1] == [f"{cell}{kind}{batch}" for batch in range(6) for kind in "FILM" if kind in kinds[cell, batch]]
        )
        if cell < 3:
            late = 3 - cell if rule.wants_sample_losses() else 1
            known = rule.auxiliary_needs(lf.Place(cell, 4)) in (lf.Needs.NOTHING, lf.Needs.TARGET)
            late = 0 if known or getattr(rule, "synthetic_inputs", False) else late
            found = [str(a) for a in taken["pipelined"] if a.cell == cell]
            assert found == [
                f"{cell}{kind}{batch}"
                for tick in range(6 + late)
                for kind, batch in [*((kind, tick) for kind in "FILM"), ("A", tick - late)]
                if kind in kinds.get((cell, batch), "")
            ]


def wanted_kinds(rule, cells, batches):
    """What each cell does on each batch, by the clock's own words; no cell waits for the one above."""
    clock, wanted = rule.clock(cells), {}
    for cell, batch in itertools.product(reversed(range(cells)), range(batches)):
        pace = "learn" if clock is None else clock.pace(cell, batch).value
        kinds = "F" + {"learn": "L", "report": "M", "rest": "", "freeze": ""}[pace]
        helps = clock is None or clock.auxiliary(cell, batch)
        kinds += "I" if helps and rule.synthesises_inputs(lf.Place(cell, cells)) else ""
        informed = rule.auxiliary_needs(lf.Place(cell, cells)) != lf.Needs.ABOVE or set(
            wanted.get((cell + 1, batch), "")
        ) & set("LM")
        learns = rule.auxiliary_needs(lf.Place(cell, cells)) is not None
        kinds += "A" if learns and helps and informed else ""
        wanted[cell, batch] = kinds
    return wanted


def test_pipelining_refuses_who_must_wait():
    for case in RULES:
        if not PIPELINED.serves(case.make(), 4):
            with pytest.raises(ValueError, match=r"links=Link\(delay=1\)"):
                learner_for(MLP, case.make(), schedule=PIPELINED)


def in_any_order(schedule, actions, random):
    """Draws an order of a tick in which every action comes after what it waits for, and each cell's own stay in theirs."""
    left, order = list(actions), []
    while left:
        first_of_cell = list({action.cell: action for action in reversed(left)}.values())
        ready = [action for action in first_of_cell if not any(other in left for other in schedule.waits_for(action))]
        order.append(random.choice(ready))
        left.remove(order[-1])
    return order


@pytest.mark.parametrize("schedule", [LOCKSTEP, SCHEDULES[4]], ids=lambda row: row.name)
@named(RULES)
@pytest.mark.thinned(3)
def test_any_order_of_a_tick_that_keeps_the_waits_gives_the_same_bits(case, schedule):
    """What an action waits for is all that it depends on."""
    model = MODELS["in_place"]  # no dropout: the order of draws is an order, too
    if not schedule.serves(case.make(), model.blocks):
        pytest.skip("this rule cannot run with late links")
    states = []
    for seed in (None, 1, 2):
        learner, random = learner_for(model, case.make(), schedule=schedule), Random(seed)
        run, moved = learner._executor.run, []

        def shuffled(assembly, actions, *, run=run, moved=moved, random=random, seed=seed):
            order = actions if seed is None else in_any_order(assembly.schedule, actions, random)
            moved.append(order != actions)
            return run(assembly, order)

        learner._executor.run = shuffled
        for x, y in model.batches(case.moving + 2):
            learner.step(x, y)
        learner.drain()
        states.append([learner.model.state_dict(), [(cell.auxiliary, cell.inputs) for cell in learner.cells]])
        states[-1][1] = [dict(one.state_dict()) for pair in states[-1][1] for one in pair if one is not None]
    assert any(moved) or case.locks == cases.ALL
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])


# ---- 4: stop and resume ------------------------------------------------------------------------------------------------------

STEPS = 6
RESUMED = [pytest.param(r, s, id=f"{r.name}-{s.name}") for r, s in cases.legal_pairs(4)]


@pytest.mark.parametrize(("rule", "schedule"), RESUMED)
@pytest.mark.thinned(5)
def test_resume_is_bit_identical_at_every_step(rule, schedule, tmp_path):
    batches = MLP.batches(STEPS)
    whole = learner_for(MLP, rule.make(), schedule=schedule)
    torch.manual_seed(3)
    losses = []
    for step, (x, y) in enumerate(batches):
        checkpoint.save(tmp_path / str(step), whole.state_dict())
        result = whole.step(x, y)
        losses.append((result.batch, result.loss, result.auxiliary, result.inputs))
    undrained = whole.state_dict()
    whole.drain()
    drained = whole.state_dict()

    other = learner_for(MLP, rule.make(), schedule=schedule, seed=1)
    for start in (4, 1, 2, 5, 3):  # in one object, so that leftovers of a former life would show
        torch.manual_seed(1000 + start)
        other.load_state_dict(checkpoint.load(tmp_path / str(start)))
        seen = []
        for x, y in batches[start:]:
            result = other.step(x, y)
            seen.append((result.batch, result.loss, result.auxiliary, result.inputs))
        assert_same(seen, losses[start:])
        assert_same(other.state_dict(), undrained)
        other.drain()
        assert_same(other.state_dict(), drained)


@pytest.mark.parametrize("model", ["residual", "unet", "dict", "tied", "gpt", "in_place"])
@pytest.mark.parametrize("schedule", [SCHEDULES[2], SCHEDULES[4]], ids=lambda row: row.name)
@pytest.mark.parametrize("rule", ["backprop", "dni-hidden", "dfa"])
@pytest.mark.thinned(5)
def test_resume_in_mid_flight_for_every_kind_of_model(model, rule, schedule, tmp_path):
    model = MODELS[model]
    batches = model.batches(STEPS)
    whole = learner_for(model, BY_NAME[rule].make(), schedule=schedule)
    torch.manual_seed(3)
    for x, y in batches[:4]:
        whole.step(x, y)
    checkpoint.save(tmp_path / "middle", whole.state_dict())
    for x, y in batches[4:]:
        whole.step(x, y)
    whole.drain()
    other = learner_for(model, BY_NAME[rule].make(), schedule=schedule, seed=1)
    other.load_state_dict(checkpoint.load(tmp_path / "middle"))
    for x, y in batches[4:]:
        other.step(x, y)
    other.drain()
    assert_same(other.state_dict(), whole.state_dict())


def test_a_state_is_a_copy():
    learner = learner_for(MLP, BY_NAME["dni"].make(), schedule=SCHEDULES[4])
    for x, y in MLP.batches(3):
        learner.step(x, y)
    state = learner.state_dict()
    kept = copy.deepcopy(state)
    learner.step(*MLP.batches(1)[0])
    assert_same(state, kept)
    other = learner_for(MLP, BY_NAME["dni"].make(), schedule=SCHEDULES[4])
    other.load_state_dict(state)
    other.step(*MLP.batches(1)[0])
    assert_same(state, kept)
    assert_same(other.state_dict(), learner.state_dict())


def strangers():
    yield "rule", learner_for(MLP, BY_NAME["cdni"].make()), "rule"
    yield "rule's field", learner_for(MLP, lf.rules.SyntheticGradients(learning_rate=0.5)), "rule"
    yield "cut", learner_for(MLP, BY_NAME["dni"].make(), blocks=2), "cut"
    yield "schedule", learner_for(MLP, BY_NAME["dni"].make(), schedule=PIPELINED), "schedule"
    yield "delay", learner_for(MLP, BY_NAME["dni"].make(), schedule=SCHEDULES[1]), "schedule"
    yield "model", learner_for(MODELS["in_place"], BY_NAME["dni"].make()), "model"


@pytest.mark.parametrize("which", ["rule", "rule's field", "cut", "schedule", "delay", "model"])
def test_a_stranger_s_state_changes_nothing(which):
    (theirs, match) = {name: (learner, match) for name, learner, match in strangers()}[which]
    mine = learner_for(MLP, BY_NAME["dni"].make())
    for x, y in MLP.batches(2):
        mine.step(x, y)
        theirs.step(x, y)
    before = mine.state_dict()
    with pytest.raises(ValueError, match=match):
        mine.load_state_dict(theirs.state_dict())
    assert_same(mine.state_dict(), before)


def test_a_state_with_another_optimizer_changes_nothing():
    mine = learner_for(MLP, BY_NAME["dni"].make(), optimizer=cases.momentum)
    theirs = learner_for(MLP, BY_NAME["dni"].make(), optimizer=cases.adam, seed=1)
    batch = MLP.batches(1)[0]
    mine.step(*batch)
    theirs.step(*batch)
    before = mine.state_dict()
    with pytest.raises(ValueError, match="optimizer"):
        mine.load_state_dict(theirs.state_dict())
    assert_same(mine.state_dict(), before)


def test_a_state_of_another_dtype_changes_nothing():
    mine = learner_for(MLP, BY_NAME["backprop"].make())
    theirs = learner_for(MLP, BY_NAME["backprop"].make(), dtype=torch.float64, seed=1)
    before = mine.state_dict()
    with pytest.raises(ValueError, match="float64"):
        mine.load_state_dict(theirs.state_dict())
    assert_same(mine.state_dict(), before)


def test_a_state_whose_auxiliary_networks_have_another_size_changes_nothing():
    def make(size, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = nn.Sequential(
                nn.Conv2d(1, 2, 3, padding=1), nn.Sequential(nn.Conv2d(2, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            )
            x = torch.zeros(2, 1, size, size)
            return lf.convert(model, "dfa", loss=F.cross_entropy, optimizer=cases.sgd, example_input=x)

    mine, theirs = make(6, 0), make(8, 1)
    before = mine.state_dict()
    with pytest.raises(ValueError, match="auxiliary"):
        mine.load_state_dict(theirs.state_dict())
    assert_same(mine.state_dict(), before)


def test_what_is_no_state_is_refused():
    learner = learner_for(MLP, BY_NAME["dni"].make())
    before = learner.state_dict()
    with pytest.raises(ValueError, match="lacks"):
        learner.load_state_dict({"model": before["model"]})
    assert_same(learner.state_dict(), before)


# ---- 7: memory ---------------------------------------------------------------------------------------------------------------


def peak_of(rule, blocks, schedule=LOCKSTEP):
    """Peak of saved activations over a step, once everything is warm, in bytes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = [nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1)) for _ in range(blocks - 1)]
        model = nn.Sequential(*body, nn.Linear(32, CLASSES))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 32, generator=generator), torch.randint(CLASSES, (64,), generator=generator)
    learner = lf.convert(
        model,
        rule,
        loss=F.cross_entropy,
        optimizer=cases.adam,
        example_input=x,
        schedule=schedule.schedule,
        links=schedule.links,
    )
    meter = ActivationMeter(model)
    with meter.watch():
        learner.step(x, y)
        meter.reset()
        learner.step(x, y)
    learner.drain()
    if schedule is LOCKSTEP:
        assert meter.now == 0
    return meter.peak


CLASSES = cases.CLASSES


def waits_for_the_loss(rule):
    """Whether a lower block or its auxiliary network waits until all blocks above have run forward."""
    places = [lf.Place(i, 4) for i in range(3)]
    return rule.wants_sample_losses() or any(
        rule.needs(i) > lf.Needs.TARGET or rule.auxiliary_needs(i) == lf.Needs.ERROR for i in places
    )


@named([case for case in RULES if not waits_for_the_loss(case.make())])
def test_peak_memory_does_not_grow_with_the_number_of_blocks(case):
    four, eight, sixteen = (peak_of(case.make(), count) for count in (4, 8, 16))
    assert four > 0
    assert max(four, eight, sixteen) <= 1.05 * min(four, eight, sixteen)


def test_a_critic_keeps_its_predictions_until_the_loss_is_known_and_no_activations_of_blocks():
    four, eight, sixteen = (peak_of(BY_NAME["cdni-critic"].make(), count) for count in (4, 8, 16))
    border = (eight - four) / 4
    assert sixteen - eight == pytest.approx(8 * border, rel=0.01)
    batch, hidden, units = 64, cases.HIDDEN["hidden_units"], 32
    floats = units + cases.CLASSES + 4 * hidden + units
    assert 0 < border <= 4 * batch * floats + 64


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_graph_that_nobody_differentiates_is_freed(overlaps):
    """Operations that save their own result must not keep themselves alive through what packed it."""
    network = nn.Linear(3, 3)
    meter, stash = ActivationMeter(network), Stash(network)

    def run():
        return network(torch.randn(4, 3)).exp()

    with meter.watch():
        if overlaps:
            with stash.record() as call:
                run()
            stash.release(call)
        else:
            run()
    assert meter.peak > 0
    assert meter.now == 0


def test_peak_memory_of_backprop_grows_linearly():
    four, eight, sixteen = (peak_of(lf.rules.Backprop(), count) for count in (4, 8, 16))
    block = (eight - four) / 4
    assert block > 0
    assert sixteen - eight == pytest.approx(8 * block, rel=0.01)
    local = peak_of(BY_NAME["cdni"].make(), 16)
    assert local < sixteen / 4


def test_common_tables_are_consistent():
    assert len({case.name for case in RULES}) == len(RULES)
    for case, (one, two) in itertools.product(MODELS.values(), [(0, 1)]):
        assert cases.differs(list(case.build(seed=one).parameters()), list(case.build(seed=two).parameters()))
