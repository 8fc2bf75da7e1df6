"""fastlm models in lm-eval (EleutherAI's lm-evaluation-harness; extra `lm-eval`).

import lm_eval
from fastlm.train.evaluate_harness import as_lm

lm_eval.simple_evaluate(model=as_lm("./smollm2"), tasks=["arc_easy"], limit=100)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fastlm.data.template import render
from fastlm.hf import tokenizer
from fastlm.models.decoder import Decoder
from fastlm.train.evaluate import encode_pair, prefix_of, score, text_loss
from fastlm.train.evaluate_tasks import answers


class Harness:
    """The three methods that lm-eval asks of a model, and those for its chat template.

    Requests are lm-eval's: what matters of one is `args`, a tuple.

    Args:
        model: a decoder, or the path of a checkpoint.
        text: its tokenizer; beside the checkpoint by default.
        batch_size: sequences at a time.
        max_gen_toks: tokens generated where a request does not say.
    """

    def __init__(
        self,
        model: Decoder | str | os.PathLike[str],
        text: tokenizer.Text | None = None,
        *,
        batch_size: int = 8,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        path = None if isinstance(model, Decoder) else model
        self.model = model if isinstance(model, Decoder) else Decoder.from_pretrained(model)
        source = self.model.source or path
        if text is None and source is None:
            raise ValueError("Harness: a decoder without a checkpoint needs its tokenizer")
        self.text = text if text is not None else tokenizer.load(source)  # type: ignore[arg-type]
        self.text.check_fits(self.model.config.vocab)
        self.batch, self.max_gen_toks = batch_size, max_gen_toks
        self._chats = False  # whether prompts hold their special tokens already

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding writes it) of (context, continuation)."""
        pairs = [self._pair(*request.args) for request in requests]
        scores = score(self.model, pairs, batch_size=self.batch)
        return [(s.logprob, s.greedy) for s in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-probability of each whole text, in windows of max_positions."""
        found = []
        for request in requests:
            text = request.args[0]
            nats = (
                text_loss(self.model, self.text, [text], batch_size=self.batch).nats
                if text
                else 0.0
            )
            found.append(-nats)
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The text written after each context, up to one of the strings `until`."""
        out = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for numbers in groups.values():
            asked: Mapping[str, Any] = requests[numbers[0]].args[1]
            until = asked.get("until") or []
            options = {}
            if asked.get("do_sample") and asked.get("temperature", 0):
                options = {k: asked[k] for k in ("temperature", "top_p", "top_k") if k in asked}
            prompts = [self.text.encode(requests[i].args[0], not self._chats) for i in numbers]
            written = answers(
                self.model,
                self.text,
                prompts,
                max_new_tokens=int(asked.get("max_gen_toks", self.max_gen_toks)),
                stop=[until] if isinstance(until, str) else [s for s in until if s],
                batch_size=self.batch,
                **options,
            )
            for i, answer in zip(numbers, written, strict=True):
                out[i] = answer
        return out

    @property
    def tokenizer_name(self) -> str:
        """Where the tokenizer came from; lm-eval names its caches by it."""
        return str(self.model.source or "fastlm")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that prompts will go through."""
        return self.text.template if chat_template else None

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation."""
        if self.text.template is None:
            raise ValueError("Harness: this checkpoint has no chat template")
        self._chats = True
        special = self.text.special
        return render(
            self.text.template, chat_history, special, add_generation_prompt=add_generation_prompt
        )

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return encode_pair(self.text, context, continuation, special=not self._chats)
        prefix, rest = prefix_of(self.model, self.text), self.text.encode(continuation, False)
        return ([prefix], rest) if prefix is not None else (rest[:1], rest[1:])


def as_lm(model: Decoder | str | os.PathLike[str], **options: Any) -> Any:
    """A `Harness` that is an `lm_eval.api.model.LM`; options as there."""
    from lm_eval.api.model import LM

    return type("FastLM", (Harness, LM), {})(model, **options)
