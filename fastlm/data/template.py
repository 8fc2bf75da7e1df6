"""Jinja templates, of chats (as Hugging Face writes them) and of tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

# Noncharacters, which no text holds: they mark where `{% generation %}` begins and ends.
_BEGIN, _END = "\ufdd0", "\ufdd1"

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TemplateError(ValueError):
    """A template that is no Jinja, or that refuses what it is given."""


@cache
def compiled(source: str) -> Any:
    """The template, in a sandbox that reaches nothing but its variables."""
    from jinja2 import TemplateError as Refused
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: what the model writes."""

        tags = {"generation"}  # noqa: RUF012  (jinja2's own attribute)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("mark")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return f"{_BEGIN}{caller()}{_END}"

    def refuse(message: str) -> None:
        raise Refused(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except Refused as error:
        raise TemplateError(f"template: {error}") from error


def fill(source: str, values: Mapping[str, Any]) -> str:
    """A template with its variables filled in; one that is missing renders as nothing."""
    from jinja2 import TemplateError as Refused

    try:
        return str(compiled(source).render(**values))
    except (Refused, TypeError, KeyError, AttributeError) as error:
        raise TemplateError(f"template: {error}") from error


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    special: Mapping[str, str] | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation.

    Args:
        source: the chat template.
        messages: mappings with "role" and "content".
        special: the special tokens' texts by role ("bos_token", ...), which templates may name.
        add_generation_prompt: whether to end where the model's answer begins.

    Raises:
        TemplateError: no Jinja, or the template refuses the conversation.
    """
    return _rendered(source, messages, special, add_generation_prompt)[0]


def answer_spans(
    source: str, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str] | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where in it the assistant's answers stand.

    An answer is what the template marks with `{% generation %}`. Where it marks nothing, it is
    what a turn of the assistant adds to the conversation before it, rendered up to where the
    model goes on: the answer and the text that ends the turn.

    Raises:
        TemplateError: the template renders a conversation's beginning differently once it goes
            on, so that no part of the text belongs to that answer.
    """
    text, spans = _rendered(source, messages, special, False)
    if spans:
        return text, spans
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            spans.append(_turn(source, messages, i, special, text))
    return text, spans


def _rendered(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    special: Mapping[str, str] | None,
    add_generation_prompt: bool,
) -> tuple[str, list[tuple[int, int]]]:
    values = {
        **(special or {}),
        "messages": [dict(message) for message in messages],
        "add_generation_prompt": add_generation_prompt,
    }
    marked = fill(source, values)
    if _BEGIN not in marked:
        return marked, []
    text, spans = "", []
    for piece in marked.split(_BEGIN):
        answer, mark, rest = piece.partition(_END)
        if mark:
            spans.append((len(text), len(text) + len(answer)))
        text += answer + rest
    return text, spans


def _turn(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    i: int,
    special: Mapping[str, str] | None,
    text: str,
) -> tuple[int, int]:
    """Where the assistant's turn i stands in the whole text."""
    after = _rendered(source, messages[: i + 1], special, False)[0]
    prompt = _rendered(source, messages[:i], special, True)[0] if i else ""
    start, end = len(prompt), len(after)
    if not after.startswith(prompt):
        # the prompt may say more than the conversation does (white space, an empty thought): the
        # answer then begins with its content, behind what both have in common
        common = next(
            (n for n, (a, b) in enumerate(zip(prompt, after, strict=False)) if a != b), len(after)
        )
        start = after.find(str(messages[i]["content"]).strip(), common)
    if start < 0 or not text.startswith(after.rstrip()):
        raise TemplateError(
            f"template: message {i + 1} is rendered differently once the conversation goes on, so"
            " its answer cannot be found; mark it with {% generation %} in the template"
        )
    return start, min(end, len(text))
