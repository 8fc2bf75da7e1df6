"""Launches attention's kernels: allocation, strides, lists of tiles, the options as constants."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlm.triton import _configs
from fastlm.triton._attention_backward import (
    attention_bwd_kv,
    attention_bwd_q,
    attention_delta,
)
from fastlm.triton._attention_forward import attention_fwd
from fastlm.triton._attention_mask import mask_tiles
from fastlm.triton._configs import Config
from fastlm.triton._primitives import ceil_div, power_of_two

_FAR = 2**23  # elements between rows; further, and offsets within a tile would not fit 32 bits
_LOG2E = 1.4426950408889634


class _Call:
    """The arguments of one call as the kernels take them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        slopes: Tensor | None,
        starts_q: Tensor | None,
        starts_k: Tensor | None,
        causal: bool,
        window: int,
        scale: float,
        softcap: float,
    ) -> None:
        self.q, self.k, self.v = (near(x) for x in (q, k, v))
        self.packed = starts_q is not None
        self.starts_q, self.starts_k = starts_q, starts_q if starts_k is None else starts_k
        self.batch = 1 if q.dim() == 3 else q.shape[0]
        self.sequences = 0 if starts_q is None else starts_q.shape[0] - 1
        token, head = (-3, -2) if self.packed else (-2, -3)
        self.heads, self.kv_heads = q.shape[head], k.shape[head]
        self.tq, self.tk = q.shape[token], k.shape[token]
        self.size, self.value_size = q.shape[-1], v.shape[-1]
        self.slopes, self.mask = slopes, None
        self.kind = 0
        if mask is not None:
            self.kind = 1 if mask.dtype == torch.bool else 2
            mask = mask.view(torch.uint8) if self.kind == 1 else mask
            mask = mask.float() if mask.dtype == torch.float64 else mask
            self.mask = mask.expand(self.batch, self.heads, self.tq, self.tk)
        # a window as wide as all keys hides none, and must not overflow when added to a position
        self.window = min(window, self.tq + self.tk)
        self.scale = scale
        precise = q.dtype == torch.float32
        natural = precise or self.kind == 2
        factor = 1.0 if natural else _LOG2E
        self.numbers = (scale * factor, scale / softcap if softcap else 0.0, softcap * factor)
        fold = scale > 0 and not softcap and slopes is None and self.kind != 2
        block, value_block = (max(16, power_of_two(n)) for n in (self.size, self.value_size))
        self.shape = {"D": self.size, "DV": self.value_size, "BD": block, "BDV": value_block}
        self.masks = {
            "PACKED": self.packed,
            "CAUSAL": causal,
            "WINDOW": self.window > 0,
            "SOFTCAP": bool(softcap),
            "ALIBI": slopes is not None,
        }
        self.units = {"NATURAL": natural, "FOLD": fold}
        self.low = precise
        self.precision = {"PRECISION": "ieee" if precise else "tf32"}

    def config(self, name: str) -> Config:
        size = max(self.shape["BD"], self.shape["BDV"])
        if self.low and name != "attention_delta":
            name += "_fp32"
        return _configs.select(name, size, self.q.get_device())

    def tiles(self, rows: int, tile: int) -> int:
        """How many tiles of rows there may be, of one head and sequence, or of all packed ones."""
        return rows // tile + self.sequences if self.packed else ceil_div(rows, tile)

    def pack(self, tile: int) -> int:
        """How many heads share a tile of the forward pass: all of a group, or one.

        All where few queries leave a tile half empty, and the device has work enough without it.
        """
        groups = self.heads // self.kv_heads
        if self.packed or self.mask is not None or groups > tile:
            return 1
        apart = self.tiles(self.tq, tile) * self.heads
        together = self.tiles(self.tq, tile // groups) * self.kv_heads
        busy = apart * self.batch > _configs.multiprocessors(self.q.get_device())
        return groups if busy and 2 * together <= apart else 1

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """Of sequence, head and row."""
        if self.packed:
            return 0, x.stride(1), x.stride(0)
        return x.stride(0), x.stride(1), x.stride(2)

    def lists(
        self, config: Config, keys: bool
    ) -> tuple[Tensor | None, Tensor | None, tuple[int, ...], int]:
        """(tiles, counts, strides of mask and lists, columns) of the tiles a mask leaves."""
        if self.mask is None:
            return None, None, (0,) * 6, 0
        mask = self.mask
        bm, bn = config.tile if keys else config.tile[::-1]
        rows, columns = ceil_div(self.tq, bm), ceil_div(self.tk, bn)
        if not keys:
            rows, columns = columns, rows
        batch = self.batch if mask.stride(0) else 1
        heads = self.heads if mask.stride(1) else 1
        tiles = mask.new_empty((batch, heads, rows, columns), dtype=torch.int32)
        counts = mask.new_empty((batch, heads, rows), dtype=torch.int32)
        constants = {
            "BM": bm,
            "BN": bn,
            "MASK": self.kind,
            "CAUSAL": self.masks["CAUSAL"],
            "WINDOW": self.masks["WINDOW"],
            "KEYS": keys,
        }
        numbers = (heads, self.tq, self.tk, self.window, rows, columns)
        launch(
            mask_tiles,
            batch * heads * rows,
            (mask, tiles, counts),
            (*mask.stride(), *numbers),
            Config((bm, bn), 4, 1),
            **constants,
        )
        mask_strides = mask.stride()
        planes = (heads if batch > 1 else 0, 1 if heads > 1 else 0)
        return tiles, counts, (*mask_strides, *planes), columns

    def extents(self, num_tiles: int, columns: int) -> tuple[int, ...]:
        """What every kernel takes after the strides of a mask and its lists."""
        many = self.slopes is not None and self.slopes.dim() == 2
        slopes_stride = self.slopes.stride(0) if many else 0  # type: ignore[union-attr]
        heads = self.heads, self.heads // self.kv_heads
        sizes = self.tq, self.tk, self.window
        return slopes_stride, *heads, self.sequences, num_tiles, columns, *sizes

    def lse_strides(self) -> tuple[int, int]:
        return (0 if self.packed else self.heads * self.tq), self.tq


def near(x: Tensor) -> Tensor:
    """x, or a copy where its last stride is not one or its rows lie too far apart."""
    rows = -3 if x.dim() == 3 else -2
    apart = x.stride(rows) > _FAR and x.shape[rows] > 1
    return x.contiguous() if apart or (x.stride(-1) != 1 and x.shape[-1] != 1) else x


def launch(
    kernel: Callable[..., None],
    programs: int,
    tensors: tuple[Tensor | None, ...],
    scalars: tuple[int | float, ...],
    config: Config,
    **constants: object,
) -> None:
    kernel((programs, 1, 1), tensors, scalars, config, **constants)


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
    c = _Call(q, k, v, mask, slopes, starts_q, starts_k, causal, window, scale, softcap)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator fastlm::attention_gradients: of q, k, v and, where given, the sinks."""
    c = _Call(q, k, v, mask, slopes, starts_q, starts_k, causal, window, scale, softcap)
    grad = near(grad)
    delta = torch.empty_like(lse[0])
    rows, heads = c.tq, c.heads
    glse_strides = (0, 0, 0)
    if grad_lse is not None:
        batch_stride = 0 if c.packed else grad_lse.stride(0)
        glse_strides = (batch_stride, grad_lse.stride(-2), grad_lse.stride(-1))
    config = c.config("attention_delta")
    (block,) = config.tile
    launch(
        attention_delta,
        ceil_div(rows, block) * heads * c.batch,
        (out, grad, grad_lse, delta),
        (
            *c.strides(out),
            *c.strides(grad),
            *glse_strides,
            *c.lse_strides(),
            heads,
            ceil_div(rows, block),
            rows,
        ),
        config,
        BM=block,
        DV=c.value_size,
        BDV=c.shape["BDV"],
        GRAD_LSE=grad_lse is not None,
    )

    dk, dv = _like(k), _like(v)
    atomic = not deterministic and sinks is None and c.tk > 0
    dq = torch.zeros_like(q, dtype=torch.float32) if atomic else _like(q)
    config = c.config("attention_kv")
    tiles, counts, mask_strides, columns = c.lists(config, keys=False)
    num_tiles = c.tiles(c.tk, config.tile[0])
    more = (c.mask, tiles, counts, slopes)
    constants = {**c.shape, **c.masks}
    launch(
        attention_bwd_kv,
        num_tiles * c.kv_heads * c.batch,
        (c.q, c.k, c.v, grad, lse, delta, dq, dk, dv, *more, c.starts_q, c.starts_k),
        (
            *c.strides(c.q),
            *c.strides(c.k),
            *c.strides(c.v),
            *c.strides(grad),
            *c.strides(dq),
            *c.strides(dk),
            *c.strides(dv),
            *c.lse_strides(),
            lse[0].numel(),
            *mask_strides,
            *c.extents(num_tiles, columns),
            c.numbers[0],
            c.scale,
            *c.numbers[1:],
        ),
        config,
        BM=config.tile[1],
        BN=config.tile[0],
        **constants,
        MASK=c.kind,
        **c.units,
        LOW=c.low,
        ATOMIC=atomic,
        **c.precision,
    )
    if atomic:
        return _like(q).copy_(dq), dk, dv, q.new_empty(0)

    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(delta)
    config = c.config("attention_q")
    tiles, counts, mask_strides, columns = c.lists(config, keys=True)
    num_tiles = c.tiles(c.tq, config.tile[0])
    last = (c.mask, tiles, counts, slopes, sinks, c.starts_q, c.starts_k)
    launch(
        attention_bwd_q,
        num_tiles * heads * c.batch,
        (c.q, c.k, c.v, grad, grad_lse, lse, delta, dq, dsinks, *last),
        (
            *c.strides(c.q),
            *c.strides(c.k),
            *c.strides(c.v),
            *c.strides(grad),
            *glse_strides,
            *c.strides(dq),
            *c.lse_strides(),
            lse[0].numel(),
            *mask_strides,
            *c.extents(num_tiles, columns),
            c.numbers[0],
            c.scale,
            *c.numbers[1:],
        ),
        config,
        BM=config.tile[0],
        BN=config.tile[1],
        **constants,
        SINKS=sinks is not None,
        MASK=c.kind,
        **c.units,
        LOW=c.low,
        GRAD_LSE=grad_lse is not None,
        **c.precision,
    )
    if sinks is not None:
        dsinks = dsinks.sum([n for n in range(dsinks.dim()) if n != dsinks.dim() - 2])
    return dq, dk, dv, dsinks


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
    packed = (None, None, None, starts, None, True, 0, 0.125, 0.0)
    q, k, v = (x[0].transpose(0, 1) for x in _heads(128))
    yield "attention packed", partial(attention_lse, q, k, v, *packed)
    few, cache = q.new_empty(64, 32, 32, 128), q.new_empty(64, 8, 4096, 128)
    sloped = (None, slopes, None, None, None, True, 0, 0.125, 0.0)
    yield "attention few queries", partial(attention_lse, few, cache, cache, *sloped)
    yield "attention_backward packed, atomic", partial(_backward, q, k, v, packed, False)


def _heads(size: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    like = torch.empty(0, dtype=dtype, device="meta")
    return [like.new_empty(2, 4096, n, size).transpose(1, 2) for n in (32, 8, 8)]


def _backward(q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...], fixed: bool) -> None:
    out = torch.empty_like(q)
    lse = q.new_empty((2, *q.shape[-2::-1]), dtype=torch.float32)
    more: tuple[Any, ...] = (*options, fixed)
    attention_gradients(out, None, q, k, v, out, lse, *more)
