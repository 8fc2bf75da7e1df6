"""A conversation with a model whose earlier turns need not be read again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastlm.models.text import Answer, stream_text

if TYPE_CHECKING:
    from fastlm.hf.tokenizer import Text
    from fastlm.models.decoder import Decoder

_NAMES = {"system": "", "user": "User: ", "assistant": "Assistant: "}
_PLAIN_STOPS = ("\nUser:",)

Message = Mapping[str, str]


class Chat:
    """A conversation: messages, and a cache of what the model has read of them.

    Every turn renders the whole conversation with the chat template. What the cache holds of it
    already, the longest common beginning of the tokens, is not read again.

    Args:
        model: the decoder.
        text: its tokenizer, with the chat template.
        system: the system message.
        plain: "User: ... Assistant:" instead of the template, for models without one.
        stop: the answer ends before the first of these strings.
        max_new_tokens, options: as in `fastlm.models.generate.stream`.

    Attributes:
        messages: the conversation so far, {"role", "content"} each.
        dropped: how many messages the last turn left out because they no longer fit.
        read: how many tokens the model had to read for the last turn.

    Raises:
        ValueError: no chat template, an empty stop string, a tokenizer of another model.
    """

    def __init__(
        self,
        model: Decoder,
        text: Text,
        *,
        system: str | None = None,
        plain: bool = False,
        stop: Sequence[str] = (),
        max_new_tokens: int = 256,
        **options: Any,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"chat: max_new_tokens must be 1 or more, got {max_new_tokens}")
        text.check_fits(model.config.vocab)
        self.model, self.text, self.plain = model, text, plain
        self.stop = (*stop, *(_PLAIN_STOPS if plain else ()))
        self.max_new_tokens, self.options = max_new_tokens, options
        self.messages: list[Message] = []
        self.dropped = self.read = 0
        self._cache = model.new_cache()
        self._cached: list[int] = []  # the tokens in it
        self.reset(system)
        self.render([{"role": "user", "content": "x"}])  # a template that cannot be used says so

    def reset(self, system: str | None = None) -> None:
        """Forgets the conversation; the system message stays unless another is given."""
        if system is None and self.system is not None:
            system = self.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    @property
    def system(self) -> str | None:
        """The system message."""
        first = self.messages[0] if self.messages else {"role": ""}
        return first["content"] if first["role"] == "system" else None

    @system.setter
    def system(self, content: str | None) -> None:
        rest = self.messages[self.system is not None :]
        first = [] if content is None else [{"role": "system", "content": content}]
        self.messages = [*first, *rest]

    def render(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation up to where the answer begins."""
        if not self.plain:
            return self.text.chat(messages)
        lines = [f"{_NAMES[message['role']]}{message['content']}\n" for message in messages]
        return self.text.encode("".join(lines) + "Assistant:")

    def ask(self, content: str) -> Iterator[str]:
        """Sends a message and yields the answer as it comes.

        The answer that has come when the iterator is closed stays in the conversation. Where the
        conversation has become too long, its oldest turns are dropped, never the system message.

        Raises:
            ValueError: a message that alone is too long; it is not kept.
        """
        tokens, messages = self._fit([*self.messages, {"role": "user", "content": content}])
        same = 0
        for ours, given in zip(self._cached, tokens[:-1], strict=False):
            if ours != given:
                break
            same += 1
        answer = Answer(self.text, tokens, self.model.config.eos_ids, self.stop)
        self._cache.crop(same)
        self._cached = tokens[:same]
        pieces = stream_text(
            self.model,
            self.text,
            tokens[same:],
            self.max_new_tokens,
            answer=answer,
            cache=self._cache,
            history=tokens[:same],
            **self.options,
        )
        self.dropped += len(self.messages) + 1 - len(messages)
        self.messages, self.read = messages, len(tokens) - same
        return self._follow(pieces, answer, tokens)

    def _follow(self, pieces: Any, answer: Answer, tokens: list[int]) -> Iterator[str]:
        try:
            if self.plain:  # the space after "Assistant:"
                first = next((piece for piece in pieces if piece.strip()), "")
                yield first.lstrip()
            yield from pieces
        finally:
            pieces.close()
            known = [*tokens, *answer.tokens]
            self._cache.crop(min(self._cache.length, len(known)))
            self._cached = known[: self._cache.length]
            content = answer.completion.text
            self.messages.append(
                {"role": "assistant", "content": content.strip() if self.plain else content}
            )

    def _fit(self, messages: list[Message]) -> tuple[list[int], list[Message]]:
        """The tokens of as many of the latest messages as leave room for an answer."""
        self.dropped = 0
        limit = self.model.config.max_positions
        room = limit - min(self.max_new_tokens, limit // 2)
        while True:
            tokens = self.render(messages)
            if not tokens:
                raise ValueError("chat: the message has no tokens")
            if len(tokens) <= room:
                return tokens, messages
            first = int(messages[0]["role"] == "system")
            turns = [i for i, m in enumerate(messages) if m["role"] == "user"]
            if len(turns) < 2:
                raise ValueError(
                    f"chat: the message must fit {room} tokens (max_positions = {limit}, the rest"
                    f" is for the answer), got {len(tokens)}"
                )
            messages = [*messages[:first], *messages[turns[1] :]]
