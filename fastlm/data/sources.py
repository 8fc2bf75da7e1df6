"""Documents out of .txt, .jsonl, folders and .zip, a piece at a time."""

from __future__ import annotations

import codecs
import contextlib
import fnmatch
import hashlib
import io
import itertools
import json
import os
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from fastlm.data import DataError

TEXT_PATTERNS = ("*.txt", "*.text", "*.md")
LINES_PATTERNS = ("*.jsonl", "*.ndjson")
LONGEST = 1 << 22  # characters of a document held at once; what is longer comes in parts
_CHUNK = 1 << 20
_MAGIC = {
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"PK\x03\x04": "a zip file; name it .zip",
    b"PAR1": "a Parquet file; write its text column as .jsonl first",
    b"%PDF": "a PDF file; extract its text first",
    b"\xff\xfe": "UTF-16 text; try --encoding utf-16",
    b"\xfe\xff": "UTF-16 text; try --encoding utf-16",
}


@dataclass(frozen=True)
class Reading:
    """How files become documents.

    Attributes:
        separator: what stands between the documents of a text file; None: one document a file.
        text_field: the key of a JSON line that holds its text.
        include: patterns of file names taken from folders and archives, in place of the usual.
        encoding: of text and JSON lines.
        errors: "strict" refuses bytes that are not text, "replace" puts U+FFFD in their place.
    """

    separator: str | None = None
    text_field: str = "text"
    include: Sequence[str] = ()
    encoding: str = "utf-8"
    errors: str = "strict"

    def __post_init__(self) -> None:
        if self.separator == "":
            raise DataError("the separator must not be empty")
        if self.errors not in ("strict", "replace"):
            raise DataError(f"errors must be strict or replace, got {self.errors!r}")
        try:
            b"a".decode(self.encoding, "replace")
            codecs.getincrementaldecoder(self.encoding)
        except LookupError as error:
            raise DataError(f"encoding: {error}") from error


class Document(NamedTuple):
    """A document, or a part of a very long one: `goes_on` says that another part follows."""

    text: str
    label: str
    goes_on: bool


@dataclass
class _File:
    name: str
    size: int
    path: Path
    member: str | None = None


