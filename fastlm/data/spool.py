"""Clean documents on disk between two passes, with what is known about each."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

_BUFFER = 1 << 20
_ROW = np.dtype(
    [
        ("offset", "<i8"),  # of the label, which the text follows
        ("label", "<i4"),  # bytes
        ("text", "<i8"),  # bytes
        ("characters", "<i8"),
        ("joins", "?"),
        ("digest", "<u8", 2),
    ]
)


class Spool:
    """A file of texts, written once and then read by number.

    Args:
        folder: made here; removing it is the caller's.
        bands: how many MinHash keys come with each text.

    Attributes:
        count: documents.
        digests: their BLAKE2b hashes, uint64 [count, 2].
        lengths: their characters, int64 [count].
        joins: whether one is a further part of the text before, bool [count].
        keys: the MinHash keys, uint64 [count, bands].
    """

    def __init__(self, folder: Path, bands: int):
        folder.mkdir()
        self.count, self._bands, self._offset = 0, bands, 0
        self._paths = [folder / name for name in ("texts", "rows", "keys")]
        self._files: list[BinaryIO] = [open(p, "wb", _BUFFER) for p in self._paths]  # noqa: SIM115

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def add(self, text: str, label: str, joins: bool, keys: np.ndarray | None) -> None:
        """Adds a document."""
        data, name = text.encode(), label.encode()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        row = np.zeros(1, _ROW)
        values = (self._offset, len(name), len(data), len(text), joins)
        row[0] = (*values, np.frombuffer(digest, "<u8"))
        texts, rows, bands = self._files
        texts.write(name)
        texts.write(data)
        rows.write(row.tobytes())
        if keys is not None:
            bands.write(keys.tobytes())
        self._offset += len(name) + len(data)
        self.count += 1

    def finish(self) -> None:
        """Ends writing; everything below can be read from now on."""
        for file in self._files:
            file.close()
        if self.count == 0:
            return
        self._rows = np.memmap(self._paths[1], _ROW, "r")
        self.digests = np.array(self._rows["digest"])
        self.lengths = np.array(self._rows["characters"])
        self.joins = np.array(self._rows["joins"])
        if self._bands:
            shape = (self.count, self._bands)
            self.keys = np.memmap(self._paths[2], "<u8", "r", shape=shape)
        self._files = [open(self._paths[0], "rb")]  # noqa: SIM115

    def read(self, i: int) -> tuple[str, str]:
        """The label and the text of document i."""
        row = self._rows[i]
        label, text = int(row["label"]), int(row["text"])
        data = os.pread(self._files[0].fileno(), label + text, int(row["offset"]))
        return data[:label].decode(), data[label:].decode()

    def characters(self, kept: np.ndarray) -> set[str]:
        """Every character that occurs in the documents kept."""
        seen: set[str] = set()
        for i in np.flatnonzero(kept).tolist():
            seen.update(self.read(i)[1])
        return seen
