"""One token of every sequence on buffers that stay where they are.

`Decoder.hidden` learns from the host where its tokens stand and how long the cache is; a step here
reads both from the device, writes the next tokens there and never looks. So a step can follow the
one before without the host, and one that was recorded as a CUDA graph (`fastlm.models.graph`) can
be played again. On a CPU it runs as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import nn, ops
from fastlm.models.cache import KVCache
from fastlm.models.sampling import Sampler

if TYPE_CHECKING:
    from fastlm.models.decoder import Decoder

BLOCK = 64  # random numbers a sequence is given at a time


class StaticStep:
    """A decoder's layers, a cache and a choice of tokens, bound to each other.

    It holds the decoder's parts but not the decoder.

    Args:
        model: the decoder; `fastlm.models.graph.unsupported` must have said nothing against it.
        cache: of this model; the step writes to its tensors, whose growth it does not follow, and
            leaves what it says of its length alone.
        sampler: how tokens are chosen; what it remembers is copied by `begin`.

    Attributes:
        tokens: [B] int64, the last tokens: read, then overwritten with the next ones.
        lengths: [B] int32, how many tokens of each sequence are in the cache.
        logits: [B, vocab], of the last step.
    """

    def __init__(self, model: Decoder, cache: KVCache, sampler: Sampler) -> None:
        batch, device = cache.batch, model.embed.weight.device
        self._embed, self._learned, self._rope = model.embed, model.positions, model.rope
        self._blocks, self._norm, self._head = [*model.blocks], model.norm, model.head
        self._keys, self._values, self._window = [*cache.keys], [*cache.values], cache.window
        prompts: list[list[int]] = [[]] * batch
        self._sampler = Sampler(
            sampler.options, 0, prompts, model.config.vocab, device, sampler.limit
        )
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.draws = self._sampler.uniforms is not None
        self._uniforms = torch.zeros(BLOCK, batch, dtype=torch.float64, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)  # in _uniforms
        self.logits: Tensor | None = None

    def begin(self, tokens: Tensor, cache: KVCache, sampler: Sampler) -> None:
        """Stands after a prompt: tokens [B] are the first that were chosen."""
        self.tokens.copy_(tokens)
        if cache.lengths is None:
            self.lengths.fill_(cache.length)
        else:
            self.lengths.copy_(cache.lengths)
        self._place.zero_()
        for ours, theirs in zip(self._sampler.state(), sampler.state(), strict=True):
            ours.copy_(theirs)

    def give(self, uniforms: Tensor) -> None:
        """The random numbers [BLOCK, B] of the next BLOCK steps."""
        self._uniforms.copy_(uniforms, non_blocking=True)

    def registers(self) -> tuple[Tensor, ...]:
        """Everything but the cache that a step leaves to the next one."""
        sampler = self._sampler.state()
        return (self.tokens, self.lengths, self._uniforms, self._place, *sampler)

    def run(self) -> None:
        """Takes `tokens`, continues the cache with them, chooses the next ones."""
        self.lengths.add_(1)
        logits = self._logits()
        uniform = None
        if self.draws:
            uniform = self._uniforms.index_select(0, self._place)[0]
            self._place.add_(1).remainder_(BLOCK)
        self.tokens.copy_(self._sampler.draw(logits, uniform))
        self.logits = logits

    def _logits(self) -> Tensor:
        lengths, batch = self.lengths, self.tokens.shape[0]
        x = F.embedding(self.tokens, self._embed.weight)
        if self._learned is not None:
            x = x + F.embedding(lengths - 1, self._learned.weight)
        cos, sin = (None, None) if self._rope is None else (self._rope.cos, self._rope.sin)
        residual = None
        block: Any
        for block, keys, values in zip(self._blocks, self._keys, self._values, strict=True):
            attention = block.attention
            if residual is None:
                h, residual = block.attention_norm(x), x
            else:
                h, residual = block.attention_norm(x, residual)
            heads, kv_heads = attention.heads, attention.kv_heads
            # with one token, heads within tokens and tokens within heads lie alike
            rows = attention.qkv(h).view(batch, heads + 2 * kv_heads, 1, attention.head_dim)
            q, k, v = rows.split_with_sizes((heads, kv_heads, kv_heads), 1)
            q = ops.rope_append(q, k, v, cos, sin, keys, values, lengths)
            h = ops.decode_attention(q, keys, values, lengths, window=self._window)
            h = attention.out(h.reshape(batch, heads * attention.head_dim))
            h, residual = block.mlp_norm(h, residual)
            x = block.mlp(h)
        hidden = self._norm(x, residual)[0]
        if isinstance(self._head, nn.QuantizedLinear):
            logits: Tensor = self._head(hidden)
            return logits
        return ops.linear(hidden, (self._embed if self._head is None else self._head).weight)
