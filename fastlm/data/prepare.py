"""The way from files of text to token shards.

First pass: read, clean, filter; what stays goes to a work file with its hash and its MinHash keys.
Then the duplicates are found and the split is drawn, from these numbers alone. Second pass:
tokenise the work file into shards. Memory holds a batch of text and some 40 bytes a document.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlm._version import __version__
from fastlm.data import DataError
from fastlm.data.clean import Cleaning
from fastlm.data.dedup import MinHash, equal, near_duplicates
from fastlm.data.encode import Encoder
from fastlm.data.folder import complete_folder
from fastlm.data.shards import MANIFEST, SHARD_TOKENS, SplitWriter, write_manifest
from fastlm.data.sources import Reading, Sources
from fastlm.data.spool import Spool

if TYPE_CHECKING:
    from fastlm.hf.tokenizer import Text

EXAMPLES = 5  # of dropped documents, for each reason
Progress = Callable[[str, int, int], None]  # stage, done, of how many


@dataclass(frozen=True)
class Selection:
    """Which documents stay and on which side of the split they go.

    Attributes:
        exact: drop documents whose clean text stood before.
        near: drop documents at least this similar to one before, in (0, 1]; None: do not look.
        near_words: similarity compares runs of so many words.
        validation: the share held back, in [0, 1).
        split: "documents" draws whole documents by their content; "tail" holds back the end of
            the last characters; "auto" is "tail" where there is a single document.
        seed: another draw of the documents held back.
    """

    exact: bool = True
    near: float | None = 0.7
    near_words: int = 3
    validation: float = 0.1
    split: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise DataError(f"validation must be in [0, 1), got {self.validation}")
        if self.split not in ("auto", "documents", "tail"):
            raise DataError(f"split must be auto, documents or tail, got {self.split!r}")
        if self.near is not None:
            MinHash(self.near, self.near_words)


def prepare(
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | Text,
    *,
    reading: Reading = Reading(),  # noqa: B008 frozen
    cleaning: Cleaning = Cleaning(),  # noqa: B008
    selection: Selection = Selection(),
    eos: bool = True,
    bos: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    command: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Makes a data folder, which appears complete or not at all.

    Args:
        sources: .txt, .jsonl and .zip files, and folders of them.
        out: the folder to make.
        tokenizer: what `fastlm.data.tokenizer.open_tokenizer` takes, an opened one, or "char":
            one token for each character that occurs.
        reading, cleaning, selection: how files become documents, and which stay.
        eos: end each document with the tokenizer's end token.
        bos: begin each with its begin token.
        shard_tokens: tokens in one file.
        overwrite: replace a data folder; it stays until the new one is complete.
        command: the command line, for the manifest.
        progress: called as progress(stage, done, total).

    Returns:
        The manifest. The same sources and options give the same files.

    Raises:
        DataError: anything about the sources, the tokenizer, the folder or the disk; nothing is
            left at `out` then.
    """
    from fastlm.data import tokenizer as tokenizers

    text: Text | None = None
    if isinstance(tokenizer, (str, os.PathLike)):
        if tokenizer != "char":
            text = tokenizers.open_tokenizer(tokenizer)
    else:
        text = tokenizer
    # refuses what it cannot do before anything is read
    Encoder(tokenizers.char_level("a") if text is None else text, eos, bos)
    found = Sources(sources, reading)
    _check_room(Path(out), found.size)
    hasher = None if selection.near is None else MinHash(selection.near, selection.near_words)
    try:
        with complete_folder(out, MANIFEST, overwrite) as folder:
            dropped = _Dropped()
            with Spool(folder / "work", hasher.bands if hasher else 0) as spool:
                _first_pass(found, cleaning, hasher, spool, dropped, progress)
                kept = _unique(spool, selection, hasher, dropped, progress)
                side, cut = _draw(spool, kept, selection)
                if text is None:
                    text = tokenizers.char_level(spool.characters(kept))
                encoder = Encoder(text, eos, bos)
                splits = _second_pass(folder, spool, side, cut, encoder, shard_tokens, progress)
            shutil.rmtree(folder / "work")
            tokenizers.save(text, folder / "tokenizer")
            return write_manifest(
                folder,
                splits=splits,
                vocab=encoder.vocab,
                eos=encoder.eos,
                documents={
                    "read": spool.count + dropped.before,
                    "kept": int(kept.sum()),
                    "dropped": dropped.reasons,
                },
                sources=found.facts(),
                options={
                    **asdict(reading),
                    **asdict(cleaning),
                    **asdict(selection),
                    "bos": bos,
                    "tokenizer": str(tokenizer) if isinstance(tokenizer, (str, Path)) else None,
                },
                notes=[*found.notes(), *encoder.notes()],
                command=command,
                fastlm=__version__,
            )
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(
                f"{out}: {os.strerror(error.errno)}; making it needs about "
                f"{found.size * 2:,} bytes beside it. Nothing was left there"
            ) from error
        raise DataError(f"{error.filename or out}: {error.strerror or error}") from error


def _check_room(out: Path, size: int) -> None:
    """Refuses what cannot fit, before hours go into it; the text alone is written once."""
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder)[2]
    if free < size:
        raise DataError(f"{out}: making it needs {size:,} bytes at least; {free:,} are free")


