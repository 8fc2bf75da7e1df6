"""The tokenizer and the chat template beside a checkpoint's weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.hf.weights import CheckpointError, read_json

if TYPE_CHECKING:
    from fastlm.hf.gguf import GGUFFile

_CONTEXT = 8  # tokens decoded before a new one
_LONGEST_CHARACTER = 8  # tokens held back while they are no character; UTF-8 has up to 4 bytes
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass
class Text:
    """Text to tokens and back.

    Attributes:
        tokenizer: a `tokenizers.Tokenizer`.
        template: the chat template (Jinja), or None.
        special: the special tokens' texts by role, "bos_token" and so on.
    """

    tokenizer: Any
    template: str | None = None
    special: dict[str, str] = field(default_factory=dict)

    @cached_property
    def vocab(self) -> int:
        """One more than the largest token; a model's head may be padded beyond."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def check_fits(self, vocab: int) -> None:
        """Raises ValueError where a model with so many outputs lacks tokens of this tokenizer."""
        if self.vocab > vocab:
            raise ValueError(
                f"tokenizer: its tokens must be below {vocab}, the model's vocabulary, got"
                f" {self.vocab - 1}: it is not this model's tokenizer"
            )

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text, with the special ones its tokenizer adds."""
        try:
            return list(self.tokenizer.encode(text, add_special_tokens=special).ids)
        except TypeError as error:  # bytes that were no UTF-8 leave lone surrogates behind
            raise ValueError("tokenizer: the text must be Unicode, got something else") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def texts(self, tokens: Sequence[int], before: Sequence[int] = ()) -> list[str]:
        """The text of each token; of those that are no text, its name in the vocabulary.

        A character that is spread over several tokens stands at the last of them. `before` is as
        in `streamer`.
        """
        step = self.streamer(before)
        return [step(token) or str(self.tokenizer.id_to_token(token)) for token in tokens]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the model's answer begins.

        Args:
            messages: mappings with "role" ("system", "user", "assistant") and "content".

        Raises:
            ValueError: no template, or one that refuses these messages.
        """
        if self.template is None:
            raise ValueError("chat: this checkpoint has no chat template")
        from fastlm.data.template import render

        text = render(self.template, messages, self.special, add_generation_prompt=True)
        return self.encode(text, special=False)

    def streamer(self, before: Sequence[int] = ()) -> Callable[[int], str]:
        """A function from the next token to the text that is certain by now.

        A character may be spread over several tokens: it comes with the last of them. Bytes that
        are no UTF-8 become U+FFFD when it is certain that they stay so.

        Args:
            before: the tokens in front, whose text is not repeated. Many tokenizers drop the space
                of a first word, which a continuation needs.
        """
        shown = list(before[-_CONTEXT:])  # decoded before the new ones, for what depends on them
        held: list[int] = []

        def step(token: int) -> str:
            nonlocal shown, held
            held.append(token)
            old, text = self.decode(shown), self.decode(shown + held)
            if text.endswith("\ufffd") and len(held) < _LONGEST_CHARACTER:
                return ""
            new = text[len(old) :]
            shown, held = (held if new else shown + held)[-_CONTEXT:], []
            return new

        return step


def load(source: str | os.PathLike[str] | GGUFFile) -> Text:
    """The tokenizer of a Hugging Face directory, a .gguf file or a model's `source`."""
    if not isinstance(source, (str, os.PathLike)):
        return from_gguf(source)
    path = Path(source)
    if path.is_file():
        from fastlm.hf.gguf import GGUFFile

        return from_gguf(GGUFFile(path))
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: the file is missing")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{file}: not a tokenizer: {error}") from error
    config = path / "tokenizer_config.json"
    values = read_json(config) if config.is_file() else {}
    template = values.get("chat_template")
    if (path / "chat_template.jinja").is_file():
        template = (path / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    special = {}
    for role in SPECIAL:
        token = values.get(role)
        if token is not None:
            special[role] = token["content"] if isinstance(token, dict) else token
    return Text(tokenizer, template, special)


# tokenizer.ggml.pre -> whether digits stand alone, before GPT-2's own splitting
_GPT2_SPLITS = {
    "default": False,
    "gpt-2": False,
    "smollm": True,
    "starcoder": True,
    "refact": True,
    "command-r": True,
}
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama-bpe": _LLAMA3_SPLIT % r"\p{N}{1,3}",
    "llama3": _LLAMA3_SPLIT % r"\p{N}{1,3}",
    "qwen2": _LLAMA3_SPLIT % r"\p{N}",
}
_CONTROL, _USER = 3, 4  # tokenizer.ggml.token_type


def from_gguf(file: GGUFFile) -> Text:
    """The tokenizer in a GGUF file's metadata: byte-level BPE."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    kind = file.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise CheckpointError(f"{file.path}: tokenizer.ggml.model must be 'gpt2', got {kind!r}")
    tokens = file.get("tokenizer.ggml.tokens")
    merges = file.get("tokenizer.ggml.merges")
    if not tokens or merges is None:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens or .merges is missing")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
        )
    )
    pre = file.get("tokenizer.ggml.pre", "default")
    steps: list[Any]
    if pre in _GPT2_SPLITS:
        steps = [pre_tokenizers.Digits(individual_digits=True)] if _GPT2_SPLITS[pre] else []
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    elif pre in _SPLITS:
        steps = [
            pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        known = ", ".join([*_GPT2_SPLITS, *_SPLITS])
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.pre must be one of {known}, got {pre!r}"
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    types = file.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for wanted, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER, tokenizer.add_tokens)):
        texts = [t for t, type_ in zip(tokens, types, strict=True) if type_ == wanted]
        add([AddedToken(t, special=wanted == _CONTROL, normalized=False) for t in texts])
    special = _special(file, tokens)
    if file.get("tokenizer.ggml.add_bos_token", False) and "bos_token" in special:
        from tokenizers.processors import TemplateProcessing

        bos = special["bos_token"]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokens.index(bos))],
        )
    return Text(tokenizer, file.get("tokenizer.chat_template"), special)


def _special(file: GGUFFile, tokens: Sequence[str]) -> dict[str, str]:
    keys = dict(zip(SPECIAL, ("bos", "eos", "unknown", "padding"), strict=True))
    ids = {role: file.get(f"tokenizer.ggml.{key}_token_id") for role, key in keys.items()}
    for role, i in ids.items():
        if i is not None and not 0 <= i < len(tokens):
            raise CheckpointError(
                f"{file.path}: {role} must be a token below {len(tokens)}, got {i}"
            )
    return {role: tokens[i] for role, i in ids.items() if i is not None}
