"""Generating text: tokens to text as they come, stop strings, prompts by the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlm.hf.tokenizer import Text
    from fastlm.models.decoder import Decoder


@dataclass
class Completion:
    """What was generated for one prompt.

    Attributes:
        text: the text, without the stop string.
        tokens: the tokens; the last may lie, in part or whole, beyond the text.
        finish: "end" (an end token), "stop" (a stop string) or "length".
    """

    text: str
    tokens: list[int]
    finish: str


class StopStrings:
    """Passes text on until a stop string, which may be spread over several pieces.

    Only what could be the beginning of a stop string is held back.

    >>> stop = StopStrings(["\\nUser:"])
    >>> [stop.feed(piece) for piece in ("Yes.", "\\n", "Us", "ed\\nUs", "er: no")]
    ['Yes.', '', '', '\\nUsed', '']
    >>> stop.found
    '\\nUser:'
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self.strings = [strings] if isinstance(strings, str) else [*strings]
        for string in self.strings:
            if not isinstance(string, str) or not string:
                raise ValueError(f"generate: stop must be strings of text, got {string!r}")
        self.found: str | None = None  # the stop string that ended the text
        self._held = ""

    def feed(self, piece: str) -> str:
        """What may be shown now; nothing after a stop string."""
        if self.found is not None:
            return ""
        text = self._held + piece
        places = [(at, s) for s in self.strings if (at := text.find(s)) >= 0]
        if places:
            at, self.found = min(places)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, s) for s in self.strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest beginning of `stop` that ends `text`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


class Answer:
    """The text of one sequence as its tokens come.

    Args:
        text: the tokenizer.
        before: the prompt's tokens.
        ends: the end tokens.
        stop: stop strings.
    """

    def __init__(
        self, text: Text, before: Sequence[int], ends: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self._decode, self._ends = text.streamer(before), frozenset(ends)
        self._stop = StopStrings(stop)
        self.tokens: list[int] = []
        self.pieces: list[str] = []

    def add(self, token: int) -> str:
        """Takes the next token; returns the text that may be shown now."""
        self.tokens.append(token)
        piece = "" if token in self._ends else self._stop.feed(self._decode(token))
        self.pieces.append(piece)
        return piece

    def close(self) -> str:
        """The text that was held back; call it when no token follows."""
        self.pieces.append(self._stop.rest())
        return self.pieces[-1]

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop.found is not None

    @property
    def completion(self) -> Completion:
        """What has come so far."""
        ended = bool(self.tokens) and self.tokens[-1] in self._ends
        finish = "stop" if self.stopped else "end" if ended else "length"
        return Completion("".join(self.pieces), self.tokens, finish)


def stream_text(
    model: Decoder,
    text: Text,
    prompt: Sequence[int],
    max_new_tokens: int = 128,
    *,
    stop: Sequence[str] = (),
    answer: Answer | None = None,
    **options: Any,
) -> Iterator[str]:
    """Yields the text of one answer as it comes, a piece for each token.

    Args:
        model, max_new_tokens, options: as in `fastlm.models.generate.stream`.
        text: the model's tokenizer; what its vocabulary does not hold is never chosen.
        prompt: tokens.
        stop: the text ends before the first of these strings, which is not shown.
        answer: to be filled, for who wants the tokens and the reason of the end as well.

    Raises:
        ValueError: as `stream`; an empty stop string; a tokenizer of another model.
    """
    text.check_fits(model.config.vocab)
    if answer is None:
        before = [*options.get("history", ()), *prompt]
        answer = Answer(text, before, _ends(model, options), stop)
    limit = {"vocab_limit": text.vocab, **options}
    return _pieces(model.stream(list(prompt), max_new_tokens, **limit), answer)


def _pieces(tokens: Iterator[int], answer: Answer) -> Iterator[str]:
    for token in tokens:
        yield answer.add(token)
        if answer.stopped:
            return
    yield answer.close()


def complete(
    model: Decoder,
    text: Text,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    *,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    callback: Callable[[int, Completion], None] | None = None,
    **options: Any,
) -> list[Completion]:
    """Completes prompts of any lengths, batch_size of them at a time.

    Args:
        model, text, stop, options: as in `stream_text`.
        prompts: tokens.
        batch_size: how many are generated together; 1 to 16 take the decode plan on a CPU.
        callback: called with the number of a prompt and its completion, in the order of prompts.

    Returns:
        One completion a prompt, in their order.

    Prompt i draws with the random numbers of seed + i, whatever the batch.
    """
    if batch_size < 1:
        raise ValueError(f"complete: batch_size must be 1 or more, got {batch_size}")
    text.check_fits(model.config.vocab)
    seed = options.pop("seed", 0)
    ends = _ends(model, options)
    found: list[Completion] = []
    for first in range(0, len(prompts), batch_size):
        batch = [list(prompt) for prompt in prompts[first : first + batch_size]]
        answers = [Answer(text, prompt, ends, stop) for prompt in batch]

        def until(row: int, token: int, answers: list[Answer] = answers) -> bool:
            answers[row].add(token)
            return answers[row].stopped

        settings = {"vocab_limit": text.vocab, **options, "until": until}
        own = None if seed is None else seed + first
        for _ in model.stream(batch, max_new_tokens, seed=own, **settings):
            pass
        for row, answer in enumerate(answers):
            answer.close()
            found.append(answer.completion)
            if callback is not None:
                callback(first + row, answer.completion)
    return found


def _ends(model: Decoder, options: dict[str, Any]) -> Sequence[int]:
    eos = options.get("eos")
    if eos is None:
        return model.config.eos_ids
    return (eos,) if isinstance(eos, int) else eos
