"""The loader: which batches come, in which order, and what a resume goes on with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockfree import data


def loader(samples: int = 10, **options) -> data.TensorLoader:
    inputs = torch.arange(samples * 2.0).reshape(samples, 2)
    return data.TensorLoader(inputs, torch.arange(samples), **({"batch_size": 3} | options))


def order(batches) -> list[list[int]]:
    return [targets.tolist() for _, targets in batches]


class TestTensorLoader:
    @settings(deadline=None, max_examples=50)
    @given(samples=st.integers(1, 40), batch=st.integers(1, 45), seed=st.integers(0, 2**40), drop=st.booleans())
    def test_an_epoch_hands_out_every_sample_once(self, samples, batch, seed, drop):
        drop = drop and batch <= samples
        batches = loader(samples, batch_size=batch, seed=seed, drop_last=drop)
        seen = order(batches)
        assert len(seen) == len(batches) == (samples // batch if drop else -(-samples // batch))
        flat = [target for batch_targets in seen for target in batch_targets]
        assert len(set(flat)) == len(flat) == (samples // batch * batch if drop else samples)

    def test_inputs_stay_with_their_targets(self):
        for inputs, targets in loader():
            assert torch.equal(inputs, torch.stack([2.0 * targets, 2.0 * targets + 1], 1))

    def test_order_is_a_function_of_seed_and_epoch_alone(self):
        first, again = loader(100, seed=5), loader(100, seed=5)
        torch.manual_seed(1)
        epochs = [order(first) for _ in range(3)]
        torch.manual_seed(2)
        assert [order(again) for _ in range(3)] == epochs
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        # Neighbouring seeds are not the same orders one epoch later.
        assert order(loader(100, seed=6)) not in epochs
        jumped = loader(100)
        jumped.load_state_dict({"epoch": 2, "position": 0, "seed": 5})
        assert order(jumped) == epochs[2]

    def test_drawing_orders_leaves_the_global_generator_alone(self):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        order(loader())
        assert torch.equal(before, torch.get_rng_state())

    @settings(deadline=None, max_examples=50)
    @given(samples=st.integers(1, 30), batch=st.integers(1, 7), stop=st.integers(0, 40), shuffle=st.booleans())
    def test_resume_anywhere(self, samples, batch, stop, shuffle):
        def endless(source):
            while True:
                yield from source

        whole, first = (loader(samples, batch_size=batch, seed=3, shuffle=shuffle) for _ in range(2))
        reference = [targets.tolist() for (_, targets), _ in zip(endless(whole), range(stop + 12), strict=False)]
        running = endless(first)
        head = [next(running)[1].tolist() for _ in range(stop)]
        second = loader(samples, batch_size=batch, seed=99, shuffle=shuffle)
        second.load_state_dict(first.state_dict())
        tail = [targets.tolist() for (_, targets), _ in zip(endless(second), range(12), strict=False)]
        assert head + tail == reference

    def test_a_batch_counts_as_soon_as_it_is_handed_out(self):
        batches = loader(seed=4)
        running = iter(batches)
        assert batches.state_dict() == {"epoch": 0, "position": 0, "seed": 4}
        next(running)
        assert batches.state_dict() == {"epoch": 0, "position": 1, "seed": 4}
        assert len(order(batches)) == len(batches) - 1
        assert batches.state_dict() == {"epoch": 1, "position": 0, "seed": 4}
        assert list(running) == []
        assert batches.state_dict() == {"epoch": 1, "position": 0, "seed": 4}

    def test_after_the_last_batch_nothing_remains_of_the_epoch(self):
        batches = loader()
        running = iter(batches)
        for _ in range(len(batches)):
            next(running)
        resumed = loader()
        resumed.load_state_dict(batches.state_dict())
        assert resumed.state_dict() == {"epoch": 0, "position": 4, "seed": 0}
        assert order(resumed) == []
        assert resumed.state_dict() == {"epoch": 1, "position": 0, "seed": 0}

    def test_unshuffled_batches_are_views(self):
        inputs, targets = torch.randn(5, 2), torch.arange(5)
        batches = list(data.TensorLoader(inputs, targets, batch_size=2, shuffle=False))
        assert torch.equal(torch.cat([x for x, _ in batches]), inputs)
        assert [x.data_ptr() for x, _ in batches] == [inputs[start].data_ptr() for start in (0, 2, 4)]

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: loader(0), "empty set"),
            (lambda: loader(batch_size=0), "batch_size must be 1 or more, got 0"),
            (lambda: loader(batch_size=11, drop_last=True), "batch_size 11 is larger than the set of 10"),
            (lambda: data.TensorLoader(torch.zeros(3, 1), torch.zeros(2), batch_size=1), "3 inputs and 2 targets"),
            (lambda: loader().load_state_dict({"epoch": 0}), r"got \['epoch'\]"),
            (lambda: loader().load_state_dict({"epoch": 0, "position": 5, "seed": 0}), "from 0 to 4, got .*position 5"),
            (lambda: loader().load_state_dict({"epoch": -1, "position": 0, "seed": 0}), "got epoch -1"),
        ],
    )
    def test_errors(self, call, message):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
