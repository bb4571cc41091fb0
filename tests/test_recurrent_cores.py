"""Every recurrent core against a plain loop over time: full and truncated backpropagation, and states as matrices."""

import pytest
import recurrences
import torch
from recurrences import CASES, CLASSES, F64, FEATURES, HIDDEN, batch_for, descent, learner_for, momentum, network_for
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree.recurrent import Encoded, OneHot, Stacked, SyntheticGradient, convert

EXACT = {"rtol": 0.0, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _own_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


def assert_close(found, wanted, **tolerance):
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        torch.testing.assert_close(found[name], one, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def moved(learner, chunks, step):
    """The mean gradient that one step of descent at rate 1 shows, of so many chunks, times their number."""
    parameters = recurrences.named(learner.core, learner.readout)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    step()
    return {name: chunks * (before[name] - p.detach()) for name, p in parameters.items()}


# ---- the true gradient at the horizon ----------------------------------------------------------------------------------------


@pytest.mark.thinned(1)
@pytest.mark.parametrize("horizon", [1, 3, 11, 20])
@pytest.mark.parametrize("name", CASES)
def test_the_true_gradient_makes_full_backpropagation_through_time(name, horizon):
    case = CASES[name]
    core, readout = network_for(case)
    batch = batch_for(case)
    learner = learner_for(core, readout, "oracle", horizon=horizon)
    wanted = recurrences.full(case, core, readout, batch, counted=min(horizon, 11))
    assert_close(learner.gradients(*batch), wanted, **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_learning_by_the_true_gradient_is_full_backpropagation_through_time(name):
    # Four chunks make one step of descent, so that all of them are learnt at the same weights.
    case = CASES[name]
    core, readout = network_for(case)
    batch = batch_for(case)
    learner = learner_for(core, readout, "oracle", optimizer=descent, accumulate=4)
    wanted = recurrences.full(case, core, readout, batch, counted=3)
    assert_close(moved(learner, 4, lambda: learner.step(*batch)), wanted, **EXACT)


@pytest.mark.parametrize("name", ["lstm", "carrying", "starting"])
def test_unequal_lengths_with_masked_losses(name):
    # Each sample holds one sequence and then padding, which a loss with weights leaves out.
    case = CASES[name]
    core, readout = network_for(case)
    batch = batch_for(case)
    lengths = torch.tensor([11, 2, 3, 7, 1, 9])
    done = torch.arange(1, 12).unsqueeze(1) == lengths
    counts = (torch.arange(11).unsqueeze(1) < lengths).to(F64)

    def loss(scores, targets):
        return (F.cross_entropy(scores, targets["class"], reduction="none") * targets["counts"]).mean()

    learner = learner_for(core, readout, "oracle", loss=loss)
    found = learner.gradients(batch.inputs, {"class": batch.targets, "counts": counts}, done)

    total = 0.0
    for n, length in enumerate(lengths.tolist()):  # one by one, without any mask
        state = case.begin(core, 1)
        for t in range(length):
            output, state = case.step(core, batch.inputs[t, n : n + 1], state)
            total = total + F.cross_entropy(readout(output), batch.targets[t, n : n + 1])
    wanted = recurrences.gradients(recurrences.named(core, readout), total / (6 * 3))
    assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("horizon", [11, 20])
@pytest.mark.parametrize("bootstrap", ["none", "dni", "dni-solved"])
def test_a_horizon_beyond_the_end_is_backpropagation_through_time(bootstrap, horizon):
    # What is descended is then the plain mean over the stretch, whatever is said of the time after it at first.
    case = CASES["lstm"]
    core, readout = network_for(case)
    batch = batch_for(case)
    learner = learner_for(core, readout, bootstrap, horizon=horizon, optimizer=descent)
    wanted = recurrences.full(case, core, readout, batch, counted=11)
    loss = recurrences.loop(case, core, readout, batch)[0].mean().item()
    learnt = []
    assert_close(moved(learner, 1, lambda: learnt.append(learner.step(*batch))), wanted, **EXACT)
    assert (learnt[0].steps, learnt[0].updates) == (11, 1)
    assert learnt[0].loss == pytest.approx(loss, abs=1e-12)


# ---- truncation --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_truncation_lets_nothing_past_the_horizon(name):
    case = CASES[name]
    core, readout = network_for(case)
    batch = batch_for(case)
    learner = learner_for(core, readout, "none")
    assert_close(learner.gradients(*batch), recurrences.truncated(case, core, readout, batch, 3), **EXACT)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


@pytest.mark.parametrize("optimizer", [momentum, adam])
@pytest.mark.parametrize("horizon", [4, 5])
def test_truncation_is_the_loop_that_one_writes_by_hand(optimizer, horizon):
    torch.manual_seed(2)
    core, readout = nn.LSTM(FEATURES, HIDDEN, 2), nn.Linear(HIDDEN, CLASSES)
    inputs, targets = torch.randn(20 * horizon, 6, FEATURES), torch.randint(0, CLASSES, (20 * horizon, 6))
    mine, my_readout = nn.LSTM(FEATURES, HIDDEN, 2), nn.Linear(HIDDEN, CLASSES)
    mine.load_state_dict(core.state_dict())
    my_readout.load_state_dict(readout.state_dict())

    learner = convert(core, readout, horizon=horizon, loss=F.cross_entropy, optimizer=optimizer)
    learner.step(inputs[: 7 * horizon], targets[: 7 * horizon])
    learner.step(inputs[7 * horizon :], targets[7 * horizon :])

    own = optimizer([*mine.parameters(), *my_readout.parameters()])
    h, c = torch.zeros(2, 6, HIDDEN), torch.zeros(2, 6, HIDDEN)
    for start in range(0, 20 * horizon, horizon):
        outputs, (h, c) = mine(inputs[start : start + horizon], (h.detach(), c.detach()))
        own.zero_grad()
        F.cross_entropy(my_readout(outputs.flatten(0, 1)), targets[start : start + horizon].flatten()).backward()
        own.step()
    assert all(torch.equal(a, b) for a, b in zip(core.parameters(), mine.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(readout.parameters(), my_readout.parameters(), strict=True))


class Noisy(nn.Module):
    """Learns the state that it begins in, drops units and normalises over the batch, at each of its steps."""

    def __init__(self):
        super().__init__()
        self.cell, self.norm = nn.GRUCell(FEATURES, HIDDEN), nn.BatchNorm1d(HIDDEN)
        self.start = nn.Parameter(torch.linspace(-1, 1, HIDDEN))

    def initial_state(self, samples):
        return self.start.expand(samples, -1)

    def forward(self, x, h):
        h = F.dropout(self.norm(self.cell(x, h)), 0.3, self.training)
        return h, h


def noisy_network():
    torch.manual_seed(5)
    return Noisy(), nn.Sequential(nn.BatchNorm1d(HIDDEN), nn.Dropout(0.2), nn.Linear(HIDDEN, CLASSES))


@pytest.mark.parametrize("bootstrap", ["dni", "dni-solved", SyntheticGradient(reads="output", scale=0.1, gamma=0.9)])
@pytest.mark.parametrize("optimizer", [momentum, adam])
def test_the_first_update_with_a_synthesiser_is_that_of_truncation(bootstrap, optimizer):
    made = []
    for one in ("none", bootstrap):
        learner = convert(*noisy_network(), horizon=4, bootstrap=one, loss=F.cross_entropy, optimizer=optimizer)
        batch = batch_for(CASES["gru-cell"], steps=4, seed=4)
        torch.manual_seed(9)
        learner.step(batch.inputs.float(), batch.targets, batch.done)
        made.append([*learner.core.state_dict().values(), *learner.readout.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("name", ["lstm", "starting"])
def test_a_synthesiser_that_knows_nothing_truncates(name):
    case = CASES[name]
    core, readout = network_for(case)
    batch = batch_for(case)
    plain, dni = (learner_for(core, readout, bootstrap) for bootstrap in ("none", "dni"))
    assert_close(dni.gradients(*batch), plain.gradients(*batch), rtol=0.0, atol=0.0)


# ---- states as matrices, and what is no core -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_states_become_rows_and_rows_states(name):
    case = CASES[name]
    core, readout = network_for(case)
    batch = batch_for(case, ends=0.0)
    learner = learner_for(core, readout, "oracle")
    _, state = learner.predict(batch.inputs)
    _, layout = lf.recurrent.cores.understand(core, batch.inputs)
    with torch.no_grad():
        wanted = recurrences.loop(case, core, readout, batch)[1]
    rows = layout.rows(state)
    torch.testing.assert_close(rows, recurrences.rows_of(wanted, case.dims), rtol=0.0, atol=1e-12)
    assert rows.shape == (6, layout.width)
    parted = layout.parted(rows)
    assert all(torch.equal(a, b) for a, b in zip(parted, layout.leaves(state), strict=True))
    chosen = torch.tensor([True, False] * 3)
    zeros = layout.zeros(6)
    layout.check(zeros, 6)
    mixed = recurrences.rows_of(layout.where(chosen, state, zeros), case.dims)
    assert torch.equal(mixed, torch.where(chosen.unsqueeze(1), rows, torch.zeros_like(rows)))


def test_a_state_that_is_learnt_learns_even_if_prediction_came_first():
    case = CASES["starting"]
    core, readout = network_for(case)
    batch = batch_for(case)
    learner = learner_for(core, readout, "oracle")
    learner.predict(batch.inputs)
    assert_close(learner.gradients(*batch), recurrences.full(case, core, readout, batch, counted=3), **EXACT)


def test_symbols_as_vectors():
    torch.manual_seed(3)
    gru, readout = nn.GRU(5, HIDDEN, dtype=F64), nn.Linear(HIDDEN, CLASSES, dtype=F64)
    inputs, targets = torch.randint(0, 5, (7, 6)), torch.randint(0, CLASSES, (7, 6))
    found = learner_for(Encoded(OneHot(5, F64), gru), readout, "oracle").gradients(inputs, targets)
    wanted = learner_for(gru, readout, "oracle").gradients(F.one_hot(inputs, 5).to(F64), targets)
    assert_close(found, {name.replace("core.", "core.core."): one for name, one in wanted.items()}, **EXACT)


class BatchFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(FEATURES, HIDDEN, batch_first=True)

    def forward(self, inputs, state=None):
        return self.gru(inputs, state)


class Growing(nn.Module):
    def forward(self, inputs, state=None):
        return inputs, inputs if state is None else torch.cat([state, inputs])


class StartingElsewhere(nn.Module):
    def forward(self, x, state=None):
        state = torch.full_like(x, 0.5) if state is None else torch.tanh(state + x)
        return state, state


class CountingOnly(nn.Module):
    def forward(self, x, state=None):
        count = torch.zeros(len(x), dtype=torch.int64) if state is None else state
        return x, count + 1


class OneForAll(nn.Module):
    def forward(self, x, state=None):
        level = x.mean() if state is None else 0.5 * state + x.mean()
        return x + level, level


@pytest.mark.parametrize(
    ("core", "says"),
    [
        (lambda: nn.GRU(FEATURES, HIDDEN, bidirectional=True), "GRU is bidirectional.*no horizon"),
        (lambda: nn.Linear(FEATURES, HIDDEN), "Linear is not a recurrent core.*A core maps"),
        (lambda: nn.Sequential(nn.GRU(FEATURES, HIDDEN)), "Sequential is not a recurrent core.*A core maps"),
        (BatchFirst, "BatchFirst is not a recurrent core|number of samples"),
        (Growing, "Growing is not a recurrent core.*grows with the steps.*A core maps"),
        (StartingElsewhere, "does not begin at zero.*initial_state"),
        (CountingOnly, "no numbers of floating point"),
        (OneForAll, "every tensor of a state needs one dimension that is the number of samples"),
        (lambda: Stacked(nn.GRU(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)), "Linear is not a recurrent core|Stacked"),
    ],
)
def test_a_module_that_is_no_core_is_refused(core, says):
    core = core()
    if not list(core.parameters()):
        core.unused = nn.Linear(1, 1)
    learner = convert(core, nn.Linear(HIDDEN, CLASSES), horizon=3, loss=F.cross_entropy, optimizer=momentum)
    inputs, targets = torch.randn(4, 2, FEATURES), torch.randint(0, CLASSES, (4, 2))
    with pytest.raises(ValueError, match=says) as raised:
        learner.step(inputs, targets)
    assert "\n" not in str(raised.value)


def test_an_empty_stack_is_refused():
    with pytest.raises(ValueError, match="one core or more"):
        Stacked()
