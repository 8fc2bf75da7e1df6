"""The cases of a GPU: sizes of 1B to 8B models, each with a small sibling whose result is checked.

A small sibling has the same code paths and few enough elements for float64; it is also what runs
under compute-sanitizer and when the benchmarks themselves are tried out on a CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks import gpu_peers
from benchmarks.case import OPS, Case, Work
from benchmarks.gpu_peers import Peers
from benchmarks.ops.test_rope import tables


@dataclass(frozen=True)
class GpuCase:
    """A case, its small sibling, and the peers beside eager, given a built case."""

    case: Case
    small: Case
    peers: Callable[[Work], Peers] = lambda work: {}
    slow_peers: Callable[[Work], Peers] | None = None  # compiled first: a second round has them

    @property
    def id(self) -> str:
        return self.case.id


def _of(op: str, big: tuple, small: tuple, peers=None, slow_peers=None, **options) -> GpuCase:
    make = importlib.import_module(f"benchmarks.ops.test_{op}").case
    case, little = (make(size[0], *size[1:], **options) for size in (big, small))
    found = peers or (lambda work: {})
    return GpuCase(case, little, found, slow_peers)


def _norms(op: str) -> list[GpuCase]:
    peers = getattr(gpu_peers, op)

    def make(dtype: str, rows: int, width: int, **options) -> GpuCase:
        residual = options.get("residual", False)
        small = (dtype, min(rows, 24), width)
        slow = None if rows < 100 or residual else lambda work: {}
        return _of(op, (dtype, rows, width), small, lambda w: peers(residual), slow, **options)

    return [
        make("bf16", 8192, 4096),
        make("bf16", 8192, 4096, backward=True),
        make("bf16", 8192, 4096, residual=True),
        make("bf16", 16, 4096, residual=True),
        make("bf16", 8192, 4096, residual=True, backward=True),
        make("fp32", 8192, 4096, backward=True),
        make("bf16", 65536, 768, backward=True),
        make("bf16", 4096, 16384, backward=True),
        make("bf16", 1024, 65536),
        make("fp32", 8192, 4096),
    ]


def _rope() -> list[GpuCase]:
    def make(dtype: str, batch: int, tokens: int, heads: int, kv: int, head: int, **options):
        small = (dtype, min(batch, 2), min(tokens, 40), heads, kv, head)
        peers = lambda w: gpu_peers.rope(*(t.cuda() for t in tables(dtype, tokens, head)))  # noqa: E731
        slow = (lambda work: {}) if tokens > 1 else None
        return _of("rope", (dtype, batch, tokens, heads, kv, head), small, peers, slow, **options)

    return [
        make("bf16", 4, 2048, 32, 8, 128),
        make("bf16", 4, 2048, 32, 8, 128, backward=True),
        make("bf16", 16, 1, 32, 8, 128),
        make("bf16", 16, 2048, 12, 12, 64, backward=True),
        make("fp32", 4, 2048, 32, 8, 128, backward=True),
    ]


def _rope_append() -> list[GpuCase]:
    def make(dtype: str, batch: int, heads: int, kv: int, keys: int) -> GpuCase:
        small = (dtype, min(batch, 2), 1, heads, kv, 128, 64)
        return _of("rope_append", (dtype, batch, 1, heads, kv, 128, keys), small)

    return [
        make("bf16", 1, 32, 32, 2048),
        make("bf16", 16, 32, 8, 4096),
        make("fp32", 1, 32, 8, 2048),
    ]


def _activation() -> list[GpuCase]:
    def make(dtype: str, kind: str, rows: int, width: int, **options) -> GpuCase:
        peers = lambda w: gpu_peers.activation(kind, options.get("gated", False))  # noqa: E731
        slow = (lambda work: {}) if rows > 100 else None
        small = (dtype, kind, min(rows, 24), width)
        return _of("activation", (dtype, kind, rows, width), small, peers, slow, **options)

    return [
        make("bf16", "silu", 8192, 14336, gated=True),
        make("bf16", "silu", 8192, 14336, gated=True, backward=True),
        make("bf16", "silu", 16, 14336, gated=True),
        make("bf16", "gelu_tanh", 8192, 14336, backward=True),
        make("bf16", "gelu", 8192, 14336),
        make("fp32", "silu", 8192, 5632, gated=True, backward=True),
    ]


def _cross_entropy() -> list[GpuCase]:
    def make(dtype: str, rows: int, vocab: int, **options) -> GpuCase:
        peers = lambda w: gpu_peers.cross_entropy()  # noqa: E731
        small = (dtype, 24, vocab)
        return _of("cross_entropy", (dtype, rows, vocab), small, peers, lambda work: {}, **options)

    return [
        make("bf16", 8192, 128256, backward=True),
        make("bf16", 8192, 32000, backward=True),
        make("bf16", 8192, 128256),
        make("fp32", 4096, 50304, backward=True),
    ]


def _linear_cross_entropy() -> list[GpuCase]:
    def make(dtype: str, rows: int, width: int, vocab: int) -> GpuCase:
        peers = lambda w: gpu_peers.linear_cross_entropy()  # noqa: E731
        small = (dtype, 40, min(width, 512), 3000)
        return _of("linear_cross_entropy", (dtype, rows, width, vocab), small, peers)

    return [make("bf16", 4096, 4096, 128256), make("bf16", 8192, 2048, 32000)]


def _attention() -> list[GpuCase]:
    def make(dtype, batch, heads, tokens, head, *, form="causal", kv_heads=None, backward=False):
        causal, grouped = form == "causal", kv_heads is not None
        return _of(
            "attention",
            (dtype, batch, heads, tokens, head),
            (dtype, min(batch, 2), heads, min(tokens, 300), head),
            lambda w: gpu_peers.attention(causal, grouped),
            lambda w: gpu_peers.flex_attention(causal, grouped, w.inputs[0].shape[2]),
            form=form,
            kv_heads=kv_heads,
            backward=backward,
        )

    return [
        make("bf16", 2, 16, 8192, 128),
        make("bf16", 2, 16, 8192, 128, backward=True),
        make("bf16", 2, 16, 8192, 128, form="full"),
        make("bf16", 2, 16, 8192, 128, form="full", backward=True),
        make("bf16", 4, 32, 2048, 128, kv_heads=8, backward=True),
        make("bf16", 16, 12, 1024, 64, backward=True),
        make("bf16", 4, 32, 2048, 64),
        make("bf16", 1, 32, 512, 128, kv_heads=8),
    ]


def _decode_attention() -> list[GpuCase]:
    def make(dtype: str, batch: int, heads: int, kv: int, keys: int, head: int) -> GpuCase:
        small = (dtype, min(batch, 3), heads, kv, min(keys, 512), head)
        return _of("decode_attention", (dtype, batch, heads, kv, keys, head), small)

    return [
        make("bf16", 32, 32, 8, 4096, 128),
        make("bf16", 1, 32, 8, 4096, 128),
        make("bf16", 1, 32, 8, 32768, 128),
        make("bf16", 1, 32, 32, 2048, 128),
    ]


def _feed_forward() -> list[GpuCase]:
    def make(rows: int, width: int, inner: int, **options) -> GpuCase:
        small = ("bf16", min(rows, 24), min(width, 512), min(inner, 1408))
        slow = (lambda work: {}) if rows > 1000 else None
        return _of("feed_forward", ("bf16", rows, width, inner), small, None, slow, **options)

    return [
        make(8192, 4096, 14336),
        make(8192, 4096, 14336, backward=True),
        make(1, 4096, 14336),
        make(8192, 768, 3072, gated=False, backward=True),
    ]


def _quantized_linear() -> list[GpuCase]:
    def make(bits: int, rows: int, k: int, n: int) -> GpuCase:
        return _of("quantized_linear", ("bf16", bits, rows, k, n), ("bf16", bits, rows, 512, 1024))

    return [
        make(4, 1, 4096, 14336),
        make(8, 1, 4096, 14336),
        make(4, 16, 4096, 14336),
        make(4, 4, 4096, 4096),
    ]


def _linear() -> list[GpuCase]:
    def make(rows: int, k: int, n: int) -> GpuCase:
        return _of("linear", ("bf16", rows, k, n), ("bf16", rows, 512, 1024))

    return [make(1, 4096, 14336), make(16, 4096, 4096)]


def _sample() -> list[GpuCase]:
    def make(rows: int, vocab: int, top_k, top_p) -> GpuCase:
        return _of("sample", ("bf16", rows, vocab, top_k, top_p), ("bf16", 2, 4000, top_k, top_p))

    return [make(1, 128256, None, 0.9), make(16, 128256, 50, 0.9)]


_MAKE = {
    "rms_norm": lambda: _norms("rms_norm"),
    "layer_norm": lambda: _norms("layer_norm"),
    "rope": _rope,
    "rope_append": _rope_append,
    "activation": _activation,
    "attention": _attention,
    "decode_attention": _decode_attention,
    "linear": _linear,
    "feed_forward": _feed_forward,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "quantized_linear": _quantized_linear,
    "sample": _sample,
}


def load(ops: Iterable[str] = OPS) -> list[GpuCase]:
    """The cases of the named operators, the first of each before the second of any."""
    by_op = [_MAKE[op]() for op in ops]
    depth = max(map(len, by_op), default=0)
    return [cases[i] for i in range(depth) for cases in by_op if i < len(cases)]
