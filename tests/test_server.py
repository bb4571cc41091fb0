"""The server by itself and with one worker: against a plain loop, with bad pushes, dying and coming back."""

import dataclasses
import io
import math

import pytest
import torch
from served import Net, a_plain_loop, adam, assert_same, cross_entropy, data, equal, frozen, plain, served, sgd, smooth, trained
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import lockfree as lf
from lockfree.server import (
    Applied,
    Batches,
    Dropped,
    Gamma,
    Gone,
    NotFinite,
    Refused,
    Server,
    Simulator,
    Tickets,
    Worker,
)
from lockfree.staleness import (
    ASP,
    BSP,
    SSP,
    AdaDelay,
    DelayCompensation,
    DropStale,
    GapAware,
    HessianCompensation,
    NoCorrection,
    ScaleByDelay,
)

# ---- one worker is a plain loop ------------------------------------------------------------------------------------------------

HARMLESS = [NoCorrection(), ScaleByDelay(), DelayCompensation(), DelayCompensation(adaptive=False), DropStale(bound=1)]


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("consistency", [BSP(), SSP(2), ASP()])
@pytest.mark.parametrize("correction", HARMLESS, ids=repr)
@pytest.mark.usefixtures("unchecked")  # for speed
def test_one_worker_is_a_plain_loop(optimizer, consistency, correction):
    settings = {"optimizer": optimizer, "batch_size": 5, "updates": 13}  # 48 samples: the last batch of an epoch has 3
    result = trained(Net(), workers=1, consistency=consistency, correction=correction, **settings)
    assert_same(result.model, a_plain_loop(Net(), data(), **settings))
    assert {entry.delay for entry in result.history} == {0}


def test_clipping_and_a_schedule_are_those_of_a_plain_loop():
    def schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)

    settings = {"optimizer": sgd, "batch_size": 8, "updates": 20, "clip": 0.3, "schedule": schedule}
    assert_same(trained(workers=1, **settings).model, a_plain_loop(Net(), data(), **settings))


def test_samples_may_be_single_or_all_at_once():
    for batch_size, updates in ((1, 50), (None, 5)):
        settings = {"optimizer": plain, "batch_size": batch_size, "updates": updates}
        assert_same(trained(smooth(), workers=1, **settings).model, a_plain_loop(smooth(), data(), **settings))


def test_a_loss_scale_changes_nothing_but_the_range_of_gradients():
    one, other = (trained(smooth(), loss_scale=scale, consistency=BSP()).model for scale in (1.0, 1024.0))
    assert_same(one, other)  # a power of two


def test_frozen_parameters_stay():
    model = Net()
    model.layers[0].weight.requires_grad_(False)
    before = model.layers[0].weight.clone()
    result = trained(model)
    assert torch.equal(result.model.layers[0].weight, before)
    assert not torch.equal(result.model.layers[-1].weight, Net().layers[-1].weight)


def test_the_global_generators_are_left_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    trained()
    assert torch.equal(torch.rand(3), wanted)


class Pairs(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, place):
        return self.x[place], int(self.y[place])


def test_datasets_and_tensors_give_the_same():
    wanted = trained().model
    for given in (Pairs(*data()), TensorDataset(*data())):
        assert_same(trained(given=given).model, wanted)


def test_augmentation_is_drawn_by_the_ticket():
    class Noisy(Pairs):
        def __getitem__(self, place):
            return self.x[place] + torch.randn(6), int(self.y[place])

    torch.manual_seed(1)
    one = trained(given=Noisy(*data()))
    torch.manual_seed(2)
    assert_same(one.model, trained(given=Noisy(*data())).model)


# ---- tickets -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "batch_size"), [(10, 3), (12, 4), (5, None), (3, 8), (4, 1)])
def test_an_epoch_has_every_sample_once(length, batch_size):
    tickets = Tickets(seed=7, length=length, batch_size=batch_size)
    epochs = [
        torch.cat([tickets.samples(epoch * tickets.per_epoch + n) for n in range(tickets.per_epoch)]) for epoch in range(3)
    ]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(length))
    assert len(tickets.samples(0)) == min(batch_size or length, length)
    again = Tickets(seed=7, length=length, batch_size=batch_size)
    assert torch.equal(again.samples(2 * again.per_epoch), tickets.samples(2 * tickets.per_epoch))  # whatever was asked before


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(Tickets(seed=seed, length=20, batch_size=20).samples(n).tolist()) for seed in range(3) for n in range(3)}
    assert len(orders) == 9


