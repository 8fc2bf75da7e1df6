"""How each kernel is cut, per architecture: data, never tuned at run time.

A tuner at run time is slow, and makes results differ between runs and between ranks. A table maps
the size that matters to a kernel (its docstring says which) to the first row whose bound holds.
The rows below come from register and shared memory budgets (tests/triton/registers.json) and from
published sizes; no GPU has measured them. Those of tuned.json, which tools/tune.py writes on a GPU,
stand in their place.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
ANY = 2**62  # a bound that always holds


class Config(NamedTuple):
    """How one kernel runs.

    What the sizes in `tile` mean is the kernel's matter; of one with products the first is the rows
    of a product (from 64 on, tools/compile_kernels.py expects wgmma on sm_90).
    """

    tile: tuple[int, ...]
    warps: int = 4
    stages: int = 1  # loads under way ahead of their use, in loops


Rows = list[tuple[int, Config]]

# Elements of a tile. Rows above the last bound are worked through tile by tile.
_NORM: Rows = [
    (256, Config((2048,), 4)),
    (2048, Config((2048,), 4)),
    (4096, Config((4096,), 4)),
    (8192, Config((8192,), 8)),
    (16384, Config((16384,), 16)),
    (ANY, Config((4096,), 8)),
]
# Elements of a tile, and programs per multiprocessor: each keeps its share of the weight gradient
# in registers.
_NORM_BACKWARD: Rows = [
    (256, Config((1024, 8), 4)),
    (1024, Config((1024, 8), 4)),
    (2048, Config((2048, 4), 4)),
    (4096, Config((4096, 2), 8)),
    (8192, Config((8192, 1), 16)),
    (ANY, Config((4096, 4), 8)),
]

# Rows and columns of a tile; partial sums are added up in it too
_NORM_WEIGHT_GRADIENT: Rows = [(ANY, Config((16, 128), 4))]
# Elements of a tile
_ACTIVATION: Rows = [(ANY, Config((1024,), 4))]
# Pairs of a tile
_ROPE: Rows = [(ANY, Config((2048,), 4))]
# Elements of a tile. Rows above the last bound go through registers tile by tile, and a second time
# for the gradient: 132 programs of 256 KB each stay in the 50 MB of L2.
_CROSS_ENTROPY: Rows = [
    (2048, Config((2048,), 4)),
    (8192, Config((8192,), 8)),
    (32768, Config((32768,), 32)),
    (ANY, Config((8192,), 16)),
]
# Rows of a chunk: 1.05 GB of bf16 logits at 128256 classes
_LINEAR_CROSS_ENTROPY: Rows = [(ANY, Config((4096,)))]

# Queries and keys of a tile, by head size; the kernel of dk and dv names keys first.
_ATTENTION: Rows = [
    (64, Config((128, 64), 4, 3)),
    (128, Config((128, 32), 8, 2)),
    (ANY, Config((64, 32), 8, 1)),
]
_ATTENTION_KV: Rows = [
    (64, Config((64, 64), 8, 2)),
    (128, Config((64, 32), 8, 1)),
    (ANY, Config((32, 16), 8, 1)),
]
_ATTENTION_Q: Rows = [
    (64, Config((128, 64), 8, 1)),
    (128, Config((64, 32), 8, 1)),
    (ANY, Config((32, 32), 8, 1)),
]
# fp32, without tensor cores: a thread holds its part of both factors in registers, so that larger
# tiles spill by the kilobyte
_ATTENTION_FP32: Rows = [
    (64, Config((64, 32), 8, 1)),
    (128, Config((32, 32), 8, 1)),
    (ANY, Config((16, 16), 8, 1)),
]
_ATTENTION_BACKWARD_FP32: Rows = [
    (64, Config((32, 32), 8, 1)),
    (ANY, Config((16, 16), 8, 1)),
]
# wgmma reads keys from shared memory, and two groups of warps share one tile
_ATTENTION_90: Rows = [
    (64, Config((128, 128), 8, 2)),
    (128, Config((128, 64), 8, 2)),
    (ANY, Config((128, 32), 8, 2)),
]
_ATTENTION_KV_90: Rows = [
    (64, Config((128, 64), 8, 2)),
    (128, Config((128, 32), 8, 2)),
    (ANY, Config((64, 32), 8, 2)),
]
_ATTENTION_Q_90: Rows = [
    (64, Config((128, 64), 8, 2)),
    (128, Config((128, 64), 8, 2)),
    (ANY, Config((64, 64), 8, 2)),
]
# 512 registers a thread of four warps, of 64 threads each, hold what 256 of eight do not
_ATTENTION_KV_AMD: Rows = [(128, Config((64, 32), 4, 1)), (ANY, Config((32, 16), 8, 1))]
# Rows at least, and outputs; of one row: outputs and bytes of weights
_QUANTIZED: Rows = [(16, Config((16, 64), 4, 4)), (ANY, Config((16, 128), 8, 3))]
_QUANTIZED_ROW: Rows = [(ANY, Config((16, 256), 4, 3))]
# Queries at least, and keys
_DECODE: Rows = [
    (128, Config((16, 64), 4, 3)),
    (256, Config((16, 32), 4, 3)),
    (ANY, Config((16, 16))),
]
# Rows, outputs and columns of a step, by x's width. Where the library multiplies the tile is empty:
# an own product 5 % behind it wins up to a width of 5,200 and, where the projections are stored
# too, of 3,500; so far it is expected to be further behind.
LIBRARY = Config(())
_FEED_FORWARD: Rows = [(4096, Config((128, 64, 32), 4, 4)), (ANY, LIBRARY)]
_FEED_FORWARD_90: Rows = [(4096, Config((128, 128, 64), 8, 3)), (ANY, LIBRARY)]
_FEED_FORWARD_AMD: Rows = [(4096, Config((128, 64, 32), 8, 2)), (ANY, LIBRARY)]
# up to 64 rows the weights are read once either way, and a launch counts
_FEED_FORWARD_FEW: Rows = [(ANY, Config((16, 64, 64), 4, 4))]
_FEED_FORWARD_FEW_AMD: Rows = [(ANY, Config((16, 64, 64), 4, 2))]
_ATTENTION_DELTA: Rows = [(128, Config((64,), 4)), (ANY, Config((16,), 4))]

TABLE: dict[str, dict[str, Rows]] = {
    "attention": {"": _ATTENTION, "sm_90": _ATTENTION_90},
    "attention_kv": {"": _ATTENTION_KV, "sm_90": _ATTENTION_KV_90, "gfx942": _ATTENTION_KV_AMD},
    "attention_q": {"": _ATTENTION_Q, "sm_90": _ATTENTION_Q_90},
    "feed_forward": {
        "": _FEED_FORWARD,
        "sm_90": _FEED_FORWARD_90,
        "sm_100": _FEED_FORWARD_90,
        "gfx942": _FEED_FORWARD_AMD,
    },
    "feed_forward_kept": {
        "": [(2048, _FEED_FORWARD[0][1]), (ANY, LIBRARY)],
        "sm_90": [(2048, _FEED_FORWARD_90[0][1]), (ANY, LIBRARY)],
        "sm_100": [(2048, _FEED_FORWARD_90[0][1]), (ANY, LIBRARY)],
        "gfx942": [(2048, _FEED_FORWARD_AMD[0][1]), (ANY, LIBRARY)],
    },
    "feed_forward_few": {"": _FEED_FORWARD_FEW, "gfx942": _FEED_FORWARD_FEW_AMD},
    "feed_forward_fp32": {"": [(ANY, LIBRARY)]},  # no tensor cores
    "attention_fp32": {"": _ATTENTION_FP32},
    "attention_kv_fp32": {"": _ATTENTION_BACKWARD_FP32},
    "attention_q_fp32": {"": _ATTENTION_BACKWARD_FP32},
    "quantized_linear": {"": _QUANTIZED},
    "quantized_row": {"": _QUANTIZED_ROW},
    "decode_attention": {"": _DECODE},
    "attention_delta": {"": _ATTENTION_DELTA},
    "norm": {"": _NORM},
    "norm_backward": {"": _NORM_BACKWARD},
    "norm_weight_gradient": {"": _NORM_WEIGHT_GRADIENT},
    "activation": {"": _ACTIVATION},
    "rope": {"": _ROPE},
    "cross_entropy": {"": _CROSS_ENTROPY},
    "cross_entropy_sums": {"": [(ANY, Config((4096,), 8))]},
    "linear_cross_entropy": {"": _LINEAR_CROSS_ENTROPY},
}

TUNED = Path(__file__).with_name("tuned.json")  # what tools/tune.py has measured, if anything


def parsed(content: dict[str, Any], file: str) -> dict[str, dict[str, Rows]]:
    """Architecture -> table -> rows of tools/tune.py's file.

    Raises:
        ValueError: what is not a table, in a file that is named.
    """
    found: dict[str, dict[str, Rows]] = {}
    for arch, about in content.items():
        for name, lines in about["tables"].items():
            table = [
                (ANY if bound is None else bound, Config(tuple(tile), warps, stages))
                for bound, tile, warps, stages in lines
            ]
            bounds = [bound for bound, _ in table]
            if arch not in ARCHITECTURES or name not in TABLE:
                raise ValueError(f"{file}: there is no table {name!r} of {arch!r}")
            if bounds[-1:] != [ANY] or bounds != sorted(set(bounds)):
                raise ValueError(
                    f"{file}: {name} of {arch}: bounds must ascend and end with null, got "
                    f"{[line[0] for line in lines]}"
                )
            found.setdefault(arch, {})[name] = table
    return found


if TUNED.exists():
    for _arch, _tables in parsed(json.loads(TUNED.read_text()), str(TUNED)).items():
        for _name, _rows in _tables.items():
            TABLE[_name][_arch] = _rows

_assumed: str | None = None
_overrides: dict[str, Config] = {}


def select(name: str, size: int, device: int) -> Config:
    """The configuration of the kernel `name` for its size on a device, by index."""
    if _overrides and name in _overrides:
        return _overrides[name]
    return _select(name, size, architecture(device))


@lru_cache(4096)
def _select(name: str, size: int, arch: str) -> Config:
    return next(config for bound, config in rows(name, arch) if size <= bound)


def rows(name: str, arch: str) -> Rows:
    """The table of the kernel `name` for an architecture."""
    tables = TABLE[name]
    found = tables.get(arch, tables[""])
    if arch.startswith("gfx"):  # whose warps have 64 threads: a block holds 16
        return [(n, c._replace(warps=min(c.warps, 16))) for n, c in found]
    return found


def architecture(device: int) -> str:
    """The name under which the tables hold a device, the nearest one that stands in them."""
    return _assumed or _architecture(device)


@lru_cache
def _architecture(device: int) -> str:
    if device < 0:  # the interpreter
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")  # sm_12x has the shared memory of sm_8x


@lru_cache
def multiprocessors(device: int) -> int:
    """How many multiprocessors a device has; three in the interpreter."""
    if device < 0:
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextlib.contextmanager
def assume(arch: str) -> Iterator[None]:
    """Chooses as for an architecture, whatever is here."""
    global _assumed
    _assumed = arch
    try:
        yield
    finally:
        _assumed = None


@contextlib.contextmanager
def override(**configs: Config) -> Iterator[None]:
    """Other configurations inside the block: for tests and for the tuner."""
    _overrides.update(configs)
    try:
        yield
    finally:
        for name in configs:
            del _overrides[name]
