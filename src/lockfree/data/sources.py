"""Where each public set lies, on disk and on the internet, and what its bytes must be.

Every checksum of an IDX file is over its *uncompressed* bytes: the same content is packed differently in different
places (Debian's package of Fashion-MNIST is recompressed, so its .gz files fit no published sum), and a set that
another tool has unpacked is as good. How the sums were verified:

* Fashion-MNIST: computed from the files of Debian's package dataset-fashion-mnist; the MD5 sums of the same bytes are
  those that others publish for the unpacked official files (f4a8712d..., 9018921c..., 8181f547..., 15d48437...).
* MNIST: computed from unpacked files; the MD5 sums of the same bytes are those that others publish for the unpacked
  official files (6bbc9ace..., a25bea73..., 2646ac64..., 27ae3e4e...).
* CIFAR-10: *not* recomputed here. The archive's sum and size are those in wide use for the authors' archive, whose page
  gives MD5 c32a1d4ab5d03f1284b67883e8d87530; the sums of the single files are those that a port of torchvision checks.
  The archive's sum alone decides whether a download is good; the files' only tell official files from others.
* Tiny Shakespeare: computed from a copy of the authors' input.txt of 1,115,394 bytes, the size that is commonly given for
  it; *not* compared with a sum that somebody else publishes.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class PublicFile:
    """A file and what it must hold.

    Attributes:
        name: Its name inside the set's folder (or, for an archive, on the mirror).
        sha256: The checksum of its uncompressed content (of an archive: of the archive).
        size: How many bytes that is.
        remote: What it is called on the mirrors; NAME.gz if left out.
    """

    name: str
    sha256: str
    size: int
    remote: str | None = None

    @property
    def on_mirrors(self) -> str:
        """What it is called on the mirrors."""
        return f"{self.name}.gz" if self.remote is None else self.remote

    def holds(self, content: bytes) -> bool:
        """Tells whether this is the official content.

        Args:
            content: The uncompressed bytes of a file.

        Returns:
            True when size and checksum are right.
        """
        return len(content) == self.size and hashlib.sha256(content).hexdigest() == self.sha256


@dataclass(frozen=True, kw_only=True)
class Source:
    """A public set.

    Attributes:
        folder: Where it lies under the data folder, as the public tools lay it out.
        files: What lies there; IDX sets: training images, training labels, test images, test labels.
        mirrors: Base URLs, the official one first; none where nobody offers the set in this form.
        archive: What to download; None when every file is on the mirrors by itself.
        licence: What one may do with it.
    """

    folder: str
    files: tuple[PublicFile, ...]
    mirrors: tuple[str, ...]
    archive: PublicFile | None = None
    licence: str

    def present(self, root: Path) -> list[Path | None]:
        """Finds this set's files: plain, or else as .gz unless they came out of an archive.

        Args:
            root: The data folder.

        Returns:
            For each of `files` where it lies, or None.
        """
        suffixes = ("", ".gz") if self.archive is None else ("",)
        choices = [[root / self.folder / f"{file.name}{suffix}" for suffix in suffixes] for file in self.files]
        return [next((path for path in choice if path.is_file()), None) for choice in choices]


@dataclass(frozen=True, kw_only=True)
class ImageSource(Source):
    """A public set of images in classes.

    Attributes:
        classes: The name of each class.
        n_train: Training samples of the official set.
        n_test: Test samples of the official set.
    """

    classes: tuple[str, ...]
    n_train: int
    n_test: int


@dataclass(frozen=True, kw_only=True)
class TextSource(Source):
    """A text. Its one file is split where it is read; three files are its training, validation and test parts.

    Attributes:
        by_hand: How to come by it, with {folder} for where to; for messages.
    """

    by_hand: str


def data_root(root: str | Path | None = None) -> Path:
    """Says which folder holds the data sets.

    Args:
        root: The folder, if the caller knows it.

    Returns:
        `root`, else the environment's LOCKFREE_DATA, else a folder in the user's cache.

    Example:
        >>> data_root("sets").name
        'sets'
    """
    if root is not None:
        return Path(root).expanduser()
    if given := os.environ.get("LOCKFREE_DATA"):
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "lockfree"


def _idx(name: str, sha256: str, size: int) -> PublicFile:
    return PublicFile(name=f"{name}-ubyte", sha256=sha256, size=size)


def _unofficial(name: str) -> PublicFile:
    return PublicFile(name=name, sha256="", size=0)  # no content is the official one


def _batch(name: str, sha256: str) -> PublicFile:
    return PublicFile(name=f"{name}.bin", sha256=sha256, size=10_000 * 3_073)


SOURCES: dict[str, ImageSource] = {
    "mnist": ImageSource(
        folder="MNIST/raw",
        files=(
            _idx("train-images-idx3", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db", 47_040_016),
            _idx("train-labels-idx1", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", 60_008),
            _idx("t10k-images-idx3", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7", 7_840_016),
            _idx("t10k-labels-idx1", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", 10_008),
        ),
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist",
            "https://storage.googleapis.com/cvdf-datasets/mnist",
        ),
        classes=tuple("0123456789"),
        n_train=60_000,
        n_test=10_000,
        licence="CC BY-SA 3.0, Yann LeCun and Corinna Cortes",
    ),
    "fashion-mnist": ImageSource(
        folder="FashionMNIST/raw",
        files=(
            _idx("train-images-idx3", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888", 47_040_016),
            _idx("train-labels-idx1", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9", 60_008),
            _idx("t10k-images-idx3", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b", 7_840_016),
            _idx("t10k-labels-idx1", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34", 10_008),
        ),
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
        ),
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        n_train=60_000,
        n_test=10_000,
        licence="MIT, Zalando SE",
    ),
    "cifar10": ImageSource(
        folder="cifar-10-batches-bin",
        files=(
            _batch("data_batch_1", "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
            _batch("data_batch_2", "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
            _batch("data_batch_3", "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
            _batch("data_batch_4", "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
            _batch("data_batch_5", "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
            _batch("test_batch", "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
        ),
        mirrors=("https://www.cs.toronto.edu/~kriz",),
        archive=PublicFile(
            name="cifar-10-binary.tar.gz",
            sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            size=170_052_171,
        ),
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        n_train=50_000,
        n_test=10_000,
        licence="none stated; the authors ask to cite Krizhevsky (2009)",
    ),
}

TEXT_SOURCES: dict[str, TextSource] = {
    "tinyshakespeare": TextSource(
        folder="text",
        files=(
            PublicFile(
                name="tinyshakespeare.txt",
                sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                size=1_115_394,
                remote="input.txt",
            ),
        ),
        mirrors=("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare",),
        licence="public domain",
        by_hand="run `lockfree data fetch tinyshakespeare`",
    ),
    "austen": TextSource(
        folder="text",
        files=(_unofficial("austen.txt"),),
        mirrors=(),
        licence="public domain",
        by_hand="put austen.txt, Jane Austen's novels one after the other (Project Gutenberg has them) in UTF-8, into {folder}",
    ),
    "brown": TextSource(
        folder="text",
        files=tuple(_unofficial(f"brown.{part}.txt") for part in ("train", "valid", "test")),
        mirrors=(),
        licence="for non-commercial use, Francis and Kucera",
        by_hand="put brown.train.txt, brown.valid.txt and brown.test.txt, the Brown corpus (nltk has it) as lines of words "
        "between spaces, into {folder}",
    ),
}
