"""Speculative decoding: several tokens in one pass over the weights, the text unchanged.

A drafter guesses the next tokens, the model reads all of them in one pass and chooses at each place
as it would have without them: guesses are kept as far as they are what the model chooses. Every
choice is made from the model's own logits with the random number of its place, so greedy and drawn
texts alike are those of ordinary decoding, whatever the drafter says.

That holds bit for bit where a decode plan runs (fp32, bf16 and integer weights on the CPU): a pass
over rows of one sequence gives each the bits of a step of its own (`DecodePlan`). Elsewhere the
products of one row and of several may be summed in another order, and a near-tie can fall the other
way; `explain(model.generate, ...)` shows which way is taken.

Source: Leviathan et al., arXiv:2211.17192; Saxena, "Prompt lookup decoding", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastlm.models import plan
from fastlm.models.cache import FEW

if TYPE_CHECKING:
    from fastlm.models.cache import KVCache
    from fastlm.models.decoder import Decoder
    from fastlm.models.generate import Run

MOST = plan.MAX_BATCH - 1  # guesses that one pass of a plan can check


class Drafter(Protocol):
    """Guesses what follows.

    Attributes:
        offered: how many guesses were checked so far.
        accepted: how many of them were what the model chose.
    """

    offered: int
    accepted: int

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow these, the prompt and all generated ones."""


