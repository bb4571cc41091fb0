"""Downloads that are either whole and right, or leave nothing behind."""

import hashlib
import http.client
import logging
import os
import shutil
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

from lockfree.data.formats import decompressed
from lockfree.data.sources import SOURCES, TEXT_SOURCES, PublicFile, Source, data_root

_logger = logging.getLogger(__name__)

_CHUNK = 1 << 16
_TIMEOUT_SECONDS = 30

Progress = Callable[[str, int, int | None], None]


def fetch(
    name: str,
    *,
    root: str | Path | None = None,
    mirrors: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Downloads a public set; files that are there and right are kept, and nothing half-done is left behind.

    Args:
        name: "mnist", "fashion-mnist", "cifar10" or "tinyshakespeare".
        root: The data folder; by default the environment's LOCKFREE_DATA, else a folder in the user's cache.
        mirrors: Base URLs to try in turn instead of the official ones.
        progress: Called with (file name, bytes so far, bytes in all or None if the server does not say).

    Returns:
        The folder that holds the set now.

    Raises:
        ValueError: The name cannot be fetched, or a mirror is no http or https address.
        OSError: No mirror gave the right bytes, or they cannot be written.

    Example:
        >>> fetch("digits")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: 'digits' cannot be fetched: choose one of mnist, fashion-mnist, cifar10, tinyshakespeare; others ...
    """
    source = _source(name, data_root(root))
    bases = source.mirrors if mirrors is None else tuple(mirrors)
    for base in bases or ("",):
        if not base.startswith(("http://", "https://")):
            raise ValueError(f"expected mirrors such as ['https://example.org/data'], got {mirrors!r}; list base URLs")
    folder = data_root(root) / source.folder
    wrong = _wrong_files(source, data_root(root))
    if not wrong:
        _logger.info("%s is whole in %s", name, folder)
        return folder
    with _folder(folder):
        if source.archive is None:
            for file in wrong:
                packed = file.on_mirrors.endswith(".gz")
                with _downloaded(file, file.on_mirrors, bases, folder, progress, unpack=packed) as path:
                    os.replace(path, folder / file.name)
        else:
            with _downloaded(source.archive, source.archive.name, bases, folder, progress) as path:
                _extract(path, source, folder)
    return folder


def _source(name: str, root: Path) -> Source:
    if name in TEXT_SOURCES and not TEXT_SOURCES[name].mirrors:
        text = TEXT_SOURCES[name]
        raise ValueError(
            f"{name!r} cannot be fetched, nobody offers it as one: {text.by_hand.format(folder=root / text.folder)}"
        )
    sources: dict[str, Source] = {name: source for name, source in (SOURCES | TEXT_SOURCES).items() if source.mirrors}
    if name not in sources:
        raise ValueError(f"{name!r} cannot be fetched: choose one of {', '.join(sources)}; others need no download")
    return sources[name]


def _wrong_files(source: Source, root: Path) -> list[PublicFile]:
    return [
        file for file, path in zip(source.files, source.present(root), strict=True) if path is None or not _right(file, path)
    ]


def _right(file: PublicFile, path: Path) -> bool:
    try:
        content, whole = decompressed(path.read_bytes(), str(path))
    except ValueError:
        return False
    return whole and file.holds(content)


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Makes a folder, and takes it away again if it stays empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            for path in missing:
                path.rmdir()


@contextmanager
def _downloaded(
    file: PublicFile,
    remote: str,
    bases: Sequence[str],
    folder: Path,
    progress: Progress | None,
    *,
    unpack: bool = False,
) -> Iterator[Path]:
    """Gives a temporary file that holds the right bytes, from the first mirror that has them."""
    # In the target's own folder, so that the final rename stays on one file system and is atomic.
    path = folder / f".{file.name}.{os.getpid()}.part"
    try:
        with path.open("wb") as sink:
            _try_mirrors(file, remote, bases, sink, progress, unpack=unpack)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _try_mirrors(
    file: PublicFile, remote: str, bases: Sequence[str], sink: IO[bytes], progress: Progress | None, *, unpack: bool
) -> None:
    failures = []
    for base in bases:
        url = f"{base.rstrip('/')}/{remote}"
        try:
            return _download(url, file, sink, progress, unpack=unpack)
        except (OSError, http.client.HTTPException, zlib.error) as error:
            failures.append(f"{url}: {' '.join(str(error).split()) or type(error).__name__}")
            _logger.info("mirror failed: %s", failures[-1])
            # What the mirror sent so far must not stay in front of the next one's bytes.
            sink.seek(0)
            sink.truncate()
    raise OSError(f"could not fetch {remote} ({'; '.join(failures)}); try again later or name other mirrors")


def _download(url: str, file: PublicFile, sink: IO[bytes], progress: Progress | None, *, unpack: bool) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "lockfree"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
        chunks = _received(response, url.rpartition("/")[2], progress)
        digest, size = hashlib.sha256(), 0
        for chunk in _inflated(chunks) if unpack else chunks:
            digest.update(chunk)
            size += len(chunk)
            # Checked on the way: a wrong address may answer with something that never ends.
            if size > file.size:
                raise OSError(f"expected {file.size:,} bytes, found more")
            sink.write(chunk)
    if size != file.size:
        raise OSError(f"expected {file.size:,} bytes, found {size:,}")
    if digest.hexdigest() != file.sha256:
        raise OSError(f"wrong checksum: expected SHA-256 {file.sha256}, found {digest.hexdigest()}")


def _received(response: http.client.HTTPResponse, name: str, progress: Progress | None) -> Iterator[bytes]:
    announced = response.headers.get("Content-Length")
    total = int(announced) if announced else None
    done = 0
    while chunk := response.read(_CHUNK):
        done += len(chunk)
        if progress is not None:
            progress(name, done, total)
        yield chunk
    # http.client takes a connection that closes early for the end of the file.
    if total is not None and done != total:
        raise OSError(f"short read: {done:,} of {total:,} bytes")


def _inflated(chunks: Iterable[bytes]) -> Iterator[bytes]:
    stream = zlib.decompressobj(wbits=31)
    for chunk in chunks:
        yield stream.decompress(chunk)
    if not stream.eof:
        raise OSError("the compressed data is cut off")


def _extract(archive: Path, source: Source, folder: Path) -> None:
    """Unpacks a verified archive beside its place, then moves the files in one by one."""
    aside = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder))
    try:
        with tarfile.open(archive) as tar:
            unpacked = dict(_unpacked(tar, aside))
        missing = [file.name for file in source.files if file.name not in unpacked]
        if missing:
            raise OSError(f"{archive.name}: expected {', '.join(missing)} in the archive too; report this, please")
        for name, path in unpacked.items():
            os.replace(path, folder / name)
    except tarfile.TarError as error:
        raise OSError(f"{archive.name}: cannot be unpacked ({error}); report this, please") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _unpacked(tar: tarfile.TarFile, folder: Path) -> Iterator[tuple[str, Path]]:
    """Writes the regular files of an archive into one folder, and yields the name and the path of each.

    By hand, since the first releases of Python 3.11 have no ``filter="data"`` to extract with.
    """
    for member in tar:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise tarfile.TarError(f"{member.name} points outside")
        content = tar.extractfile(member) if member.isreg() else None
        if content is not None:
            with content, open(folder / path.name, "wb") as sink:
                shutil.copyfileobj(content, sink)
            yield path.name, folder / path.name
