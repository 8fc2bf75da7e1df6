"""The Triton kernels of the activations against float64, forward and gradients."""

from __future__ import annotations

import pytest
import torch

from fastlm import ops, reference
from fastlm.ops.activation import KINDS
from fastlm.testing import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(kind, dtype):
    x, up = (torch.randn(7, 300).to(dtype) * 3 for _ in range(2))
    plain = (f(kind) for f in (_of(ops), _of(reference), _of(reference)))
    check(*plain, [x], draws=2)
    gated = (g(kind) for g in (_gated(ops), _gated(reference), _gated(reference)))
    check(*gated, [x, up], draws=2)
    packed = (g(kind, packed=True) for g in (_gated(ops), _gated(reference), _gated(reference)))
    check(*packed, [x], draws=2)


def _of(where):
    return lambda kind: lambda x: where.activation(x, kind)


def _gated(where):
    def form(kind, packed=False):
        if packed:
            return lambda x: where.gated_activation(x, None, kind)
        return lambda x, up: where.gated_activation(x, up, kind)

    return form


@pytest.mark.parametrize("kind", KINDS)
def test_tails_and_special_values(kind):
    x = torch.tensor([0.0, -0.0, 1e-30, 60.0, -60.0, 1e4, -1e4, float("nan")], requires_grad=True)
    y = ops.activation(x, kind)
    z = reference.activation(x, kind)
    torch.testing.assert_close(y, z, equal_nan=True)
    ours, theirs = (torch.autograd.grad(t.sum(), x)[0][:-1] for t in (y, z))
    torch.testing.assert_close(ours, theirs)


def test_strides():
    x = torch.randn(3, 5, 2100)
    gate, up = x.chunk(2, -1)
    for a, b in (
        (gate, up),
        (gate.transpose(0, 1), up.transpose(0, 1)),
        (gate[:1].expand(3, 5, 1050), up),
    ):
        y = ops.gated_activation(a, b, "silu")
        assert y.is_contiguous()
        assert torch.equal(y, ops.gated_activation(a.contiguous(), b.contiguous(), "silu"))
    assert torch.equal(
        ops.gated_activation(x, None, "silu"), ops.gated_activation(gate, up, "silu")
    )
    assert ops.activation(torch.tensor(1.5), "relu") == 1.5
    assert ops.activation(torch.empty(0, 4), "silu").shape == (0, 4)
    assert ops.gated_activation(torch.empty(3, 0), None, "silu").shape == (3, 0)


def test_bad_input_is_named():
    x = torch.ones(2, 8)
    for up in (torch.ones(2, 7), torch.ones(2, 8).half()):
        with pytest.raises(ValueError, match="gated_activation: up must be"):
            ops.gated_activation(x, up, "silu")
    with pytest.raises(ValueError, match="activation: kind must be"):
        ops.activation(x, "tanh")
