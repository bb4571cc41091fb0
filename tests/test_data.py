"""Data: the sets by name, their standardisation, and the embedded sample."""

import hashlib
import importlib.resources
import logging
import os
import struct
from pathlib import Path

import pytest
import torch

from lockfree import data
from lockfree.data.dataset import standardised
from lockfree.data.embedded import make_sample
from lockfree.data.sources import SOURCES

IDX_SETS = ("mnist", "fashion-mnist")


def bytes_tensor(*shape: int, seed: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def write_set(root: Path, name: str, *, train: int = 30, test: int = 10, suffix: str = "") -> list[Path]:
    """A tiny set in the public layout; returns its files, training images first."""
    source = SOURCES[name]
    folder = root / source.folder
    folder.mkdir(parents=True)
    paths = [folder / f"{file.name}{suffix}" for file in source.files]
    for index, samples in ((0, train), (2, test)):
        data.write_idx(paths[index], bytes_tensor(samples, 28, 28, seed=index))
        data.write_idx(paths[index + 1], torch.arange(samples, dtype=torch.uint8) % 10)
    return paths


def cifar_records(count: int, *, seed: int = 0) -> bytes:
    records = bytes_tensor(count, 3073, seed=seed)
    records[:, 0] = torch.arange(count) % 10
    return records.numpy().tobytes()


@pytest.fixture
def real(request) -> Path:
    root = os.environ.get("LOCKFREE_DATA")
    if not root or not all(SOURCES[request.param].present(Path(root))):
        pytest.skip(f"no {request.param} under LOCKFREE_DATA")
    return Path(root)


class TestStandardised:
    def test_training_statistics_serve_both_halves(self):
        train, test = bytes_tensor(50, 3, 4, 5), bytes_tensor(20, 3, 4, 5, seed=1)
        inputs, held_out = standardised(train, test)
        assert torch.allclose(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
        assert torch.allclose(inputs.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)
        exact = train.double() / 255
        mean, deviation = exact.mean((0, 2, 3), keepdim=True), exact.std((0, 2, 3), correction=0, keepdim=True)
        assert torch.allclose(held_out.double(), (test.double() / 255 - mean) / deviation, atol=1e-5)

    def test_a_channel_that_never_varies_becomes_zero(self):
        inputs, _ = standardised(torch.full((4, 1, 2, 2), 7, dtype=torch.uint8), bytes_tensor(1, 1, 2, 2))
        assert inputs.abs().max() < 1e-6


class TestLoad:
    def test_digits(self):
        digits = data.load("digits")
        assert (digits.input_shape, len(digits.classes)) == ((1, 8, 8), 10)
        assert (len(digits.train.targets), len(digits.test.targets)) == (1437, 360)
        held_out, kept = digits.test.targets.bincount(), digits.train.targets.bincount()
        assert torch.allclose(held_out / (held_out + kept), torch.tensor(0.2), atol=0.005)
        assert digits.train.inputs.mean().abs() < 1e-5
        assert (digits.train.inputs.dtype, digits.train.targets.dtype) == (torch.float32, torch.int64)
        assert torch.equal(digits.test.inputs, data.load("digits").test.inputs)

    def test_to_shares_what_is_there(self):
        digits = data.load("digits")
        moved = digits.to("cpu")
        assert moved.train.inputs.data_ptr() == digits.train.inputs.data_ptr()
        assert digits.to("meta").test.inputs.device.type == "meta"
        assert "tensor" not in repr(digits)

    @pytest.mark.parametrize("name", IDX_SETS)
    @pytest.mark.parametrize("suffix", ["", ".gz"])
    def test_idx_sets(self, tmp_path, name, suffix):
        paths = write_set(tmp_path, name, suffix=suffix)
        loaded = data.load(name, root=tmp_path)
        assert (loaded.name, loaded.input_shape, len(loaded.train.targets), len(loaded.test.targets)) == (
            name, (1, 28, 28), 30, 10,
        )  # fmt: skip
        inputs, _ = standardised(data.read_idx(paths[0]).unsqueeze(1), bytes_tensor(1, 1, 28, 28))
        assert torch.equal(loaded.train.inputs, inputs)
        assert str(paths[0].parent) in loaded.source
        assert "differ from the official set" in loaded.source
        assert "30 training and 10 test images" in loaded.source

    def test_cifar10(self, tmp_path):
        folder = tmp_path / "cifar-10-batches-bin"
        folder.mkdir()
        for index, file in enumerate(SOURCES["cifar10"].files):
            (folder / file.name).write_bytes(cifar_records(4, seed=index))
        loaded = data.load("cifar10", root=tmp_path)
        assert (loaded.input_shape, len(loaded.train.targets), len(loaded.test.targets)) == ((3, 32, 32), 20, 4)
        (folder / "data_batch_3.bin").unlink()
        with pytest.raises(ValueError, match=r"incomplete: expected data_batch_3.bin"):
            data.load("cifar10", root=tmp_path)

    def test_root_is_argument_then_environment_then_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("LOCKFREE_DATA", str(tmp_path / "env"))
        assert data.data_root(tmp_path) == tmp_path
        assert data.data_root() == tmp_path / "env"
        monkeypatch.delenv("LOCKFREE_DATA")
        assert data.data_root() == tmp_path / "cache" / "lockfree"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert data.data_root() == Path.home() / ".cache" / "lockfree"

    @pytest.mark.parametrize("name", ["mnist", "cifar10"])
    def test_a_set_that_is_not_there(self, tmp_path, name):
        with pytest.raises(ValueError, match=f"no {name} in {tmp_path}.*`lockfree data fetch {name}`"):
            data.load(name, root=tmp_path)

    def test_unknown_names(self):
        with pytest.raises(ValueError, match=r"did you mean 'fashion-mnist'.*digits, mnist, fashion-mnist, cifar10"):
            data.load("fashoin-mnist")
        with pytest.raises(ValueError, match="unknown data set 'xyz': choose from"):
            data.load("xyz")

    def test_fashion_mnist_falls_back_with_a_warning(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            loaded = data.load("fashion-mnist", root=tmp_path)
        assert loaded.source == "embedded sample: 10,000 training and 2,000 test images"
        assert loaded.name == "fashion-mnist"
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "lockfree data fetch fashion-mnist" in caplog.text

    def test_broken_full_sets_are_errors_and_never_fall_back(self, tmp_path):
        images, labels, test_images, test_labels = write_set(tmp_path, "fashion-mnist")

        def breaks(path: Path, broken: bytes | None, message: str) -> None:
            good = path.read_bytes()
            path.unlink()
            if broken is not None:
                path.write_bytes(broken)
            with pytest.raises(ValueError, match=message) as caught:
                data.load("fashion-mnist", root=tmp_path)
            assert "\n" not in str(caught.value)
            path.write_bytes(good)

        breaks(test_labels, None, "incomplete: expected t10k-labels-idx1-ubyte")
        breaks(images, images.read_bytes()[:-1], "train-images.*expected 23,536 bytes.*found 23,535")
        breaks(labels, struct.pack(">II", 0x0801, 29) + bytes(29), r"train-labels.*expected 30 labels.*\(29,\)")
        breaks(labels, struct.pack(">II", 0x0801, 30) + bytes([10] * 30), "labels from 0 to 9, found 10 at record 0")
        breaks(images, struct.pack(">II", 0x0801, 30) + bytes(30), r"expected images of shape .*found \(30,\)")
        breaks(
            test_images,
            struct.pack(">IIII", 0x0803, 10, 2, 2) + bytes(40),
            r"training images' size \(28, 28\), found \(2, 2\)",
        )
        assert len(data.load("fashion-mnist", root=tmp_path).train.targets) == 30

    @pytest.mark.parametrize("real", IDX_SETS, indirect=True)
    def test_the_table_describes_the_real_files(self, real, request):
        name = request.node.callspec.params["real"]
        loaded = data.load(name, root=real)
        assert loaded.source == f"full set in {real / SOURCES[name].folder}: 60,000 training and 10,000 test images"
        assert (loaded.test.targets.bincount().min(), loaded.train.inputs.shape) == (
            1000 if name == "fashion-mnist" else 892,
            (60_000, 1, 28, 28),
        )

    @pytest.mark.parametrize("real", ["cifar10"], indirect=True)
    def test_real_cifar10_is_balanced(self, real):
        loaded = data.load("cifar10", root=real)
        assert loaded.train.targets.bincount().tolist() == [5000] * 10
        assert loaded.test.targets.bincount().tolist() == [1000] * 10
        assert torch.allclose(loaded.train.inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)


class TestAvailable:
    def test_nothing_on_disk(self, tmp_path):
        lines = {line.name: line for line in data.available(tmp_path)}
        assert tuple(sorted(lines)) == tuple(sorted(data.names()))
        assert {name: line.status for name, line in lines.items()} == {
            "digits": "embedded",
            "mnist": "missing",
            "fashion-mnist": "embedded",
            "cifar10": "missing",
            "fashion-mnist-sample": "embedded",
        }
        assert lines["mnist"].where == str(tmp_path / "MNIST" / "raw")
        for name in ("digits", "fashion-mnist", "fashion-mnist-sample"):
            loaded = data.load(name, root=tmp_path)
            assert (len(loaded.train.targets), len(loaded.test.targets)) == (lines[name].n_train, lines[name].n_test)
        assert all(line.licence for line in lines.values())

    def test_found_sets(self, tmp_path):
        write_set(tmp_path, "fashion-mnist")
        line = next(line for line in data.available(tmp_path) if line.name == "fashion-mnist")
        assert (line.status, line.n_train, line.where) == ("found", 60_000, str(tmp_path / "FashionMNIST" / "raw"))


class TestEmbeddedSample:
    def test_is_class_balanced_and_standardised(self):
        sample = data.load("fashion-mnist-sample")
        assert sample.train.targets.bincount().tolist() == [1000] * 10
        assert sample.test.targets.bincount().tolist() == [200] * 10
        assert sample.input_shape == (1, 28, 28)
        assert abs(sample.train.inputs.mean()) < 1e-4
        assert abs(sample.train.inputs.std(correction=0) - 1) < 1e-4
        # Not sorted by class: a loader that does not shuffle must still see every class in its batches.
        assert len(sample.train.targets[:100].unique()) == 10

    def test_is_small_and_carries_its_licence(self):
        folder = importlib.resources.files("lockfree.data.embedded")
        sizes = [len(entry.read_bytes()) for entry in folder.iterdir() if entry.name.endswith(".xz")]
        assert len(sizes) == 4
        assert sum(sizes) <= 6_000_000
        notice = folder.joinpath("LICENSE-Fashion-MNIST").read_text(encoding="utf-8")
        assert "2017 Zalando SE, https://tech.zalando.com" in notice
        assert "Permission is hereby granted" in notice

    @pytest.mark.parametrize("real", ["fashion-mnist"], indirect=True)
    def test_the_script_makes_it_again(self, real, tmp_path):
        make_sample.main(str(real), str(tmp_path))
        folder = importlib.resources.files("lockfree.data.embedded")
        for file in SOURCES["fashion-mnist"].files:
            (tmp_path / "kept.xz").write_bytes(folder.joinpath(f"{file.name}.xz").read_bytes())
            assert torch.equal(data.read_idx(tmp_path / f"{file.name}.xz"), data.read_idx(tmp_path / "kept.xz"))

    def test_the_script_wants_the_official_set(self, tmp_path):
        write_set(tmp_path, "fashion-mnist")
        with pytest.raises(ValueError, match="expected the official train-images"):
            make_sample.main(str(tmp_path), str(tmp_path))

    def test_the_choice_depends_on_places_only(self):
        labels = torch.arange(10, dtype=torch.uint8).repeat(1500)
        places = make_sample.chosen(labels, "train")
        assert hashlib.sha256(places.numpy().astype("<i8").tobytes()).hexdigest()[:16] == "2cfe23bcd7f2a52a"
        assert labels[places].bincount().tolist() == [1000] * 10