def test_tickets_in_a_row_are_samples_in_a_row():
    small, large = (Tickets(seed=0, length=24, batch_size=size) for size in (3, 12))
    assert torch.equal(torch.cat([small.samples(n) for n in range(4, 8)]), large.samples(1))


# ---- late gradients --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_no_strength_is_no_compensation(adaptive):
    engine = Simulator(speeds=Gamma(shape=2))
    nothing = DelayCompensation(strength=0, adaptive=adaptive)
    one, other = (trained(correction=correction, engine=engine) for correction in (NoCorrection(), nothing))
    assert_same(one.model, other.model)
    assert max(entry.delay for entry in one.history) > 3


def test_the_oracle_recovers_the_gradient_that_is_not_late():
    """On a quadratic, with every gradient late, the run of four workers is that of one, batch after batch."""
    curvature = torch.diag(torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64))
    targets = torch.randn(32, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x):
            return self.w - x

    def loss(difference, _):
        return 0.5 * ((difference @ curvature) * difference).sum(1).mean()

    def run(workers, correction):
        settings = {"loss": loss, "optimizer": plain, "batch_size": 2, "updates": 40, "seed": 0}
        given = (targets, torch.zeros(32))
        return lf.server.train(Point(), given, workers=workers, correction=correction, **settings).model.w.detach()

    oracle = HessianCompensation(product=lambda weights, direction: [curvature @ direction[0]])
    wanted = run(1, NoCorrection())
    assert (run(4, oracle) - wanted).abs().max() < 1e-10
    assert (run(4, NoCorrection()) - wanted).abs().max() > 1e-3