@dataclass
class Sources:
    """The files behind a list of paths, found and checked before the first is read.

    Args:
        paths: files, folders (searched with all below them, but not what is hidden, .NAME) and
            .zip archives.
        reading: how they become documents.

    Attributes:
        size: bytes of all files, unpacked.
        read: bytes read so far.
        ignored: files in folders and archives whose names were not wanted.
        digest: SHA-256 over names and bytes of the files, complete when they are read.

    Raises:
        DataError: a path is missing or unreadable, or there is nothing to read in it.
    """

    paths: Sequence[str | os.PathLike[str]]
    reading: Reading = field(default_factory=Reading)
    size: int = 0
    read: int = 0
    ignored: int = 0

    def __post_init__(self) -> None:
        self._files: list[_File] = []
        self._hash = hashlib.sha256()
        self._listed: list[dict[str, Any]] = []
        for path in map(Path, self.paths):
            before = len(self._files)
            for found in _find(path, self.reading.include):
                if isinstance(found, _File):
                    self._files.append(found)
                else:
                    self.ignored += 1
            if len(self._files) == before:
                patterns = self.reading.include or (*TEXT_PATTERNS, *LINES_PATTERNS)
                raise DataError(
                    f"{path}: holds no file named {', '.join(patterns)}; --include takes others"
                )
        self.size = sum(file.size for file in self._files)

    def facts(self) -> dict[str, Any]:
        """For a manifest: how much was read, its hash, the first files with theirs."""
        return {
            "files": len(self._files),
            "ignored": self.ignored,
            "bytes": self.read,
            "sha256": self._hash.hexdigest(),
            "first": self._listed,
        }

    def notes(self) -> list[str]:
        """What a reader of the manifest should know."""
        if not self.ignored:
            return []
        return [f"files passed over for their names: {self.ignored} (--include chooses)"]

    def documents(self) -> Iterator[Document]:
        """All documents, in the order of the paths and of the names in them."""
        for path, files in itertools.groupby(self._files, lambda file: file.path):
            with contextlib.ExitStack() as stack:
                archive: zipfile.ZipFile | None = None
                handle: IO[bytes]
                for file in files:
                    try:
                        if file.member is None:
                            handle = stack.enter_context(open(path, "rb"))
                        else:
                            archive = archive or stack.enter_context(zipfile.ZipFile(path))
                            handle = archive.open(file.member)
                        with handle:
                            yield from self._file(file, handle)
                    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                        raise DataError(f"{file.name}: cannot be unpacked: {error}") from error

    def _file(self, file: _File, handle: IO[bytes]) -> Iterator[Document]:
        digest, before = hashlib.sha256(), self.read
        text = self._decoded(handle, file.name, digest)
        if _named(file.name, LINES_PATTERNS):
            yield from self._lines(text, file.name)
        else:
            yield from self._texts(text, file.name)
        entry = {"file": file.name, "bytes": self.read - before, "sha256": digest.hexdigest()}
        self._hash.update(json.dumps(entry).encode())
        if len(self._listed) < 100:
            self._listed.append(entry)

    def _decoded(self, file: IO[bytes], name: str, digest: Any) -> Iterator[str]:
        """The text of a file in pieces, with line ends as \\n."""
        strict = self.reading.errors == "strict"
        decoder = codecs.getincrementaldecoder(self.reading.encoding)(self.reading.errors)
        lines = io.IncrementalNewlineDecoder(None, translate=True)
        place, first = 0, True
        while True:
            piece = file.read(_CHUNK)
            digest.update(piece)
            if first and strict:
                _refuse_known(name, piece, self.reading.encoding)
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{name}: byte {place - held + error.start} is not {self.reading.encoding} "
                    f"({error.object[error.start : error.start + 4].hex(' ')}: {error.reason}); "
                    "--errors replace or another --encoding reads it"
                ) from error
            if strict and "\0" in text:
                at = place - held + max(piece.find(b"\0"), 0)
                raise DataError(
                    f"{name}: byte {at} is 0: not a text file? --errors replace reads it"
                )
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            place += len(piece)
            self.read += len(piece)
            yield lines.decode(text, final=not piece)
            if not piece:
                return

    def _texts(self, pieces: Iterable[str], name: str) -> Iterator[Document]:
        separator = self.reading.separator
        if separator is None:
            for text, goes_on in _parts(pieces):
                yield Document(text, name, goes_on)
            return
        number, rest, began = 1, "", False  # began: a part of this document is out already
        for piece in pieces:
            *whole, rest = (rest + piece).split(separator)
            for text in whole:
                text = text.rstrip("\n") if began else text.strip("\n")
                for part, goes_on in _parts([text]):
                    yield Document(part, f"{name}#{number}", goes_on)
                number, began = number + 1, False
            while len(rest) > LONGEST + len(separator):
                cut = _cut(rest)
                part = rest[:cut] if began else rest[:cut].lstrip("\n")
                yield Document(part, f"{name}#{number}", True)
                rest, began = rest[cut:], True
        rest = rest.rstrip("\n") if began else rest.strip("\n")
        if rest or began:
            for part, goes_on in _parts([rest]):
                yield Document(part, f"{name}#{number}", goes_on)

    def _lines(self, pieces: Iterable[str], name: str) -> Iterator[Document]:
        number, rest = 0, ""
        for piece in pieces:
            *whole, rest = (rest + piece).split("\n")
            for line in whole:
                number += 1
                if line.strip():
                    yield from self._line(line, f"{name}:{number}")
            if len(rest) > 16 * LONGEST:
                raise DataError(
                    f"{name}:{number + 1}: a line of over {16 * LONGEST:,} characters: not JSON "
                    "lines (one object a line)?"
                )
        if rest.strip():
            yield from self._line(rest, f"{name}:{number + 1}")

    def _line(self, line: str, label: str) -> Iterator[Document]:
        key = self.reading.text_field
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{label}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{label}: expected an object, got {type(row).__name__}")
        if key not in row:
            raise DataError(
                f"{label}: no field {key!r}; there are {', '.join(map(repr, row)) or 'none'} "
                "(--text-field chooses)"
            )
        text = row[key]
        if not isinstance(text, str):
            raise DataError(
                f"{label}: field {key!r}: expected a string, got {type(text).__name__}"
                + (" (conversations are for `fastlm finetune`)" if isinstance(text, list) else "")
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if self.reading.errors == "strict":
                raise DataError(
                    f"{label}: field {key!r}: half a character at {error.start}; "
                    "--errors replace reads it"
                ) from error
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for part, goes_on in _parts([text]):
            yield Document(part, label, goes_on)


def _parts(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """A document in parts of at most LONGEST characters, with whether another follows."""
    held: list[str] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        while size > LONGEST:
            text = "".join(held)
            cut = _cut(text)
            yield text[:cut], True
            held, size = [text[cut:]], size - cut
    yield "".join(held), False


def _cut(text: str) -> int:
    """Where to cut a text longer than LONGEST: before a line end, else a space, else anywhere."""
    for mark in "\n", " ":
        at = text.rfind(mark, 1, LONGEST)
        if at > 0:
            return at
    return LONGEST


def _refuse_known(name: str, head: bytes, encoding: str) -> None:
    if codecs.lookup(encoding).name != "utf-8":
        return
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{name}: expected text, found {what}")


def _find(path: Path, include: Sequence[str]) -> Iterator[_File | None]:
    """The files to read below a path; None for each that is passed over."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if stat.S_ISDIR(status.st_mode):
        for root, folders, files in os.walk(path, onerror=_raise):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for file in (Path(root, name) for name in sorted(files)):
                if file.name.startswith("."):
                    continue
                if _named(file.name, ["*.zip"]) and file.is_file():
                    yield from _members(file, include)
                elif _wanted(file.name, include) and file.is_file():
                    yield _whole(file)
                else:
                    yield None
    elif _named(path.name, ["*.zip"]):
        yield from _members(path, include)
    elif stat.S_ISREG(status.st_mode):
        yield _whole(path)
    else:
        raise DataError(f"{path}: expected a file or a folder")


def _raise(error: OSError) -> None:
    raise DataError(f"{error.filename}: {error.strerror}") from error


def _whole(path: Path) -> _File:
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise DataError(f"{path}: no permission to read it")
    return _File(_shown(str(path)), path.stat().st_size, path)


def _members(path: Path, include: Sequence[str]) -> Iterator[_File | None]:
    try:
        with zipfile.ZipFile(path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                if info.is_dir() or _hidden(info.filename):
                    continue
                if not _wanted(Path(info.filename).name, include):
                    yield None
                    continue
                if info.flag_bits & 1:
                    raise DataError(f"{path}: {info.filename} is encrypted; unpack it first")
                name = _shown(f"{path}:{info.filename}")
                yield _File(name, info.file_size, path, info.filename)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path}: not a zip archive that can be read: {error}") from error


def _hidden(member: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in member.split("/"))


def _wanted(name: str, include: Sequence[str]) -> bool:
    return _named(name, include or (*TEXT_PATTERNS, *LINES_PATTERNS))


def _named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern.lower()) for pattern in patterns)


def _shown(name: str) -> str:
    """A file name as text, whatever its bytes."""
    return os.fsencode(name).decode("utf-8", "replace")
