"""Rows of data sets: JSONL, JSON, TSV, CoNLL, SQuAD, and texts labelled by their file."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fastlm.data import DataError

Row = tuple[str, dict[str, Any]]  # where it stands, and its columns

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".tsv": "tsv",
    ".txt": "tsv",
    ".conll": "conll",
    ".iob": "conll",
    ".zip": "labelled",
}


def read(
    path: str | Path,
    format: str | None = None,
    *,
    columns: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    encoding: str = "utf-8",
    fallback: str | None = None,
) -> Iterator[Row]:
    """Yields (where, row) of a file.

    Args:
        path: a file, or for "labelled" also a folder.
        format: "jsonl", "json" (a list of objects, or SQuAD's), "tsv", "conll" or "labelled"; by
            default from the name's ending. What ends in .txt or .tsv and whose first line is a JSON
            object is read as jsonl.
        columns: names of a TSV's columns.
        labels: for "labelled": pattern of the files' names -> label. A file with one line per
            row, or one row per file where the pattern ends in "/*".
        encoding: of the file.
        fallback: an encoding to read with when that one fails.

    Yields:
        "path:line" and the row. SQuAD's rows have context, question, answers, answer; CoNLL's
        have tokens, tags, text and entities ([text, type] pairs).

    Raises:
        DataError: an empty file, one that is no such file, a broken line.
        FileNotFoundError: nothing there.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    kind = format or ("labelled" if path.is_dir() else _SUFFIXES.get(path.suffix.lower()))
    if kind not in _READERS:
        known = ", ".join(_READERS)
        raise DataError(f"{path}: the format is not known by its ending; expected one of {known}")

    def decode(content: bytes, where: str, line: int = 1) -> str:
        for name in filter(None, (encoding, fallback)):
            try:
                return content.decode(name).removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                broken = error
        line += content.count(b"\n", 0, broken.start)
        raise DataError(f"{where}:{line}: not {encoding} text: {broken.reason}")

    count = 0
    for row in _READERS[kind](path, decode, columns, labels or {}):
        count += 1
        yield row
    if not count:
        raise DataError(f"{path}: holds no rows")


def split(rows: Iterable[Row], share: float, *, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(training, validation) rows: a row's side depends on what it holds and on the seed alone.

    So equal rows never stand on both sides, and an evaluation finds the rows that a fine-tuning
    left out.

    Args:
        rows: (where, row) pairs.
        share: of validation, from 0 to 1.
        seed: another seed gives another split.
    """
    if not 0 <= share < 1:
        raise ValueError(f"split: share must be at least 0 and below 1, got {share}")
    sides: tuple[list[Row], list[Row]] = ([], [])
    for where, row in rows:
        held = _fraction(row, seed) < share
        sides[held].append((where, row))
    return sides


def sample(rows: Sequence[Row], count: int | None, *, seed: int = 0) -> list[Row]:
    """`count` rows in an order that depends on the rows and the seed alone; all when None."""
    if count is None or count >= len(rows):
        return list(rows)
    return sorted(rows, key=lambda row: _fraction(row[1], seed + 1))[:count]


def _fraction(row: Mapping[str, Any], seed: int) -> float:
    """A number in [0, 1) made from a row."""
    text = json.dumps([seed, row], sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


Decode = Callable[..., str]  # (bytes, file, the line they begin at) -> text


def _jsonl(path: Path, decode: Decode, columns: Sequence[str], labels: Any) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(decode(line, str(path), number))
            except ValueError as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(f"{where}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
            yield where, row


def _json(path: Path, decode: Decode, columns: Sequence[str], labels: Any) -> Iterator[Row]:
    try:
        values = json.loads(decode(path.read_bytes(), str(path)))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        values = values["data"]
        if values and isinstance(values[0], dict) and "paragraphs" in values[0]:
            yield from _squad(path, values)
            return
    if not isinstance(values, list):
        raise DataError(f"{path}: expected a list of objects, got {type(values).__name__}")
    for i, row in enumerate(values, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {i}: expected an object, got {type(row).__name__}")
        yield f"{path}:row {i}", row


def _squad(path: Path, articles: list[Any]) -> Iterator[Row]:
    count = 0
    try:
        for paragraph in (p for article in articles for p in article["paragraphs"]):
            for question in paragraph["qas"]:
                count += 1
                answers = [answer["text"] for answer in question["answers"]]
                row = {"context": paragraph["context"].strip("\ufeff")}
                row |= {"question": question["question"], "answers": answers}
                yield f"{path}:question {count}", {**row, "answer": answers[0] if answers else ""}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}:question {count}: not as in SQuAD: no {error}") from error


def _tsv(path: Path, decode: Decode, columns: Sequence[str], labels: Any) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            line = decode(raw, str(path), number).rstrip("\r\n")
            if not line:
                continue
            if number == 1 and line.startswith("{"):
                yield from _jsonl(path, decode, columns, labels)
                return
            parts = line.split("\t")
            if not columns:
                columns = parts  # the first line names them
                continue
            if len(parts) < len(columns):
                raise DataError(
                    f"{path}:{number}: expected {len(columns)} columns between tabs"
                    f" ({', '.join(columns)}), got {len(parts)}"
                )
            yield f"{path}:{number}", dict(zip(columns, parts, strict=False))


def _conll(path: Path, decode: Decode, columns: Sequence[str], labels: Any) -> Iterator[Row]:
    tokens: list[str] = []
    tags: list[str] = []
    first = 1
    with open(path, "rb") as file:
        for number, raw in enumerate([*file, b""], 1):
            line = decode(raw, str(path), number).strip()
            if not line:
                if tokens:
                    yield f"{path}:{first}", sentence(tokens, tags)
                tokens, tags, first = [], [], number + 1
                continue
            parts = line.split()
            if len(parts) < 2:
                raise DataError(f"{path}:{number}: expected a word and its tag, got {line!r}")
            tokens.append(parts[0])
            tags.append(parts[-1])


def sentence(tokens: list[str], tags: list[str]) -> dict[str, Any]:
    """The row of a tagged sentence (IOB tags: B-type, I-type, O)."""
    entities: list[tuple[str, str]] = []
    kind = None  # of the entity that the last word belongs to
    for token, tag in zip(tokens, tags, strict=True):
        prefix, _, name = tag.partition("-")
        if prefix not in ("B", "I"):
            kind = None
        elif prefix == "I" and kind == name:
            entities[-1] = (f"{entities[-1][0]} {token}", name)
        else:
            entities.append((token, name))
            kind = name
    return {"text": " ".join(tokens), "tokens": tokens, "tags": tags, "entities": entities}


def _labelled(
    path: Path, decode: Decode, columns: Sequence[str], labels: Mapping[str, str]
) -> Iterator[Row]:
    if not labels:
        raise DataError(f"{path}: expected labels by file name, got none")
    for name, read_bytes in _members(path):
        for pattern, label in labels.items():
            if not fnmatch(name, pattern):
                continue
            where = f"{path}/{name}"
            content = decode(read_bytes(), where)
            if pattern.endswith("/*"):
                yield where, {"text": content.strip(), "label": label}
            else:
                for number, line in enumerate(content.splitlines(), 1):
                    if line.strip():
                        yield f"{where}:{number}", {"text": line.strip(), "label": label}
            break


def _members(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The files of a folder or a zip, by name."""
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            yield str(file.relative_to(path)), file.read_bytes
        return
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: expected a folder or a zip file")
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith("/"):
                yield name, lambda name=name: archive.read(name)  # type: ignore[misc]


_READERS: dict[str, Callable[..., Iterator[Row]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "tsv": _tsv,
    "conll": _conll,
    "labelled": _labelled,
}
