"""quantized_linear's Triton kernels against the product with the weight that is stood for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check
from fastlm.triton._configs import Config, override

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = {"quantized_linear": Config((16, 32)), "quantized_row": Config((16, 64))}


def weight(outputs, width, bits, group, symmetric):
    """By rows, as off the CPU."""
    return reference.quantize_weight(torch.randn(outputs, width), bits, group, symmetric)


def matches(x, qweight, bias=None, **kw):
    def theirs(x, bias=None):
        return F.linear(x, qweight.dequantize(x.dtype), bias)

    def exactly(x, bias=None):
        return reference.quantized_linear(x, qweight, bias)

    with override(**SMALL):
        inputs = [x] if bias is None else [x, bias]
        check(lambda x, b=None: ops.quantized_linear(x, qweight, b), theirs, exactly, inputs, **kw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize(
    "form", [(8, 32, True), (4, 32, True), (4, 64, False), (8, 128, True)], ids=str
)
def test_matches_float64(dtype, rows, form):
    bits, group, symmetric = form
    qweight = weight(40, 256, bits, group, symmetric)
    matches(torch.randn(rows, 256).to(dtype), qweight, torch.randn(40).to(dtype), draws=2)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_tails_and_strides(rows, bits):
    qweight = weight(19, 96, bits, 32, True)
    matches(torch.randn(rows, 1, 200)[..., 7:103], qweight, draws=4)


@pytest.mark.parametrize("rows", [1, 4])
def test_minimum_does_not_cancel(rows):
    """A minimum lies near -8 steps: what is added for it and the integers must not be large."""
    qweight = weight(64, 512, 4, 32, False)
    matches(torch.randn(rows, 512) + 2, qweight, draws=16)


def test_leading_dimensions_and_empty_inputs():
    qweight = weight(5, 64, 8, 32, True)
    x = torch.randn(2, 3, 64)
    y = ops.quantized_linear(x, qweight)
    assert y.shape == (2, 3, 5) and torch.equal(y[1, 2], ops.quantized_linear(x[1], qweight)[2])
    assert ops.quantized_linear(x[:, :0], qweight).shape == (2, 0, 5)
    assert ops.quantized_linear(x[0, 0], qweight).shape == (5,)


def test_same_bits_every_time():
    qweight, x = weight(40, 128, 4, 32, False), torch.randn(5, 128).bfloat16()
    assert torch.equal(ops.quantized_linear(x, qweight), ops.quantized_linear(x, qweight))


def test_refuses_what_it_cannot():
    x, qweight = torch.randn(2, 96), weight(5, 96, 8, 32, True)
    for wrong, options, text in (
        (qweight.pack(), {}, "packed for the CPU"),
        (weight(5, 96, 8, 48, True), {}, "power of two from 32 on, not of 48"),
        (qweight, {"activations": "int8"}, "does not round activations"),
    ):
        with pytest.raises(RuntimeError, match=text):
            ops.quantized_linear(x, wrong, **options)
    with pytest.raises(RuntimeError, match="not float64"):
        ops.quantized_linear(x.double(), qweight)


def test_opcheck():
    x, qweight = torch.randn(3, 64), weight(5, 64, 4, 32, False)
    values, scale, minimum, *_ = qweight
    args = (x, values, scale, minimum, torch.randn(5), 5, False)
    op = torch.ops.fastlm.quantized_linear.triton
    torch.library.opcheck(op, args, test_utils=["test_schema", "test_faketensor"])
