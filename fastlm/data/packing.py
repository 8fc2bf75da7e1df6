"""Tokenised documents as batches."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fastlm.data.batches import IGNORE, Batch

_Integers = npt.NDArray[Any]


class Tokens(Protocol):
    """Documents one after the other, as `fastlm.data.shards.TokenDataset` holds them."""

    @property
    def tokens(self) -> Any:
        """[total] token numbers, of any integer type, sliced like an array."""

    @property
    def offsets(self) -> _Integers:
        """[documents + 1] int64, from 0 to total."""


class PackedDocuments:
    """A source of rows that hold documents, one after the other.

    Args:
        dataset: the documents.
        block: tokens in a row.
        batch: rows in a micro-batch; the last of an epoch may have fewer.
        seed: of the order.
        boundaries: whether documents are kept apart. With them every document's tokens are
            predicted from that document alone, each epoch covers all documents once in a new order,
            and a document that meets the end of a row goes on in another one. Without, the rows are
            windows of the whole text: random ones, or all of them in their order.
        shuffle: False for validation: the same batches in the same order each epoch.

    Raises:
        ValueError: fewer tokens than one row needs, or fewer than one row.
    """

    def __init__(
        self,
        dataset: Tokens,
        block: int,
        batch: int,
        seed: int = 0,
        boundaries: bool = True,
        *,
        shuffle: bool = True,
    ) -> None:
        for name, value in (("block", block), ("batch", batch)):
            if value < 1:
                raise ValueError(f"PackedDocuments: {name} must be 1 or more, got {value}")
        self.block, self.rows_per_batch, self.seed = block, batch, seed
        self.boundaries, self.shuffle = boundaries, shuffle
        self.dataset = dataset
        self._tokens, self._offsets = dataset.tokens, np.asarray(dataset.offsets, dtype=np.int64)
        total = len(self._tokens)
        if boundaries:  # a document of n tokens has n - 1 to predict
            self._pairs = int(np.maximum(np.diff(self._offsets) - 1, 0).sum())
        else:
            self._pairs = max(total - 1, 0)
        if self._pairs < block:
            raise ValueError(
                f"the corpus is smaller than one block: {total} tokens in"
                f" {len(self._offsets) - 1} documents have {self._pairs} to predict, a row needs"
                f" {block}; take a smaller block or more text"
            )
        self.rows = -(-self._pairs // block)
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def __len__(self) -> int:
        return -(-self.rows // self.rows_per_batch)

    def describe(self) -> dict[str, Any]:
        """What makes the batches."""
        manifest = getattr(self.dataset, "manifest", None)
        shards = manifest["splits"][self.dataset.split]["shards"] if manifest else []  # type: ignore[attr-defined]
        return {
            "sha256": [shard["sha256"] for shard in shards],
            "kind": "documents" if self.boundaries else "windows",
            "block": self.block,
            "batch": self.rows_per_batch,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "tokens": len(self._tokens),
            "documents": len(self._offsets) - 1,
        }

    def batch(self, index: int) -> Batch:
        """Micro-batch `index`; see `Source`."""
        epoch, place = divmod(index, len(self))
        first = place * self.rows_per_batch
        count = min(self.rows_per_batch, self.rows - first)
        if self.boundaries:
            return self._packed(self._order(epoch if self.shuffle else 0), first, count)
        starts = np.arange(first, first + count) * self.block
        if self.shuffle:
            random = np.random.default_rng((self.seed, index))
            starts = random.integers(0, self._pairs - self.block + 1, self.rows_per_batch)
        return self._windows(starts)

    def _windows(self, starts: _Integers) -> Batch:
        tokens = np.zeros((len(starts), self.block), np.int64)
        targets = np.full((len(starts), self.block), IGNORE, np.int64)
        for row, start in enumerate(starts):
            piece = np.asarray(self._tokens[start : start + self.block + 1], np.int64)
            tokens[row, : len(piece) - 1] = piece[:-1]
            targets[row, : len(piece) - 1] = piece[1:]
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))

    def _make_order(self, epoch: int) -> tuple[_Integers, _Integers, _Integers, int]:
        """Of an epoch: documents, where each starts among the pairs, rows, and the first pair."""
        documents = np.arange(len(self._offsets) - 1)
        rows, shift = np.arange(self.rows), 0
        if self.shuffle:
            random = np.random.default_rng((self.seed, epoch))
            documents, rows = random.permutation(documents), random.permutation(rows)
            shift = int(random.integers(0, self.block))  # rows are cut at other places each time
        sizes = np.maximum(self._offsets[documents + 1] - self._offsets[documents] - 1, 0)
        documents, sizes = documents[sizes > 0], sizes[sizes > 0]
        return documents, np.concatenate(([0], np.cumsum(sizes))), rows, shift

    def _packed(
        self, order: tuple[_Integers, _Integers, _Integers, int], first: int, count: int
    ) -> Batch:
        documents, starts, rows, shift = order
        shape = (count, self.block)
        tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        targets = np.full(shape, IGNORE, np.int64)
        bounds = [0]
        for r, row in enumerate(rows[first : first + count]):
            filled = 0
            while filled < self.block:
                place = row * self.block + filled
                width = self.block - filled
                if place < self._pairs:  # else: the last row's padding, a sequence without loss
                    place = (place + shift) % self._pairs
                    number = int(np.searchsorted(starts, place, side="right")) - 1
                    width = min(width, int(starts[number + 1]) - place)
                    width = min(width, self._pairs - (row * self.block + filled))
                    begin = int(self._offsets[documents[number]] + place - starts[number])
                    piece = np.asarray(self._tokens[begin : begin + width + 1], np.int64)
                    tokens[r, filled : filled + width] = piece[:-1]
                    targets[r, filled : filled + width] = piece[1:]
                positions[r, filled : filled + width] = np.arange(width)
                filled += width
                bounds.append(r * self.block + filled)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        made, wanted, where = (torch.from_numpy(x) for x in (tokens, targets, positions))
        return Batch(made, wanted, cu_seqlens, where)
