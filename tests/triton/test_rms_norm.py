"""rms_norm's Triton kernels against float64, forward and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check
from fastlm.triton._configs import Config, override

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDE = {
    "norm": Config((64,)),
    "norm_backward": Config((64, 1)),
    "norm_weight_gradient": Config((4, 32)),
}


def baseline(x, weight, residual=None, offset=0.0):
    """PyTorch's own kernels of the same dtype."""
    summed = x if residual is None else x + residual
    scale = None if weight is None else weight.to(x.dtype) + offset
    y = F.rms_norm(summed, x.shape[-1:], scale, 1e-6)
    return y if residual is None else (y, summed)


def compare(x, weight, residual=None, offset=0.0, **kw):
    check(
        lambda x, w, r: ops.rms_norm(x, w, residual=r, weight_offset=offset),
        lambda x, w, r: baseline(x, w, r, offset),
        lambda x, w, r: reference.rms_norm(x, w, residual=r, weight_offset=offset),
        [x, weight, residual],
        **kw,
    )


FORMS = ["plain", "residual", "no_weight", "fp32_weight", "offset"]
CASES = [(form, shape, DTYPES[1]) for form in FORMS for shape in [(3, 63), (2, 5, 64)]]
CASES += [("residual", (3, 63), dtype) for dtype in DTYPES]
CASES += [("plain", (2, 1), torch.float32)]


@pytest.mark.parametrize("form, shape, dtype", CASES, ids=str)
def test_matches_float64(dtype, shape, form):
    x = torch.randn(shape).to(dtype)
    weight = None if form == "no_weight" else torch.randn(shape[-1]).to(dtype)
    if form == "fp32_weight":
        weight = weight.float()
    residual = torch.randn(shape).to(dtype) if form == "residual" else None
    compare(x, weight, residual, offset=1.0 if form == "offset" else 0.0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_rows_wider_than_a_tile(dtype, weighted):
    x, residual = torch.randn(5, 100).to(dtype), torch.randn(5, 100).to(dtype)
    with override(**WIDE):
        compare(x, torch.randn(100).to(dtype) if weighted else None, residual, draws=2)


def test_strides_and_empty_inputs():
    x, weight = torch.randn(4, 6, 40), torch.randn(40)
    for view in (
        x[:, ::2],
        x.transpose(0, 1),
        x[..., :40:1].expand(4, 6, 40),
        x[:1].expand(3, 6, 40),
    ):
        y = ops.rms_norm(view, weight)
        assert y.is_contiguous()
        assert torch.equal(y, ops.rms_norm(view.contiguous(), weight))
    wide = torch.randn(5, 64, requires_grad=True)
    ops.rms_norm(wide[:, 8:48], weight).sum().backward()  # a row distance, and a gradient of zeros
    for shape in ((0, 8), (2, 0, 8), (3, 0)):
        x = torch.empty(shape, requires_grad=True)
        weight = torch.ones(shape[-1], requires_grad=True)
        ops.rms_norm(x, weight).sum().backward()
        assert x.grad.shape == x.shape and not weight.grad.any()


@pytest.mark.parametrize(
    "bad",
    [
        {"weight": torch.ones(9)},
        {"residual": torch.ones(2, 7)},
        {"residual": torch.ones(2, 8).bfloat16()},
    ],
    ids=["weight", "residual shape", "residual dtype"],
)
def test_bad_input_is_named(bad):
    with pytest.raises(ValueError, match=f"rms_norm: {next(iter(bad))} must be"):
        ops.rms_norm(torch.ones(2, 8), **bad)
    with pytest.raises(ValueError, match="rms_norm: x must be of rank 1 or more"):
        ops.rms_norm(torch.tensor(1.0))


def test_compiles_into_one_graph():
    weight = torch.randn(24, requires_grad=True)

    def step(x):
        return (ops.rms_norm(x, weight) ** 2).sum()

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = torch.linspace(-1, 1, 72).reshape(3, 24).requires_grad_()
        results.append(torch.autograd.grad(f(x), (x, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
