"""Texts: vocabularies, splits, the sets by name, streams, and how a text is listed and fetched."""

import gzip
import hashlib
import importlib.resources
import logging
import lzma
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockfree import data
from lockfree.data import Characters, Stream, Words
from lockfree.data.embedded.text import make_sample
from lockfree.data.sources import TEXT_SOURCES
from lockfree.data.vocabulary import LINE_END, UNKNOWN

LINES = "".join(f"line {number:03d} has words\n" for number in range(200))  # 19 characters each


def write(root: Path, name: str, text: str) -> Path:
    path = root / "text" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


@pytest.fixture
def real() -> Path:
    root = os.environ.get("LOCKFREE_DATA")
    if not root or not all(all(source.present(Path(root))) for source in TEXT_SOURCES.values()):
        pytest.skip("not all texts under LOCKFREE_DATA")
    return Path(root)


class TestCharacters:
    @given(st.text(st.characters(), min_size=1))
    def test_decoding_undoes_encoding(self, text):
        letters = Characters.of(text)
        assert letters.symbols == tuple(sorted(set(text)))
        assert letters.decode(letters.encode(text)) == text
        assert letters.encode(text).tolist() == [letters.symbols.index(letter) for letter in text]

    def test_unknown_characters_are_refused_or_counted(self):
        with pytest.raises(ValueError, match=r"here has .* lacks: 'é' \(U\+00E9\) at line 2, column 3; .*unknown='count'"):
            Characters.of("abc\n").encode("aaaa\nbcé", where="here")
        counting = Characters.of("abc\n", unknown=True)
        assert counting.symbols == ("\n", "a", "b", "c", UNKNOWN)
        assert counting.encode("abé\nz").tolist() == [1, 2, 4, 0, 4]
        assert counting.decode(counting.encode("é")) == UNKNOWN

    @pytest.mark.parametrize(
        ("symbols", "message"),
        [
            ((), "empty vocabulary"),
            (("a", "a"), "'a' more often"),
            (("b", "a"), "in order"),
            (("ab",), "single"),
            ((UNKNOWN,), "single"),
        ],
        ids=str,
    )
    def test_what_is_no_vocabulary(self, symbols, message):
        with pytest.raises(ValueError, match=message):
            Characters(symbols=symbols)

    def test_numbers_outside(self):
        for number in (-1, 2):
            with pytest.raises(ValueError, match=f"from 0 to 1, got {number}"):
                Characters.of("ab").decode(torch.tensor([0, number]))
        with pytest.raises(ValueError, match="got none"):
            Characters.of("")


class TestWords:
    @given(st.lists(st.lists(st.sampled_from(["a", "b.", "it's", "—"]))))
    def test_decoding_undoes_encoding_of_words_between_single_spaces(self, lines):
        text = "\n".join(" ".join(line) for line in lines)
        words = Words.of("a b. it's —")
        assert words.decode(words.encode(text)) == text

    def test_the_vocabulary_goes_by_frequency_then_alphabetically(self):
        words = Words.of("c b b\na a  d <unk>\n<eos>\n")
        assert words.symbols == (UNKNOWN, LINE_END, "a", "b", "c", "d")
        assert Words.of("c b b\na a\n", size=3).symbols == (UNKNOWN, LINE_END, "a")
        assert Words.of("c b b\na a\n", size=100).symbols == (UNKNOWN, LINE_END, "a", "b", "c")
        assert words.encode("b z\n\n<unk> a").tolist() == [3, 0, 1, 1, 0, 2]
        assert words.encode("").tolist() == []

    def test_what_is_no_vocabulary(self):
        with pytest.raises(ValueError, match=r"must be 3 or more.*got 2"):
            Words.of("a", size=2)
        with pytest.raises(ValueError, match="one word at least"):
            Words.of(" \n ")
        with pytest.raises(ValueError, match=r"expected <unk> and <eos> first, got \('a',\)"):
            Words(symbols=("a",))


