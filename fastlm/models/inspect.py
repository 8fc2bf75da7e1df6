"""Looking into a model: how likely each token was to it, and what its heads attended to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlm import ops
from fastlm.models.cache import KVCache

if TYPE_CHECKING:
    from fastlm.models.decoder import Decoder

_ROWS = 256  # tokens whose logits are held at a time


@dataclass
class Inspection:
    """What a model makes of a text.

    Attributes:
        tokens: the text's tokens.
        logprobs: natural logarithm of each token's probability given those before; None for the
            first, which nothing predicts.
        entropy: of the distribution each token was chosen from, in nats; None for the first.
        likeliest: the (token, logprob) pairs that were likeliest at each place, best first; one
            more entry than tokens: what would follow. Empty for the first.
        attention: by layer, [heads, T, T] fp32 on the CPU: the weight that query t (row) gives to
            key j (column); rows sum to 1.
    """

    tokens: list[int]
    logprobs: list[float | None]
    entropy: list[float | None]
    likeliest: list[list[tuple[int, float]]]
    attention: dict[int, Tensor]

    @property
    def loss(self) -> float:
        """The mean of -logprobs, nan for a single token."""
        known = [-p for p in self.logprobs if p is not None]
        return sum(known) / len(known) if known else math.nan

    def to_dict(self, texts: Sequence[str]) -> dict[str, Any]:
        """For JSON; `texts` are the tokens' texts, see `fastlm.hf.tokenizer.Text.texts`."""
        rows = [
            {
                "token": token,
                "text": text,
                "logprob": _rounded(logprob),
                "entropy": _rounded(entropy),
                "likeliest": [{"token": t, "logprob": _rounded(p)} for t, p in best],
            }
            for token, text, logprob, entropy, best in zip(
                self.tokens, texts, self.logprobs, self.entropy, self.likeliest[:-1], strict=True
            )
        ]
        following = [{"token": t, "logprob": _rounded(p)} for t, p in self.likeliest[-1]]
        found: dict[str, Any] = {"loss": _rounded(self.loss), "tokens": rows, "next": following}
        if self.attention:
            found["attention"] = [
                {
                    "layer": layer,
                    "heads": [
                        [[round(x, 5) for x in row] for row in head] for head in maps.tolist()
                    ],
                }
                for layer, maps in self.attention.items()
            ]
        return found


def _rounded(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else round(x, 5)


class _Recorder(KVCache):
    """Stands where a cache does, computes what the model computes without one, and keeps q and k.

    The model itself is not touched: no hook, no other module.
    """

    def __init__(self, model: Decoder, layers: frozenset[int]) -> None:
        c = model.config
        assert c.kv_heads is not None and c.head_dim is not None  # set by Config
        super().__init__(0, 1, c.kv_heads, c.head_dim, window=c.window)
        self._layers = layers
        self.maps: dict[int, Tensor] = {}

    @property
    def batch(self) -> int:
        return 1

    def begin(self, tokens: int) -> None:
        """Nothing is stored."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention as `fastlm.nn.SelfAttention` computes it without a cache."""
        if layer in self._layers:
            self.maps[layer] = attention_weights(q, k, self.window)[0].cpu()
        return ops.attention(q, k, v, causal=True, window=self.window)


def attention_weights(q: Tensor, k: Tensor, window: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) over the keys that causal attention shows, in fp32 (or fp64).

    Args:
        q: [B, Hq, T, D].
        k: [B, Hkv, T, D], Hq a multiple of Hkv.
        window: sliding window; None for all keys.

    Returns:
        [B, Hq, T, T]. Rows sum to 1.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.to(wide) @ keys.mT / math.sqrt(q.shape[-1])
    places = torch.arange(q.shape[2], device=q.device)
    ahead = places - places[:, None]
    hidden = ahead > 0
    if window is not None:
        hidden = hidden | (ahead <= -window)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


@torch.no_grad()
def inspect(
    model: Decoder,
    tokens: Sequence[int],
    *,
    top: int = 5,
    layers: Sequence[int] | None = None,
    limit: int | None = None,
) -> Inspection:
    """Reads a text once and keeps what the model made of it.

    Args:
        model: the decoder.
        tokens: the text, at least one token, at most max_positions.
        top: how many of the likeliest tokens to name at each place.
        layers: those whose attention maps to keep; None for all, () for none.
        limit: probabilities are over the tokens below this number (a padded head).

    Raises:
        ValueError: no tokens, too many, a layer that is not there.

    Logits are the model's own; logarithms, entropies and maps are fp32. The model's outputs are
    those of an ordinary forward pass.
    """
    c = model.config
    given = [*tokens]
    if not 0 < len(given) <= c.max_positions:
        raise ValueError(
            f"inspect: the text must have 1 to {c.max_positions} tokens (max_positions), got"
            f" {len(given)}"
        )
    if not 0 <= min(given) <= max(given) < c.vocab:
        raise ValueError(f"inspect: tokens must be in [0, {c.vocab}), got {min(given)} and more")
    wanted = range(c.layers) if layers is None else layers
    if bad := [layer for layer in wanted if not 0 <= layer < c.layers]:
        raise ValueError(f"inspect: layers must be in [0, {c.layers}), got {bad[0]}")
    vocab = min(c.vocab, c.vocab if limit is None else limit)
    if not 1 <= top <= vocab:
        raise ValueError(f"inspect: top must be 1 to {vocab}, got {top}")
    recorder = _Recorder(model, frozenset(wanted))
    ids = torch.tensor([given], device=model.embed.weight.device)
    hidden = model.hidden(ids, cache=recorder)[0]
    logprobs: list[float | None] = [None]
    entropy: list[float | None] = [None]
    likeliest: list[list[tuple[int, float]]] = [[]]
    for first in range(0, len(given), _ROWS):
        logits = model.logits(hidden[first : first + _ROWS])[:, :vocab]
        p = logits.float().log_softmax(-1)
        following = torch.tensor(given[first + 1 : first + 1 + len(p)], device=p.device)
        inside = following.clamp(max=vocab - 1)  # a token beyond the limit has probability 0
        chosen = p[: len(following)].gather(1, inside[:, None])[:, 0]
        chosen = chosen.masked_fill(following >= vocab, -math.inf)
        logprobs += chosen.tolist()
        entropy += (-(p.exp() * p.clamp(min=-1e4)).sum(-1)).tolist()
        values, places = p.topk(top)
        likeliest += [
            [*zip(t, v, strict=True)] for t, v in zip(places.tolist(), values.tolist(), strict=True)
        ]
    maps = {layer: recorder.maps[layer] for layer in sorted(recorder.maps)}
    return Inspection(given, logprobs, entropy[: len(given)], likeliest, maps)
