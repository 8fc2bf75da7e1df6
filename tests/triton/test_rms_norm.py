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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 5, 64), (9, 130)], ids=str)
@pytest.mark.parametrize("form", ["plain", "residual", "no_weight", "fp32_weight", "offset"])
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
    x, residual = torch.randn(5, 150).to(dtype), torch.randn(5, 150).to(dtype)
    with override(**WIDE):
        compare(x, torch.randn(150).to(dtype) if weighted else None, residual, draws=3)
