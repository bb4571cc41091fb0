"""The pipeline executor: several processes train one learner, and every number is that of the sequential reference."""

import contextlib
import itertools
import math

import cases
import pytest
import torch
from cases import MODELS, OPTIMIZERS, RULES, SCHEDULES, learner_for, legal_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from together import together
from torch import nn

import lockfree as lf
from lockfree.executors import FailedElsewhere, Pipeline
from lockfree.executors.pipeline.groups import balanced
from lockfree.executors.pipeline.wire import Layout
from lockfree.trace import fingerprints, replay

pytestmark = pytest.mark.xdist_group("pipeline")  # what is started once is started in one process

BY_NAME = {case.name: case for case in RULES}
PLANS = {plan.name: plan for plan in SCHEDULES}
MLP = MODELS["mlp"]


def dry():
    """Four blocks that draw nothing."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU()),
        nn.Sequential(nn.Linear(10, 9), nn.Tanh()),
        nn.Sequential(nn.Linear(9, 8), nn.ReLU()),
        nn.Linear(8, cases.CLASSES),
    )


DRY = cases.ModelCase(name="dry", make=dry, draw=MLP.draw, cuts=("1",), blocks=4)


def train(learner, batches):
    """Trains, and returns all that should be the same everywhere."""
    losses = [learner.step(x, y).loss for x, y in batches]
    learner.drain()
    return {"losses": list(map(str, losses)), "weights": fingerprints(learner.cells)}


def both(case, rule, plan, batches, groups, **more):
    """Returns what comes of a pipeline and of the reference; or why the pipeline is refused."""
    found = {}
    for name, executor in (("pipeline", Pipeline(groups=groups)), ("sequential", "sequential")):
        torch.manual_seed(1)
        try:
            learner = learner_for(case, BY_NAME[rule].make(), schedule=PLANS[plan], executor=executor, **more)
            found[name] = train(learner, batches)
        except ValueError as error:
            assert name == "pipeline"
            return str(error)
    return found


def run_rows(rank, rows, groups=None):
    """Trains row after row; a process that has them all in one go imports PyTorch once."""
    answers = []
    for model, rule, plan, count, samples, more in rows:
        case = DRY if model == "dry" else MODELS[model]
        batches = [batch for number in samples for batch in case.batches(count, seed=number, samples=number)]
        answers.append(both(case, rule, plan, batches, groups, **more))
    return answers


def row(model, rule, plan, *, count=11, samples=(8,), **more):
    return model, rule, plan, count, samples, more


def agree(answers):
    """Checks that each process found the pipeline's numbers to be the reference's."""
    for each in answers:
        assert not isinstance(each, str), each
        assert each["pipeline"] == each["sequential"]


# ---- the same numbers --------------------------------------------------------------------------------------------------------

LEGAL = [(rule.name, plan.name) for rule, plan in legal_pairs(4)]
AT_WORK = [
    pair for pair in LEGAL if pair[1] == "pipelined" or (pair[1] == "pipelined-late" and (pair[0], "pipelined") not in LEGAL)
]


def rows_of(pairs):
    """Dropout is part of them where each block draws for itself."""
    return [row("mlp" if "pipelined" in plan else "dry", rule, plan) for rule, plan in pairs]


@pytest.mark.parametrize(("rule", "plan"), [pytest.param(*pair, id="-".join(pair)) for pair in AT_WORK])
def test_every_rule_trains_as_the_reference_does(two, rule, plan):
    answers = [each[AT_WORK.index((rule, plan))] for each in two["rules"]]
    if rule == "ff-hard":
        assert all("needs ERROR to make what enters the chain" in answer for answer in answers)
        return
    agree(answers)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [[3, 1], [1, 2, 1], [1, 1, 1, 1]], ids=str)
def test_every_legal_pair_trains_as_the_reference_does(groups):
    rows = rows_of(pair for pair in LEGAL if pair[0] != "ff-hard")
    for answers in together(len(groups), run_rows, rows, groups, seconds=900):
        agree(answers)


MORE = [
    *(row(model, "dni", "pipelined") for model in ("cnn", "residual", "unet", "dict", "in_place", "resnet20")),
    *(row(model, "backprop", "pipelined-late") for model in ("residual", "unet", "dict")),
    *(row("mlp", "dni", "pipelined", optimizer=OPTIMIZERS[name]) for name in OPTIMIZERS),
    row("mlp", "cdni-critic", "pipelined-late", samples=(8, 5, 8)),
    row("mlp", "dfa", "pipelined-late", samples=(8, 5)),
    row("mlp", "pred", "pipelined", samples=(8, 3, 8), accumulate=2),
    row("mlp", "dni", "pipelined", update="block", clip_norm=0.5),
    row("dry", "hsic-format", "pipelined"),
]


def test_other_models_optimizers_and_sizes_train_as_the_reference_does(two):
    for answers in two["more"]:
        agree(answers)


@pytest.mark.slow
def test_three_processes_two_of_them_with_one_block():
    rows = [
        row("mlp", rule, plan)
        for rule, plan in (("dni", "pipelined"), ("dfa", "pipelined-late"), ("cdni-unlocked", "pipelined"))
    ]
    rows += [row("dry", "backprop", "lockstep-late"), row("dry", "dni", "lockstep")]
    for answers in together(3, run_rows, rows):
        agree(answers)


def with_links(rank, options):
    found = []
    for option in options:
        pair = []
        for executor in ("pipeline", "sequential"):
            learner = lf.convert(
                DRY.build(dtype=torch.float64), "backprop", loss=DRY.loss, optimizer=cases.momentum, schedule="lockstep",
                executor=executor, links=lf.Link(delay=1, **option),
            )  # fmt: skip
            pair.append(train(learner, DRY.batches(9, dtype=torch.float64)))
        found.append(pair)
    return found


LINKS = [
    {"stash": False},
    {"correction": lf.staleness.DelayCompensation()},
    {"stash": False, "correction": lf.staleness.ScaleByDelay()},
]


def test_delayed_backprop_with_and_without_kept_weights_and_corrected(two):
    for pairs in two["links"]:
        for ours, theirs in pairs:
            assert ours == theirs


# ---- what is in flight -------------------------------------------------------------------------------------------------------


def made(rule, plan, executor, case=MLP):
    torch.manual_seed(1)
    return learner_for(case, BY_NAME[rule].make(), schedule=PLANS[plan], executor=executor)


def resumed(rank, rule, plan):
    """Stops a pipeline in mid-flight, and goes on from its state in other ways."""
    batches = MLP.batches(14)
    first = made(rule, plan, Pipeline(groups=[1, 3]))
    for x, y in batches[:7]:
        first.step(x, y)
    state = first.state_dict()
    again = first.state_dict()
    found = {"twice the same": torch.equal(state["model"]["0.0.weight"], again["model"]["0.0.weight"])}
    for name, executor in (("sequential", "sequential"), ("other groups", Pipeline(groups=[3, 1])), ("the same", None)):
        learner = first if executor is None else made(rule, plan, executor)
        learner.load_state_dict(state)
        found[name] = train(learner, batches[7:])
    whole = made(rule, plan, "sequential")
    for x, y in batches[:7]:
        whole.step(x, y)
    found["never stopped"] = train(whole, batches[7:])
    return found


@pytest.mark.parametrize("rule", ["dni", "dfa"])
def test_a_state_in_mid_flight_goes_on_anywhere(two, rule):
    for found in two[rule]:
        assert found.pop("twice the same")
        wanted = found.pop("never stopped")
        for name, answer in found.items():
            assert answer == wanted, name


def looked_at(rank):
    """Looks at a pipeline in mid-flight; the reference is looked at in the same way."""
    found = []
    for executor in ("pipeline", "sequential"):
        learner = made("dni", "pipelined", executor)
        batches = MLP.batches(9)
        for x, y in batches[:6]:
            learner.step(x, y)
        x, y = batches[6]
        scores = learner.predict(x)
        gradients = learner.gradients(x, y)
        rest = train(learner, batches[6:])
        found.append([scores.tolist(), {name: g.tolist() for name, g in gradients.items()}, rest])
    return found


def test_predictions_and_gradients_are_the_reference_s(two):
    for ours, theirs in two["looks"]:
        assert ours == theirs


def traced(rank):
    learner = made("cdni", "pipelined", "pipeline", DRY)
    lines = learner.trace()
    for x, y in DRY.batches(5):
        learner.step(x, y)
    lines += learner.trace()
    learner.drain()
    for x, y in DRY.batches(3, seed=2):
        learner.step(x, y)
    learner.drain()
    return lines + learner.trace()


def test_a_trace_replays_bit_for_bit_and_tells_what_differs(two):
    lines, same = two["trace"]
    assert [line["kind"] for line in lines] == [line["kind"] for line in same]
    batches = [*DRY.batches(5), *DRY.batches(3, seed=2)]
    found = replay(lines, made("cdni", "pipelined", "sequential", DRY), batches)
    assert found.identical
    assert (found.steps, found.processes, found.compared) == (8, 2, (5, 8))
    other = made("cdni", "pipelined", "sequential", DRY)
    with torch.no_grad():
        other.model[3].weight[0, 0] += 1e-6
    assert replay(lines, other, batches).differing[3] == 5
    with pytest.raises(ValueError, match="is not of this schedule"):
        replay(lines, made("dfa", "pipelined-late", "sequential", DRY), batches)
    with pytest.raises(ValueError, match="more than the 3 batches given"):
        replay(lines, made("cdni", "pipelined", "sequential", DRY), batches[:3])
    waits = [line["waited"] for line in lines if line["kind"] == "tick"]
    assert all(
        0 <= wait <= line["seconds"] for wait, line in zip(waits, [x for x in lines if x["kind"] == "tick"], strict=True)
    )


# ---- what is refused, and what goes wrong ------------------------------------------------------------------------------------


def refusals(rank):
    said = {}

    def attempt(name, run):
        try:
            run()
        except (ValueError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"

    x, y = MLP.batches(1)[0]
    attempt(
        "too few", lambda: learner_for(MLP, BY_NAME["dni"].make(), schedule=PLANS["pipelined"], executor="pipeline", blocks=1)
    )
    attempt("clip", lambda: learner_for(MLP, BY_NAME["pred"].make(), executor="pipeline", clip_norm=1.0))
    attempt("groups", lambda: made("dni", "pipelined", Pipeline(groups=[2, 3])))
    attempt("above", lambda: made("backprop", "pipelined", "pipeline"))
    attempt("shared", lambda: made("dni", "pipelined", "pipeline", MODELS["gpt"]).step(*MODELS["gpt"].batches(1)[0]))
    attempt("drawn", lambda: made("pred", "lockstep", "pipeline").step(x, y))
    bad = made("dni", "pipelined", "pipeline")
    attempt("target", lambda: bad.step(x, y + cases.CLASSES))
    attempt("alone", lambda: bad.step_block(0, x, y))
    bad.step(x, y)  # nothing was harmed
    broken = made("dni", "pipelined", "pipeline", DRY)
    infinite = (torch.full_like(x, torch.inf), y)

    def go_on():
        for batch in [(x, y)] * 3 + [infinite] * 6:
            broken.step(*batch)
        broken.drain()

    attempt("diverged", go_on)
    attempt("after it", lambda: broken.step(x, y))
    fresh = made("pred", "pipelined", "pipeline", DRY)  # others can go on
    fresh.step(x, y)
    fresh.drain()
    return said


def everything(rank):
    """Does all that takes two processes; the last thing breaks them apart."""
    return {
        "rules": run_rows(rank, rows_of(AT_WORK), [2, 2]),
        "more": run_rows(rank, MORE),
        "links": with_links(rank, LINKS),
        "dni": resumed(rank, "dni", "pipelined"),
        "dfa": resumed(rank, "dfa", "pipelined-late"),
        "looks": looked_at(rank),
        "trace": traced(rank),
        "refusals": refusals(rank),
    }


@pytest.fixture(scope="module")
def two():
    """What comes of it in each of two processes: to start them takes as long as what they do."""
    ours, theirs = together(2, everything)
    return {name: (ours[name], theirs[name]) for name in ours}


def test_refusals_say_what_forbids_it_and_how_to_mend_it(two):
    ours, theirs = two["refusals"]
    assert "1 blocks cannot be shared among 2 processes" in ours["too few"]
    assert "clip_norm" in ours["clip"]
    assert "4 in all" in ours["groups"]
    assert "needs ABOVE" in ours["above"]
    assert "share a parameter" in ours["shared"]
    assert "draws random numbers" in ours["drawn"] + theirs["drawn"]
    assert "0 to 3" in ours["target"]
    for said in (ours, theirs):
        assert "not finite" in said["diverged"]
        assert "cannot go on together" in said["after it"]
    same = set(ours) - {"drawn", "diverged"}
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert sorted(said["diverged"].split(":")[0] for said in (ours, theirs)) == ["Diverged", FailedElsewhere.__name__]


def test_numbers_out_of_range_are_refused():
    for bad in ({"ahead": 0}, {"timeout": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Pipeline(**bad)
    with pytest.raises(ValueError, match=r"groups=\[3\]"):
        learner_for(MLP, BY_NAME["dni"].make(), schedule=PLANS["pipelined"], executor=Pipeline(groups=[3]))


# ---- its parts ---------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 8))
def test_groups_are_as_balanced_as_can_be(seconds, count):
    count = min(count, len(seconds))
    sizes = balanced([float(one) for one in seconds], count)
    assert sum(sizes) == len(seconds)
    assert len(sizes) == count
    assert min(sizes) >= 1

    def slowest(cuts):
        return max(sum(seconds[a:b]) for a, b in itertools.pairwise([0, *cuts, len(seconds)]))

    best = min(slowest(cuts) for cuts in itertools.combinations(range(1, len(seconds)), count - 1))
    assert slowest(list(itertools.accumulate(sizes))[:-1]) == best


KINDS = [torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16]


def some(kind, shape):
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(kind)


leaves = st.integers(-3, 3) | st.just("plain") | st.none()
leaves |= st.builds(some, st.sampled_from(KINDS), st.lists(st.integers(0, 3), max_size=3))
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=5,
)


@settings(deadline=None, max_examples=80)
@given(trees, st.integers(0, 2**40), st.integers(-1, 2**40))
def test_what_crosses_a_border_arrives_as_it_was(tree, batch, word):
    layout = Layout.of(tree)
    parcel = layout.unpack(layout.pack(tree, batch, word))
    assert (parcel.batch, parcel.word) == (batch, word)
    assert layout.fits(tree)
    if tree is not None:
        assert str(parcel.values) == str(tree)


def test_marks_and_gaps_arrive_too():
    values = (torch.ones(2, 3, requires_grad=True), torch.arange(4), torch.zeros(5).requires_grad_())
    layout = Layout.of(values)
    arrived = layout.unpack(layout.pack(values, 0, -1)).values
    assert [one.requires_grad for one in arrived] == [True, False, True]
    assert all(one.data_ptr() % 64 == 0 for one in arrived)
    with contextlib.suppress(RuntimeError), torch.no_grad():
        arrived[1].add_(1)
    assert arrived[0]._version == 0  # who changes one in place has not touched the others
    credit = layout.carriers()
    gaps = credit.unpack(credit.pack((None, torch.ones(5)), 3, -1)).values
    assert gaps[0] is None
    assert gaps[1].tolist() == [1.0] * 5
    assert credit.unpack(credit.pack(None, 3, -1)).values is None
    assert not credit.fits((torch.ones(2, 4), None))


def test_one_process_is_the_reference():
    case = MLP
    torch.manual_seed(1)
    learner = learner_for(case, BY_NAME["dni"].make(), schedule=PLANS["pipelined"], executor="pipeline")
    found = train(learner, case.batches(6))
    assert found == train(made("dni", "pipelined", "sequential"), case.batches(6))
    assert math.isnan(float(found["losses"][0]))
    assert learner.trace() == []
