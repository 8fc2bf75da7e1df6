"""Documents that are equal, and documents that are nearly so.

Near-duplicates are found by MinHash and locality-sensitive hashing, and every find is confirmed
by the true similarity of the two texts, so that chance drops nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

from fastlm.data import DataError

_WORD = re.compile(r"\w+")
# writing without spaces between words: each character counts as one
_ALONE = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff])")
_BASE = 0x9E3779B97F4A7C15  # odd: has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)
_SLICE = 1 << 17  # characters hashed at once
_COMPARED = 16  # earlier members of a band's bucket that a document is compared with


class MinHash:
    """Keys that similar documents share.

    A document is the set of its runs of `words` words. The similarity of two is the size of their
    common part over the size of their union (Jaccard). Of K = bands·rows random orders of all
    runs, the first run of a document agrees with another's with a probability equal to their
    similarity s; a band is the hash of `rows` of them. Two documents share one of the bands with
    probability 1 - (1 - s^rows)^bands; rows and bands are chosen so that this is at least 0.99
    at the threshold.

    Args:
        threshold: the least similarity of near-duplicates, in (0, 1].
        words: the length of a run.
        hashes: K at most.
        seed: of the random orders.

    Source:
        Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3.
    """

    def __init__(self, threshold: float, words: int = 3, hashes: int = 128, seed: int = 1):
        if not 0 < threshold <= 1:
            raise DataError(f"the near-duplicate threshold must be in (0, 1], got {threshold}")
        if words < 1:
            raise DataError(f"near-duplicate words must be at least 1, got {words}")
        self.threshold, self.words = threshold, words
        self.rows = max(
            (r for r in range(1, 33) if 1 - (1 - threshold**r) ** (hashes // r) >= 0.99),
            default=1,
        )
        self.bands = hashes // self.rows
        random = np.random.default_rng(seed)
        shape = self.bands * self.rows
        self._factor = random.integers(0, 1 << 32, (shape, 1), np.uint32) | np.uint32(1)
        self._shift = random.integers(0, 1 << 32, (shape, 1), np.uint32)
        self._join = random.integers(0, 1 << 64, (self.bands, self.rows), np.uint64) | np.uint64(1)

    def runs(self, text: str) -> np.ndarray:
        """The hashes of a text's distinct runs of words, sorted; case and punctuation ignored."""
        return run_hashes(text, self.words)

    def keys(self, runs: np.ndarray) -> np.ndarray:
        """The bands' hashes, uint64 [bands]; zeros for a text without words."""
        if not len(runs):
            return np.zeros(self.bands, np.uint64)
        least = np.full(len(self._factor), np.iinfo(np.uint32).max, np.uint32)
        short = (runs >> np.uint64(32)).astype(np.uint32)
        for start in range(0, len(short), 4096):
            order = self._factor * short[start : start + 4096]
            order += self._shift
            np.minimum(least, order.min(1), out=least)
        bands = least.astype(np.uint64).reshape(self.bands, self.rows)
        return _mix((bands * self._join).sum(1, dtype=np.uint64))


def run_hashes(text: str, words: int) -> np.ndarray:
    """The hashes of a text's distinct runs of `words` words, sorted, uint64.

    A text of fewer words is one run. The hash of a run is that of its bytes as digits of a number
    modulo 2^64, a difference of two prefix sums, so that no loop visits the words. Long texts go
    through it in slices, to bound memory; the few runs across two slices are left out.
    """
    slices = range(0, len(text), _SLICE)
    found = [_run_hashes(text[start : start + _SLICE], words) for start in slices]
    runs = np.sort(np.concatenate([np.empty(0, np.uint64), *found]))
    return runs[np.append(True, runs[1:] != runs[:-1])[: len(runs)]]


