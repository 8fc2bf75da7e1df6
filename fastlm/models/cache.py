"""The keys and values of the tokens seen so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import ops

FEW = 8  # new tokens up to this many go through decode_attention


class KVCache:
    """Keys and values of every layer, [B, Hkv, capacity, D] each, allocated ahead and grown.

    All sequences are of one length (`length`), or each has its own (`lengths`, after a prompt of
    unequal sequences, padded on the right). Rows beyond a sequence's length hold no meaning.

    Args:
        layers, batch, kv_heads, head_dim: sizes.
        capacity: tokens to make room for; it doubles when they do not suffice.
        window: sliding window of the attention.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        capacity: int = 256,
        window: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (batch, kv_heads, max(1, capacity), head_dim)
        self.window = window
        self.length = 0
        self.lengths: Tensor | None = None
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self._rows: Tensor | None = None  # where the new tokens go, when lengths differ
        self.steps: dict[Any, Any] = {}  # what `fastlm.models.graph` has bound to these tensors

    @property
    def batch(self) -> int:
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def positions(self, tokens: int) -> Tensor | slice:
        """The positions of the next tokens: a slice, or [B, tokens] where lengths differ."""
        if self.lengths is None:
            return slice(self.length, self.length + tokens)
        return self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)

    def reserve(self, tokens: int) -> None:
        """Makes room for new tokens."""
        needed = self.length + tokens
        if needed > self.capacity:
            self._grow(max(needed, 2 * self.capacity))

    def begin(self, tokens: int) -> None:
        """Makes room for new tokens and finds their places; call it once before the layers."""
        self.reserve(tokens)
        if self.lengths is not None:
            _, heads, capacity, _ = self.keys[0].shape
            first = torch.arange(self.batch * heads, device=self.lengths.device) * capacity
            new = torch.arange(tokens, device=self.lengths.device)
            start = self.lengths.repeat_interleave(heads) + first
            self._rows = (start[:, None] + new).flatten()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores the new tokens' keys and values and attends to all of them so far."""
        keys, values = self.keys[layer], self.values[layer]
        past, tokens = self.length, q.shape[2]
        if self.lengths is None:
            end = past + tokens
            keys[:, :, past:end] = k
            values[:, :, past:end] = v
            if tokens <= FEW:
                return ops.decode_attention(q, keys, values, end, window=self.window)
            if past:
                k, v = keys[:, :, :end], values[:, :, :end]
            return ops.attention(q, k, v, causal=True, window=self.window)
        assert self._rows is not None  # begin() was called
        for cache, new in ((keys, k), (values, v)):
            flat = cache.view(-1, cache.shape[-1])
            flat.index_copy_(0, self._rows, new.reshape(-1, new.shape[-1]))
        return ops.decode_attention(q, keys, values, self.lengths + tokens, window=self.window)

    @torch.inference_mode(False)  # what is made here may be used outside of inference mode
    def end(self, tokens: int, lengths: Tensor | None = None) -> None:
        """Counts the new tokens; call it once after the layers.

        Args:
            tokens: how many there were.
            lengths: [B], how many of them are real in each sequence of a first, padded prompt.
        """
        if lengths is not None:
            self.lengths = lengths.clone()
        elif self.lengths is not None:
            self.lengths += tokens
        self.length += tokens

    @torch.inference_mode(False)
    def stand_at(self, length: int, lengths: Tensor | None) -> None:
        """Says how many tokens were put into it elsewhere: of all, or [B] of each sequence."""
        self.length = length
        self.lengths = None if lengths is None else lengths.clone()

    def crop(self, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        if self.lengths is not None:
            raise ValueError("KVCache.crop: the sequences must be of one length")
        if not 0 <= length <= self.length:
            raise ValueError(
                f"KVCache.crop: length must be between 0 and {self.length}, got {length}"
            )
        self.length = length

    @torch.inference_mode(False)
    def _grow(self, capacity: int) -> None:
        self.steps.clear()
        for stored in (self.keys, self.values):
            for i, old in enumerate(stored):
                batch, heads, _, size = old.shape
                stored[i] = old.new_empty(batch, heads, capacity, size)
                stored[i][:, :, : self.length] = old[:, :, : self.length]
