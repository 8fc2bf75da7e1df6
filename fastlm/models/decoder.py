"""The decoder."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastlm import nn, ops
from fastlm.models.cache import KVCache
from fastlm.models.config import Config
from fastlm.nn.attention import Attend
from fastlm.nn.loss import next_token_loss

if TYPE_CHECKING:
    from fastlm.hf.gguf import GGUFFile

Rope = tuple[Tensor, Tensor]


class Block(torch.nn.Module):
    """One layer: attention and feed-forward, each behind a norm.

    The sum that the residual stream carries is left to the next norm, which adds and normalises in
    one pass: a block takes and returns (what is to be added, the stream so far).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config
        self.attention_norm = make_norm(c)
        self.attention = nn.SelfAttention(
            c.hidden,
            c.heads,
            c.kv_heads,
            c.head_dim,
            bias=c.qkv_bias,
            out_bias=c.out_bias,
            window=c.window,
        )
        self.mlp_norm = make_norm(c)
        assert c.intermediate is not None  # set by Config
        self.mlp = nn.FeedForward(
            c.hidden, c.intermediate, c.activation, gated=c.gated, bias=c.mlp_bias
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rope: Rope | None = None,
        mask: Tensor | None = None,
        attend: Attend | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x, residual) -> (mlp output, residual), both [B, T, hidden]."""
        if residual is None:
            h, residual = self.attention_norm(x), x
        else:
            h, residual = self.attention_norm(x, residual)
        h = self.attention(h, rope, mask=mask, attend=attend, cu_seqlens=cu_seqlens)
        # under autocast the products are of 16 bits, the stream is of the weights' type
        h, residual = self.mlp_norm(h.to(residual.dtype), residual)
        return self.mlp(h).to(residual.dtype), residual


class Decoder(torch.nn.Module):
    """A decoder language model.

    >>> config = Config(vocab=64, hidden=32, layers=2, heads=4, kv_heads=2)
    >>> Decoder(config)(torch.zeros(1, 5, dtype=torch.long)).shape
    torch.Size([1, 5, 64])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.source: Path | GGUFFile | None = None  # the checkpoint it was loaded from
        # whether training keeps each block's input alone and computes the block again for backward
        self.activation_checkpointing = False
        self.embed = _embedding(config.vocab, config.hidden)
        learned = config.positions == "learned"
        self.positions = _embedding(config.max_positions, config.hidden) if learned else None
        assert config.head_dim is not None  # set by Config
        self.rope = (
            None
            if learned
            else nn.RotaryTable(
                config.head_dim, config.max_positions, config.rope_theta, config.rope_scaling
            )
        )
        self.blocks = torch.nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.head: Any = (
            None if config.tied_head else nn.Linear(config.hidden, config.vocab, bias=False)
        )
        if not self.embed.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights as GPT-2's: normal of 0.02, smaller where a block adds to the stream."""
        deep = 0.02 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds = name.endswith(("attention.out.weight", "mlp.down.weight"))
                torch.nn.init.normal_(parameter, std=deep if adds else 0.02)
            else:  # norms and biases
                torch.nn.init.constant_(parameter, float("norm.weight" in name))

    @property
    def head_weight(self) -> Tensor:
        """[vocab, hidden]: the head's own weights or the embedding's."""
        if isinstance(self.head, nn.QuantizedLinear):
            return self.head.qweight.dequantize(self.embed.weight.dtype)
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] normalised hidden states -> [..., vocab]."""
        if isinstance(self.head, nn.QuantizedLinear):
            return self.head(hidden)
        return ops.linear(hidden, self.head_weight)

    @torch.no_grad()
    def quantize(
        self,
        bits: int = 8,
        group_size: int = 32,
        *,
        symmetric: bool = True,
        activations: str = "exact",
    ) -> Decoder:
        """Replaces every linear layer and the head by `fastlm.nn.QuantizedLinear`, in place.

        Embeddings, norms and biases stay as they are. For inference: the integers are not
        trained. `save_pretrained` writes them, `from_pretrained` opens them again.

        Args:
            bits, group_size, symmetric: as in `fastlm.ops.quantize_weight`.
            activations: "exact", or "int8": see `fastlm.ops.quantized_linear`.

        Returns:
            The decoder itself.

        Raises:
            ValueError: the model is quantized already.
        """
        if any(isinstance(module, nn.QuantizedLinear) for module in self.modules()):
            raise ValueError("quantize: the model is held in integers already")
        options: Any = {"symmetric": symmetric, "activations": activations}
        for module in [*self.modules()]:
            for name, child in [*module.named_children()]:
                if isinstance(child, torch.nn.Linear):
                    quantized = nn.QuantizedLinear.from_linear(child, bits, group_size, **options)
                    setattr(module, name, quantized)
        if self.head is None:
            qweight = ops.quantize_weight(self.embed.weight, bits, group_size, symmetric=symmetric)
            self.head = nn.QuantizedLinear(qweight, activations=activations)
        return self

    def forward(
        self,
        tokens: Tensor,
        *,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        reduction: str = "mean",
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The logits of the next token after each token, or with labels or targets the loss.

        Args:
            tokens: [B, T] token numbers.
            labels: [B, T] like tokens; labels[:, t + 1] is predicted at t; -100: no loss.
            targets: [B, T] in place of labels: targets[:, t] is predicted at t.
            reduction: of the loss over targets: "mean", "sum", or "none" for [B, T] losses.
            mask: [B, T], nonzero for real tokens; only padding on the left needs one (what stands
                to the right of a token never reaches it). Positions then count the real tokens.
            positions: [T] or [B, T], where the tokens stand; by default from 0, or after the
                cache's.
            cu_seqlens: [n + 1] int32, from 0 to B T: where sequences start in the flattened tokens,
                packed one after the other; none sees another. Positions then count from each
                start, unless given.
            cache: from `new_cache`; the tokens continue it and are added to it. With a cache
                nothing is differentiated.

        Returns:
            [B, T, vocab] logits in the weights' dtype, or the loss, a scalar but for "none".

        Raises:
            ValueError: a shape that does not fit, a position beyond max_positions.
            TypeError: tokens that are no integers.
        """
        for name, given in (("labels", labels), ("targets", targets)):
            if given is not None and given.shape != tokens.shape:
                expected, got = list(tokens.shape), list(given.shape)
                raise ValueError(f"Decoder: {name} must be {expected} like tokens, got {got}")
        if labels is not None and (targets is not None or reduction != "mean"):
            raise ValueError("Decoder: labels come alone, with the mean; give targets instead")
        hidden = self.hidden(
            tokens, mask=mask, positions=positions, cu_seqlens=cu_seqlens, cache=cache
        )
        if targets is not None:
            return ops.linear_cross_entropy(hidden, self.head_weight, targets, reduction=reduction)
        if labels is None:
            return self.logits(hidden)
        return next_token_loss(hidden, self.head_weight, labels)

    def hidden(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """The normalised hidden states [B, T, hidden] that the head turns into logits.

        `lengths` [B] is for a first prompt of unequal sequences, padded on the right: how many of
        each sequence's tokens the cache keeps. The rest is as in `forward`.
        """
        if cu_seqlens is not None:
            if mask is not None or cache is not None:
                raise ValueError("Decoder: cu_seqlens come without mask and cache")
            places = self._packed_positions(tokens, positions, cu_seqlens)
            flat = self._hidden(tokens.reshape(1, -1), places, None, None, None, cu_seqlens)
            return flat.view(*tokens.shape, -1)
        where = self._positions(tokens, mask, positions, cache, lengths)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            return self._hidden(tokens, where, mask, cache, lengths)

    def _hidden(
        self,
        tokens: Tensor,
        where: Tensor | slice,
        mask: Tensor | None,
        cache: KVCache | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[where]
        rope = None if self.rope is None else (self.rope.cos[where], self.rope.sin[where])
        visible = None if mask is None else mask.bool()[:, None, None, :]
        if cache is not None:
            cache.begin(tokens.shape[1])
        residual: Tensor | None = None
        again = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            attend = None if cache is None else partial(cache.attend, i)
            call = partial(checkpoint, block, use_reentrant=False) if again else block
            x, residual = call(x, residual, rope, visible, attend, cu_seqlens)
        if cache is not None:
            cache.end(tokens.shape[1], lengths)
        return self.norm(x, residual)[0]

    def _positions(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: KVCache | None,
        lengths: Tensor | None,
    ) -> Tensor | slice:
        """Checks the arguments of `hidden` against each other; returns where the tokens stand."""
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
            kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"Decoder: tokens must be an int64 or int32 tensor, got {kind}")
        if tokens.dim() != 2:
            raise ValueError(f"Decoder: tokens must be [B, T], got {list(tokens.shape)}")
        limit, count = self.config.max_positions, tokens.shape[1]
        if mask is not None:
            if cache is not None:
                raise ValueError("Decoder: mask must be None with a cache, which knows its lengths")
            if mask.shape != tokens.shape:
                expected, got = list(tokens.shape), list(mask.shape)
                raise ValueError(f"Decoder: mask must be {expected} like tokens, got {got}")
        if cache is not None and cache.batch != tokens.shape[0]:
            raise ValueError(
                f"Decoder: tokens must be [{cache.batch}, T], got {list(tokens.shape)}"
            )
        if lengths is not None and (cache is None or cache.length):
            raise ValueError("Decoder: lengths are for the first tokens of a cache")
        past = 0 if cache is None else cache.length
        if past + count > limit and positions is None and mask is None:
            raise ValueError(
                f"Decoder: tokens must end by position {limit} (max_positions), got {past} in the"
                f" cache and {count} new ones"
            )
        if positions is not None:
            if positions.shape not in (tokens.shape, tokens.shape[1:]):
                raise ValueError(
                    f"Decoder: positions must be [T] or [B, T] for tokens {list(tokens.shape)},"
                    f" got {list(positions.shape)}"
                )
            return positions
        if mask is not None:
            return (mask.long().cumsum(1) - 1).clamp(min=0)
        return slice(0, count) if cache is None else cache.positions(count)

    def _packed_positions(
        self, tokens: Tensor, positions: Tensor | None, cu_seqlens: Tensor
    ) -> Tensor:
        """[1, B T]: where packed tokens stand in their sequences."""
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1:
            raise ValueError(f"Decoder: cu_seqlens must be [n + 1], got {cu_seqlens!r}")
        if positions is None:
            places = torch.arange(tokens.numel(), device=tokens.device)
            starts = cu_seqlens.long()
            positions = places - starts[torch.searchsorted(starts, places, right=True) - 1]
            positions = positions.view(tokens.shape)
        where = self._positions(tokens, None, positions, None, None)
        assert isinstance(where, Tensor)
        return where.expand(tokens.shape).reshape(1, -1)

    def new_cache(self, batch: int = 1, capacity: int = 256) -> KVCache:
        """An empty cache for `batch` sequences of this model."""
        c, weight = self.config, self.embed.weight
        assert c.kv_heads is not None and c.head_dim is not None  # set by Config
        return KVCache(
            c.layers,
            batch,
            c.kv_heads,
            c.head_dim,
            capacity=min(capacity, c.max_positions),
            window=c.window,
            dtype=weight.dtype,
            device=weight.device,
        )

    def stream(self, tokens: Any, max_new_tokens: int = 128, **options: Any) -> Iterator[Any]:
        """Yields the generated tokens one by one; see `fastlm.models.generate.stream`."""
        from fastlm.models.generate import stream

        return stream(self, tokens, max_new_tokens, **options)

    def generate(
        self,
        tokens: Tensor | Sequence[int] | Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        *,
        callback: Callable[[Any], None] | None = None,
        **options: Any,
    ) -> list[int] | list[list[int]]:
        """The generated tokens as a list; see `fastlm.models.generate.generate`."""
        from fastlm.models.generate import generate

        return generate(self, tokens, max_new_tokens, callback=callback, **options)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        dtype: torch.dtype | str | None = None,
        *,
        quantized: bool = False,
    ) -> Decoder:
        """Opens a Hugging Face directory or a .gguf file; see `fastlm.hf.weights.load`."""
        from fastlm.hf.weights import load

        return load(path, dtype, quantized=quantized)

    def save_pretrained(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Writes a Hugging Face directory; see `fastlm.hf.weights.save`."""
        from fastlm.hf.weights import save

        save(self, path, **options)


def make_norm(config: Config) -> torch.nn.Module:
    """The norm layer of an architecture."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.hidden, eps=config.norm_eps)


def _embedding(rows: int, width: int) -> torch.nn.Embedding:
    """An embedding whose values are set later."""
    return torch.nn.Embedding(rows, width, _weight=torch.empty(rows, width))
