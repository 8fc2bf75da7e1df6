"""The checks of attention's arguments, with the error that names the one at fault."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops import _checks

WIDEST = 2**31 - 1  # window: a wider one, as of sys.maxsize, hides nothing more


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Checks q, k and v of [B, H, T, D]."""
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        a, b, c = q.shape, k.shape, v.shape
        if (
            len(a) == len(b) == len(c) == 4
            and a[0] == b[0] == c[0]
            and b[1] == c[1] > 0
            and a[1] % b[1] == 0
            and b[2] == c[2]
            and a[3] == b[3] > 0
            and q.dtype == k.dtype == v.dtype
            and q.dtype in _checks.FLOATS
            and q.device == k.device == v.device
        ):
            return
    _explain(q, k, v, 4)


def _explain(q: Tensor, k: Tensor, v: Tensor, rank: int) -> None:
    """Raises the error that names what does not fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _checks.floating("attention", name, x)
        _checks.rank("attention", name, x, rank)
    for name, x in (("k", k), ("v", v)):
        _checks.same_dtype("attention", name, x, q)
        _checks.same_device("attention", name, x, q)
    batch, (hq, _), (hkv, tk) = q.shape[:-3], q.shape[-3:-1], k.shape[-3:-1]
    if rank == 3:
        (tk, hkv), hq = k.shape[:2], q.shape[1]
    if hkv == 0 or hq % hkv:
        raise _checks.fail("attention", "k", f"of a head count that divides {hq}", f"{hkv} heads")
    if q.shape[-1] == 0:
        raise _checks.fail("attention", "q", "of a head size of 1 or more", list(q.shape))
    keys = (hkv, tk) if rank == 4 else (tk, hkv)
    _checks.shape("attention", "k", k, (*batch, *keys, q.shape[-1]))
    _checks.shape("attention", "v", v, (*batch, *keys, v.shape[-1]))


def check_packed(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor | None, mask: Tensor | None
) -> None:
    """Checks packed sequences: q, k and v of [total, H, D] and where each begins."""
    _explain(q, k, v, 3)
    if mask is not None:
        raise _checks.fail("attention", "mask", "None for packed sequences", "a mask")
    for name, starts in (("cu_seqlens_q", starts_q), ("cu_seqlens_k", starts_k)):
        if starts is None:
            continue
        _checks.tensor("attention", name, starts)
        if starts.dtype != torch.int32:
            raise _checks.fail("attention", name, "of torch.int32", starts.dtype)
        _checks.rank("attention", name, starts, 1)
        _checks.same_device("attention", name, starts, q)
        if starts.shape[0] < 1:
            raise _checks.fail("attention", name, "of one element or more", list(starts.shape))
    if starts_k is not None:
        _checks.shape("attention", "cu_seqlens_k", starts_k, starts_q.shape)
    if torch.compiler.is_compiling() or q.device.type != "cpu":
        return  # their values are known to the device only
    _check_starts("cu_seqlens_q", starts_q.tolist(), q.shape[0])
    name = "cu_seqlens_q" if starts_k is None else "cu_seqlens_k"
    _check_starts(name, (starts_q if starts_k is None else starts_k).tolist(), k.shape[0])


def _check_starts(name: str, starts: list[int], total: int) -> None:
    if starts[0] != 0 or starts[-1] != total or starts != sorted(starts):
        raise _checks.fail("attention", name, f"rising from 0 to {total}", starts)


def check_options(
    q: Tensor,
    k: Tensor,
    batch: int,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Checks what else a call may give."""
    if window is not None and window < 1:
        raise _checks.fail("attention", "window", "1 or more", window)
    if softcap is not None:
        _checks.positive("attention", "softcap", softcap)
    heads = q.shape[1]
    if alibi_slopes is not None:
        _checks.floating("attention", "alibi_slopes", alibi_slopes)
        _checks.same_device("attention", "alibi_slopes", alibi_slopes, q)
        if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
            wanted = f"[{heads}] or [{batch}, {heads}]"
            raise _checks.fail("attention", "alibi_slopes", wanted, list(alibi_slopes.shape))
    if sinks is not None:
        _checks.floating("attention", "sinks", sinks)
        _checks.same_device("attention", "sinks", sinks, q)
        _checks.shape("attention", "sinks", sinks, (heads,))
    if mask is not None:
        _checks.tensor("attention", "mask", mask)
        if mask.dtype != torch.bool and mask.dtype not in _checks.FLOATS:
            raise TypeError(f"attention: mask must be bool or floating-point, got {mask.dtype}")
        _checks.same_device("attention", "mask", mask, q)
        full = (*q.shape[:3], k.shape[2])
        shape = mask.shape
        if len(shape) > 4 or any(
            n not in (1, m) for n, m in zip(reversed(shape), reversed(full), strict=False)
        ):
            raise _checks.fail("attention", "mask", f"broadcastable to {list(full)}", list(shape))
