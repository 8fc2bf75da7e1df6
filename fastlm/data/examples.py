"""Conversations as batches: rows that hold several of them, none of which sees another."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastlm.data.batches import IGNORE, Batch
from fastlm.data.chat import Example


class PackedExamples:
    """A source of rows packed with whole conversations.

    The longest go first, each into the row that it fills best; rows are made once and come in
    another order each epoch. No conversation is cut.

    Args:
        examples: tokenised conversations.
        block: tokens in a row; at least as many as the longest has to predict.
        batch: rows in a micro-batch; the last of an epoch may have fewer.
        seed: of the order.
        shuffle: False for validation.

    Raises:
        ValueError: no examples, one that is longer than a row.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        block: int,
        batch: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
    ) -> None:
        if not examples:
            raise ValueError("PackedExamples: there are no examples")
        for example in examples:
            if len(example.tokens) - 1 > block:
                raise ValueError(
                    f"{example.where}: {len(example.tokens)} tokens do not fit a row of {block}"
                )
        self.examples, self.block, self.rows_per_batch = examples, block, batch
        self.seed, self.shuffle = seed, shuffle
        self.rows = _best_fit([len(e.tokens) - 1 for e in examples], block)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.rows_per_batch)

    def describe(self) -> dict[str, Any]:
        """What makes the batches."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(np.asarray(example.tokens, np.int64).tobytes())
            digest.update(bytes(example.mask))
        return {
            "kind": "conversations",
            "block": self.block,
            "batch": self.rows_per_batch,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "conversations": len(self.examples),
            "sha256": digest.hexdigest(),
        }

    def batch(self, index: int) -> Batch:
        """Micro-batch `index`; see `fastlm.data.batches.Source`."""
        epoch, place = divmod(index, len(self))
        order = np.arange(len(self.rows))
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        chosen = order[place * self.rows_per_batch : (place + 1) * self.rows_per_batch]
        shape = (len(chosen), self.block)
        tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        targets = np.full(shape, IGNORE, np.int64)
        bounds = [0]
        for r, row in enumerate(chosen):
            filled = 0
            for number in self.rows[row]:
                example = self.examples[number]
                end = filled + len(example.tokens) - 1
                tokens[r, filled:end] = example.tokens[:-1]
                positions[r, filled:end] = np.arange(end - filled)
                following = np.asarray(example.tokens[1:], np.int64)
                targets[r, filled:end] = np.where(example.mask[1:], following, IGNORE)
                filled = end
                bounds.append(r * self.block + filled)
            if filled < self.block:  # the rest is a sequence without loss
                positions[r, filled:] = np.arange(self.block - filled)
                bounds.append((r + 1) * self.block)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        arrays = [torch.from_numpy(x) for x in (tokens, targets, positions)]
        return Batch(arrays[0], arrays[1], cu_seqlens, arrays[2])


def _best_fit(sizes: Sequence[int], block: int) -> list[list[int]]:
    """Numbers of the items in each row: longest first, into the fullest row that has room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, row), sorted
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = bisect.bisect_left(room, (sizes[number], -1))
        if place == len(room):
            rows.append([])
            left, row = block, len(rows) - 1
        else:
            left, row = room.pop(place)
        rows[row].append(number)
        bisect.insort(room, (left - sizes[number], row))
    return rows