def _run_hashes(text: str, words: int) -> np.ndarray:
    line = " ".join(_WORD.findall(_ALONE.sub(r" \1 ", text.lower()))).encode("utf-8", "replace")
    if not line:
        return np.empty(0, np.uint64)
    digits = np.frombuffer(line, np.uint8)
    spaces = np.flatnonzero(digits == ord(" "))
    ends = np.append(spaces, len(line))[words - 1 :]
    if not len(ends):
        ends = np.array([len(line)])
    starts = np.append(0, spaces + 1)[: len(ends)]
    up, down = _powers(1 << len(line).bit_length())
    sums = np.append(np.uint64(0), np.cumsum(digits * up[: len(line)], dtype=np.uint64))
    return _mix((sums[ends] - sums[starts]) * down[starts])


@lru_cache(4)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers 0 … count-1 of the base and of its inverse, modulo 2^64."""
    both = []
    for base in (_BASE, _INVERSE):
        factors = np.full(count, base, np.uint64)
        factors[0] = 1
        both.append(np.cumprod(factors, dtype=np.uint64))
    return both[0], both[1]


def _mix(x: np.ndarray) -> np.ndarray:
    """Spreads every bit over all others (splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def equal(digests: np.ndarray) -> np.ndarray:
    """For each document the first one with the same digest: itself where there is none before.

    Args:
        digests: [n, 2] uint64, the halves of a hash of the text.
    """
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in order
    halves = digests[order]
    new = np.ones(len(order), bool)
    new[1:] = (halves[1:] != halves[:-1]).any(1)
    starts = np.flatnonzero(new)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.repeat(starts, np.diff(np.append(starts, len(order))))]
    return first


def candidates(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Pairs of rows that share a band: int64 [pairs, 2], earlier then later, by the later.

    Of many documents in one bucket each is paired with the first few and the one before it.

    Args:
        keys: [n, bands] uint64; zeros pair with nothing.
        rows: those to look at; the pairs are places in it.
    """
    count = len(rows)
    found = np.empty(0, np.int64)
    for band in range(keys.shape[1]):
        column = keys[:, band][rows]
        order = np.argsort(column, kind="stable")
        column = column[order]
        order = order[np.searchsorted(column, 0, "right") :]
        column = column[len(column) - len(order) :]
        new = np.ones(len(order), bool)
        new[1:] = column[1:] != column[:-1]
        place = np.arange(len(order))
        start = np.maximum.accumulate(np.where(new, place, 0))
        pairs = [found]
        for k in range(_COMPARED + 1):
            later = place[place - start > k]
            if not len(later):
                break
            earlier = start[later] + k if k < _COMPARED else later - 1
            pairs.append(order[later] * count + order[earlier])
        found = np.unique(np.concatenate(pairs))
    return np.stack([found % max(count, 1), found // max(count, 1)], 1)


def near_duplicates(
    keys: np.ndarray,
    hasher: MinHash,
    text: Callable[[int], str],
    rows: np.ndarray,
    origin: np.ndarray | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Iterator[tuple[int, int, float]]:
    """The documents to drop, each with the one that stays and their similarity.

    A document is dropped only for one that is kept and truly as similar as the threshold, never
    through a chain of others.

    Args:
        keys: [n, bands], one row of `MinHash.keys` for each document.
        hasher: made the keys.
        text: gives document i's text again.
        rows: the documents to look at, in order.
        origin: [n]; documents of one origin are parts of one text and not compared.
        progress: called as progress(stage, done, total).
    """
    runs = lru_cache(16)(lambda i: hasher.runs(text(i)))
    dropped: set[int] = set()
    pairs = rows[candidates(keys, rows)]
    if origin is not None:
        pairs = pairs[origin[pairs[:, 0]] != origin[pairs[:, 1]]]
    for done, (earlier, later) in enumerate(pairs.tolist()):
        progress("comparing", done + 1, len(pairs))
        if earlier in dropped or later in dropped:
            continue
        similarity = jaccard(runs(earlier), runs(later))
        if similarity >= hasher.threshold:
            dropped.add(later)
            yield later, earlier, similarity


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The common part over the union of two sorted sets; 0 where both are empty."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - common
    return common / union if union else 0.0
