"""Choosing the next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor


def check(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError for options out of range."""
    if not temperature >= 0:
        raise ValueError(f"sampling: temperature must be 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"sampling: top_k must be 1 or more, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"sampling: top_p must be in (0, 1], got {top_p}")


def distribution(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The probabilities tokens are drawn with.

    softmax(logits / temperature) over the top_k largest logits, then cut to the fewest tokens whose
    probabilities reach top_p (the one that crosses it included), and normalised again.

    Args:
        logits: [B, V].
        temperature: above 0.
        top_k: how many tokens to keep; None for all.
        top_p: the probability to keep; None for all.

    Returns:
        probabilities [B, n] in fp32, and the tokens they belong to [B, n], most likely first; None
        in their place when nothing was cut and n = V.
    """
    scores = logits.float() / temperature
    ids: Tensor | None = None
    if top_k is not None and top_k < scores.shape[-1]:
        scores, ids = scores.topk(top_k)  # sorted
    probabilities = scores.softmax(-1)
    if top_p is None or top_p >= 1:
        return probabilities, ids
    if ids is None:
        probabilities, ids = _head(probabilities, top_p)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    return probabilities / probabilities.sum(-1, keepdim=True), ids


def _head(probabilities: Tensor, top_p: float, few: int = 1024) -> tuple[Tensor, Tensor]:
    """The largest probabilities, sorted, as many as top_p needs: rarely is that the whole row."""
    if probabilities.shape[-1] > few:
        top, ids = probabilities.topk(few)
        if bool((top.sum(-1) > top_p + 1e-4).all()):
            return top, ids
    return probabilities.sort(-1, descending=True)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One index per row, [B, n] -> [B], by inverting the cumulative distribution.

    Sums are fp64: an index of probability 0 is never drawn.
    """
    cumulative = probabilities.double().cumsum(-1)
    shape = (*probabilities.shape[:-1], 1)
    device = probabilities.device
    uniform = torch.rand(shape, dtype=torch.float64, generator=generator, device=device)
    return torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True).squeeze(-1)


def sample(
    logits: Tensor,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The next token of each row: [B, V] -> [B]. Temperature 0 takes the largest logit."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, ids = distribution(logits, temperature, top_k, top_p)
    drawn = draw(probabilities, generator)
    return drawn if ids is None else ids.gather(-1, drawn[:, None]).squeeze(-1)
