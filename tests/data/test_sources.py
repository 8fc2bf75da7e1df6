"""Files to documents."""

from __future__ import annotations

import gzip
import json
import os
import zipfile

import pytest

from fastlm.data import DataError, sources
from fastlm.data.sources import Reading, Sources


def read(*paths, **reading):
    return [(d.text, d.label) for d in Sources(paths, Reading(**reading)).documents()]


def texts(*paths, **reading):
    return [text for text, _ in read(*paths, **reading)]


def put(folder, name, content):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.fixture(params=[1 << 20, 1, 7])
def chunk(request, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK", request.param)


def test_a_text_file_is_one_document(tmp_path, chunk):
    file = put(tmp_path, "a.txt", " äb\r\n€\rc\n\n")
    assert read(file) == [(" äb\n€\nc\n\n", str(file))]
    assert texts(put(tmp_path, "bom.txt", "\ufeffa")) == ["a"]
    assert texts(put(tmp_path, "empty.txt", "")) == [""]


def test_separators(tmp_path, chunk):
    file = put(tmp_path, "a.txt", "one\nline<|endoftext|>\ntwo\n<|endoftext|>\n\n")
    assert read(file, separator="<|endoftext|>") == [
        ("one\nline", f"{file}#1"),
        ("two", f"{file}#2"),
    ]
    file = put(tmp_path, "b.txt", "a\r\nb\r\n\r\nc")
    assert texts(file, separator="\n\n") == ["a\nb", "c"]


def test_json_lines(tmp_path, chunk):
    rows = ['{"text": "a\\nb", "n": 1}', "", '{"text": "\\u2028ä"}']
    file = put(tmp_path, "a.jsonl", "\n".join(rows))
    assert read(file) == [("a\nb", f"{file}:1"), ("\u2028ä", f"{file}:3")]
    file = put(tmp_path, "b.JSONL", '{"body": "x"}\n')
    assert texts(file, text_field="body") == ["x"]


def test_folders_and_archives_in_order(tmp_path):
    put(tmp_path, "in/b.txt", "b")
    put(tmp_path, "in/a/z.md", "z")
    put(tmp_path, "in/a.jsonl", '{"text": "j"}')
    put(tmp_path, "in/picture.png", b"\x89PNG")
    put(tmp_path, "in/raw.neg", "n")
    put(tmp_path, "in/.git/notes.txt", "hidden")
    put(tmp_path, "in/.hidden.txt", "hidden")
    with zipfile.ZipFile(tmp_path / "in" / "c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/2.txt", "2")
        archive.writestr("x/1.txt", "1")
        archive.writestr("__MACOSX/x/._1.txt", "hidden")
        archive.writestr("x/3.neg", "3")
    assert texts(tmp_path / "in") == ["j", "b", "1", "2", "z"]
    found = Sources([tmp_path / "in"])
    list(found.documents())
    assert found.ignored == 3
    assert found.read == found.size == sum(entry["bytes"] for entry in found.facts()["first"])
    assert "passed over for their names: 3 (" in found.notes()[0]
    assert texts(tmp_path / "in", include=["*.neg"]) == ["3", "n"]
    assert texts(tmp_path / "in" / "raw.neg") == ["n"]
    with pytest.raises(DataError, match=r"holds no file named \*\.csv; --include takes others"):
        read(tmp_path / "in", include=["*.csv"])


def test_the_digest_covers_names_and_bytes(tmp_path):
    def digest():
        found = Sources([tmp_path])
        list(found.documents())
        return found.facts()["sha256"]

    file = put(tmp_path, "a.txt", "a")
    first = digest()
    assert digest() == first
    put(tmp_path, "a.txt", "b")
    second = digest()
    file.rename(tmp_path / "b.txt")
    assert len({first, second, digest()}) == 3


def test_long_documents_come_in_parts(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(sources, "LONGEST", 20)
    words = "the quick brown fox\njumps over it. " * 9 + "x" * 70
    file = put(tmp_path, "a.txt", words)
    for reading in (Reading(), Reading(separator="||")):
        parts = list(Sources([file], reading).documents())
        assert "".join(part.text for part in parts) == words
        assert all(len(part.text) <= 20 for part in parts)
        assert [part.goes_on for part in parts] == [True] * (len(parts) - 1) + [False]
    row = put(tmp_path, "a.jsonl", json.dumps({"text": words[:250]}))
    assert "".join(texts(row)) == words[:250]
    two = put(tmp_path, "a.txt", f"\n{words}\n||\n{words}||")
    labels = [label for _, label in read(two, separator="||")]
    assert "".join(texts(two, separator="||")) == words * 2
    assert labels == sorted(labels) and len(set(labels)) == 2


def bad(tmp_path, name, content, match, **reading):
    file = put(tmp_path, name, content)
    with pytest.raises(DataError, match=match) as error:
        read(file, **reading)
    assert str(file) in str(error.value)


def test_bytes_that_are_not_text(tmp_path, chunk):
    bad(tmp_path, "a.txt", "abä€".encode() + b"\xff\xe9z", r"byte 7 is not utf-8 \(ff")
    bad(tmp_path, "a.txt", b"ab\xe2\x82", r"byte 2 is not utf-8 \(e2")
    bad(tmp_path, "a.txt", b"text\0more", r"byte 4 is 0")
    file = put(tmp_path, "b.txt", b"a\xffb\0c")
    assert texts(file, errors="replace") == ["a\ufffdb\0c"]
    assert texts(put(tmp_path, "c.txt", b"caf\xe9"), encoding="latin-1") == ["café"]
    assert texts(put(tmp_path, "d.txt", "é\n".encode("utf-16")), encoding="utf-16") == ["é\n"]


def test_files_of_other_kinds_are_named(tmp_path):
    bad(tmp_path, "a.txt", gzip.compress(b"a"), "expected text, found a gzip file")
    bad(tmp_path, "a.jsonl", "a".encode("utf-16"), "UTF-16 text; try --encoding")
    bad(tmp_path, "a.zip", b"no archive", "not a zip archive")


def test_bad_rows_are_named(tmp_path):
    bad(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": ', "a.jsonl:2: not JSON")
    bad(tmp_path, "a.jsonl", "[1]", "a.jsonl:1: expected an object, got list")
    bad(tmp_path, "a.jsonl", '{"body": "a"}', r"no field 'text'; there are 'body' \(--text-field")
    bad(tmp_path, "a.jsonl", '{"text": [{"role": "user"}]}', "expected a string, got list .*fine")
    bad(tmp_path, "a.jsonl", '{"text": "\\ud800"}', "half a character at 0")
    bad(tmp_path, "a.jsonl", "[" * 100_000, "not JSON")
    assert texts(put(tmp_path, "b.jsonl", '{"text": "\\ud800"}'), errors="replace") == ["\ufffd"]


def test_damaged_and_locked_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x.txt", "some text in here")
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    place = raw.index(b"some text")
    raw[place] ^= 1
    bad(tmp_path, "a.zip", bytes(raw), "x.txt: cannot be unpacked: Bad CRC")
    raw[place] ^= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    bad(tmp_path, "a.zip", bytes(raw), "x.txt is encrypted")


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match=r"no\.txt: No such file"):
        read(tmp_path / "no.txt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: expected a file or a folder"):
        read(tmp_path / "pipe")


def test_no_permission_to_read(tmp_path, nobody):
    put(tmp_path, "a.txt", "a").chmod(0)
    with nobody(tmp_path), pytest.raises(DataError, match=r"a\.txt: no permission"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("reading", "match"),
    [
        ({"separator": ""}, "separator must not be empty"),
        ({"errors": "ignore"}, "errors must be strict or replace"),
        ({"encoding": "utf-99"}, "encoding: unknown encoding"),
        ({"encoding": "hex"}, "encoding: 'hex' is not a text encoding"),
    ],
)
def test_wrong_options(reading, match):
    with pytest.raises(DataError, match=match):
        Reading(**reading)
