"""Documents to tokens in batches, long ones in pieces, without a difference to see."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Protocol

from fastlm.data import DataError
from fastlm.data.tokenizer import token_of, vocabulary
from fastlm.hf.tokenizer import Text

_BATCH = 1 << 19  # characters
_PIECE = 1 << 17
_LOOK = 256  # characters at each side of a cut that are compared
_CUT = re.compile(r"(?<=[^\W\d_])(?=[ \n])")  # after a letter, before the space that follows


class Writer(Protocol):
    """What takes the tokens."""

    def append(self, tokens: Any, ends: bool = True) -> None:
        """Adds tokens to the current document, and ends it."""


class Encoder:
    """Collects documents, tokenises them together (on all cores) and hands on their tokens.

    Special tokens that stand in a text as letters stay letters.

    Args:
        text: the tokenizer.
        eos: end documents with its end token.
        bos: begin them with its begin token.
    """

    def __init__(self, text: Text, eos: bool = True, bos: bool = False):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(text.tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab = vocabulary(text)
        self.eos = _required(text, "eos_token", "--no-eos leaves it out") if eos else None
        self._bos = _required(text, "bos_token", "leave out --bos") if bos else None
        self._names = [name for name in text.special.values() if len(name) > 1]
        self._forged: dict[str, int] = {}
        self._waiting: list[tuple[Writer, str, bool, bool]] = []
        self._size = 0
        self._begins: dict[int, bool] = {}

    def add(self, writer: Writer, text: str, goes_on: bool = False) -> None:
        """A document for a writer; `goes_on` says that the next text there is a part of it."""
        for name in self._names:
            if name in text:
                self._forged[name] = self._forged.get(name, 0) + 1
        pieces = list(self._pieces(text))
        for i, piece in enumerate(pieces):
            begins = i == 0 and self._begins.get(id(writer), True)
            ends = i == len(pieces) - 1 and not goes_on
            self._waiting.append((writer, piece, begins, ends))
            self._size += len(piece)
            if self._size >= _BATCH or len(self._waiting) >= 4096:
                self.flush()
        self._begins[id(writer)] = not goes_on

    def flush(self) -> None:
        """Tokenises what waits."""
        texts = [text for _, text, _, _ in self._waiting]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for (writer, _, begins, ends), encoding in zip(self._waiting, encodings, strict=True):
            tokens = encoding.ids
            if begins and self._bos is not None:
                tokens = [self._bos, *tokens]
            if ends and self.eos is not None:
                tokens.append(self.eos)
            writer.append(tokens, ends)
        self._waiting, self._size = [], 0

    def notes(self) -> list[str]:
        """What a reader of the manifest should know."""
        return [
            f"documents in which {name} stands as text: {count}; it was tokenised as letters "
            "(--separator splits documents there)"
            for name, count in self._forged.items()
        ]

    def _pieces(self, text: str) -> Iterator[str]:
        """The text in pieces whose tokens, one after the other, are those of the whole.

        A cut is taken only where the tokenizer gives the same tokens for the text around it, cut
        and uncut. Where it never does, as with one that marks the start of a text, the text stays
        whole.
        """
        start = 0
        while len(text) - start > _PIECE:
            cut = self._cut(text, start + _PIECE // 2, start + _PIECE)
            if cut is None:
                break
            yield text[start:cut]
            start = cut
        yield text[start:]

    def _cut(self, text: str, low: int, high: int) -> int | None:
        for tried, match in enumerate(_CUT.finditer(text, low, high)):
            at = match.start()
            left, right = text[at - _LOOK : at], text[at : at + _LOOK]
            both, a, b = self._tokenizer.encode_batch_fast(
                [left + right, left, right], add_special_tokens=False
            )
            if both.ids == a.ids + b.ids:
                return at
            if tried == 8:
                break
        return None


def _required(text: Text, role: str, otherwise: str) -> int:
    token = token_of(text, role)
    if token is None:
        named = text.special.get(role)
        what = f"its {role} {named!r} is no token" if named else f"it has no {role}"
        raise DataError(f"the tokenizer cannot mark documents: {what}; {otherwise}")
    return token
