"""Generating text, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlm.models import graph, sampling
from fastlm.models.cache import KVCache
from fastlm.models.plan import NextLogits

if TYPE_CHECKING:
    from fastlm.models.decoder import Decoder
    from fastlm.models.speculative import Drafter

Until = Callable[[int, int], bool]
Prompt = Tensor | Sequence[int] | Sequence[Sequence[int]]


def generate(
    model: Decoder,
    tokens: Prompt,
    max_new_tokens: int = 128,
    *,
    callback: Callable[[Any], None] | None = None,
    **options: Any,
) -> list[int] | list[list[int]]:
    """Generates until an end token or max_new_tokens.

    Args:
        model, tokens, max_new_tokens, options: as in `stream`.
        callback: called with each token as it comes (a batch: with the list of them).

    Returns:
        The new tokens of one prompt as a list, of several as a list of lists. An end token that
        was generated is the last of them.
    """
    steps = []
    for step in stream(model, tokens, max_new_tokens, **options):
        steps.append(step)
        if callback is not None:
            callback(step)
    if not _is_batch(tokens):
        return steps
    rows = len(tokens)
    return [[step[row] for step in steps if step[row] is not None] for row in range(rows)]


def stream(
    model: Decoder,
    tokens: Prompt,
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int | None = 0,
    eos: int | Sequence[int] | None = None,
    vocab_limit: int | None = None,
    cache: KVCache | None = None,
    history: Sequence[int] = (),
    until: Until | None = None,
    drafter: Drafter | None = None,
) -> Iterator[Any]:
    """Yields each new token as soon as it is known.

    Args:
        model: the decoder.
        tokens: one prompt ([T] tensor or list), or several, also of unequal length ([B, T] tensor
            or list of lists). No prompt may be empty.
        max_new_tokens: how many to generate at most; fewer when max_positions ends the sequence.
        temperature: 0 takes the most likely token (greedy).
        top_k, top_p, min_p: see `fastlm.ops.sample`.
        repetition_penalty, presence_penalty, frequency_penalty: see `sampling.Options`.
        seed: of the random numbers; prompt i draws with those of seed + i, as it would alone. None
            takes fresh ones.
        eos: end tokens; the config's by default, () for none.
        vocab_limit: tokens from this number on are never chosen (a head padded beyond the
            tokenizer's vocabulary).
        cache: a cache that holds what came before the prompt; it is continued. A new one by
            default.
        history: the tokens in that cache; a repetition penalty counts them, a drafter reads them.
        until: called with (row, token) for each new token; true ends that sequence after it.
        drafter: guesses what comes next, for one prompt: see `fastlm.models.speculative`.

    Yields:
        The token as an int. With several prompts a list, None for those that have ended.

    Raises:
        ValueError: an empty prompt, one longer than max_positions, an option out of range.

    The same seed gives the same tokens. A sequence has the same random numbers alone and in a
    batch; its logits may differ in the last bits there, because the products of a longer prompt
    are cut differently, and with them, rarely, a token.
    """
    options = sampling.Options(
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
    )
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be 0 or more, got {max_new_tokens}")
    if vocab_limit is not None and vocab_limit < 1:
        raise ValueError(f"generate: vocab_limit must be 1 or more, got {vocab_limit}")
    device = model.embed.weight.device
    padded, lengths = _pad(tokens, device)
    _check_tokens(padded, model.config.vocab)
    if drafter is not None and len(padded) != 1:
        raise ValueError(f"generate: a drafter takes one prompt, got {len(padded)}")
    own = cache is None and drafter is None
    if cache is None:
        size = len(padded), padded.shape[1] + max_new_tokens
        cache = graph.borrow(model, *size) if own else model.new_cache(*size)
    room = model.config.max_positions - cache.length - padded.shape[1]
    if room < 0:
        raise ValueError(
            f"generate: tokens must fit max_positions = {model.config.max_positions}, got"
            f" {cache.length} in the cache and {padded.shape[1]} new ones"
        )
    ends = model.config.eos_ids if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    counts = [padded.shape[1]] * len(padded) if lengths is None else lengths.tolist()
    before = [[*history, *row[:count]] for row, count in zip(padded.tolist(), counts, strict=True)]
    sampler = sampling.Sampler(options, seed, before, model.config.vocab, device, vocab_limit)
    run = Run(
        model,
        padded,
        lengths,
        cache,
        sampler,
        # the last token is chosen from a full sequence and itself takes no position
        min(max_new_tokens, room + 1),
        frozenset(ends),
        until,
        _is_batch(tokens),
        own,
    )
    if drafter is None:
        return _steps(run)
    from fastlm.models.speculative import steps

    return steps(run, drafter, before[0])


@dataclass
class Run:
    """A generation whose arguments have been checked; see `stream`."""

    model: Decoder
    tokens: Tensor  # [B, T]
    lengths: Tensor | None  # [B], where they differ
    cache: KVCache
    sampler: sampling.Sampler
    count: int
    ends: frozenset[int]
    until: Until | None
    batch: bool
    own: bool = False  # whether the cache is the generation's own

    def first(self) -> Tensor:
        """Reads the prompts; [B], the tokens after them."""
        hidden = self.model.hidden(self.tokens, cache=self.cache, lengths=self.lengths)
        if self.lengths is None:
            last = hidden[:, -1]
        else:
            last = hidden[torch.arange(len(hidden), device=hidden.device), self.lengths - 1]
        return self.sampler.choose(self.model.logits(last))

    def ended(self, row: int, token: int) -> bool:
        """Whether a sequence ends with this token."""
        stop = self.until is not None and self.until(row, token)  # hears of every token
        return stop or token in self.ends


def _steps(run: Run) -> Iterator[Any]:
    if run.count <= 0 or not len(run.tokens):
        return
    ended = [False] * len(run.tokens)
    # inference mode is left before each yield: the caller's code must not run in it
    with torch.inference_mode():
        graphs = graph.chosen(run.model, run.cache)
        source = graph.Ahead(run) if graphs else _OneByOne(run)
    try:
        for step in range(run.count):
            with torch.inference_mode():
                found = source.token(step)
            if not run.batch:
                over = run.ended(0, found[0])
                yield found[0]
                if over:
                    return
                continue
            values = [None if over else value for value, over in zip(found, ended, strict=True)]
            ended = [value is None or run.ended(row, value) for row, value in enumerate(values)]
            yield values
            if all(ended):
                return
    finally:
        if graphs and run.own:
            graph.give_back(run.model, run.cache)


class _OneByOne:
    """The tokens of a generation, each step made when its token is asked for."""

    def __init__(self, run: Run) -> None:
        self._run, self._following = run, NextLogits(run.model, run.cache)
        self._chosen = run.first()

    def token(self, step: int) -> list[int]:
        """[B], the tokens of a step; steps are asked for one after the other."""
        sampler = self._run.sampler
        if step and sampler.takes_the_largest:
            self._chosen = self._following.best(self._chosen, sampler.limit)
        elif step:
            self._chosen = sampler.choose(self._following(self._chosen))
        values: list[int] = self._chosen.tolist()
        return values


def _is_batch(tokens: Prompt) -> bool:
    if isinstance(tokens, Tensor):
        return tokens.dim() == 2
    return bool(tokens) and not isinstance(tokens[0], int)


def _pad(tokens: Prompt, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """[B, T] tokens padded on the right, and the lengths [B] where they differ."""
    if isinstance(tokens, Tensor):
        if tokens.dim() not in (1, 2) or not tokens.shape[-1]:
            raise ValueError(f"generate: tokens must be [T] or [B, T], got {list(tokens.shape)}")
        return tokens.to(device).reshape(-1, tokens.shape[-1]), None
    rows = [list(row) for row in tokens] if _is_batch(tokens) else [list(tokens)]  # type: ignore[arg-type]
    counts = [len(row) for row in rows]
    if min(counts) == 0:
        raise ValueError("generate: tokens must hold at least one token per prompt, got none")
    longest = max(counts)
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    equal = min(counts) == longest
    return padded, None if equal else torch.tensor(counts, device=device)


def _check_tokens(tokens: Tensor, vocab: int) -> None:
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise TypeError(f"generate: tokens must be integers, got {tokens.dtype}")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
        bad = tokens.min() if int(tokens.min()) < 0 else tokens.max()
        raise ValueError(f"generate: tokens must be in [0, {vocab}), got {int(bad)}")