class TestReadText:
    def test_parts_are_whole_lines_and_lose_nothing(self, tmp_path):
        text = data.read_text(write(tmp_path, "own.txt", LINES))
        # 3,800 characters: the borders after 3,420 and 3,610 are the ends of lines 180 and 190.
        assert (len(text.train), len(text.valid), len(text.test)) == (3420, 190, 190)
        decode = text.vocabulary.decode
        assert decode(text.train) + decode(text.valid) + decode(text.test) == LINES
        assert decode(text.valid).startswith("line 180 ")
        assert (text.name, text.train.dtype) == ("own.txt", torch.int64)
        assert text.source == f"{tmp_path / 'text' / 'own.txt'}: 3,420 training, 190 validation and 190 test characters"
        assert "tensor" not in repr(text)
        assert text.to("meta").valid.device.type == "meta"

    def test_a_border_waits_for_the_end_of_the_line(self, tmp_path):
        text = data.read_text(write(tmp_path, "own.txt", LINES + "x" * 5 + "\n"), unknown="count")
        assert len(text.train) == math.ceil(0.9 * 3806 / 19) * 19

    def test_without_lines_it_is_cut_where_it_falls(self, tmp_path):
        text = data.read_text(write(tmp_path, "own.txt", "ab" * 500))
        assert (len(text.train), len(text.valid), len(text.test)) == (900, 50, 50)

    def test_encodings(self, tmp_path):
        plain = data.read_text(write(tmp_path, "plain.txt", LINES))
        path = write(tmp_path, "other.txt", "")
        windows = b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode()
        for content in (windows, gzip.compress(LINES.encode()), lzma.compress(LINES.encode())):
            path.write_bytes(content)
            other = data.read_text(path)
            assert torch.equal(other.train, plain.train)
            assert other.vocabulary == plain.vocabulary
        path.write_bytes(gzip.compress(LINES.encode())[:-20])
        with pytest.raises(ValueError, match=r"other.txt: the compressed text is cut off"):
            data.read_text(path)
        path.write_bytes(b"caf\xe9 " * 1000)
        with pytest.raises(ValueError, match=r"other.txt: expected UTF-8, found byte 0xe9 at place 3; save"):
            data.read_text(path)

    @pytest.mark.parametrize("text", ["", "a", "a\nb\n", "\n"], ids=repr)
    def test_too_short(self, tmp_path, text):
        with pytest.raises(ValueError, match=r"too few .*take a longer text") as caught:
            data.read_text(write(tmp_path, "own.txt", text))
        assert "\n" not in str(caught.value)

    def test_parts_of_one_symbol(self, tmp_path):
        with pytest.raises(ValueError, match=r"the validation part has 1 symbols, too few"):
            data.read_text(write(tmp_path, "own.txt", "a" * 20))

    def test_unknown_characters(self, tmp_path):
        path = write(tmp_path, "own.txt", LINES + "§")
        with pytest.raises(ValueError, match=r"own.txt, test part, has .* lacks: '§' \(U\+00A7\) at line 10, column 1"):
            data.read_text(path)
        text = data.read_text(path, unknown="count")
        assert text.test[-1] == len(text.vocabulary) - 1
        assert text.vocabulary.symbols[-1] == UNKNOWN
        assert int(text.train.max()) < len(text.vocabulary) - 1

    def test_words_need_no_such_care(self, tmp_path):
        text = data.read_text(write(tmp_path, "own.txt", LINES), unit="word", vocabulary_size=5)
        assert text.vocabulary.symbols == (UNKNOWN, LINE_END, "has", "line", "words")
        assert text.test[:5].tolist() == [3, 0, 2, 4, 1]
        assert len(text.train) == 180 * 5

    def test_settings(self, tmp_path, unchecked):
        path = write(tmp_path, "own.txt", LINES)
        with pytest.raises(ValueError, match="vocabulary_size is for words, got 9"):
            data.read_text(path, vocabulary_size=9)
        with pytest.raises(ValueError, match="unknown unit 'words': did you mean 'word'"):
            data.read_text(path, unit="words")
        with pytest.raises(ValueError, match=r"'counts': did you mean 'count'"):
            data.read_text(path, unknown="counts")


