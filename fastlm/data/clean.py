"""A document's text brought into one form, and the rules by which some are dropped."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from fastlm.data import DataError

# C0 and C1 controls but tab and line end, marks of byte order, what Unicode gives no meaning
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff\ufdd0-\ufdef]")
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_NO_LETTER = re.compile(r"[\W\d_]+")
FORMS = ("nfc", "nfkc", "none")


@dataclass(frozen=True)
class Cleaning:
    """What is done to a document, and what it must be like to stay. Only empty ones go by default.

    Attributes:
        normalize: Unicode normal form: "nfc" (one code for one character), "nfkc" (look-alikes
            too: ligatures, full-width letters) or "none".
        lowercase: turn capitals into small letters.
        min_chars, max_chars: bounds of a document's length, space at its ends not counted.
        min_letters: the least share of letters among the characters that are not space.
        max_repeated_lines: the greatest share of lines that stood in the document before.
        max_word: the longest run of characters without space: longer ones are encoded data.
    """

    normalize: str = "nfc"
    lowercase: bool = False
    min_chars: int = 1
    max_chars: int | None = None
    min_letters: float = 0.0
    max_repeated_lines: float = 1.0
    max_word: int | None = None

    def __post_init__(self) -> None:
        if self.normalize not in FORMS:
            raise DataError(f"normalize must be one of {', '.join(FORMS)}, got {self.normalize!r}")
        for name in ("min_letters", "max_repeated_lines"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.max_chars is not None and self.max_chars < max(self.min_chars, 1):
            raise DataError(f"max_chars {self.max_chars} is below min_chars {self.min_chars}")

    def clean(self, text: str) -> str:
        """The text with \\n as its only line end, no control characters, in its normal form."""
        if _LINE_ENDS.search(text):
            text = _LINE_ENDS.sub("\n", text)
        if _CONTROL.search(text):
            text = _CONTROL.sub("", text)
        form = self.normalize.upper()
        if form != "NONE" and not unicodedata.is_normalized(form, text):  # type: ignore[arg-type]
            text = unicodedata.normalize(form, text)  # type: ignore[arg-type]
        return text.lower() if self.lowercase else text

    def objection(self, text: str) -> tuple[str, str] | None:
        """Why a clean text is dropped: the rule, and what was measured; None to keep it."""
        size = len(text.strip())
        if size == 0:
            return "empty", "no text"
        if size < self.min_chars:
            return "min_chars", f"{size} characters, fewer than {self.min_chars}"
        if self.max_chars is not None and size > self.max_chars:
            return "max_chars", f"{size} characters, more than {self.max_chars}"
        if self.min_letters > 0:
            share = _letters(text)
            if share < self.min_letters:
                return "min_letters", f"letters {share:.2f}, less than {self.min_letters}"
        if self.max_repeated_lines < 1:
            share = _repeated_lines(text)
            if share > self.max_repeated_lines:
                limit = self.max_repeated_lines
                return "max_repeated_lines", f"repeated lines {share:.2f}, more than {limit}"
        if self.max_word is not None:
            longest = max(map(len, text.split()))
            if longest > self.max_word:
                return "max_word", f"a word of {longest} characters, more than {self.max_word}"
        return None


def _letters(text: str) -> float:
    seen = sum(map(len, text.split()))
    return len(_NO_LETTER.sub("", text)) / seen


def _repeated_lines(text: str) -> float:
    lines = [line for part in text.split("\n") if (line := part.strip())]
    return 1 - len(set(lines)) / len(lines)