def test_delay_compensation_is_algorithm_2_of_the_paper_with_a_backup_for_each_worker():
    """By hand: w <- w - eta (g + lambda g g (w - backup of the worker)), the backup taken at the pull."""
    strength, rate, order = 0.5, 0.05, [0, 1, 2, 0, 0, 2, 1, 2, 1, 0]
    model = smooth().double()
    x, y = data()
    server, worker, _ = served(
        model, (x.double(), y), optimizer=plain, correction=DelayCompensation(strength=strength, adaptive=False, cap=None)
    )
    by_hand = [weight.clone() for weight in server.weights]
    pulled, backups = {}, {}
    for number in range(3):
        server.join(number)
        pulled[number], backups[number] = server.pull(number, 1), [weight.clone() for weight in by_hand]
    for number in order:
        push = worker.answer(pulled[number])
        for place, gradient in enumerate(push.gradients):
            if gradient is not None:
                moved = by_hand[place] - backups[number][place]
                by_hand[place] = by_hand[place] - rate * (gradient + strength * gradient * gradient * moved)
        server.push(push)
        pulled[number], backups[number] = server.pull(number, 1), [weight.clone() for weight in by_hand]
    for mine, theirs in zip(server.weights, by_hand, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_weight_decay_is_added_after_the_correction():
    decay, rate = 0.1, 0.05
    server, worker, _ = served(
        smooth(), optimizer=lambda w: torch.optim.SGD(w, lr=rate, weight_decay=decay), correction=ScaleByDelay()
    )
    for number in range(3):
        server.join(number)
    pulls = [server.pull(number, 1) for number in range(3)]
    pushes = [worker.answer(pull) for pull in pulls]
    for push in pushes:
        before = [weight.clone() for weight in server.weights]
        answer = server.push(push)
        for place, gradient in enumerate(push.gradients):
            if gradient is not None:
                wanted = before[place] - rate * (gradient / max(1, answer.delay) + decay * before[place])
                torch.testing.assert_close(server.weights[place], wanted)
    assert answer.delay == 2


def test_a_memory_for_each_worker_is_made_of_its_own_gradients():
    correction = DelayCompensation(strength=1.0, decay=0.5)
    server, worker, _ = served(smooth(), correction=correction, memory_per_worker=True)
    shared, *_ = served(smooth(), correction=correction)
    squares = {0: 0.0, 1: 0.0}
    for one in (server, shared):
        one.join(0), one.join(1)
    for number in (0, 1, 1, 0, 1):
        push = worker.answer(server.pull(number, 1))
        squares[number] = 0.5 * squares[number] + 0.5 * push.gradients[0] ** 2
        server.push(push)
        shared.pull(number, 1)
    memories = server.snapshot()["memories"]["each"]
    for number in (0, 1):
        torch.testing.assert_close(memories[number]["mean_square"][0], squares[number])
    assert shared.snapshot()["memories"]["each"] == {}


def test_a_gradient_that_is_left_out_makes_no_version():
    result = trained(correction=DropStale(bound=2), updates=20)
    dropped = [entry for entry in result.history if not entry.applied]
    assert dropped
    assert all(entry.delay >= 2 for entry in dropped)
    assert all(entry.delay < 2 for entry in result.history if entry.applied)
    assert [entry.update for entry in result.history if entry.applied] == list(range(1, 21))


@pytest.mark.parametrize("correction", [AdaDelay(), GapAware()])
@pytest.mark.usefixtures("unchecked")  # for speed
def test_corrections_with_a_memory_train(correction):
    rate = 1.0 if isinstance(correction, AdaDelay) else 0.05
    result = trained(smooth(), correction=correction, updates=300, optimizer=lambda w: torch.optim.SGD(w, lr=rate))
    losses = [entry.loss for entry in result.history]
    assert sum(losses[-40:]) < 0.7 * sum(losses[:40])


def test_gap_and_repair_are_measured_as_told():
    result = trained(smooth(), correction=DelayCompensation(strength=1.0), every=1)
    late = [entry for entry in result.history if entry.delay]
    assert all(entry.gap > 0 and 0 < entry.ratio <= 1.0001 for entry in late)
    assert result.history[0].gap == result.history[0].ratio == 0.0
    few = trained(smooth(), correction=DelayCompensation(strength=1e-3), every=5)
    assert [entry.gap is not None for entry in few.history] == [number % 5 == 0 for number in range(24)]


def test_gaps_are_distances_between_versions():
    server, worker, _ = served(smooth(), every=1)
    server.join(0), server.join(1)
    first, second = server.pull(0, 1), server.pull(1, 1)
    before = torch.cat([weight.flatten().clone() for weight in server.weights])
    server.push(worker.answer(first))
    wanted = float((torch.cat([weight.flatten() for weight in server.weights]) - before).norm())
    assert server.push(worker.answer(second)).gap == pytest.approx(wanted, rel=1e-6)


def test_a_correction_out_of_hand_is_given_up(caplog):
    wild = DelayCompensation(strength=1e6)
    result = trained(smooth(), correction=wild, patience=5, every=1, updates=40)
    (fallback,) = [line for line in result.trace if line["kind"] == "fallback"]
    late = [entry for entry in result.history if entry.delay]
    assert fallback["version"] == late[4].update
    assert all(entry.ratio == 0.0 for entry in late[5:])
    assert [record.message for record in caplog.records] == [
        f"{wild!r} has been out of hand for 5 gradients in a row: going on without"
    ]
    tame = trained(smooth(), correction=DelayCompensation(strength=1e-3), patience=5, every=1, updates=40)
    assert not [line for line in tame.trace if line["kind"] == "fallback"]


def test_it_is_noticed_whatever_the_pushes_at_which_it_is_measured():
    result = trained(smooth(), correction=DelayCompensation(strength=1e6), patience=5, every=7, updates=40)
    (fallback,) = [line for line in result.trace if line["kind"] == "fallback"]
    assert fallback["version"] == 8 + 4  # measured at pushes 0 and 7, and from then on at each


# ---- buffers -------------------------------------------------------------------------------------------------------------------


def test_buffers_of_a_round_are_means_and_whole_numbers_the_largest():
    server, worker, _ = served(consistency=BSP())
    for number in range(3):
        server.join(number)
    pushes = [worker.answer(server.pull(number, 1)) for number in range(3)]
    for push in pushes:
        server.push(push)
    names = [name for name, _ in Net().named_buffers()]
    for place, name in enumerate(names):
        each = [push.buffers[place] for push in pushes]
        wanted = {
            "mask": torch.tensor([0.0, -torch.inf]),
            "layers.1.num_batches_tracked": torch.tensor(1),
        }.get(name)
        if wanted is None:
            wanted = (each[0] + each[1] + each[2]) / 3
            assert not torch.equal(each[0], each[1])
        assert torch.equal(server.buffers[place], wanted), name


def test_buffers_of_a_push_are_its_worker_s():
    server, worker, _ = served()
    server.join(0), server.join(1)
    for number in (0, 1, 0):
        push = worker.answer(server.pull(number, 1))
        server.push(push)
        assert all(map(torch.equal, server.buffers, push.buffers))


# ---- versions --------------------------------------------------------------------------------------------------------------------


def test_what_was_pulled_stays_as_it_was_until_it_is_answered():
    server, worker, _ = served(correction=DelayCompensation())
    generator = torch.Generator().manual_seed(0)
    pulls, copies = {}, {}
    for number in range(5):
        server.join(number)
    for _ in range(60):
        number = int(torch.randint(5, (), generator=generator))
        if number in pulls:
            pulled = pulls.pop(number)
            assert all(map(torch.equal, pulled.weights, copies[number]))
            server.push(worker.answer(pulled))
        pulls[number] = server.pull(number, 1)
        copies[number] = [weight.clone() for weight in pulls[number].weights]
    assert server.versions <= 6


def test_workers_at_one_version_share_it_and_what_nobody_holds_is_used_again():
    server, worker, _ = served()
    for number in range(4):
        server.join(number)
    pulls = [server.pull(number, 1) for number in range(4)]
    assert len({pull.weights[0].data_ptr() for pull in pulls}) == 1
    places = set()
    for _ in range(10):
        for number in range(4):
            server.push(worker.answer(pulls[number]))
            pulls[number] = server.pull(number, 1)
            places |= {server.weights[0].data_ptr()}
            assert server.versions <= 5
    assert len(places) <= 6
    alone, worker, _ = served()
    alone.join(0)
    place = alone.weights[0].data_ptr()
    for _ in range(3):
        alone.push(worker.answer(alone.pull(0, 1)))
        assert alone.weights[0].data_ptr() == place  # one worker needs no second copy


def test_a_pull_that_is_repeated_is_the_same():
    server, worker, lines = served()
    server.join(0), server.join(1)
    first = server.pull(0, 1)
    server.push(worker.answer(server.pull(1, 1)))
    second = server.pull(0, 1)
    assert (first.version, first.ticket, first.sequence) == (second.version, second.ticket, second.sequence) == (0, 0, 1)
    assert sum(line["kind"] == "pull" for line in lines) == 2


# ---- bad pushes ----------------------------------------------------------------------------------------------------------------


def changed(push, **more):
    return dataclasses.replace(push, **more)


def spoilt(push, value):
    bad = [None if gradient is None else gradient.clone() for gradient in push.gradients]
    bad[0].view(-1)[3] = value
    return changed(push, gradients=bad)


def with_gradient(push, gradient):
    return changed(push, gradients=[gradient, *push.gradients[1:]])


REFUSED = {
    "nan": (lambda p: spoilt(p, math.nan), NotFinite, "worker 0 pushed a gradient that is not finite"),
    "inf": (lambda p: spoilt(p, -math.inf), NotFinite, "worker 0 pushed a gradient that is not finite"),
    "loss": (lambda p: changed(p, loss=math.nan), NotFinite, "worker 0 pushed a loss of nan"),
    "buffer": (
        lambda p: changed(p, buffers=[p.buffers[0], p.buffers[1] * math.nan, *p.buffers[2:]]),
        NotFinite,
        "pushed a buffer that is not finite",
    ),
    "shape": (lambda p: with_gradient(p, torch.zeros(6, 8)), Refused, r"gradient 0 of the shape \(6, 8\), wanted is \(8, 6\)"),
    "broadcast": (lambda p: with_gradient(p, torch.zeros(1, 6)), Refused, r"gradient 0 of the shape \(1, 6\)"),
    "count": (
        lambda p: changed(p, gradients=p.gradients[:-1]),
        Refused,
        "pushed 6 gradients, the model has 7: push one for each",
    ),
    "buffers": (lambda p: changed(p, buffers=[]), Refused, "pushed 0 buffers, the model has 4"),
    "dtype": (lambda p: with_gradient(p, torch.zeros(8, 6).double()), Refused, "as torch.float64, wanted is torch.float32"),
    "sparse": (lambda p: with_gradient(p, torch.zeros(8, 6).to_sparse()), Refused, "push a dense tensor"),
    "samples": (lambda p: changed(p, samples=0), Refused, "samples=0: give how many samples"),
    "no such version": (lambda p: changed(p, version=9), Refused, "version 9, which there is not: the server is at version 2"),
    "negative version": (lambda p: changed(p, version=-1), Refused, "version -1, which there is not"),
    "other version": (lambda p: changed(p, version=1), Refused, "version 1, it had pulled 2: push for what was pulled"),
    "other ticket": (lambda p: changed(p, ticket=9), Refused, "batch 9, it had been given 3: push for what was pulled"),
    "other pull": (lambda p: changed(p, sequence=7), Refused, "pull 7, its last one was 2: push what was pulled last"),
    "unknown": (lambda p: changed(p, worker=7), Gone, "worker 7 is unknown: let it join first"),
    "later incarnation": (lambda p: changed(p, incarnation=2), Gone, "says incarnation 2, the server gave it 1"),
    "earlier incarnation": (lambda p: changed(p, incarnation=0), Gone, "incarnation 0 was replaced by 1"),
}


def at_work(consistency=None, **settings):
    """A server on which two workers have pushed, and hold another pull each."""
    server, worker, lines = served(consistency=consistency or ASP(), **settings)
    server.join(0), server.join(1)
    for number in (0, 1):
        server.push(worker.answer(server.pull(number, 1)))
    if server.consistency.barrier:
        return server, worker, lines, [server.pull(number, 1) for number in (0, 1)]
    second = server.pull(1, 1)
    return server, worker, lines, [server.pull(0, 1), second]


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_push_is_refused_in_one_line_and_changes_nothing(what):
    spoil, error, message = REFUSED[what]
    server, worker, lines, (mine, other) = at_work()
    good, before = worker.answer(mine), frozen(server)
    with pytest.raises(error, match=message) as raised:
        server.push(spoil(good))
    assert "\n" not in str(raised.value)
    after = frozen(server)
    kept = ("versions", "descent", "memories") if error is not NotFinite else ("descent", "memories")
    assert all(equal(before[part], after[part]) for part in kept)
    assert equal(before["versions"]["kept"][2], after["versions"]["kept"][2])
    assert lines[-2]["outcome"] == ("not finite" if error is NotFinite else "refused")
    # And on it goes.
    if error is NotFinite:
        again = server.pull(0, 1)
        assert (again.ticket, again.sequence) == (mine.ticket, mine.sequence + 1)
        good = worker.answer(again)
    assert server.push(good) == Applied(3, 0)
    assert server.push(worker.answer(other)).version == 4


@pytest.mark.parametrize("what", ["nan", "inf", "loss", "buffer", "shape", "count", "dtype", "other pull", "unknown"])
def test_a_round_bears_a_bad_push(what):
    spoil, error, _ = REFUSED[what]
    server, worker, _, (mine, other) = at_work(BSP())
    with pytest.raises(error):
        server.push(spoil(worker.answer(mine)))
    assert server.push(worker.answer(other)).version == 2
    assert server.version == 1
    again = server.pull(0, 1)
    assert again.ticket == mine.ticket
    server.push(worker.answer(again))
    assert server.version == 2
    clean, worker, _, pulls = at_work(BSP())
    for pulled in pulls:
        clean.push(worker.answer(pulled))
    assert all(map(torch.equal, clean.weights, server.weights))


def test_a_push_that_comes_twice_is_applied_once():
    for consistency in (ASP(), BSP(), SSP(1)):
        server, worker, lines, (mine, other) = at_work(consistency)
        push = worker.answer(mine)
        first = server.push(push)
        server.push(worker.answer(other))
        before = frozen(server)
        assert server.push(push) == first
        after = frozen(server)
        assert equal(before, after)
        assert lines[-2]["outcome"] == "duplicate"
        server.pull(0, 1)
        assert server.push(push) == first  # also when it has pulled again


def test_a_zombie_is_told_that_it_was_replaced():
    server, worker, _, (mine, other) = at_work()
    push = worker.answer(mine)
    assert server.join(0) == 2
    with pytest.raises(Gone, match="worker 0 of incarnation 1 was replaced by 2"):
        server.push(push)
    with pytest.raises(Gone, match="replaced by 2"):
        server.pull(0, 1)
    assert server.pull(0, 2).ticket == mine.ticket  # its batch is not lost
    server.evict(1)
    with pytest.raises(Gone, match="worker 1 was evicted: let it join anew"):
        server.push(worker.answer(other))
    with pytest.raises(Gone, match="worker 1 was evicted"):
        server.pull(1, 1)
    with pytest.raises(Gone, match="worker 1 is not at work: there is nothing to take out"):
        server.evict(1)
    with pytest.raises(Gone, match="worker 5 is unknown"):
        server.pull(5, 1)


def test_a_push_without_a_pull_is_refused():
    server, worker, _, (mine, _) = at_work()
    push = worker.answer(mine)
    server.push(push)
    with pytest.raises(Refused, match="without a pull that is still to be answered"):
        server.push(changed(push, sequence=3))


@pytest.mark.parametrize(("workers", "often"), [(1, "10 times for batch 0"), (4, "10 times in a row")])
def test_values_that_are_never_finite_end_training(workers, often):
    def loss(scores, y):
        return cross_entropy(scores, y) / 0.0

    with pytest.raises(lf.Diverged, match=rf"training broke after 0 updates: worker \d pushed a loss of inf, {often};"):
        trained(loss=loss, workers=workers)


def test_one_bad_batch_ends_training_and_is_named():
    x, y = data()
    bad = int(Tickets(seed=3, length=48, batch_size=4).samples(5)[0])
    x[bad] = math.nan
    model = smooth()
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(lf.Diverged, match="10 times for batch 5; look for bad values in the data"):
        trained(model, (x, y), updates=500)
    assert all(map(torch.equal, before, model.parameters()))


# ---- clocks, members -----------------------------------------------------------------------------------------------------------


def test_who_joins_late_begins_where_the_slowest_is():
    server, worker, lines = served(consistency=SSP(2))
    server.join(0), server.join(1)
    for number in (0, 0, 1, 0):
        server.push(worker.answer(server.pull(number, 1)))
    server.join(2)
    assert server.clocks == {0: 3, 1: 1, 2: 1}
    assert server.slowest == 1
    assert lines[-1] == {"kind": "join", "worker": 2, "incarnation": 1, "clock": 1, "replaced": False}
    server.push(worker.answer(server.pull(0, 1)))
    assert server.pull(0, 1) is None  # at 4, the slowest at 1
    server.evict(1)
    assert server.pull(0, 1) is None
    server.evict(2)
    assert server.pull(0, 1).version == 5


def test_who_joins_in_the_midst_of_a_round_waits_for_the_next():
    server, worker, _ = served(consistency=BSP())
    server.join(0), server.join(1)
    first, second = server.pull(0, 1), server.pull(1, 1)
    server.join(2)
    assert server.pull(2, 1) is None
    server.push(worker.answer(first))
    server.push(worker.answer(second))
    assert server.version == 1
    assert [server.pull(number, 1).ticket for number in (2, 0, 1)] == [4, 2, 3]


@pytest.mark.parametrize("pushed", [0, 1, 2])
def test_who_begins_anew_has_its_place_in_the_round(pushed):
    clean, worker, _ = served(consistency=BSP())
    server, _, _ = served(consistency=BSP())
    for one in (clean, server):
        for number in range(3):
            one.join(number)
        pulls = [one.pull(number, 1) for number in range(3)]
        for number in range(pushed):
            one.push(worker.answer(pulls[number]))
        if one is server:
            server.join(2)  # nobody has noticed that it was gone
            assert server.version == 0
        for number in range(pushed, 3):
            one.push(worker.answer(one.pull(number, 2 if one is server and number == 2 else 1)))
        assert one.version == 1
    assert all(map(torch.equal, clean.weights, server.weights))
    pulls = [server.pull(number, incarnation) for number, incarnation in ((1, 1), (2, 2), (0, 1))]
    assert [pull.ticket for pull in pulls] == [4, 5, 3]


def test_who_has_pushed_and_begins_anew_waits_for_the_next_round():
    server, worker, _ = served(consistency=BSP())
    server.join(0), server.join(1)
    pulls = [server.pull(number, 1) for number in range(2)]
    server.push(worker.answer(pulls[0]))
    assert server.join(0) == 2
    assert server.pull(0, 2) is None
    server.push(worker.answer(pulls[1]))
    assert server.version == 1
    assert [server.pull(number, incarnation).ticket for number, incarnation in ((0, 2), (1, 1))] == [2, 3]


def test_a_round_ends_when_all_that_are_left_have_pushed():
    server, worker, _ = served(consistency=BSP())
    for number in range(3):
        server.join(number)
    pulls = [server.pull(number, 1) for number in range(3)]
    for number in (0, 2):
        assert server.push(worker.answer(pulls[number])) == Applied(1, 0)
    assert server.version == 0
    server.evict(1)
    assert server.version == 1
    assert [server.pull(number, 1).ticket for number in (0, 2)] == [1, 3]  # what did not come goes out first


def test_a_round_whose_workers_all_leave_waits_for_new_ones():
    server, worker, _ = served(consistency=BSP())
    server.join(0), server.join(1)
    pulls = [server.pull(number, 1) for number in range(2)]
    server.push(worker.answer(pulls[0]))
    server.evict(0)
    server.evict(1)
    assert server.version == 0
    server.join(1)
    server.push(worker.answer(server.pull(1, 2)))
    assert server.version == 1


# ---- coming back ---------------------------------------------------------------------------------------------------------------


def play(server, worker, count, log):
    """A life with everything in it, decided by what the server says, so that it can be gone on with from any state."""
    for _ in range(count):
        step = log["step"]
        log["step"] += 1
        number = (7 * step + step // 5) % 4
        if step % 13 == 5 and len(server.clocks) > 2 and number in server.clocks:
            server.evict(number)
            log["pulls"].pop(number, None)
            continue
        if number not in server.clocks:
            log["incarnations"][number] = server.join(number)
            continue
        if number not in log["pulls"]:
            pulled = server.pull(number, log["incarnations"][number])
            if pulled is not None:
                log["pulls"][number] = worker.answer(pulled)
            continue
        server.push(log["pulls"].pop(number))


@pytest.mark.parametrize("consistency", [BSP(), SSP(1), ASP()])
@pytest.mark.parametrize(
    "settings",
    [
        {"correction": DelayCompensation(), "memory_per_worker": True, "optimizer": adam},
        {"correction": GapAware(), "schedule": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20), "every": 3},
    ],
)
@pytest.mark.usefixtures("unchecked")  # for speed
def test_from_a_snapshot_at_any_moment_it_goes_on_bit_for_bit(consistency, settings):
    server, worker, _ = served(consistency=consistency, **settings)
    log = {"step": 0, "incarnations": {}, "pulls": {}}
    moments = []
    for _ in range(27):
        file = io.BytesIO()
        torch.save(server.snapshot(), file)
        moments.append((file.getvalue(), {**log, "incarnations": dict(log["incarnations"]), "pulls": dict(log["pulls"])}))
        play(server, worker, 1, log)
    wanted = frozen(server)
    assert server.version > (1 if consistency.barrier else 5)
    for number, (saved, then) in enumerate(moments):
        other, _, _ = served(consistency=consistency, **settings)
        if number % 2:  # on a server that has already done something
            play(other, worker, 9, {"step": 3, "incarnations": {}, "pulls": {}})
        other.restore(torch.load(io.BytesIO(saved), weights_only=True))
        play(other, worker, 27 - then["step"], then)
        assert equal(frozen(other), wanted), number


def test_a_snapshot_is_not_changed_by_what_follows():
    server, worker, _, pulls = at_work(correction=DelayCompensation(), memory_per_worker=True, optimizer=adam)
    state = server.snapshot()
    saved = io.BytesIO()
    torch.save(state, saved)
    for one in (server, served(correction=DelayCompensation(), memory_per_worker=True, optimizer=adam)[0]):
        one.restore(state)
        for number in (0, 1, 0, 1):
            one.push(worker.answer(one.pull(number, 1)))
    assert equal(state, torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    assert pulls[0].version == 2


def test_a_snapshot_of_something_else_is_refused():
    state = served(smooth())[0].snapshot()
    with pytest.raises(ValueError, match="the snapshot's weights are not those of this model"):
        served()[0].restore(state)
    apart = served(smooth(), memory_per_worker=True)[0]
    with pytest.raises(ValueError, match="another memory_per_worker"):
        apart.restore(state)


# ---- what users get wrong ------------------------------------------------------------------------------------------------------


WRONG = {
    "workers": ({"workers": 0}, "workers=0: give a whole number, 1 or more"),
    "workers, half": ({"workers": 1.5}, r"workers=1\.5: give a whole number"),
    "updates": ({"updates": 0}, "updates=0: give a whole number, 1 or more"),
    "batch_size": ({"batch_size": 0}, "batch_size=0: give a whole number of samples, 1 or more, or None"),
    "no data": ({"given": (torch.zeros(0, 6), torch.zeros(0))}, "the dataset is empty"),
    "lengths": ({"given": (torch.zeros(4, 6), torch.zeros(3))}, "4 samples and 3 targets: give one target for each"),
    "no weights": ({"model": nn.ReLU()}, "the model has no parameters to train"),
    "engine": ({"engine": "simulator"}, r"engine='simulator': give an engine of lockfree.server, such as Simulator\(\)"),
    "consistency": ({"consistency": "asp"}, r"consistency='asp': give an object of lockfree.staleness, such as ASP\(\)"),
    "correction": ({"correction": DelayCompensation}, "correction=.*: give an object of lockfree.staleness"),
    "clip": ({"clip": 0.0}, r"clip=0\.0: give a norm above 0, or None"),
    "loss scale": ({"loss_scale": -1.0}, "loss_scale=-1.0: give a number above 0"),
    "every": ({"every": 0}, "every=0: give a whole number"),
    "seed": ({"seed": 0.5}, "seed=0.5: give a whole number"),
    "loss": ({"loss": "mse"}, "loss='mse': give a function"),
    "optimizer": ({"optimizer": lambda w: torch.optim.LBFGS(w)}, "LBFGS evaluates the loss itself"),
    "loss of none": ({"loss": lambda scores, y: torch.zeros(())}, "the loss is not one number that depends on the weights"),
    "loss of many": ({"loss": lambda scores, y: scores}, "the loss is not one number"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_argument_is_a_clear_error(what, unchecked):
    more, message = WRONG[what]
    with pytest.raises(ValueError, match=message) as raised:
        trained(**more)
    assert "\n" not in str(raised.value)


def test_data_of_another_kind_are_a_clear_error(unchecked):
    for given, message in (
        ([1, 2], "dataset is a list: give a torch Dataset"),
        ((torch.zeros(3),), r"two tensors, \(x, y\)"),
        (Dataset(), "the dataset has no length"),
    ):
        with pytest.raises(TypeError, match=message):
            trained(given=given)


def test_numbers_of_workers_are_whole(unchecked):
    server = served()[0]
    for number in (-1, 1.5, True):
        with pytest.raises(Refused, match="give a whole number, 0 or more"):
            server.join(number)


def test_a_worker_of_a_model_without_a_copy_uses_it_as_it_is():
    model = smooth()
    worker = Worker(model, Batches(data(), batch_size=4, seed=3), loss=cross_entropy, own=True)
    server = Server(smooth(), optimizer=sgd)
    worker.gradient(server.weights, server.buffers, ticket=0)
    assert next(model.parameters()).data_ptr() == server.weights[0].data_ptr()


def test_dropped_is_an_answer():
    server, worker, _ = served(correction=DropStale(bound=1))
    server.join(0), server.join(1)
    pulls = [server.pull(number, 1) for number in range(2)]
    assert server.push(worker.answer(pulls[0])) == Applied(1, 0, 0.0, 0.0)
    assert server.push(worker.answer(pulls[1])) == Dropped(1, 1)
    assert server.clocks == {0: 1, 1: 1}
    assert server.pull(1, 1).ticket == 2
