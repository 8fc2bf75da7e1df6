"""rms_norm: every implementation against float64, forward and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check

SHAPES = [(1, 1), (2, 1), (1, 3), (3, 63), (2, 5, 64), (7, 130), (1, 768), (100, 768), (1, 4099)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def baseline(x, weight, residual=None, offset=0.0):
    """PyTorch's own kernels of the same dtype."""
    summed = x if residual is None else x + residual
    scale = None if weight is None else weight.to(x.dtype) + offset
    y = F.rms_norm(summed, x.shape[-1:], scale, 1e-6)
    return y if residual is None else (y, summed)


@pytest.mark.parametrize("backend", ops.implementations("rms_norm"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "residual", "no_weight", "offset", "fp32_weight"])
def test_matches_float64(backend, shape, dtype, form):
    x = torch.randn(shape, dtype=dtype)
    weight = None if form == "no_weight" else torch.randn(shape[-1], dtype=dtype)
    if form == "fp32_weight":
        weight = torch.randn(shape[-1])
    residual = torch.randn(shape, dtype=dtype) if form == "residual" else None
    offset = 1.0 if form == "offset" else 0.0

    def ours(x, weight, residual):
        return ops.rms_norm(x, weight, residual=residual, weight_offset=offset)

    def exact(x, weight, residual):
        return reference.rms_norm(x, weight, residual=residual, weight_offset=offset)

    def theirs(x, weight, residual):
        return baseline(x, weight, residual, offset)

    with ops.use_backend(backend):
        check(ours, theirs, exact, [x, weight, residual])


@pytest.mark.parametrize("backend", ops.implementations("rms_norm"))
@pytest.mark.parametrize("shape, draws", [((2, 40000), 8), ((1, 100003), 8), ((20000, 24), 1)])
def test_long_sums_lose_no_digits(backend, shape, draws):
    inputs = [torch.randn(shape), torch.randn(shape[-1])]
    with ops.use_backend(backend):
        check(ops.rms_norm, baseline, reference.rms_norm, inputs, draws=draws)


def test_strided_input_equals_contiguous():
    x = torch.randn(6, 40, 8).transpose(1, 2)
    weight = torch.randn(40)
    assert torch.equal(ops.rms_norm(x, weight), ops.rms_norm(x.contiguous(), weight))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_empty_batch_gives_empty_result(shape):
    x = torch.empty(shape, requires_grad=True)
    y = ops.rms_norm(x, torch.ones(8))
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_same_bits_for_any_number_of_threads():
    x, weight = torch.randn(200, 96, requires_grad=True), torch.randn(96, requires_grad=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = ops.rms_norm(x, weight)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_fullgraph_compile_forward_and_backward():
    def f(x, weight, residual):
        y, summed = ops.rms_norm(x, weight, residual=residual)
        return (y * summed).sum()

    args = [torch.randn(4, 32, requires_grad=True), torch.randn(32), torch.randn(4, 32)]
    compiled = torch.compile(f, fullgraph=True)(*args)
    (grad,) = torch.autograd.grad(compiled, args[0])
    (expected,) = torch.autograd.grad(f(*args), args[0])
    torch.testing.assert_close(grad, expected)


@pytest.mark.skipif("cpu" not in ops.implementations("rms_norm"), reason="no native kernels")
def test_opcheck():
    x, w = torch.randn(3, 16), torch.randn(16)
    check_op = torch.library.opcheck
    check_op(torch.ops.fastlm.rms_norm.default, (x, w, 1e-6, 0.0))
    check_op(torch.ops.fastlm.add_rms_norm.default, (x, x + 1, None, 1e-6, 0.0))
    check_op(torch.ops.fastlm.rms_norm_backward.default, (x, None, x, w, 1e-6, 0.0))


@pytest.mark.parametrize(
    "args, kwargs, error, text",
    [
        ((torch.ones(2, 4), torch.ones(3)), {}, ValueError, r"rms_norm: weight must be \[4\]"),
        ((torch.ones(2, 4).int(),), {}, TypeError, "rms_norm: x must be a floating-point"),
        ((torch.tensor(1.0),), {}, ValueError, "rms_norm: x must be of rank 1 or more"),
        (("x",), {}, TypeError, "rms_norm: x must be a tensor, got str"),
        (
            (torch.ones(2, 4),),
            {"residual": torch.ones(2, 4).bfloat16()},
            ValueError,
            "rms_norm: residual must be torch.float32, got torch.bfloat16",
        ),
    ],
)
def test_bad_input_names_the_argument(args, kwargs, error, text):
    with pytest.raises(error, match=text):
        ops.rms_norm(*args, **kwargs)
