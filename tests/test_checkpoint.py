"""Checkpoints come back bit for bit, or say what is wrong with them."""

import json
import os
import shutil
import struct
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockfree import checkpoint
from lockfree.checkpoint import CorruptCheckpoint, load, save, tidy, write_atomically

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
    *(torch.complex64, torch.complex128),
]


def bits(tensor):
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist()


def assert_same(one, other):
    """Asserts that two trees are equal in every type, order and bit."""
    if isinstance(one, torch.Tensor):
        assert (other.dtype, other.shape) == (one.dtype, one.shape)
        assert bits(other) == bits(one)
        return
    assert type(other) is type(one)
    if isinstance(one, dict):
        assert [(type(key), key) for key in other] == [(type(key), key) for key in one]
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(other) == len(one)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, float) and one == one:
        assert struct.pack("d", other) == struct.pack("d", one)
    else:
        assert other == one or (one != one and other != other)


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = int(torch.Size(shape).numel()) * torch.empty((), dtype=dtype).element_size()
    limit = 1 if dtype is torch.bool else 255
    raw = draw(st.lists(st.integers(0, limit), min_size=count, max_size=count))
    tensor = torch.tensor(raw, dtype=torch.uint8).view(dtype).reshape(shape)
    return draw(st.sampled_from([tensor, tensor.t() if len(shape) == 2 else tensor, tensor[..., ::2] if shape else tensor]))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text() | tensors()
KEYS = st.text(max_size=4) | st.integers() | st.sampled_from(["$tensor", "$float", "a.b", "__metadata__"])
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(state=st.dictionaries(KEYS, TREES, max_size=4))
def test_trees_come_back_bit_for_bit(tmp_path, state):
    save(tmp_path / "c", state)
    assert_same(state, load(tmp_path / "c"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_also_empty_and_without_dimensions(tmp_path, dtype):
    whole = torch.arange(2).to(torch.float32).to(dtype)
    state = {"whole": whole, "scalar": whole[1], "empty": whole[:0]}
    save(tmp_path / "c", state)
    assert_same(state, load(tmp_path / "c"))


def test_optimizer_and_generator_states_come_back(tmp_path):
    weights = torch.nn.Parameter(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adam([weights])
    weights.sum().backward()
    optimizer.step()
    generator = torch.Generator().manual_seed(7)
    save(tmp_path / "c", {"optimizer": optimizer.state_dict(), "generator": generator.get_state()})
    found = load(tmp_path / "c")
    assert_same(optimizer.state_dict(), found["optimizer"])
    assert list(found["optimizer"]["state"]) == [0]
    again = torch.Generator()
    again.set_state(found["generator"])
    assert torch.equal(torch.rand(5, generator=again), torch.rand(5, generator=generator))


def test_shared_tensors_are_stored_once_and_shared_again(tmp_path):
    tensor = torch.arange(1000.0)
    save(tmp_path / "c", {"a": tensor, "b": [tensor.detach()], "half": tensor[::2]})
    found = load(tmp_path / "c")
    assert found["a"] is found["b"][0]
    assert torch.equal(found["half"], tensor[::2])
    assert (tmp_path / "c" / "state.safetensors").stat().st_size < 4 * 1000 * 2


def test_subclasses_come_back_as_plain_values(tmp_path):
    save(tmp_path / "c", OrderedDict(weight=torch.nn.Parameter(torch.ones(2)), size=torch.Size([2, 3])))
    found = load(tmp_path / "c")
    assert type(found) is dict
    assert type(found["weight"]) is torch.Tensor
    assert not found["weight"].requires_grad
    assert found["size"] == (2, 3)


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        (object(), "object"),
        ({1, 2}, "set"),
        (b"x", "bytes"),
        (torch.float32, "torch.dtype"),
        (torch.eye(2).to_sparse(), "torch.sparse.FloatTensor"),
    ],
)
def test_other_leaves_are_refused_by_path_and_type(tmp_path, leaf, kind):
    with pytest.raises(TypeError, match=rf"cells\.0\.optimizer\.state of type {kind}: ") as caught:
        save(tmp_path / "c", {"cells": [{"optimizer": {"state": leaf}}]})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_other_keys_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"key \(1, 2\) of a\.b, of type tuple"):
        save(tmp_path / "c", {"a": {"b": {(1, 2): 3}}})