class _Dropped:
    """What was left out and why, with some examples of each."""

    def __init__(self) -> None:
        self.reasons: dict[str, dict[str, Any]] = {}
        self.before = 0  # dropped in the first pass

    def add(self, reason: str, label: str, why: str, text: str) -> None:
        entry = self.reasons.setdefault(reason, {"documents": 0, "characters": 0, "examples": []})
        entry["documents"] += 1
        entry["characters"] += len(text)
        if len(entry["examples"]) < EXAMPLES:
            start = " ".join(text[:400].split())[:100]
            entry["examples"].append({"source": label, "why": why, "text": start})

    def __str__(self) -> str:
        counts = [f"{entry['documents']} {reason}" for reason, entry in self.reasons.items()]
        return ", ".join(counts) or "none"


def _first_pass(
    sources: Sources,
    cleaning: Cleaning,
    hasher: MinHash | None,
    spool: Spool,
    dropped: _Dropped,
    progress: Progress,
) -> None:
    joins = False  # the document is a further part of the one before, which stayed
    for document in sources.documents():
        text = cleaning.clean(document.text)
        objection = cleaning.objection(text)
        if objection is not None:
            dropped.before += 1
            dropped.add(objection[0], document.label, objection[1], text)
            joins = False
        else:
            keys = hasher.keys(hasher.runs(text)) if hasher else None
            spool.add(text, document.label, joins, keys)
            joins = document.goes_on
        progress("reading", sources.read, sources.size)
    spool.finish()
    if spool.count == 0:
        raise DataError(
            f"{', '.join(map(str, sources.paths))}: no text to keep; dropped: {dropped}"
        )


def _unique(
    spool: Spool,
    selection: Selection,
    hasher: MinHash | None,
    dropped: _Dropped,
    progress: Progress,
) -> np.ndarray:
    """Which documents stay, bool [n]."""
    kept = np.ones(spool.count, bool)
    origin = np.cumsum(~spool.joins)  # parts of one text may be alike
    if selection.exact:
        first = equal(spool.digests)
        kept = (first == np.arange(spool.count)) | (origin == origin[first])
        for i in np.flatnonzero(~kept).tolist():
            label, text = spool.read(i)
            dropped.add("exact duplicate", label, f"equal to {spool.read(int(first[i]))[0]}", text)
    if hasher is not None:
        rows = np.flatnonzero(kept)
        finds = near_duplicates(
            spool.keys, hasher, lambda i: spool.read(i)[1], rows, origin, progress
        )
        for i, original, similarity in finds:
            kept[i] = False
            label, text = spool.read(i)
            why = f"{similarity:.2f} like {spool.read(original)[0]}"
            dropped.add("near duplicate", label, why, text)
    return kept


def _draw(spool: Spool, kept: np.ndarray, selection: Selection) -> tuple[np.ndarray, int]:
    """The side of each document: -1 dropped, 0 train, 1 validation.

    Returns:
        side: int8 [n].
        cut: where the first document of side 1 is cut in two, its head to side 0; 0: nowhere.
    """
    side = np.where(kept, 0, -1).astype(np.int8)
    rows = np.flatnonzero(kept)
    whole = int((~spool.joins[rows]).sum())
    if selection.validation == 0:
        return side, 0
    if selection.split == "tail" or (selection.split == "auto" and whole <= 1):
        ends = np.cumsum(spool.lengths[rows])
        at = min(int(ends[-1] * (1 - selection.validation)), int(ends[-1]) - 1)  # to train on
        if at < 1:
            raise DataError(f"a corpus of {ends[-1]} characters has no end to hold back")
        crossing = int(np.searchsorted(ends, at, "right"))
        side[rows[crossing:]] = 1
        cut = at - int(ends[crossing] - spool.lengths[rows[crossing]])
        return side, cut
    if len(rows) < 2:
        raise DataError("one document cannot be split by documents; split its tail")
    count = min(max(round(len(rows) * selection.validation), 1), len(rows) - 1)
    # a document's side depends on its text alone, wherever it stands: equal ones go together
    salt = np.frombuffer(hashlib.blake2b(b"%d" % selection.seed, digest_size=8).digest(), "<u8")
    draw = (spool.digests[rows, 0] ^ salt[0]) * np.uint64(0x9E3779B97F4A7C15)
    side[rows[draw <= np.partition(draw, count - 1)[count - 1]]] = 1
    if not (side == 0).any():
        raise DataError("all documents are equal: none would be left to train on")
    return side, 0


def _second_pass(
    folder: Path,
    spool: Spool,
    side: np.ndarray,
    cut: int,
    encoder: Encoder,
    shard_tokens: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    writers = [
        SplitWriter(folder, split, encoder.vocab, shard_tokens) for split in ("train", "validation")
    ]
    sizes = [{"characters": 0, "bytes": 0} for _ in writers]

    def write(target: int, text: str, goes_on: bool) -> None:
        sizes[target]["characters"] += len(text)
        sizes[target]["bytes"] += len(text.encode())
        encoder.add(writers[target], text, goes_on)

    total = int((side >= 0).sum())
    for done, i in enumerate(np.flatnonzero(side >= 0).tolist()):
        text, here = spool.read(i)[1], int(side[i])
        if here == 1 and cut:
            write(0, text[:cut], False)
            text, cut = text[cut:], 0
        goes_on = i + 1 < len(side) and bool(spool.joins[i + 1])
        write(here, text, goes_on and (side[i + 1] == here or (here == 0 and cut > 0)))
        progress("tokenising", done + 1, total)
    encoder.flush()
    if not writers[0].tokens:
        raise DataError(f"the tokenizer made no token of the {total} documents kept")
    return {
        writer.split: {**writer.close(), **size}
        for writer, size in zip(writers, sizes, strict=True)
    }
