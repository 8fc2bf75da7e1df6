"""A call of attention as its kernels take it: strides, options as constants, lists of tiles."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.triton import _configs
from fastlm.triton._attention_backward import sequence_sums
from fastlm.triton._attention_mask import mask_tiles
from fastlm.triton._configs import Config
from fastlm.triton._primitives import ceil_div, power_of_two

_FAR = 2**23  # elements between rows; further, and offsets within a tile would not fit 32 bits
_LOG2E = 1.4426950408889634


class Call:
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
        if self.q.dtype == torch.float32 and name != "attention_delta":
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

    def slopes_of(self, rows: Tensor) -> Tensor:
        """The gradient of the slopes, of those of every row."""
        if self.slopes.dim() == 1:  # type: ignore[union-attr]
            return sum_but(rows, rows.dim() - 2)
        if not self.packed:
            return rows.sum(-1)
        sums = rows.new_empty(self.slopes.shape)  # type: ignore[union-attr]
        config = _configs.select("attention_delta", 0, rows.get_device())
        launch(
            sequence_sums,
            sums.numel(),
            (rows, sums, self.starts_q),
            (self.tq, self.heads),
            config,
            BLOCK=1024,
        )
        return sums

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


def sum_but(x: Tensor, kept: int) -> Tensor:
    """Over all dimensions but one."""
    return x.sum([n for n in range(x.dim()) if n != kept])