STATE = {"step": 3, "weights": torch.arange(20.0), "loss": float("nan")}


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_every_truncation_and_bit_flip_is_noticed(tmp_path, name):
    save(tmp_path / "c", STATE)
    path = tmp_path / "c" / name
    content = path.read_bytes()
    damaged = [content[:cut] for cut in range(0, len(content), 7)] + [content + b" "]
    for at in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[at] ^= 1 << (at % 8)
        damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(CorruptCheckpoint, match=name) as caught:
            load(tmp_path / "c")
        assert "\n" not in str(caught.value)
    path.write_bytes(content)
    assert_same(STATE, load(tmp_path / "c"))


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_missing_files_and_folders_are_noticed(tmp_path, name):
    with pytest.raises(CorruptCheckpoint, match="there is no checkpoint here"):
        load(tmp_path / "c")
    save(tmp_path / "c", STATE)
    (tmp_path / "c" / name).unlink()
    with pytest.raises(CorruptCheckpoint, match=f"{name}: the file is missing"):
        load(tmp_path / "c")


def test_files_of_two_checkpoints_do_not_mix(tmp_path):
    save(tmp_path / "a", STATE)
    save(tmp_path / "b", {**STATE, "weights": torch.ones(20)})
    shutil.copy(tmp_path / "a" / "state.safetensors", tmp_path / "b" / "state.safetensors")
    with pytest.raises(CorruptCheckpoint, match="SHA-256 differs"):
        load(tmp_path / "b")


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save(tmp_path / "c", STATE)
    monkeypatch.undo()
    with pytest.raises(CorruptCheckpoint, match="has format 2, this version of lockfree reads 1"):
        load(tmp_path / "c")


def test_the_files_are_plain_json_and_safetensors(tmp_path):
    save(tmp_path / "c", STATE)
    header = json.loads((tmp_path / "c" / "state.json").read_text(), parse_constant=pytest.fail)
    assert header["format"] == 1
    assert header["tensors"]["bytes"] == (tmp_path / "c" / "state.safetensors").stat().st_size
    assert header["state"] == {"step": 3, "weights": {"$tensor": "weights"}, "loss": {"$float": "nan"}}
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["state.json", "state.safetensors"]


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_at_rename(monkeypatch, number):
    """Ends the process at its rename of that number: nothing after it runs, no clean-up either."""
    count = 0
    rename = os.rename

    def dying_rename(source, target):
        nonlocal count
        count += 1
        if count >= number:
            raise Killed
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", dying_rename)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path: None)


@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_at_either_rename_leaves_the_old_checkpoint(tmp_path, monkeypatch, number):
    save(tmp_path / "c", {"step": 1})
    with monkeypatch.context() as patch:
        kill_at_rename(patch, number)
        # The handler of the real code would tidy up; a killed process does not get that far.
        patch.setattr(checkpoint, "tidy", lambda folder: None)
        with pytest.raises(Killed):
            save(tmp_path / "c", {"step": 2})
    assert (tmp_path / "c").exists() == (number == 1)
    assert load(tmp_path / "c") == {"step": 1}
    save(tmp_path / "c", {"step": 3})
    assert load(tmp_path / "c") == {"step": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_kill_before_the_first_rename_leaves_no_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at_rename(patch, 1)
        with pytest.raises(Killed):
            save(tmp_path / "c", {"step": 1})
    with pytest.raises(CorruptCheckpoint, match="there is no checkpoint here"):
        load(tmp_path / "c")
    tidy(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_leaves_the_old_checkpoint_and_no_litter(tmp_path, monkeypatch):
    save(tmp_path / "c", {"step": 1})

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "_write_files", full)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path / "c", {"step": 2})
    assert load(tmp_path / "c") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_text_files_change_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "αβ\n")
    assert path.read_bytes() == "αβ\n".encode()

    def killed(*_):
        raise Killed

    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with pytest.raises(Killed):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "αβ\n"
    assert list(Path(tmp_path).iterdir()) == [path]
