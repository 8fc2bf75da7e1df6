"""layer_norm's Triton kernels against float64, forward and gradients."""

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


def baseline(x, weight, bias, residual=None):
    """PyTorch's own kernels of the same dtype."""
    summed = x if residual is None else x + residual
    weight, bias = (None if v is None else v.to(x.dtype) for v in (weight, bias))
    y = F.layer_norm(summed, x.shape[-1:], weight, bias)
    return y if residual is None else (y, summed)


def compare(x, weight, bias, residual=None, **kw):
    check(
        lambda x, w, b, r: ops.layer_norm(x, w, b, residual=r),
        baseline,
        lambda x, w, b, r: reference.layer_norm(x, w, b, residual=r),
        [x, weight, bias, residual],
        **kw,
    )


FORMS = ["plain", "residual", "no_bias", "bare", "fp32_weight"]
CASES = [(form, shape, DTYPES[1]) for form in FORMS for shape in [(3, 63), (2, 5, 64)]]
CASES += [("residual", (3, 63), dtype) for dtype in DTYPES]


@pytest.mark.parametrize("form, shape, dtype", CASES, ids=str)
def test_matches_float64(dtype, shape, form):
    x = torch.randn(shape).to(dtype)
    kind = torch.float32 if form == "fp32_weight" else dtype
    weight = None if form == "bare" else torch.randn(shape[-1]).to(kind)
    bias = None if form in ("bare", "no_bias") else torch.randn(shape[-1]).to(kind)
    residual = torch.randn(shape).to(dtype) if form == "residual" else None
    compare(x, weight, bias, residual)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_rows_wider_than_a_tile(dtype, weighted):
    x, residual = torch.randn(5, 100).to(dtype), torch.randn(5, 100).to(dtype)
    vectors = [torch.randn(100).to(dtype) if weighted else None for _ in range(2)]
    with override(**WIDE):
        compare(x, *vectors, residual, draws=2)


@pytest.mark.parametrize("wide", [False, True])
def test_a_large_mean_cancels_nothing(wide):
    with override(**WIDE if wide else {}):
        compare(torch.randn(4, 200) + 2000, torch.randn(200), torch.randn(200), draws=2)
