"""quantized_linear and quantize_weight: rounding, products, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check

FORMS = [
    {"bits": 8},
    {"bits": 4},
    {"bits": 4, "symmetric": False},
    {"bits": 8, "group_size": 16},
    {"bits": 4, "group_size": 64},
]
DTYPES = [torch.float32, torch.bfloat16]
ids = {"ids": lambda value: ",".join(f"{k}={v}" for k, v in value.items())}


@pytest.mark.parametrize("form", FORMS, **ids)
def test_rounds_to_the_nearest_step(form):
    w = torch.randn(40, 192) * torch.logspace(-3, 3, 40)[:, None]
    q = ops.quantize_weight(w, **form)
    assert tuple(q.shape) == (40, 192)
    step = q.scale.float().abs().repeat_interleave(q.group_size, 1)
    # half a step, and what rounding the scale (and minimum) to fp16 shifts at the far end
    slack = (2 ** (q.bits - 1) + 1) * 2**-11 * step + 2**-24
    if q.minimum is not None:
        slack = slack + 2**-11 * q.minimum.float().abs().repeat_interleave(q.group_size, 1) + slack
    elif q.bits == 4:
        slack = slack + step / 2  # the far end of the other sign is cut off: -8 ... 7
    assert ((q.dequantize() - w).abs() <= step / 2 + slack).all()


@pytest.mark.parametrize("form", FORMS, **ids)
def test_a_quantized_weight_survives_a_second_time(form):
    w = ops.quantize_weight(torch.randn(6, 128), **form).dequantize()
    if form.get("symmetric", True):
        torch.testing.assert_close(
            ops.quantize_weight(w, **form).dequantize(), w, rtol=1e-3, atol=0
        )


def test_four_bit_values_lie_as_in_gguf():
    w = torch.arange(-8.0, 8.0).repeat(1, 2)  # one group of 32: -8 ... 7, -8 ... 7
    q = ops.quantize_weight(w, bits=4)
    assert q.scale.item() == 1.0
    assert torch.equal(q.values[0], torch.arange(16, dtype=torch.uint8) * 17)
    assert torch.equal(q.dequantize(), w)


@pytest.mark.parametrize("form", FORMS, **ids)
def test_zeros_and_constants(form):
    w = torch.zeros(2, 64)
    w[1] = 127 / 32  # its scales are exact in fp16
    assert torch.equal(ops.quantize_weight(w, **form).dequantize(), w)


@pytest.mark.parametrize("backend", ops.implementations("quantized_linear"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, **ids)
@pytest.mark.parametrize("rows", [(1,), (2, 5), (40,)], ids=str)
def test_matches_float64(backend, dtype, form, rows):
    x, bias = torch.randn(*rows, 192, dtype=dtype), torch.randn(300, dtype=dtype)
    q = ops.quantize_weight(torch.randn(300, 192), **form)

    def ours(x, bias):
        return ops.quantized_linear(x, q, bias)

    def theirs(x, bias):
        return F.linear(x, q.dequantize(x.dtype), bias)

    def exact(x, bias):
        return reference.quantized_linear(x, q, bias)

    with ops.use_backend(backend):
        check(ours, theirs, exact, [x, bias])


def test_strided_and_empty_input():
    q = ops.quantize_weight(torch.randn(5, 32))
    x = torch.randn(32, 7).t()
    torch.testing.assert_close(ops.quantized_linear(x, q), ops.quantized_linear(x.clone(), q))
    assert ops.quantized_linear(torch.empty(2, 0, 32), q).shape == (2, 0, 5)


def test_autocast():
    q = ops.quantize_weight(torch.randn(5, 32))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.quantized_linear(torch.randn(3, 32), q, torch.randn(5)).dtype == torch.bfloat16


def test_fullgraph_compile_forward_and_backward():
    q = ops.quantize_weight(torch.randn(50, 64), bits=4)
    x = torch.randn(4, 64, requires_grad=True)
    y = torch.compile(lambda x: ops.quantized_linear(x, q), fullgraph=True)(x)
    torch.testing.assert_close(y, ops.quantized_linear(x, q))
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, q.dequantize().sum(0).expand(4, 64))


W = torch.ones(4, 64)


@pytest.mark.parametrize(
    "args, kwargs, error, text",
    [
        (("w",), {}, TypeError, "quantize_weight: w must be a tensor, got str"),
        ((W[0],), {}, ValueError, "quantize_weight: w must be of rank 2"),
        ((W, 3), {}, ValueError, "quantize_weight: bits must be 8 or 4, got 3"),
        ((W, 8, 48), {}, ValueError, "group_size must be a divisor of 64, got 48"),
        ((W, 8, 0), {}, ValueError, "group_size must be a divisor of 64, got 0"),
        ((W, 4, 1), {}, ValueError, "group_size must be even for 4 bits, got 1"),
        ((W, 8), {"symmetric": False}, ValueError, "symmetric must be True for 8 bits"),
        ((W * 1e9,), {}, ValueError, "w must be finite and within the range of an fp16 scale"),
        ((W * float("nan"),), {}, ValueError, "w must be finite"),
    ],
)
def test_bad_weights_are_refused(args, kwargs, error, text):
    with pytest.raises(error, match=text):
        ops.quantize_weight(*args, **kwargs)


@pytest.mark.parametrize(
    "x, q, bias, error, text",
    [
        (W, W, None, TypeError, "qweight must be a QuantizedWeight .* got Tensor"),
        ("x", None, None, TypeError, "quantized_linear: x must be a tensor, got str"),
        (W[:, :32], None, None, ValueError, r"quantized_linear: x must be \[..., 64\]"),
        (W, None, torch.ones(3), ValueError, r"quantized_linear: bias must be \[4\], got \[3\]"),
        (W, None, torch.ones(4).half(), ValueError, "bias must be torch.float32"),
    ],
)
def test_bad_input_names_the_argument(x, q, bias, error, text):
    with pytest.raises(error, match=text):
        ops.quantized_linear(x, ops.quantize_weight(W) if q is None else q, bias)
