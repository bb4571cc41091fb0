"""Two networks on different clocks: what each way of coupling them descends, against plain autograd and against each other."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree.objective import Diverged
from lockfree.recurrent import Coupled, Decoupled, LeastSquaresGradient, Oracle, Severed, SyntheticGradient, TwoClocks

T, S, M = 3, 4, 8


class Gathering(torch.optim.Optimizer):
    """Sums gradients up and changes nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                total = self.state[parameter].setdefault("sum", torch.zeros_like(parameter))
                total += parameter.grad


def networks(seed=0, dtype=torch.float64, dropout=0.0):
    torch.manual_seed(seed)
    a = lf.recurrent.Encoded(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(dropout)), nn.LSTM(6, 6))
    message = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    parts = {"a": a, "a_readout": nn.Linear(6, T + 1), "message": message, "b": nn.GRU(4, 6), "b_readout": nn.Linear(6, 7)}
    return {name: module.to(dtype) for name, module in parts.items()}


def pair(coupling, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), *, dropout=0.0, dtype=torch.float64, **more):
    settings = {"horizon": T, "slow": S, "loss": F.cross_entropy, "optimizer": optimizer, "coupling": coupling} | more
    return TwoClocks(**networks(dropout=dropout, dtype=dtype), **settings)


def stretch(seed=1, dtype=torch.float64):
    """Inputs, A's counts at each tick, B's at the last one."""
    draw = torch.Generator().manual_seed(seed)
    fast, slow = torch.full((S * T, M), -100), torch.full((S, M), -100)
    fast[T - 1 :: T] = torch.randint(T + 1, (S, M), generator=draw)
    slow[-1] = torch.randint(7, (M,), generator=draw)
    return torch.randn(S * T, M, 5, generator=draw, dtype=dtype), fast, slow


def gathered(coupling, **more):
    """The sum of what the optimizers of both would be given in a stretch, if no weight changed."""
    two = pair(coupling, Gathering, **more)
    two.step(*stretch())
    named = [(f"{part}.{name}", p) for part, module in two.parts._asdict().items() for name, p in module.named_parameters()]
    states = two.optimizers[0].state | two.optimizers[1].state
    return {name: states[p]["sum"] for name, p in named if p in states}


def weights(two):
    return {f"{part}.{name}": p.detach().clone() for part, m in two.parts._asdict().items() for name, p in m.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def near(one, other):
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], rtol=1e-10, atol=1e-10) for n in one)


def plain(*, cut):
    """The same by autograd and a loop; A's memory is cut at ticks if wanted."""
    parts = networks()
    inputs, fast, slow = stretch()
    a, state, messages, loss = parts["a"], None, [], 0.0
    for tick in range(S):
        steps = slice(tick * T, (tick + 1) * T)
        encoded = a.encoder(inputs[steps].flatten(0, 1)).unflatten(0, (T, M))
        outputs, state = a.core(encoded, state)
        loss = loss + F.cross_entropy(parts["a_readout"](outputs[-1]), fast[steps][-1])
        messages.append(parts["message"](outputs[-1]))
        state = tuple(one.detach() for one in state) if cut else state
    heard, _ = parts["b"](torch.stack(messages))
    (loss + F.cross_entropy(parts["b_readout"](heard[-1]), slow[-1])).backward()
    return {f"{part}.{name}": p.grad for part, module in parts.items() for name, p in module.named_parameters()}


@pytest.mark.parametrize("truncated", [False, True])
def test_coupled_is_one_backward_pass_through_both(truncated):
    assert near(gathered(Coupled(truncated=truncated)), plain(cut=truncated))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_decoupled_with_the_true_gradients_is_coupled(dropout):
    """Dropout is drawn alike in looking ahead, and running ahead leaves no trace in batch normalisation."""
    assert near(gathered(Decoupled(bootstrap=Oracle()), dropout=dropout), gathered(Coupled(truncated=True), dropout=dropout))


