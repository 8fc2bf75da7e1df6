"""Token shards: what `fastlm prepare` writes and training reads.

    FOLDER/manifest.json                what is in it, with sizes and hashes
    FOLDER/tokenizer/                   the tokenizer, as Hugging Face lays it out
    FOLDER/SPLIT/00000.bin, 00001.bin   tokens, uint16 or uint32, little-endian, nothing else
    FOLDER/SPLIT/offsets.bin            int64: where each document starts, and the end of the last

SPLIT is "train" or "validation". Shards are mapped into memory, not read: opening takes the same
time for any size, and several processes share one copy.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from fastlm.data import DataError

FORMAT, VERSION = "fastlm-tokens", 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
SHARD_TOKENS = 1 << 28  # 512 MiB of uint16
_EDGE = 1 << 16  # bytes at each end of a file that opening it checks


def token_dtype(vocab: int) -> np.dtype[Any]:
    """The narrowest type on disk that holds tokens 0 … vocab-1."""
    return np.dtype("<u2" if vocab <= 1 << 16 else "<u4")


class SplitWriter:
    """Writes the shards of one split into `folder`/`split`, document by document.

    Args:
        folder: the data folder being made.
        split: "train" or "validation".
        vocab: tokens are below it.
        shard_tokens: the size of a shard; a document may go on in the next one.
    """

    def __init__(self, folder: Path, split: str, vocab: int, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.split, self.vocab = folder, split, vocab
        self.dtype = token_dtype(vocab)
        self.shard_tokens = shard_tokens
        self.tokens = self.documents = 0
        self._files: list[dict[str, Any]] = []
        self._shard: _HashedFile | None = None
        (folder / split).mkdir(parents=True)
        self._offsets = _HashedFile(folder, f"{split}/offsets.bin")
        self._offsets.write(np.zeros(1, "<i8"))

    def append(self, tokens: Sequence[int] | np.ndarray, ends: bool = True) -> None:
        """Adds tokens to the current document, and ends it unless told otherwise."""
        values = np.asarray(tokens, dtype=np.int64)
        if values.size and not 0 <= values.min() <= values.max() < self.vocab:
            bad = int(values.min()) if values.min() < 0 else int(values.max())
            raise DataError(
                f"{self.split}: tokens must be in [0, {self.vocab}), got {bad}: "
                "the tokenizer gives tokens beyond its own vocabulary"
            )
        values = values.astype(self.dtype)
        while values.size:
            if self._shard is None:
                name = f"{self.split}/{len(self._files):05d}.bin"
                self._shard = _HashedFile(self.folder, name)
            room = self.shard_tokens - self._shard.size // self.dtype.itemsize
            self._shard.write(values[:room])
            self.tokens += min(room, values.size)
            values = values[room:]
            if values.size:
                self._end_shard()
        if ends:
            self.documents += 1
            self._offsets.write(np.array([self.tokens], "<i8"))

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._files.append(self._shard.close())
            self._shard = None

    def close(self) -> dict[str, Any]:
        """Ends the split. Returns its entry of the manifest."""
        self._end_shard()
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "offsets": self._offsets.close(),
            "shards": self._files,
        }


class _HashedFile:
    """A file that knows its size and hash when it is closed."""

    def __init__(self, folder: Path, name: str):
        self.name, self.path, self.size = name, folder / name, 0
        self._file: BinaryIO = open(self.path, "wb")  # noqa: SIM115 closed by close()
        self._hash = hashlib.sha256()

    def write(self, values: np.ndarray) -> None:
        data = values.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {
            "file": self.name,
            "bytes": self.size,
            "sha256": self._hash.hexdigest(),
            "edges": _edges(self.path),
        }


def _edges(path: Path) -> str:
    """The hash of a file's first and last bytes: quick to check, seldom equal by chance."""
    with open(path, "rb") as file:
        head = file.read(_EDGE)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _EDGE))
        return hashlib.sha256(head + file.read(_EDGE)).hexdigest()[:32]


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_manifest(
    folder: Path,
    *,
    splits: dict[str, dict[str, Any]],
    vocab: int,
    eos: int | None,
    **facts: Any,
) -> dict[str, Any]:
    """Writes `folder`/manifest.json, the last file of a data folder.

    Args:
        folder: the data folder; its shards and its tokenizer are written.
        splits: what `SplitWriter.close` returned, by split; more facts may be added to each.
        vocab: tokens are below it.
        eos: the token that ends documents, or None.
        facts: anything else for JSON.
    """
    tokenizer = {
        f"tokenizer/{file.name}": file_hash(file)
        for file in sorted((folder / "tokenizer").iterdir())
    }
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": token_dtype(vocab).name,
        "vocab": vocab,
        "eos": eos,
        "splits": splits,
        "tokenizer": tokenizer,
        **facts,
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a data folder, checked for format and version."""
    file = Path(path) / MANIFEST
    if not Path(path).is_dir():
        raise DataError(f"{path}: no such folder; `fastlm prepare` makes one")
    if not file.is_file():
        raise DataError(f"{file}: the file is missing: not a folder that `fastlm prepare` wrote")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = (manifest["format"], manifest["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not a manifest of `fastlm prepare`: {error!r}") from error
    if found != (FORMAT, VERSION):
        raise DataError(f"{file}: expected format {FORMAT} version {VERSION}, got {found}")
    return manifest


class TokenDataset:
    """The documents of one split as tokens, mapped into memory.

    Args:
        path: the data folder.
        split: "train" or "validation".

    Attributes:
        tokens: all tokens one after the other, 1-D uint16 or uint32: a memory map, or an object
            of the same indexing where there are several shards. A slice inside one shard is a
            view, one across shards a copy.
        offsets: int64 [documents + 1]; document i is tokens[offsets[i]:offsets[i + 1]].
        eos: the token that ends documents, or None.
        vocab: tokens are below it.
        manifest: what `fastlm prepare` noted.
        tokenizer: the folder of the tokenizer, path/"tokenizer".

    Raises:
        DataError: a file is missing, truncated or not the one that was written. Opening checks
            sizes and both ends of every file; `verify` reads them whole.
    """

    def __init__(self, path: str | os.PathLike[str], split: Literal["train", "validation"]):
        self.path, self.split = Path(path), split
        if split not in SPLITS:
            raise DataError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.manifest = read_manifest(path)
        self.tokenizer = self.path / "tokenizer"
        try:
            self.eos: int | None = self.manifest["eos"]
            self.vocab = int(self.manifest["vocab"])
            dtype = np.dtype(self.manifest["dtype"])
            facts = self.manifest["splits"][split]
            self._files = [facts["offsets"], *facts["shards"]]
            for entry in self._files:
                _check_file(self.path, entry)
            tokens = int(facts["tokens"])
            counts = [entry["bytes"] // dtype.itemsize for entry in facts["shards"]]
            documents = int(facts["documents"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{self.path / MANIFEST}: an entry is missing: {error!r}") from error
        self.offsets = np.memmap(self.path / facts["offsets"]["file"], "<i8", mode="r")
        ends = (len(self.offsets) - 1, int(self.offsets[0]), int(self.offsets[-1]))
        if ends != (documents, 0, tokens) or sum(counts) != tokens:
            raise DataError(
                f"{self.path}: {split} should hold {documents} documents and {tokens} tokens; "
                f"its files hold {ends[0]} and {sum(counts)}, the last offset is {ends[2]}"
            )
        shards = [
            np.memmap(self.path / entry["file"], dtype.newbyteorder("<"), mode="r")
            for entry in facts["shards"]
        ]
        self.tokens: np.ndarray | Shards
        if len(shards) > 1:
            self.tokens = Shards(shards)
        else:
            self.tokens = shards[0] if shards else np.empty(0, dtype)

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    def document(self, i: int) -> np.ndarray:
        """The tokens of document i, its end token included."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"document must be in [0, {len(self)}), got {i}")
        i %= len(self)
        return self.tokens[int(self.offsets[i]) : int(self.offsets[i + 1])]

    def require(self, block: int) -> None:
        """Raises DataError where there are not even `block` tokens and one to predict."""
        if len(self.tokens) <= block:
            raise DataError(
                f"{self.path}: {self.split} holds {len(self.tokens)} tokens; "
                f"a block of {block} needs {block + 1}"
            )

    def verify(self) -> None:
        """Reads every file of the split and compares its hash; raises DataError."""
        named = [(entry["file"], entry["sha256"]) for entry in self._files]
        for name, digest in [*named, *self.manifest["tokenizer"].items()]:
            if not (self.path / name).is_file() or file_hash(self.path / name) != digest:
                raise DataError(f"{self.path / name}: not the file that was written")

    def __repr__(self) -> str:
        return (
            f"TokenDataset({str(self.path)!r}, {self.split!r}): {len(self):,} documents, "
            f"{len(self.tokens):,} tokens below {self.vocab:,}"
        )


