"""Conversations to tokens, with a mask of what the model is to learn: its own answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from fastlm.data import DataError
from fastlm.data.template import TemplateError, answer_spans, render

ROLES = ("system", "user", "assistant", "tool")
ANSWERS = ("completion", "response", "answer")  # names of a completion's column

# Without a chat template: the texts as they are, and the answer ends with the end token.
PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately"
    " completes the request.\n\n### Instruction:\n{}\n\n"
)


class RowError(DataError):
    """A row that cannot be learnt from; the message names its file and line."""


@dataclass
class Example:
    """One conversation as tokens.

    Attributes:
        where: file and line it came from.
        tokens: all of it.
        mask: for each token whether it is (part of) an answer, and so has a loss.
    """

    where: str
    tokens: list[int]
    mask: list[bool]

    @property
    def answers(self) -> int:
        """How many tokens have a loss; the first has none, for nothing predicts it."""
        return sum(self.mask[1:])


@dataclass
class Conversations:
    """Turns rows into examples, and counts what it had to leave out.

    Args:
        text: the tokenizer, its template and special tokens (`fastlm.hf.tokenizer.Text`).
        template: a chat template; by default the checkpoint's, and without one plain text.
        plain: whether texts are joined as they are, even where there is a template.
        max_length: longer conversations are cut at the end.
        drop_bad_rows: whether a row that cannot be learnt from is counted and left out instead of
            raising RowError.

    Attributes:
        bad: the messages of the rows left out.
        cut: how many conversations were cut.
    """

    text: Any
    template: str | None = None
    plain: bool = False
    max_length: int | None = None
    drop_bad_rows: bool = False
    bad: list[str] = field(default_factory=list)
    cut: int = 0

    def __post_init__(self) -> None:
        if self.template is None:
            self.template = self.text.template
        self.plain = self.plain or self.template is None
        tokenizer = self.text.tokenizer
        # templates write special tokens as text: each must be one token there
        known = [t for t in self.text.special.values() if tokenizer.token_to_id(t) is not None]
        tokenizer.add_special_tokens(known)
        added = tokenizer.get_added_tokens_decoder().items()
        self.ends = {number for number, token in added if token.special}

    def examples(self, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Example]:
        """The examples of (where, row) pairs; see `messages_of` for a row's shapes.

        Raises:
            RowError: a row of no known shape, or whose answers are empty or lie beyond
                max_length; the message names it.
        """
        out = []
        for where, row in rows:
            try:
                out.append(self.example(where, row))
            except RowError as error:
                if not self.drop_bad_rows:
                    raise
                self.bad.append(str(error))
        return out

    def example(self, where: str, row: Mapping[str, Any]) -> Example:
        """The example of one row."""
        messages = messages_of(where, row, plain=self.plain)
        try:
            tokens, mask = self.encode(messages)
        except TemplateError as error:
            raise RowError(f"{where}: {error}") from error
        example = Example(where, tokens, mask)
        if not example.answers:
            raise RowError(f"{where}: the template leaves nothing to learn: no token of an answer")
        if self.max_length is not None and len(tokens) > self.max_length:
            example = Example(where, tokens[: self.max_length], mask[: self.max_length])
            if not example.answers:
                first = mask.index(True)
                raise RowError(
                    f"{where}: cut to {self.max_length} tokens nothing of the answer is left: it"
                    f" begins at token {first + 1} of {len(tokens)}"
                )
            self.cut += 1
        return example

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
        """A conversation's tokens, and for each whether it belongs to an answer.

        What stands before an answer is encoded as it is when the model is asked for one: where a
        tokenizer would join the last character of the prompt and the first of the answer in one
        token, they are encoded apart.
        """
        special = self.text.special
        source = PLAIN if self.plain else self.template
        assert source is not None  # else it is plain
        text, spans = answer_spans(source, messages, special)
        cuts = self._cuts(text, spans)
        edges = [0, *cuts, len(text)]
        tokens: list[int] = []
        mask: list[bool] = []
        for start, end in pairwise(edges):
            if start == end and start:
                continue
            # a chat template writes the special tokens itself
            first = self.plain and not tokens
            piece = self.text.tokenizer.encode(text[start:end], add_special_tokens=first)
            for number, (left, right) in zip(piece.ids, piece.offsets, strict=True):
                tokens.append(number)
                mask.append(
                    any(left + start < stop and right + start > begin for begin, stop in spans)
                )
        for begin, stop in self._tails(tokens, mask):
            mask[begin:stop] = [False] * (stop - begin)
        return tokens, mask

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a conversation up to where the model's answer begins."""
        if self.plain or self.template is None:
            return list(self.text.encode("".join(str(m["content"]) for m in messages)))
        text = render(self.template, messages, self.text.special, add_generation_prompt=True)
        return list(self.text.encode(text, special=False))

    def _cuts(self, text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
        """The beginnings of answers that fall inside a token of the whole text."""
        whole = self.text.tokenizer.encode(text, add_special_tokens=False)
        cuts = []
        for begin, _ in spans:
            before = self.text.tokenizer.encode(text[:begin], add_special_tokens=False).ids
            if whole.ids[: len(before)] != before and begin:
                cuts.append(begin)
        return cuts

    def _tails(self, tokens: list[int], mask: list[bool]) -> Iterable[tuple[int, int]]:
        """White space that a template writes behind an answer's last special token."""
        stop = len(tokens)
        while stop:
            if not mask[stop - 1]:
                stop -= 1
                continue
            begin = stop
            while begin and mask[begin - 1]:
                begin -= 1
            last = next((i for i in reversed(range(begin, stop)) if tokens[i] in self.ends), None)
            if last is not None and last + 1 < stop:
                tail = self.text.tokenizer.decode(tokens[last + 1 : stop])
                if not tail.strip():
                    yield last + 1, stop
            stop = begin


def messages_of(where: str, row: Mapping[str, Any], *, plain: bool = False) -> list[dict[str, Any]]:
    """The messages of a row.

    A row holds `messages` (each with "role" and "content"), or `prompt` and `completion` (texts,
    or lists of messages), or the columns of Alpaca: `instruction`, `input`, `output`.

    Args:
        where: named in errors.
        row: column -> value.
        plain: whether the messages are joined without a chat template: Alpaca's columns then
            become Alpaca's own text.

    Raises:
        RowError: none of these, an unknown role, an answer that is missing or empty.
    """
    if "messages" in row:
        messages = row["messages"]
    elif "prompt" in row and (answer := _first(row, ANSWERS)) is not None:
        messages = [*_turns(row["prompt"], "user"), *_turns(row[answer], "assistant")]
    elif "instruction" in row and (answer := _first(row, ("output", "response"))) is not None:
        messages = _alpaca(row, answer, plain)
    else:
        columns = ", ".join(map(str, row)) or "none"
        raise RowError(
            f"{where}: expected the columns messages, or prompt and completion, or instruction,"
            f" input and output; got {columns}"
        )
    if not isinstance(messages, list) or not messages:
        raise RowError(f"{where}: messages must be a list of at least one")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise RowError(f"{where}: message {i + 1} must have a role and a content")
        if message["role"] not in ROLES:
            raise RowError(
                f"{where}: message {i + 1}: role must be one of {', '.join(ROLES)}, got"
                f" {message['role']!r}"
            )
        if not isinstance(message["content"], str):
            raise RowError(f"{where}: message {i + 1}: content must be a text")
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise RowError(f"{where}: holds no answer of the assistant")
    if not all(m["content"].strip() for m in answers):
        raise RowError(f"{where}: an answer is empty")
    return [dict(message) for message in messages]


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _turns(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _alpaca(row: Mapping[str, Any], answer: str, plain: bool) -> list[dict[str, Any]]:
    instruction, given = row["instruction"], row.get("input") or ""
    if plain:
        more = ", paired with an input that provides further context" if given else ""
        prompt = _ALPACA.format(more, instruction)
        prompt += f"### Input:\n{given}\n\n" if given else ""
        prompt += "### Response:\n"
    else:
        prompt = f"{instruction}\n\n{given}" if given else instruction
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": row[answer]}]