def test_through_the_memory_of_a_coupled_sees_more():
    whole, cut = gathered(Coupled()), gathered(Coupled(truncated=True))
    assert not torch.allclose(whole["a.core.weight_hh_l0"], cut["a.core.weight_hh_l0"], rtol=1e-3)
    assert near({n: g for n, g in whole.items() if n[0] == "b"}, {n: g for n, g in cut.items() if n[0] == "b"})


def trained(coupling, count=3, **more):
    two = pair(coupling, **more)
    losses = [two.step(*stretch(number)) for number in range(count)]
    return two, [(one.fast, one.slow) for one in losses]


def test_decoupled_at_scale_0_is_severed():
    (one, its), (other, theirs) = trained(Decoupled(bootstrap=SyntheticGradient(scale=0.0))), trained(Severed())
    assert same(weights(one), weights(other))
    assert its == theirs


def test_until_the_synthesiser_has_learnt_decoupled_is_severed():
    (one, _), (other, _) = trained(Decoupled(), 1), trained(Severed(), 1)
    assert same(weights(one), weights(other))
    (one, _), (other, _) = trained(Decoupled(), 2), trained(Severed(), 2)
    assert not same(weights(one), weights(other))


def test_severed_trains_b_but_not_the_message():
    before, after = weights(pair("severed")), weights(trained(Severed())[0])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if not name.startswith("message")}


@pytest.mark.parametrize(("coupling", "updates"), [("coupled", (2, 2)), ("decoupled", (2 * S, 2)), ("severed", (2 * S, 2))])
def test_a_learns_at_every_tick_unless_it_waits_for_b(coupling, updates):
    two, _ = trained(lf.recurrent.COUPLINGS[coupling](), 2)
    assert two.updates == updates
    assert len(two.auxiliaries) == (coupling == "decoupled")


def test_losses_are_those_before_the_update():
    two = pair("coupled", lambda p: torch.optim.SGD(p, lr=0.0))
    inputs, fast, slow = stretch()
    two.step(inputs, fast, slow)
    learnt = two.step(inputs, fast, slow)
    other = pair("severed", lambda p: torch.optim.SGD(p, lr=0.0))
    same_losses = other.step(inputs, fast, slow)
    assert learnt.fast == pytest.approx(same_losses.fast, rel=1e-12)
    assert learnt.slow == pytest.approx(same_losses.slow, rel=1e-12)
    assert learnt.synthetic is None


