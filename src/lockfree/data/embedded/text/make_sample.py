"""Makes the embedded text from all of tiny Shakespeare: python -m lockfree.data.embedded.text.make_sample ROOT [TARGET]."""

import lzma
import sys
from pathlib import Path

from lockfree.data.sources import TEXT_SOURCES

SIZE = 400_000


def main(root: str, target: str | None = None) -> None:
    """Writes the beginning of the text, up to the last speech that ends within `SIZE` bytes.

    Args:
        root: The data folder that holds the full text.
        target: The folder to write to; by default this script's.

    Raises:
        ValueError: The full text is not there, or its bytes are not the official ones.
    """
    source = TEXT_SOURCES["tinyshakespeare"]
    file, path = source.files[0], source.present(Path(root))[0]
    if path is None or path.suffix != ".txt" or not file.holds(path.read_bytes()):
        raise ValueError(f"expected the official {file.name} in {Path(root) / source.folder}; fetch the text there first")
    whole = path.read_bytes()
    sample = whole[: whole.rindex(b"\n\n", 0, SIZE) + 1]
    folder = Path(target) if target else Path(__file__).parent
    (folder / "shakespeare-sample.txt.xz").write_bytes(lzma.compress(sample, preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main(*sys.argv[1:])
