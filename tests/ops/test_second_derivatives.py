"""Second derivatives: those of the reference in float64, not the zeros of a forgotten graph."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastlm import ops, reference
from fastlm.ops.activation import KINDS

STARTS = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
MASK = torch.arange(36).view(6, 6) % 5 > 0
OPTIONS = {
    "full": {},
    "window": {"causal": True, "window": 3},
    "softcap": {"causal": True, "softcap": 2.0},
    "mask": {"mask": MASK},
    "lse": {"causal": True, "return_lse": True},
    "packed": {"causal": True, "cu_seqlens_q": STARTS},
}


def heads(packed):
    q, k, v = (torch.randn(1, h, 6, 8) for h in (4, 2, 2))
    return [x[0].transpose(0, 1).contiguous() for x in (q, k, v)] if packed else [q, k, v]


def cases():
    """By name: a function of a namespace of operators and of tensors, and the tensors."""
    rows, others, vector = torch.randn(3, 16), torch.randn(3, 16), torch.randn(16)
    found = {
        "rms_norm": (lambda o, x, w: o.rms_norm(x, w, weight_offset=1.0), [rows, vector]),
        "add_rms_norm": (lambda o, x, r, w: o.rms_norm(x, w, residual=r), [rows, others, vector]),
        "rms_norm bare": (lambda o, x: o.rms_norm(x), [rows]),
        "layer_norm": (
            lambda o, x, w, b: o.layer_norm(x, w, b),
            [rows, vector, torch.randn(16)],
        ),
        "layer_norm bare": (lambda o, x: o.layer_norm(x), [rows]),
        "add_layer_norm": (
            lambda o, x, r, w: o.layer_norm(x, w, residual=r),
            [rows, others, vector],
        ),
        "packed": (lambda o, x: o.gated_activation(x, None, "silu"), [rows]),
        "sinks": (
            lambda o, q, k, v, s: o.attention(q, k, v, sinks=s),
            [*heads(False), torch.randn(4)],
        ),
        "made of each other": (
            lambda o, x: o.attention(x, x * 2, x.sin(), causal=True),
            [torch.randn(1, 2, 6, 8)],
        ),
    }
    for kind in KINDS:
        found[kind] = (lambda o, x, kind=kind: o.activation(x, kind), [rows])
        found[f"gated {kind}"] = (
            lambda o, x, u, kind=kind: o.gated_activation(x, u, kind),
            [rows, others],
        )
    for name, kw in OPTIONS.items():
        found[f"attention {name}"] = (
            lambda o, *qkv, kw=kw: o.attention(*qkv, **kw),
            heads(name == "packed"),
        )
    return found


def derivatives(function, namespace, tensors):
    """First and second ones of every tensor, with a path that leads past the first ones."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    made = function(namespace, *leaves)
    made = made if isinstance(made, tuple) else (made,)
    value = sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in made)
    first = torch.autograd.grad(value, leaves, create_graph=True)
    again = sum(g.square().sum() for g in first) + sum(y.square().sum() for y in made)
    return [*(g.detach() for g in first), *torch.autograd.grad(again, leaves)]


@pytest.mark.parametrize("name", cases())
def test_second_derivatives_are_those_of_the_reference(name):
    function, tensors = cases()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as PyTorch does of kernels without autograd
        ours = derivatives(function, ops, tensors)
    exact = derivatives(function, reference, [x.double() for x in tensors])
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["rms_norm bare", "gated silu", "attention full"])
def test_function_transforms_are_refused(name):
    """Function.apply leaves the layer out that says so, but not while a transform is on."""
    function, (x, *rest) = cases()[name]
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: function(ops, x, *rest).sum())(x)