def test_the_synthesiser_learns_the_true_gradients_of_messages():
    """Of weights that do not move, its loss falls; what it is told is the gradient of each sample's loss."""
    two = pair(
        Decoupled(bootstrap=SyntheticGradient(hidden_units=32, learning_rate=1e-2)), lambda p: torch.optim.SGD(p, lr=0.0)
    )
    losses = [two.step(*stretch()).synthetic for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_b_s_gradients_make_the_message_worth_more():
    """A knows two bits and may tell one number; a random one mixes them."""

    def last(coupling):
        torch.manual_seed(0)
        two = TwoClocks(
            a=nn.LSTM(4, 16), a_readout=nn.Linear(16, 4), message=nn.Linear(16, 1), b=nn.LSTM(1, 8), b_readout=nn.Linear(8, 2),
            horizon=1, slow=2, coupling=coupling, loss=F.cross_entropy, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
        )  # fmt: skip
        draw = torch.Generator().manual_seed(0)
        losses = []
        for _ in range(150):
            inputs = torch.randn(2, 64, 4, generator=draw)
            bits = (inputs[..., :2] > 0).long()
            losses.append(two.step(inputs, bits[..., 0] + 2 * bits[..., 1], bits[..., 0]).slow)
        return sum(losses[-20:]) / 20

    decoupled = Decoupled(bootstrap=SyntheticGradient(hidden_units=16, learning_rate=1e-2, reads="output"))
    severed, ours, coupled = last(Severed()), last(decoupled), last(Coupled())
    assert coupled < 0.75 * severed
    assert ours < 0.75 * severed


@pytest.mark.parametrize("reads", ["state", "output"])
def test_what_the_synthesiser_sees(reads):
    two, _ = trained(Decoupled(bootstrap=SyntheticGradient(reads=reads)), 1)
    assert two.auxiliaries[0].seen == {"state": 4, "output": 6}[reads]
    assert two.auxiliaries[0].width == 4


@pytest.mark.parametrize(
    "coupling",
    [Coupled(), Severed(), Decoupled(), Decoupled(bootstrap=LeastSquaresGradient(every=3))],
    ids=["coupled", "severed", "decoupled", "solved"],
)
def test_a_resume_is_bit_identical(coupling):
    whole = pair(coupling, dropout=0.5, dtype=torch.float32)
    for number in range(2):
        whole.step(*stretch(number, torch.float32))
    state = whole.state_dict()
    expected = [whole.step(*stretch(number, torch.float32)) for number in (2, 3)]
    again = pair(coupling, dropout=0.5, dtype=torch.float32)
    again.load_state_dict(state)
    found = [again.step(*stretch(number, torch.float32)) for number in (2, 3)]
    assert [(one.fast, one.slow, one.synthetic) for one in found] == [(o.fast, o.slow, o.synthetic) for o in expected]
    assert same(weights(again), weights(whole))
    assert again.updates == whole.updates


def test_another_s_state_is_refused():
    two = pair("coupled")
    with pytest.raises(ValueError, match=r"the state is of another coupling: it was saved with Coupled"):
        pair("severed").load_state_dict(two.state_dict())
    with pytest.raises(ValueError, match=r"not a state of two clocks: it lacks like, of, optimizers, parts, rng, updates"):
        two.load_state_dict({})


def test_predict_answers_for_both_and_changes_nothing():
    two, _ = trained(Decoupled(), 1, dropout=0.5)
    state = two.state_dict()
    inputs, _, _ = stretch(9)
    fast, slow = two.predict(inputs)
    assert (fast.shape, slow.shape) == ((S * T, M, T + 1), (S, M, 7))
    alone = two.predict(inputs[: 2 * T, :3])
    assert torch.allclose(alone[0], fast[: 2 * T, :3])
    assert torch.allclose(alone[1], slow[:2, :3])
    after = two.state_dict()
    assert same(after["parts"]["a"], state["parts"]["a"])
    assert same(after["parts"]["message"], state["parts"]["message"])
    assert torch.equal(after["rng"]["cpu"], state["rng"]["cpu"])
    assert all(module.training for module in two.parts)


def test_cores_of_one_s_own_and_two_losses():
    class Leaky(nn.Module):
        def __init__(self, into):
            super().__init__()
            self.into = nn.Linear(into, 4)
            self.start = nn.Parameter(torch.randn(4))

        def initial_state(self, samples):
            return self.start.expand(samples, -1)

        def forward(self, inputs, state):
            state = 0.5 * state + torch.tanh(self.into(inputs))
            return state, state

    torch.manual_seed(0)
    two = TwoClocks(
        a=Leaky(5), a_readout=nn.Linear(4, 2), message=nn.Linear(4, 3), b=Leaky(3), b_readout=nn.Linear(4, 1), horizon=2,
        coupling="decoupled", loss=F.cross_entropy, b_loss=F.mse_loss, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
    )  # fmt: skip
    assert two.slow == 2
    starts = [two.parts.a.start.clone(), two.parts.b.start.clone()]
    two.step(torch.randn(4, M, 5), torch.randint(2, (4, M)), torch.randn(2, M, 1))
    assert not any(torch.equal(a, b) for a, b in zip(starts, [two.parts.a.start, two.parts.b.start], strict=True))


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"slow": 1}, ValueError, "slow=1: give a whole number, 2 or more"),
        ({"horizon": 0}, ValueError, "horizon=0: give a whole number, 1 or more"),
        ({"horizon": 1, "slow": None}, ValueError, "slow=1: give a whole number, 2 or more"),
        ({"coupling": "copled"}, ValueError, "unknown coupling 'copled': did you mean 'coupled'"),
        ({"coupling": 3}, TypeError, "coupling must be one such as"),
        ({"optimizer": None}, TypeError, "optimizer must be a function such as"),
        ({"loss": None}, TypeError, "loss must be a function"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm=0.0: give a number above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(unchecked, more, error, message):
    with pytest.raises(error, match=message):
        pair(**({"coupling": "coupled"} | more))


def test_networks_that_cannot_be_are_refused(unchecked):
    settings = {"horizon": T, "slow": S, "loss": F.cross_entropy, "optimizer": torch.optim.Adam}
    parts = networks()
    with pytest.raises(TypeError, match=r"message must be a torch.nn.Module, got int"):
        TwoClocks(**parts | {"message": 3}, **settings)
    with pytest.raises(ValueError, match=r"A and B share a parameter"):
        TwoClocks(**parts | {"b_readout": parts["a_readout"]}, **settings)
    frozen = {name: parts[name].requires_grad_(False) for name in ("b", "b_readout")}
    with pytest.raises(ValueError, match=r"B has no parameter that requires a gradient"):
        TwoClocks(**parts | frozen, **settings)
    with pytest.raises(ValueError, match=r"looks ahead by several chunks"):
        pair(Decoupled(bootstrap=SyntheticGradient(steps=2 * T))).step(*stretch())

    class Sum(nn.Module):
        def forward(self, outputs):
            return outputs.sum()

    with pytest.raises(ValueError, match=r"the message is float64 \(\) for outputs \(2, 6\)"):
        TwoClocks(**networks() | {"message": Sum()}, **settings).step(*stretch())


def test_stretches_that_cannot_be_are_refused(unchecked):
    two = pair("decoupled")
    inputs, fast, slow = stretch()
    before = weights(two)
    for bad, message in [
        ((inputs[:-1], fast[:-1], slow), r"11 steps of inputs: give a multiple of the horizon, 3"),
        ((inputs[: 2 * T], fast[: 2 * T], slow[:2]), r"6 steps of inputs: give 12, 4 ticks of B every 3 steps"),
        ((inputs, fast[::T], slow), r"fast targets are int64 \(4, 8\) for inputs \(12, 8, 5\): give \(12, 8, ...\)"),
        ((inputs, fast, slow[-1]), r"slow targets are int64 \(8,\) for inputs \(12, 8, 5\): give \(4, 8, ...\)"),
        ((inputs[:, :0], fast, slow), r"give a tensor \(steps, samples, ...\)"),
        (([1.0], fast, slow), r"inputs are list"),
    ]:
        with pytest.raises(ValueError, match=message):
            two.step(*bad)
    two.step(inputs, fast, slow)
    with pytest.raises(ValueError, match=r"but have been float64"):
        two.step(inputs[..., :4], fast, slow)
    with pytest.raises(ValueError, match=r"give a multiple of the horizon"):
        two.predict(inputs[:4])
    assert two.updates == (S, 1)
    assert not same(before, weights(two))


def test_what_is_not_finite_is_told_of_and_not_learnt():
    two = pair("coupled")
    inputs, fast, slow = stretch()
    inputs[-1] = torch.nan
    before = weights(two)
    with pytest.raises(Diverged, match=r"the loss of A is nan at its update 0"):
        two.step(inputs, fast, slow)
    assert same(before, weights(two))
    two = pair("severed")
    with pytest.raises(Diverged, match=rf"the loss of A is nan at its update {S - 1}"):
        two.step(inputs, fast, slow)
    two = pair("severed", b_loss=lambda scores, targets: scores.sum() * torch.inf)
    with pytest.raises(Diverged, match=r"the loss of B is"):
        two.step(*stretch())
