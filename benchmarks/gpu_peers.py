"""Who else computes the same on a GPU: PyTorch's kernels by name, FlexAttention, Liger-Kernel."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.case import Call

Peers = dict[str, Call]


def liger(name: str, make: Callable[[Any], Call]) -> Peers:
    """{"liger": make(a function of liger_kernel.transformers.functional)}, empty without Liger."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    functional = importlib.import_module("liger_kernel.transformers.functional")
    found = getattr(functional, name, None)
    return {} if found is None else {"liger": make(found)}


def rms_norm(residual: bool) -> Peers:
    """Liger's norm, with the addition in front fused where there is one."""
    if residual:
        return liger("liger_fused_add_rms_norm", lambda f: lambda x, w, r: f(x, r, w, 1e-6))
    return liger("liger_rms_norm", lambda f: lambda x, w: f(x, w, 1e-6, in_place=False))


def layer_norm(residual: bool) -> Peers:
    """Liger's norm; it has none with an addition."""
    if residual:
        return {}
    return liger("liger_layer_norm", lambda f: lambda x, w, b: f(x, w, b, 1e-5))


def rope(cos: torch.Tensor, sin: torch.Tensor) -> Peers:
    """Liger's rotation of halves."""
    return liger("liger_rope", lambda f: lambda q, k: f(q, k, cos[None], sin[None]))


def activation(kind: str, gated: bool) -> Peers:
    """Liger's SwiGLU and GeGLU."""
    if not gated or kind not in ("silu", "gelu_tanh"):
        return {}
    return liger("liger_swiglu" if kind == "silu" else "liger_geglu", lambda f: f)


def cross_entropy() -> Peers:
    """Liger's loss, which writes the gradient over the logits."""
    return liger("liger_cross_entropy", lambda f: f)


def linear_cross_entropy() -> Peers:
    """Liger's loss of a head in chunks."""
    return liger("liger_fused_linear_cross_entropy", lambda f: lambda x, w, t: f(x, w, t))


def attention(causal: bool, grouped: bool) -> Peers:
    """PyTorch's attention with one of its kernels forced."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def forced(backend: SDPBackend, q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return {
        "cudnn": partial(forced, SDPBackend.CUDNN_ATTENTION),
        "flash": partial(forced, SDPBackend.FLASH_ATTENTION),
    }


def flex_attention(causal: bool, grouped: bool, tokens: int) -> Peers:
    """FlexAttention, compiled, with a block mask where it is causal."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    run = torch.compile(flex_attention, dynamic=False)
    mask = None
    if causal:
        mask = create_block_mask(
            lambda b, h, q, k: q >= k, None, None, tokens, tokens, device="cuda"
        )
    return {"flex": lambda q, k, v: run(q, k, v, block_mask=mask, enable_gqa=grouped)}