def _check_file(folder: Path, entry: dict[str, Any]) -> None:
    path = folder / entry["file"]
    if not path.is_file():
        raise DataError(f"{path}: the file is missing")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise DataError(f"{path}: expected {entry['bytes']} bytes, got {size}")
    if _edges(path) != entry["edges"]:
        raise DataError(f"{path}: not the file that was written: its first or last bytes differ")


class Shards:
    """Several arrays that are indexed as one, without copying them together."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.dtype = parts[0].dtype
        self.shape = (int(self._starts[-1]),)
        self.ndim = 1

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | np.ndarray) -> Any:
        """One token, the tokens of a slice, or those at an array of indices."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            return self._range(start, max(start, stop))
        if isinstance(index, (int, np.integer)):
            if not -len(self) <= index < len(self):
                raise IndexError(f"index must be in [0, {len(self)}), got {index}")
            index %= len(self)
            part = int(np.searchsorted(self._starts, index, "right")) - 1
            return self._parts[part][index - self._starts[part]]
        at = np.asarray(index)
        if at.dtype.kind not in "iu":
            raise TypeError(f"index must be an integer, a slice or integers, got {at.dtype}")
        at = np.where(at < 0, at + len(self), at)
        if at.size and not 0 <= at.min() <= at.max() < len(self):
            raise IndexError(f"indices must be in [0, {len(self)})")
        which = np.searchsorted(self._starts, at, "right") - 1
        out = np.empty(at.shape, self.dtype)
        for part in np.unique(which):
            here = which == part
            out[here] = self._parts[part][at[here] - self._starts[part]]
        return out

    def _range(self, start: int, stop: int) -> np.ndarray:
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        pieces = []
        for part, begin in zip(self._parts[first:], self._starts[first:], strict=False):
            if begin >= stop:
                break
            pieces.append(part[max(start - begin, 0) : stop - begin])
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("shards become one array only by a copy")
        return np.asarray(self._range(0, len(self)), dtype)
