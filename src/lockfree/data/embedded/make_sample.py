"""Makes the embedded sample from the full Fashion-MNIST: python -m lockfree.data.embedded.make_sample ROOT [TARGET].

From every class the images are taken whose place in the full set has the smallest SHA-256 (a choice that no version of
a random generator can change), and they keep their order.
"""

import hashlib
import sys
from pathlib import Path

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from lockfree.data.formats import read_idx, write_idx
from lockfree.data.sources import SOURCES

SEED = 0
PER_CLASS = {"train": 1_000, "test": 200}


def chosen(labels: UInt8[Tensor, " n"], half: str) -> Int64[Tensor, " m"]:
    """Chooses as many places from each class, the same ones always.

    Args:
        labels: The full half's labels.
        half: "train" or "test".

    Returns:
        The places, ascending.

    Example:
        >>> len(chosen(torch.arange(10, dtype=torch.uint8).repeat(300), "test"))
        2000
    """

    def rank(place: int) -> bytes:
        return hashlib.sha256(f"fashion-mnist {SEED} {half} {place}".encode()).digest()

    places = []
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten().tolist()
        places += sorted(members, key=rank)[: PER_CLASS[half]]
    return torch.tensor(sorted(places), dtype=torch.int64)


def main(root: str, target: str | None = None) -> None:
    """Writes the four compressed IDX files of the sample.

    Args:
        root: The data folder that holds the full set.
        target: Where to write; by default beside this script.

    Raises:
        ValueError: The full set is not there, or its bytes are not the official ones.
    """
    source = SOURCES["fashion-mnist"]
    folder = Path(target) if target else Path(__file__).parent
    paths = source.present(Path(root))
    arrays = []
    for file, path in zip(source.files, paths, strict=True):
        if path is None or path.suffix or not file.holds(path.read_bytes()):
            raise ValueError(f"expected the official {file.name} in {Path(root) / source.folder}; fetch the set there first")
        arrays.append(read_idx(path))
    for half, images, labels, files in (
        ("train", arrays[0], arrays[1], source.files[:2]),
        ("test", arrays[2], arrays[3], source.files[2:]),
    ):
        places = chosen(labels, half)
        for array, file in zip((images, labels), files, strict=True):
            write_idx(folder / f"{file.name}.xz", array[places])


if __name__ == "__main__":
    main(*sys.argv[1:])