class TestLoadText:
    def test_the_sample(self):
        sample = data.load_text("shakespeare-sample")
        assert (len(sample.train), len(sample.valid), len(sample.test)) == (359_920, 19_966, 19_976)
        assert sample.source == "embedded sample: 359,920 training, 19,966 validation and 19,976 test characters"
        assert sample.vocabulary.decode(sample.train[:15]) == "First Citizen:\n"
        assert sample.vocabulary.decode(sample.train[-1:]) == "\n"

    def test_tinyshakespeare_falls_back_with_a_warning(self, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            text = data.load_text("tinyshakespeare", root=tmp_path)
        assert text.name == "tinyshakespeare"
        assert torch.equal(text.test, data.load_text("shakespeare-sample").test)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "lockfree data fetch tinyshakespeare" in caplog.text

    def test_files_are_told_from_the_official_ones(self, tmp_path):
        write(tmp_path, "tinyshakespeare.txt", LINES)
        assert "text that differs from the official one in" in data.load_text("tinyshakespeare", root=tmp_path).source
        write(tmp_path, "austen.txt", LINES)
        assert data.load_text("austen", root=tmp_path).source.startswith(f"text in {tmp_path / 'text'}: 3,420 training")

    def test_brown_has_its_parts(self, tmp_path):
        for part, text in (("train", "b a\n"), ("valid", "a b a\n")):
            write(tmp_path, f"brown.{part}.txt", text)
        with pytest.raises(ValueError, match=r"is incomplete: expected brown.test.txt there too; put brown.train"):
            data.load_text("brown", root=tmp_path)
        write(tmp_path, "brown.test.txt", "a c\n")
        brown = data.load_text("brown", unit="word", root=tmp_path)
        assert [part.tolist() for part in (brown.train, brown.valid, brown.test)] == [[3, 2, 1], [2, 3, 2, 1], [2, 0, 1]]

    def test_what_is_not_there(self, tmp_path):
        for name in ("austen", "brown"):
            with pytest.raises(ValueError, match=rf"no {name} in {tmp_path / 'text'}: put {name}.*, into {tmp_path / 'text'}"):
                data.load_text(name, root=tmp_path)
        with pytest.raises(ValueError, match="unknown text set 'asten': did you mean 'austen'"):
            data.load_text("asten")

    def test_the_real_ones(self, real):
        for name, sizes, letters in (
            ("tinyshakespeare", (1_003_856, 55_780, 55_758), 65),
            ("brown", (5_511_859, 306_531, 308_684), 59),
        ):
            text = data.load_text(name, root=real)
            assert (len(text.train), len(text.valid), len(text.test)) == sizes
            assert len(text.vocabulary) == letters
            assert text.source.startswith("full text" if name == "tinyshakespeare" else "text in")

    def test_the_script_makes_the_sample_again(self, real, tmp_path):
        make_sample.main(str(real), str(tmp_path))
        kept = importlib.resources.files("lockfree.data.embedded.text").joinpath("shakespeare-sample.txt.xz").read_bytes()
        made = (tmp_path / "shakespeare-sample.txt.xz").read_bytes()
        assert lzma.decompress(made) == lzma.decompress(kept)
        assert 200_000 <= len(lzma.decompress(kept)) <= 400_000
        write(tmp_path, "tinyshakespeare.txt", LINES)
        with pytest.raises(ValueError, match=r"expected the official tinyshakespeare.txt"):
            make_sample.main(str(tmp_path))


class TestListAndFetch:
    def test_available(self, tmp_path):
        lines = {line.name: line for line in data.available_texts(tmp_path)}
        assert tuple(lines) == data.text_names()
        assert [line.status for line in lines.values()] == ["embedded", "missing", "missing", "embedded"]
        assert lines["shakespeare-sample"].size == 399_862
        assert lines["austen"].size is None
        write(tmp_path, "austen.txt", LINES)
        found = next(line for line in data.available_texts(tmp_path) if line.name == "austen")
        assert (found.status, found.size, found.where) == ("found", 3800, str(tmp_path / "text"))

    def test_texts_without_an_official_file_say_how_to_come_by_them(self, tmp_path):
        for name in ("austen", "brown"):
            with pytest.raises(ValueError, match=rf"'{name}' cannot be fetched, .*: put {name}.*into {tmp_path / 'text'}"):
                data.fetch(name, root=tmp_path)
        with pytest.raises(ValueError, match=r"'shakespeare-sample' cannot be fetched: .*; others need no download"):
            data.fetch("shakespeare-sample", root=tmp_path)

    def test_a_whole_text_is_kept(self, real):
        assert data.fetch("tinyshakespeare", root=real) == real / "text"
        official = TEXT_SOURCES["tinyshakespeare"].files[0]
        content = (real / "text" / official.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (official.size, official.sha256)


class TestStream:
    @pytest.mark.parametrize(("length", "batch", "stretch"), [(25, 2, 3), (25, 3, 8), (26, 5, 5), (2, 1, 1), (100, 7, 14)])
    def test_stretches_tile_the_text(self, length, batch, stretch):
        symbols = torch.arange(length)
        stream = Stream(symbols, batch, stretch)
        assert stream.row == (length - 1) // batch
        passages = [
            stream.at(number) for number in range(stream.row)
        ]  # the least that is surely whole passes: `stretch` of them
        inputs, targets, done = (torch.cat(parts) for parts in zip(*passages, strict=True))
        one_pass = torch.arange(batch * stream.row).view(batch, stream.row)
        assert torch.equal(inputs.T, one_pass.repeat(1, stretch))
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(done.nonzero()[:, 0].unique(), torch.arange(1, stretch + 1) * stream.row - 1)
        assert torch.equal(done.all(1), done.any(1))

    def test_a_stretch_depends_on_its_number_alone(self):
        symbols = torch.randint(9, (101,), generator=torch.Generator().manual_seed(0))
        forwards, backwards = Stream(symbols, 4, 6), Stream(symbols, 4, 6)
        ahead = [forwards.at(number) for number in range(20)]
        for number in reversed(range(20)):
            assert all(map(torch.equal, backwards.at(number), ahead[number]))

    def test_refusals(self):
        assert Stream(torch.arange(13), 3, 4).row == 4
        with pytest.raises(ValueError, match=r"12 symbols are too few for 3 rows of 4 steps, which take 13; take fewer rows"):
            Stream(torch.arange(12), 3, 4)
        with pytest.raises(ValueError, match="too few"):
            Stream(torch.arange(0), 1, 1)
        with pytest.raises(ValueError, match="batch must be 1 or more, got 0"):
            Stream(torch.arange(9), 0, 1)
        with pytest.raises(ValueError, match="stretch must be 1 or more, got 0"):
            Stream(torch.arange(9), 1, 0)
        with pytest.raises(ValueError, match="numbered from 0, got -1"):
            Stream(torch.arange(9), 1, 1).at(-1)
