"""activation and gated_activation: every implementation against float64, forward and gradients."""

from __future__ import annotations

import pytest
import torch

from fastlm import ops, reference
from fastlm.ops.activation import KINDS
from fastlm.testing import check

SHAPES = [(7, 40, 333)]  # many elements, so that luck evens out; small ones: test_tails
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["plain", "gated", "chunked", "packed"]


def function(form, kind, module):
    """The same computation on leaves, in our operators or in PyTorch's kernels."""
    if form == "plain":
        return lambda x: module.activation(x, kind)
    if form == "gated":
        return lambda gate, up: module.gated_activation(gate, up, kind)
    if form == "chunked":
        return lambda x: module.gated_activation(*x.chunk(2, -1), kind)
    return lambda x: module.gated_activation(x, None, kind)


@pytest.mark.parametrize("backend", ops.implementations("activation"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_matches_float64(backend, dtype, kind, form):
    for shape in SHAPES:
        wide = (*shape[:-1], 2 * shape[-1]) if form in ("chunked", "packed") else shape
        inputs = [torch.randn(wide, dtype=dtype) * 2 for _ in range(2 if form == "gated" else 1)]
        with ops.use_backend(backend):
            check(function(form, kind, ops), *[function(form, kind, reference)] * 2, inputs)


@pytest.mark.parametrize("backend", ops.implementations("activation"))
@pytest.mark.parametrize("size", [1e-4, 0.03, 0.3])
@pytest.mark.parametrize("form", ["plain", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_small_values_match_float64(backend, kind, form, size):
    """What a fresh model's layers hold: 1 - tail would cost gelu a digit there."""
    x = size * torch.randn(4, 1000)
    with ops.use_backend(backend):
        check(function(form, kind, ops), *[function(form, kind, reference)] * 2, [x])


@pytest.mark.parametrize("kind", KINDS)
def test_tails_equal_the_same_elements_of_a_longer_row(kind):
    gate, up = torch.randn(2, 200)
    whole = ops.gated_activation(gate, up, kind)
    for n in range(1, 40):
        assert torch.equal(ops.gated_activation(gate[:n], up[:n], kind), whole[:n])
        assert torch.equal(ops.activation(gate[:n], kind), ops.activation(gate, kind)[:n])


@pytest.mark.parametrize("kind", KINDS)
def test_far_tails_and_special_values(kind):
    x = torch.tensor([-1e4, -88.0, -20.0, -5.0, -0.0, 0.0, 5.0, 20.0, 88.0, 1e4, float("inf")])
    ours, exact = ops.activation(x, kind), reference.activation(x.double(), kind)
    torch.testing.assert_close(ours, exact.float(), rtol=1e-5, atol=1e-7)
    assert torch.equal(ops.activation(x.repeat(9), kind), ours.repeat(9))  # whole vectors too
    for n in (1, 70):
        assert ops.activation(torch.full((n,), float("nan")), kind).isnan().all()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)], ids=str)
def test_empty_input(shape):
    x = torch.empty(shape, requires_grad=True)
    ops.activation(x, "silu").sum().backward()
    assert x.grad.shape == x.shape
    assert ops.gated_activation(x, x, "gelu").shape == x.shape


def test_any_strides():
    x, up = torch.randn(6, 5, 8).transpose(0, 2), torch.randn(8, 5, 6)
    expected = ops.gated_activation(x.contiguous(), up, "silu")
    assert torch.equal(ops.gated_activation(x, up, "silu"), expected)
    assert torch.equal(ops.activation(x, "gelu"), ops.activation(x.contiguous(), "gelu"))
    row = torch.randn(1, 8).expand(4, 8)
    expected = ops.gated_activation(row.contiguous(), row.contiguous(), "silu")
    assert torch.equal(ops.gated_activation(row, row, "silu"), expected)


@pytest.mark.parametrize("form", ["plain", "gated", "packed"])
def test_fullgraph_compile_forward_and_backward(form):
    f = function(form, "silu", ops)
    inputs = [torch.randn(3, 32, requires_grad=True) for _ in range(2 if form == "gated" else 1)]
    grads = torch.autograd.grad(torch.compile(f, fullgraph=True)(*inputs).sum(), inputs)
    expected = torch.autograd.grad(f(*inputs).sum(), inputs)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif("cpu" not in ops.implementations("activation"), reason="no native kernels")
def test_opcheck():
    x = torch.randn(3, 16)
    for kind in range(len(KINDS)):
        torch.library.opcheck(torch.ops.fastlm.activation.default, (x, kind))
    torch.library.opcheck(torch.ops.fastlm.activation_backward.default, (x, x, 0))
    torch.library.opcheck(torch.ops.fastlm.gated_activation.default, (*x.chunk(2, -1), 0))
    half = torch.randn(3, 8)
    gated_backward = torch.ops.fastlm.gated_activation_backward.default
    torch.library.opcheck(gated_backward, (half, *x.chunk(2, -1), 0))
    torch.library.opcheck(torch.ops.fastlm.packed_activation.default, (x, 0))
    torch.library.opcheck(torch.ops.fastlm.packed_activation_backward.default, (half, x, 0))


X = torch.ones(2, 4)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: ops.activation(X, "swish"), ValueError, "activation: kind must be one of silu"),
        (lambda: ops.activation(X.int(), "silu"), TypeError, "activation: x must be a floating"),
        (
            lambda: ops.gated_activation(X, X[:1], "silu"),
            ValueError,
            r"gated_activation: up must be \[2, 4\], got \[1, 4\]",
        ),
        (
            lambda: ops.gated_activation(X[:, :3], None, "silu"),
            ValueError,
            r"gated_activation: gate must be \[..., 2F\] with an even last size",
        ),
    ],
)
def test_bad_input_names_the_argument(call, error, text):
    with pytest.raises(error, match=text):
        call()
