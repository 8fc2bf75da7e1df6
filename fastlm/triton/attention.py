"""Launches attention's kernels, forward and backward."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlm.triton._attention_backward import (
    attention_bwd_kv,
    attention_bwd_q,
    attention_delta,
)
from fastlm.triton._attention_call import Call, launch, near, sum_but
from fastlm.triton._attention_forward import attention_fwd
from fastlm.triton._primitives import ceil_div


def _empty(q: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """A packed tensor, or [B, H, T, size] in the memory of a [B, T, H, size]."""
    if q.dim() == 3:
        return q.new_empty((*q.shape[:2], size), dtype=dtype)
    batch, heads, rows, _ = q.shape
    return q.new_empty((batch, rows, heads, size), dtype=dtype).transpose(1, 2)


def _like(x: Tensor) -> Tensor:
    """A gradient, in the order of heads and rows in memory that x has."""
    if x.dim() == 4 and x.stride(1) < x.stride(2):
        return _empty(x, x.shape[-1])
    return x.new_empty(x.shape)


def attention(q: Tensor, k: Tensor, v: Tensor, *options: object) -> Tensor:
    """The operator fastlm::attention."""
    return _forward(q, k, v, *options, with_lse=False)[0]  # type: ignore[misc,arg-type]


def attention_lse(q: Tensor, k: Tensor, v: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    """The operator fastlm::attention_lse."""
    out, lse = _forward(q, k, v, *options, with_lse=True)  # type: ignore[misc,arg-type]
    return out, lse  # type: ignore[return-value]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    c = Call(q, k, v, mask, slopes, starts_q, starts_k, causal, window, scale, softcap)
    out, lse = _empty(q, c.value_size), None
    if with_lse:
        lse = q.new_empty((2, *out.shape[:-1]), dtype=torch.float32)
        if c.packed:
            lse = q.new_empty((2, c.heads, c.tq), dtype=torch.float32)
    config = c.config("attention")
    tiles, counts, mask_strides, columns = c.lists(config, keys=True)
    pack = c.pack(config.tile[0])
    num_tiles = c.tiles(c.tq, config.tile[0] // pack)
    launch(
        attention_fwd,
        num_tiles * (c.heads // pack) * c.batch,
        (c.q, c.k, c.v, out, lse, c.mask, tiles, counts, slopes, sinks, c.starts_q, c.starts_k),
        (
            *c.strides(c.q),
            *c.strides(c.k),
            *c.strides(c.v),
            *c.strides(out),
            *c.lse_strides(),
            0 if lse is None else lse[0].numel(),
            *mask_strides,
            *c.extents(num_tiles, columns),
            *c.numbers,
        ),
        config,
        BM=config.tile[0],
        BN=config.tile[1],
        **c.shape,
        **c.masks,
        SINKS=sinks is not None,
        MASK=c.kind,
        **c.units,
        LSE=with_lse,
        PACK=pack,
        **c.precision,
    )
    return out, lse


def attention_gradients(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    deterministic: bool,
    with_mask: bool,
    with_slopes: bool,
) -> tuple[Tensor, ...]:
    """The operator fastlm::attention_gradients: of q, k, v and, where asked for, mask, slopes and
    sinks."""
    c = Call(q, k, v, mask, slopes, starts_q, starts_k, causal, window, scale, softcap)
    g = _Gradients(c, near(grad), grad_lse, lse)
    # sums of ds over keys, where ds adds up to zero, ask for the same care as fp32
    c.low |= with_mask or with_slopes
    by_queries = g.queries(sinks)
    if c.low:
        by_queries(None, None, None, None)
    else:
        g.delta_of(out)
    dk, dv = _like(k), _like(v)
    plain = not (with_mask or with_slopes) and sinks is None
    if plain and not deterministic and c.tk > 0:
        dq = torch.zeros_like(q, dtype=torch.float32)
        g.keys(dk, dv, dq)
        return _like(q).copy_(dq), dk, dv, *(q.new_empty(0) for _ in range(3))
    g.keys(dk, dv, None)
    dq = _like(q)
    dsinks = None if sinks is None else torch.empty_like(g.delta)
    dslopes = torch.empty_like(g.delta) if with_slopes else None
    dmask = None
    if with_mask:  # tiles that are hidden stay zero
        dmask = q.new_zeros((c.batch, c.heads, c.tq, c.tk), dtype=torch.float32)
    by_queries(dq, dsinks, dslopes, dmask)
    if dmask is not None:
        dmask = dmask.sum_to_size(mask.shape).to(mask.dtype)  # type: ignore[union-attr]
    if dslopes is not None:
        dslopes = c.slopes_of(dslopes)
    if dsinks is not None:
        dsinks = sum_but(dsinks, dsinks.dim() - 2)
    # an operator's outputs are memory of their own, what was not asked for too
    more = (q.new_empty(0) if x is None else x for x in (dmask, dslopes, dsinks))
    return dq, dk, dv, *more


class _Gradients:
    """Launches of the backward kernels of one call."""

    def __init__(self, c: Call, grad: Tensor, grad_lse: Tensor | None, lse: Tensor) -> None:
        self.c, self.grad, self.grad_lse, self.lse = c, grad, grad_lse, lse
        self.delta = torch.empty_like(lse[0])
        self.glse_strides = (0, 0, 0)
        if grad_lse is not None:
            batch_stride = 0 if c.packed else grad_lse.stride(0)
            self.glse_strides = (batch_stride, grad_lse.stride(-2), grad_lse.stride(-1))
        self.inputs = *c.strides(c.q), *c.strides(c.k), *c.strides(c.v), *c.strides(grad)
        self.numbers = c.numbers[0], c.scale, *c.numbers[1:]

    def delta_of(self, out: Tensor) -> None:
        c = self.c
        config = c.config("attention_delta")
        (block,) = config.tile
        num_tiles = ceil_div(c.tq, block)
        launch(
            attention_delta,
            num_tiles * c.heads * c.batch,
            (out, self.grad, self.grad_lse, self.delta),
            (
                *c.strides(out),
                *c.strides(self.grad),
                *self.glse_strides,
                *c.lse_strides(),
                c.heads,
                num_tiles,
                c.tq,
            ),
            config,
            BM=block,
            DV=c.value_size,
            BDV=c.shape["BDV"],
            GRAD_LSE=self.grad_lse is not None,
        )

    def keys(self, dk: Tensor, dv: Tensor, dq: Tensor | None) -> None:
        """Gradients of k and v; what a dq of zeros is given is added to it in no fixed order."""
        c = self.c
        config = c.config("attention_kv")
        tiles, counts, mask_strides, columns = c.lists(config, keys=False)
        num_tiles = c.tiles(c.tk, config.tile[0])
        tables = (c.mask, tiles, counts, c.slopes, c.starts_q, c.starts_k)
        launch(
            attention_bwd_kv,
            num_tiles * c.kv_heads * c.batch,
            (c.q, c.k, c.v, self.grad, self.lse, self.delta, dq, dk, dv, *tables),
            (
                *self.inputs,
                *((0, 0, 0) if dq is None else c.strides(dq)),
                *c.strides(dk),
                *c.strides(dv),
                *c.lse_strides(),
                self.lse[0].numel(),
                *mask_strides,
                *c.extents(num_tiles, columns),
                *self.numbers,
            ),
            config,
            BM=config.tile[1],
            BN=config.tile[0],
            **c.shape,
            **c.masks,
            MASK=c.kind,
            **c.units,
            LOW=c.low and c.units["NATURAL"],  # else the log-sum-exp is one number
            ATOMIC=dq is not None,
            **c.precision,
        )

    def queries(self, sinks: Tensor | None) -> Callable[..., None]:
        """A function of (dq, dsinks, dslopes, dmask), each given or not; without dq: of delta."""
        c = self.c
        config = c.config("attention_q")
        tiles, counts, mask_strides, columns = c.lists(config, keys=True)
        num_tiles = c.tiles(c.tq, config.tile[0])
        tables = (c.mask, tiles, counts, c.slopes, sinks, c.starts_q, c.starts_k)

        def run(
            dq: Tensor | None, dsinks: Tensor | None, dslopes: Tensor | None, dmask: Tensor | None
        ) -> None:
            made = (dq, dsinks, dslopes, dmask)
            launch(
                attention_bwd_q,
                num_tiles * c.heads * c.batch,
                (c.q, c.k, c.v, self.grad, self.grad_lse, self.lse, self.delta, *made, *tables),
                (
                    *self.inputs,
                    *self.glse_strides,
                    *((0, 0, 0) if dq is None else c.strides(dq)),
                    *c.lse_strides(),
                    self.lse[0].numel(),
                    *mask_strides,
                    *c.extents(num_tiles, columns),
                    *self.numbers,
                ),
                config,
                BM=config.tile[0],
                BN=config.tile[1],
                **c.shape,
                **c.masks,
                SINKS=dsinks is not None,
                MASK=c.kind,
                **c.units,
                LOW=c.low,
                GRAD_LSE=self.grad_lse is not None,
                DELTA=dq is None,
                DSLOPES=dslopes is not None,
                DMASK=dmask is not None,
                **c.precision,
            )

        return run


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls whose kernels are compiled ahead of time."""
    bf16, fp32 = torch.bfloat16, torch.float32
    forms = ((64, True, bf16), (96, False, bf16), (128, True, bf16), (256, True, bf16))
    for size, causal, dtype in (*forms, *((size, False, fp32) for size in (64, 128, 256))):
        q, k, v = _heads(size, dtype)
        options = (None, None, None, None, None, causal, 0, size**-0.5, 0.0)
        name = f"{size}{' causal' if causal else ''}{' fp32' if dtype == fp32 else ''}"
        yield f"attention {name}", partial(attention, q, k, v, *options)
        yield f"attention_backward {name}", partial(_backward, q, k, v, options, True)
    q, k, v = _heads(64, torch.float16)
    mask, slopes = (q.new_empty(n, dtype=torch.float32) for n in ((1, 1, 4096, 4096), (32,)))
    more = (mask, slopes, slopes, None, None, False, 1024, 0.125, 30.0)
    yield "attention mask and all", partial(attention_lse, q, k, v, *more)
    yield "attention_backward mask and all", partial(_backward, q, k, v, more, True)
    starts = q.new_empty(9, dtype=torch.int32)
    packed: tuple[Any, ...] = (None, None, None, starts, None, True, 0, 0.125, 0.0)
    q, k, v = (x[0].transpose(0, 1) for x in _heads(128))
    yield "attention packed", partial(attention_lse, q, k, v, *packed)
    few, cache = q.new_empty(64, 32, 32, 128), q.new_empty(64, 8, 4096, 128)
    sloped = (None, slopes, None, None, None, True, 0, 0.125, 0.0)
    yield "attention few queries", partial(attention_lse, few, cache, cache, *sloped)
    yield "attention_backward packed, atomic", partial(_backward, q, k, v, packed, False)
    for dtype in (bf16, fp32):
        q, k, v = _heads(64, dtype)
        learnt = (mask, slopes, None, None, None, True, 0, 0.125, 0.0)
        call = partial(_backward, q, k, v, learnt, True, with_mask=True, with_slopes=True)
        yield f"attention_backward of mask and slopes{' fp32' if dtype == fp32 else ''}", call
    many = q.new_empty(8, 32, dtype=torch.float32)
    packed = (None, many, None, starts, None, True, 0, 0.125, 0.0)
    q, k, v = (x[0].transpose(0, 1) for x in _heads(64))
    call = partial(_backward, q, k, v, packed, True, with_slopes=True)
    yield "attention_backward packed, of slopes", call


def _heads(size: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    like = torch.empty(0, dtype=dtype, device="meta")
    return [like.new_empty(2, 4096, n, size).transpose(1, 2) for n in (32, 8, 8)]


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: tuple[Any, ...],
    fixed: bool,
    with_mask: bool = False,
    with_slopes: bool = False,
) -> None:
    out = torch.empty_like(q)
    rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3]
    lse = q.new_empty((2, *rows), dtype=torch.float32)
    more: tuple[Any, ...] = (*options, fixed, with_mask, with_slopes)
    attention_gradients(out, None, q, k, v, out, lse, *more)