class PromptLookup:
    """Guesses that what followed the last few tokens before will follow them again.

    Costs nothing where it finds nothing, and helps where text is repeated: summaries, edits,
    questions about a text, code. After a wrong guess it guesses fewer, after right ones more, since
    every guess costs.

    Args:
        ngram: how many tokens must be the same, at most; shorter matches are tried down to 2.
        count: how many tokens to guess, at most.
    """

    def __init__(self, ngram: int = 3, count: int = 5) -> None:
        if ngram < 1:
            raise ValueError(f"PromptLookup: ngram must be 1 or more, got {ngram}")
        self.ngram, self.count = ngram, _checked("PromptLookup", count)
        self.offered = self.accepted = 0
        self._now = min(2, count)  # how many to guess next
        self._guessed: tuple[int, list[int]] = 0, []  # the last guesses and where they begin
        self._tokens: list[int] = []
        # (n tokens) -> where what last followed them begins
        self._after: dict[tuple[int, ...], int] = {}

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """See `Drafter`."""
        known = len(self._tokens)
        if [*tokens[:known]] != self._tokens:  # another text
            self._tokens, self._after, known = [], {}, 0
        self._learn(tokens)
        sizes = range(min(2, self.ngram), self.ngram + 1)
        for end in range(known, len(tokens)):  # what precedes a token is filed when it is known
            for n in sizes:
                if end >= n:
                    self._after[tuple(tokens[end - n : end])] = end
        self._tokens = [*tokens]
        for n in reversed(sizes):
            at = self._after.get(tuple(tokens[-n:])) if len(tokens) >= n else None
            if at is not None:
                self._guessed = len(tokens), [*tokens[at : at + min(most, self._now)]]
                return self._guessed[1]
        return []

    def _learn(self, tokens: Sequence[int]) -> None:
        """How many to guess, from what became of the last guesses."""
        begin, guessed = self._guessed
        self._guessed = 0, []
        if guessed and len(tokens) > begin:
            right = [*tokens[begin : begin + len(guessed)]] == guessed
            self._now = min(self.count, 2 * self._now) if right else max(1, self._now // 2)


class DraftModel:
    """Guesses with a smaller model of the same vocabulary, greedily.

    Args:
        model: the smaller decoder.
        count: how many tokens to guess.
        limit: tokens from this number on are not guessed.
    """

    def __init__(self, model: Decoder, count: int = 4, limit: int | None = None) -> None:
        self.model, self.count, self.limit = model, _checked("DraftModel", count), limit
        self.offered = self.accepted = 0
        self._read: list[int] = []  # what the cache holds
        self._cache = model.new_cache()
        self._following = plan.NextLogits(model, self._cache)

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """See `Drafter`."""
        room = self.model.config.max_positions - len(tokens)
        count = min(most, self.count, room)
        if count <= 0:
            return []
        same = 0
        for ours, given in zip(self._read, tokens[:-1], strict=False):
            if ours != given:
                break
            same += 1
        self._cache.crop(same)
        device = self.model.embed.weight.device
        unread = torch.tensor(tokens[same:-1], device=device)
        if len(unread) > FEW:
            self.model.hidden(unread[None], cache=self._cache)
        else:
            for token in unread:
                self._following.best(token[None], self.limit)
        last = torch.tensor(tokens[-1:], device=device)
        guesses: list[int] = []
        for _ in range(count):
            last = self._following.best(last, self.limit)
            guesses.append(int(last))
        self._read = [*tokens, *guesses[:-1]]
        return guesses


def _checked(name: str, count: int) -> int:
    if not 1 <= count <= MOST:
        raise ValueError(f"{name}: count must be 1 to {MOST}, got {count}")
    return count


def check_vocabulary(model: Decoder, draft: Decoder) -> None:
    """Raises ValueError where a draft model cannot guess for this one."""
    ours, theirs = model.config.vocab, draft.config.vocab
    if ours != theirs:
        raise ValueError(
            f"draft: the model must have the vocabulary of the other, {ours} tokens, got {theirs}"
        )


class Verifier:
    """(tokens [k] of one sequence) -> what follows each; all of them enter the cache."""

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._plans: dict[int, plan.DecodePlan] = {}
        self._one = plan.NextLogits(model, cache)

    def __call__(self, tokens: Tensor, best: bool, limit: int | None) -> Tensor:
        """logits [k, vocab], or with `best` the likeliest tokens [k] before `limit`."""
        rows = len(tokens)
        if rows == 1:
            return self._one.best(tokens, limit) if best else self._one(tokens)
        made = self._plans.get(rows)
        if made is None or made.stale():
            self._plans.pop(rows, None)
            if plan.unsupported(self._model, self._cache):
                logits = self._model(tokens[None], cache=self._cache)[0]
                return logits[:, :limit].argmax(-1) if best else logits
            made = self._plans[rows] = plan.DecodePlan(self._model, self._cache, rows)
        made.step(tokens, limit if best else None)
        return made.best if best else made.logits


def steps(run: Run, drafter: Drafter, before: list[int]) -> Iterator[Any]:
    """The tokens of a run, its guesses by `drafter`; `before` is all that precedes them."""
    if run.count <= 0:
        return
    cache, sampler = run.cache, run.sampler
    greedy = sampler.takes_the_largest
    verify = Verifier(run.model, cache)
    known = [*before]
    with torch.inference_mode():
        fresh = [int(run.first())]
    made = 0
    start = cache.length  # position of the first new token
    while True:
        for token in fresh:
            known.append(token)
            made += 1
            # A caller who stops here finds the cache as ordinary decoding leaves it: without the
            # newest token, and without what was read beyond it.
            read, cache.length = cache.length, start + made - 1
            over = run.ended(0, token) or made == run.count
            yield [token] if run.batch else token
            if over:
                return
            cache.length = read
        with torch.inference_mode():
            most = min(MOST, run.count - made - 1)
            guesses = drafter.propose(known, most) if most > 0 else []
            tokens = torch.tensor([known[-1], *guesses], device=run.tokens.device)
            found = verify(tokens, greedy, sampler.limit)
            if greedy:
                chosen = found.tolist()
            else:
                chosen = []
                for row, guess in enumerate([*guesses, None]):
                    chosen.append(int(sampler.choose(found[row : row + 1])))
                    if chosen[-1] != guess:
                        break
            right = 0
            while right < len(guesses) and guesses[right] == chosen[right]:
                right += 1
            fresh = chosen[: right + 1]
            cache.crop(start + made + right)
        drafter.offered += len(guesses)
        drafter.accepted += right
