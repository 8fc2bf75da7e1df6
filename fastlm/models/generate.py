"""Generating text, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlm.models import sampling
from fastlm.models.cache import KVCache
from fastlm.models.plan import NextLogits
from fastlm.ops.sample import check_options

if TYPE_CHECKING:
    from fastlm.models.decoder import Decoder

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
    seed: int | None = 0,
    eos: int | Sequence[int] | None = None,
    vocab_limit: int | None = None,
    cache: KVCache | None = None,
) -> Iterator[Any]:
    """Yields each new token as soon as it is known.

    Args:
        model: the decoder.
        tokens: one prompt ([T] tensor or list), or several, also of unequal length ([B, T] tensor
            or list of lists). No prompt may be empty.
        max_new_tokens: how many to generate at most; fewer when max_positions ends the sequence.
        temperature: 0 takes the most likely token (greedy).
        top_k, top_p, min_p: see `fastlm.ops.sample`.
        seed: of the random numbers; None takes a fresh one.
        eos: end tokens; the config's by default, () for none.
        vocab_limit: tokens from this number on are never chosen (a head padded beyond the
            tokenizer's vocabulary).
        cache: a cache that holds what came before the prompt; it is continued. A new one by
            default.

    Yields:
        The token as an int. With several prompts a list, None for those that have ended.

    Raises:
        ValueError: an empty prompt, one longer than max_positions, an option out of range.
    """
    check_options("generate", temperature, top_k, top_p, min_p)
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be 0 or more, got {max_new_tokens}")
    device = model.embed.weight.device
    padded, lengths = _pad(tokens, device)
    _check_tokens(padded, model.config.vocab)
    if cache is None:
        cache = model.new_cache(len(padded), padded.shape[1] + max_new_tokens)
    room = model.config.max_positions - cache.length - padded.shape[1]
    if room < 0:
        raise ValueError(
            f"generate: tokens must fit max_positions = {model.config.max_positions}, got"
            f" {cache.length} in the cache and {padded.shape[1]} new ones"
        )
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    ends = model.config.eos_ids if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    following = NextLogits(model, cache)

    def choose(logits: Tensor) -> Tensor:
        if vocab_limit is not None:
            logits = logits[:, :vocab_limit]
        return sampling.sample(logits, generator, temperature, top_k, top_p, min_p)

    def follow(chosen: Tensor) -> Tensor:
        if temperature == 0:
            return following.best(chosen, vocab_limit)
        return choose(following(chosen))

    return _steps(
        model,
        padded,
        lengths,
        cache,
        choose,
        follow,
        # the last token is chosen from a full sequence and itself takes no position
        min(max_new_tokens, room + 1),
        frozenset(ends),
        _is_batch(tokens),
    )


def _steps(
    model: Decoder,
    tokens: Tensor,
    lengths: Tensor | None,
    cache: KVCache,
    choose: Callable[[Tensor], Tensor],
    follow: Callable[[Tensor], Tensor],
    count: int,
    ends: frozenset[int],
    batch: bool,
) -> Iterator[Any]:
    if count <= 0 or not len(tokens):
        return
    ended = [False] * len(tokens)
    # inference mode is left before each yield: the caller's code must not run in it
    with torch.inference_mode():
        hidden = model.hidden(tokens, cache=cache, lengths=lengths)
        if lengths is None:
            last = hidden[:, -1]
        else:
            last = hidden[torch.arange(len(tokens), device=hidden.device), lengths - 1]
        chosen = choose(model.logits(last))
    for step in range(count):
        if step:
            with torch.inference_mode():
                chosen = follow(chosen)
        values = chosen.tolist()
        if not batch:
            yield values[0]
            if values[0] in ends:
                return
            continue
        yield [None if over else value for value, over in zip(values, ended, strict=True)]
        ended = [over or value in ends for value, over in zip(values, ended, strict=True)]
        if all(ended):
            return


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
