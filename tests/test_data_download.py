"""Downloads, against HTTP servers on loopback: whole and right, or nothing."""

import gzip
import hashlib
import io
import socket
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lockfree import data
from lockfree.data.sources import SOURCES, TEXT_SOURCES, PublicFile

CONTENT = {
    "train-images-idx3-ubyte": bytes(range(256)) * 700,
    "train-labels-idx1-ubyte": b"train labels",
    "t10k-images-idx3-ubyte": b"test images" * 50,
    "t10k-labels-idx1-ubyte": b"test labels",
}


@dataclass
class Mirror:
    """A server's files, how many bytes of each it sends before it hangs up, and what it was asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def mirror_maker(monkeypatch) -> Iterator:
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def make(files: dict[str, bytes]) -> Mirror:
        mirror = Mirror(files=dict(files))

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.removeprefix("/data/")
                mirror.asked.append(name)
                if name not in mirror.files:
                    self.send_error(404)
                    return
                body = mirror.files[name]
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: mirror.cut.get(name, len(body))])

            def log_message(self, *arguments):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        mirror.url = f"http://127.0.0.1:{server.server_port}/data"
        return mirror

    yield make
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def public(name: str, content: bytes) -> PublicFile:
    return PublicFile(name=name, sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def packed(content: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(body) for name, body in content.items()}


@pytest.fixture
def small_mnist(monkeypatch) -> Path:
    files = tuple(public(name, body) for name, body in CONTENT.items())
    monkeypatch.setitem(SOURCES, "mnist", replace(SOURCES["mnist"], files=files))
    return Path("MNIST/raw")


def lying(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def whole(folder: Path) -> dict[str, bytes]:
    return {str(folder / name): body for name, body in CONTENT.items()}


def test_files_arrive_unpacked_and_a_second_fetch_asks_for_nothing(tmp_path, mirror_maker, small_mnist):
    mirror = mirror_maker(packed(CONTENT))
    seen = []
    root = tmp_path / "new" / "root"
    folder = data.fetch("mnist", root=root, mirrors=[mirror.url], progress=lambda *step: seen.append(step))
    assert folder == root / small_mnist
    assert lying(root) == whole(small_mnist)
    assert mirror.asked == [f"{name}.gz" for name in CONTENT]
    last = {name: (done, total) for name, done, total in seen}
    assert last == {name: (len(body), len(body)) for name, body in mirror.files.items()}
    assert data.fetch("mnist", root=root, mirrors=[mirror.url]) == folder
    assert len(mirror.asked) == 4


def test_only_what_is_missing_or_wrong_is_fetched(tmp_path, mirror_maker, small_mnist):
    folder = tmp_path / small_mnist
    folder.mkdir(parents=True)
    (folder / "train-images-idx3-ubyte").write_bytes(CONTENT["train-images-idx3-ubyte"])
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(CONTENT["train-labels-idx1-ubyte"]))
    (folder / "t10k-images-idx3-ubyte").write_bytes(b"wrong")
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8bbroken")
    mirror = mirror_maker(packed(CONTENT))
    data.fetch("mnist", root=tmp_path, mirrors=[mirror.url])
    assert mirror.asked == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]
    assert (folder / "t10k-images-idx3-ubyte").read_bytes() == CONTENT["t10k-images-idx3-ubyte"]
    assert (folder / "t10k-labels-idx1-ubyte").read_bytes() == CONTENT["t10k-labels-idx1-ubyte"]


def spoil_checksum(mirror: Mirror, name: str) -> None:
    content = gzip.decompress(mirror.files[name])
    mirror.files[name] = gzip.compress(bytes([content[0] ^ 1]) + content[1:])


def spoil_length(mirror: Mirror, name: str) -> None:
    mirror.files[name] = gzip.compress(gzip.decompress(mirror.files[name]) + b"more")


def spoil_connection(mirror: Mirror, name: str) -> None:
    mirror.cut[name] = len(mirror.files[name]) // 2


def spoil_stream(mirror: Mirror, name: str) -> None:
    mirror.files[name] = mirror.files[name][:-9]


def spoil_packing(mirror: Mirror, name: str) -> None:
    mirror.files[name] = b"<html>gone</html>"


def spoil_address(mirror: Mirror, name: str) -> None:
    del mirror.files[name]


SPOILS = {
    spoil_checksum: "wrong checksum",
    spoil_length: "found more",
    spoil_connection: "short read|IncompleteRead",
    spoil_stream: "cut off",
    spoil_packing: "incorrect header",
    spoil_address: "404",
}


@pytest.mark.parametrize(("spoil", "message"), SPOILS.items())
def test_a_bad_file_leaves_nothing_behind(tmp_path, mirror_maker, small_mnist, spoil, message):
    mirror = mirror_maker(packed(CONTENT))
    spoil(mirror, "train-images-idx3-ubyte.gz")
    with pytest.raises(OSError, match=rf"could not fetch train-images-idx3-ubyte.gz .*({message})") as caught:
        data.fetch("mnist", root=tmp_path, mirrors=[mirror.url])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spoil", SPOILS)
def test_the_next_mirror_steps_in(tmp_path, mirror_maker, small_mnist, spoil):
    bad, good = mirror_maker(packed(CONTENT)), mirror_maker(packed(CONTENT))
    spoil(bad, "t10k-images-idx3-ubyte.gz")
    data.fetch("mnist", root=tmp_path, mirrors=[bad.url, f"{good.url}/"])
    assert good.asked == ["t10k-images-idx3-ubyte.gz"]
    assert lying(tmp_path) == whole(small_mnist)


def test_good_files_survive_a_failure(tmp_path, mirror_maker, small_mnist):
    mirror = mirror_maker(packed(CONTENT))
    spoil_checksum(mirror, "t10k-labels-idx1-ubyte.gz")
    folder = tmp_path / small_mnist
    folder.mkdir(parents=True)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"what was there before")
    with pytest.raises(OSError, match="wrong checksum"):
        data.fetch("mnist", root=tmp_path, mirrors=[mirror.url])
    kept = dict(list(whole(small_mnist).items())[:3])
    assert lying(tmp_path) == kept | {str(small_mnist / "t10k-labels-idx1-ubyte"): b"what was there before"}


def test_a_server_that_is_not_there(tmp_path, monkeypatch, small_mnist):
    monkeypatch.setenv("no_proxy", "*")
    # Bound but not listening: nobody else can take the port, and a connection is refused.
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(OSError, match=r"could not fetch train-images-idx3-ubyte.gz .*refused"):
            data.fetch("mnist", root=tmp_path, mirrors=[gone])
    assert list(tmp_path.iterdir()) == []


def archive(members: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as tar:
        for name, body in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            tar.addfile(entry, io.BytesIO(body))
    return target.getvalue()


def small_cifar(monkeypatch, members: dict[str, bytes]) -> bytes:
    source = SOURCES["cifar10"]
    files = tuple(public(file.name, file.name.encode()) for file in source.files)
    blob = archive(members)
    monkeypatch.setitem(SOURCES, "cifar10", replace(source, files=files, archive=public("cifar-10-binary.tar.gz", blob)))
    return blob


def batches() -> dict[str, bytes]:
    names = [file.name for file in SOURCES["cifar10"].files] + ["batches.meta.txt"]
    return {f"cifar-10-batches-bin/{name}": name.encode() for name in names}


def test_an_archive_is_unpacked_into_the_layout(tmp_path, mirror_maker, monkeypatch):
    blob = small_cifar(monkeypatch, batches())
    mirror = mirror_maker({"cifar-10-binary.tar.gz": blob})
    assert data.fetch("cifar10", root=tmp_path, mirrors=[mirror.url]) == tmp_path / "cifar-10-batches-bin"
    assert lying(tmp_path) == batches()
    data.fetch("cifar10", root=tmp_path, mirrors=[mirror.url])
    assert len(mirror.asked) == 1


def test_an_archive_with_another_checksum_is_never_opened(tmp_path, mirror_maker, monkeypatch):
    blob = small_cifar(monkeypatch, batches())
    mirror = mirror_maker({"cifar-10-binary.tar.gz": blob[:-1] + bytes([blob[-1] ^ 1])})
    with pytest.raises(OSError, match="wrong checksum"):
        data.fetch("cifar10", root=tmp_path, mirrors=[mirror.url])
    assert list(tmp_path.iterdir()) == []


def test_an_archive_that_lacks_a_file(tmp_path, mirror_maker, monkeypatch):
    members = batches()
    del members["cifar-10-batches-bin/test_batch.bin"]
    mirror = mirror_maker({"cifar-10-binary.tar.gz": small_cifar(monkeypatch, members)})
    with pytest.raises(OSError, match=r"expected test_batch.bin in the archive"):
        data.fetch("cifar10", root=tmp_path, mirrors=[mirror.url])
    assert list(tmp_path.iterdir()) == []


def test_an_archive_cannot_write_outside(tmp_path, mirror_maker, monkeypatch):
    root = tmp_path / "root"
    mirror = mirror_maker({"cifar-10-binary.tar.gz": small_cifar(monkeypatch, batches() | {"../../../evil": b"x"})})
    with pytest.raises(OSError, match="evil"):
        data.fetch("cifar10", root=root, mirrors=[mirror.url])
    assert list(tmp_path.iterdir()) == []


def test_names_and_mirrors_are_checked(tmp_path):
    with pytest.raises(ValueError, match="'digits' cannot be fetched: choose one of mnist, fashion-mnist, cifar10"):
        data.fetch("digits", root=tmp_path)
    for mirrors in (["file:///etc"], "http://127.0.0.1/data", []):
        with pytest.raises(ValueError, match="expected mirrors such as"):
            data.fetch("mnist", root=tmp_path, mirrors=mirrors)
    assert list(tmp_path.iterdir()) == []


def test_a_text_comes_plain_and_under_another_name(tmp_path, mirror_maker, monkeypatch):
    source, text = TEXT_SOURCES["tinyshakespeare"], b"First Citizen:\n" * 100
    file = replace(public("tinyshakespeare.txt", text), remote="input.txt")
    monkeypatch.setitem(TEXT_SOURCES, "tinyshakespeare", replace(source, files=(file,)))
    mirror = mirror_maker({"input.txt": text + b"!"})
    with pytest.raises(OSError, match=r"could not fetch input.txt \(.*expected 1,500 bytes, found more"):
        data.fetch("tinyshakespeare", root=tmp_path, mirrors=[mirror.url])
    assert lying(tmp_path) == {}
    mirror.files["input.txt"] = text
    assert data.fetch("tinyshakespeare", root=tmp_path, mirrors=[mirror.url]) == tmp_path / "text"
    assert lying(tmp_path) == {"text/tinyshakespeare.txt": text}
    assert data.load_text("tinyshakespeare", root=tmp_path).source.startswith("full text in")
    data.fetch("tinyshakespeare", root=tmp_path, mirrors=[mirror.url])
    assert mirror.asked == ["input.txt"] * 2


def test_the_table_is_well_formed():
    for source in SOURCES.values():
        assert all(len(file.sha256) == 64 and int(file.sha256, 16) for file in source.files)
        assert len(source.classes) == 10
        assert all(mirror.startswith(("http://", "https://")) and not mirror.endswith("/") for mirror in source.mirrors)
    assert sum(file.size for file in SOURCES["cifar10"].files) == (50_000 + 10_000) * 3_073
