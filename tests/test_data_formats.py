"""The readers of IDX files and CIFAR-10 batches: round trips, and files that are damaged in every way."""

import gzip
import lzma
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockfree import data


def bytes_tensor(*shape: int, seed: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def cifar_records(count: int, *, seed: int = 0) -> bytes:
    records = bytes_tensor(count, 3073, seed=seed)
    records[:, 0] = torch.arange(count) % 10
    return records.numpy().tobytes()


class TestIdx:
    @settings(deadline=None, max_examples=50)
    @given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=5), seed=st.integers(0, 2**31))
    @pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
    def test_round_trip(self, tmp_path_factory, suffix, shape, seed):
        path = tmp_path_factory.getbasetemp() / f"round-trip{suffix}"
        array = bytes_tensor(*shape, seed=seed)
        data.write_idx(path, array)
        back = data.read_idx(path)
        assert back.shape == array.shape
        assert torch.equal(back, array)

    def test_header_is_the_published_one(self, tmp_path):
        data.write_idx(tmp_path / "a", bytes_tensor(2, 3))
        assert (tmp_path / "a").read_bytes()[:12] == struct.pack(">II", 0x0802, 2) + struct.pack(">I", 3)

    def test_writing_is_reproducible(self, tmp_path):
        for name in ("a.gz", "b.gz"):
            data.write_idx(tmp_path / name, bytes_tensor(9))
        assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()

    def test_several_gzip_streams_are_one_file(self, tmp_path):
        content = struct.pack(">II", 0x0801, 6) + b"abcdef"
        (tmp_path / "a.gz").write_bytes(gzip.compress(content[:9]) + gzip.compress(content[9:]))
        assert bytes(data.read_idx(tmp_path / "a.gz").tolist()) == b"abcdef"

    @settings(deadline=None, max_examples=50)
    @given(cut=st.integers(0, 27))
    def test_every_truncation_is_an_error_that_counts_bytes(self, tmp_path_factory, cut):
        path = tmp_path_factory.getbasetemp() / "truncated"
        whole = struct.pack(">III", 0x0802, 4, 4) + bytes(16)
        path.write_bytes(whole[:cut])
        expected = 4 if cut < 4 else 12 if cut < 12 else 28
        with pytest.raises(ValueError, match=f"truncated.*{expected} bytes.*found {cut}"):
            data.read_idx(path)

    def test_too_long(self, tmp_path):
        (tmp_path / "long").write_bytes(struct.pack(">II", 0x0801, 2) + b"abc")
        with pytest.raises(ValueError, match=r"long: expected 10 bytes.*found 11"):
            data.read_idx(tmp_path / "long")

    @pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
    def test_compressed_files_that_are_cut_off_or_damaged(self, tmp_path, compress):
        content = struct.pack(">II", 0x0801, 5000) + bytes_tensor(5000).numpy().tobytes()
        packed = compress(content)
        for cut in (len(packed) // 2, len(packed) - 4):
            (tmp_path / "cut").write_bytes(packed[:cut])
            with pytest.raises(ValueError, match=r"cut: expected .*found [\d,]+ .*cut off"):
                data.read_idx(tmp_path / "cut")
        middle = len(packed) // 2
        (tmp_path / "flip").write_bytes(packed[:middle] + bytes([packed[middle] ^ 255]) + packed[middle + 1 :])
        with pytest.raises(ValueError, match="flip"):
            data.read_idx(tmp_path / "flip")

    @pytest.mark.parametrize("magic", ["00 00 0d 01", "01 00 08 01", "00 00 08 00", "50 4b 03 04"])
    def test_foreign_magic(self, tmp_path, magic):
        (tmp_path / "foreign").write_bytes(bytes.fromhex(magic) + bytes(8))
        with pytest.raises(ValueError, match=f"foreign: expected an IDX.*found {magic}"):
            data.read_idx(tmp_path / "foreign")

    def test_huge_header_is_refused_before_memory_is_taken(self, tmp_path):
        (tmp_path / "huge").write_bytes(struct.pack(">I4I", 0x0804, *[2**32 - 1] * 4))
        with pytest.raises(ValueError, match="found 20"):
            data.read_idx(tmp_path / "huge")

    def test_only_bytes_can_be_written(self, tmp_path):
        with pytest.raises(ValueError, match="rank 0"):
            data.write_idx(tmp_path / "a", torch.tensor(1, dtype=torch.uint8))


class TestCifar:
    def test_planes_and_labels(self, tmp_path):
        (tmp_path / "a.bin").write_bytes(cifar_records(3))
        (tmp_path / "b.bin").write_bytes(bytes([9]) + bytes([1]) * 1024 + bytes([2]) * 1024 + bytes([3]) * 1024)
        images, labels = data.read_cifar10_binary([tmp_path / "a.bin", tmp_path / "b.bin"])
        assert labels.tolist() == [0, 1, 2, 9]
        assert torch.equal(images[:3].flatten(1), bytes_tensor(3, 3073)[:, 1:])
        assert [plane.unique().tolist() for plane in images[3]] == [[1], [2], [3]]

    @pytest.mark.parametrize("size", [0, 1, 3072, 3074, 2 * 3073 - 1])
    def test_sizes_that_are_no_whole_records(self, tmp_path, size):
        (tmp_path / "odd.bin").write_bytes(bytes(size))
        with pytest.raises(ValueError, match=rf"odd.bin: expected whole records of 3,073 bytes.*found {size:,}"):
            data.read_cifar10_binary([tmp_path / "odd.bin"])

    def test_label_above_nine(self, tmp_path):
        (tmp_path / "ten.bin").write_bytes(bytes(3073) + bytes([10]) + bytes(3072))
        with pytest.raises(ValueError, match=r"ten.bin: expected labels from 0 to 9, found 10 at record 1"):
            data.read_cifar10_binary([tmp_path / "ten.bin"])

    def test_no_file(self):
        with pytest.raises(ValueError, match="empty list"):
            data.read_cifar10_binary([])
