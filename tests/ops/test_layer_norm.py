"""layer_norm: every implementation against float64, forward and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check

SHAPES = [(1, 1), (2, 1), (1, 3), (3, 63), (2, 5, 64), (7, 130), (1, 768), (100, 768), (1, 4099)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["plain", "residual", "no_weight", "no_bias", "fp32_weight"]


def baseline(x, weight, bias, residual=None):
    """PyTorch's own kernels of the same dtype."""
    summed = x if residual is None else x + residual
    y = F.layer_norm(summed, x.shape[-1:], weight, bias)
    return y if residual is None else (y, summed)


def ours(x, weight, bias, residual):
    return ops.layer_norm(x, weight, bias, residual=residual)


def exact(x, weight, bias, residual):
    return reference.layer_norm(x, weight, bias, residual=residual)


@pytest.mark.parametrize("backend", ops.implementations("layer_norm"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_matches_float64(backend, shape, dtype, form):
    x = torch.randn(shape, dtype=dtype)
    like = torch.float32 if form == "fp32_weight" else dtype
    weight = None if form == "no_weight" else torch.randn(shape[-1], dtype=like)
    bias = None if form in ("no_weight", "no_bias") else torch.randn(shape[-1], dtype=like)
    residual = torch.randn(shape, dtype=dtype) if form == "residual" else None
    with ops.use_backend(backend):
        check(ours, baseline, exact, [x, weight, bias, residual])


@pytest.mark.parametrize("backend", ops.implementations("layer_norm"))
@pytest.mark.parametrize("shape, draws", [((2, 40000), 8), ((1, 100003), 8), ((20000, 24), 1)])
def test_long_sums_lose_no_digits(backend, shape, draws):
    inputs = [torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1]), None]
    with ops.use_backend(backend):
        check(ours, baseline, exact, inputs, draws=draws)


@pytest.mark.parametrize("backend", ops.implementations("layer_norm"))
def test_a_mean_far_above_the_spread_costs_no_accuracy(backend):
    x = torch.randn(5, 1000) + 2000.0
    with ops.use_backend(backend):
        check(ours, baseline, exact, [x, torch.randn(1000), torch.randn(1000), None])


@pytest.mark.parametrize("rows", [1400, 1401])
def test_results_too_large_for_the_caches(rows):
    """The kernels store those past the caches, where the rows allow."""
    x, weight, bias = torch.randn(rows, 768), torch.randn(768), torch.randn(768)
    check(ours, baseline, exact, [x, weight, bias, None])
    odd = torch.randn(1100, 1001)
    check(ours, baseline, exact, [odd, torch.randn(1001), torch.randn(1001), None])


def test_bias_alone_goes_through_the_reference():
    x, bias = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(ops.layer_norm(x, None, bias), F.layer_norm(x, (8,), None, bias))


def test_strided_input_equals_contiguous():
    x = torch.randn(6, 40, 8).transpose(1, 2)
    weight, bias = torch.randn(80)[::2], torch.randn(40)
    expected = ops.layer_norm(x.contiguous(), weight.contiguous(), bias)
    assert torch.equal(ops.layer_norm(x, weight, bias), expected)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)], ids=str)
def test_empty_input_gives_empty_result(shape):
    x = torch.empty(shape, requires_grad=True)
    weight = torch.ones(shape[-1], requires_grad=True)
    y = ops.layer_norm(x, weight, torch.ones(shape[-1]))
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros(shape[-1]))


def test_same_bits_for_any_number_of_threads():
    leaves = [torch.randn(s, requires_grad=True) for s in ((200, 96), (96,), (96,))]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = ops.layer_norm(*leaves)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_fullgraph_compile_forward_and_backward():
    def f(x, weight, bias, residual):
        y, summed = ops.layer_norm(x, weight, bias, residual=residual)
        return (ops.layer_norm(y, weight) * summed).sum()

    args = [torch.randn(4, 32, requires_grad=True), torch.randn(32), torch.randn(32)]
    args.append(torch.randn(4, 32))
    compiled = torch.compile(f, fullgraph=True)(*args)
    (grad,) = torch.autograd.grad(compiled, args[0])
    (expected,) = torch.autograd.grad(f(*args), args[0])
    torch.testing.assert_close(grad, expected)


@pytest.mark.skipif("cpu" not in ops.implementations("layer_norm"), reason="no native kernels")
def test_opcheck():
    x, w = torch.randn(3, 16), torch.randn(16)
    check_op = torch.library.opcheck
    check_op(torch.ops.fastlm.layer_norm.default, (x, w, w, 1e-6))
    check_op(torch.ops.fastlm.add_layer_norm.default, (x, x + 1, None, None, 1e-6))
    check_op(torch.ops.fastlm.layer_norm_backward.default, (x, None, x, w, True, 1e-6))
    check_op(torch.ops.fastlm.layer_norm_backward.default, (x, x, x, None, False, 1e-6))


@pytest.mark.parametrize(
    "args, kwargs, error, text",
    [
        ((torch.ones(2, 4), torch.ones(3)), {}, ValueError, r"layer_norm: weight must be \[4\]"),
        (
            (torch.ones(2, 4), torch.ones(4), torch.ones(5)),
            {},
            ValueError,
            r"layer_norm: bias must be \[4\], got \[5\]",
        ),
        ((torch.ones(2, 4).int(),), {}, TypeError, "layer_norm: x must be a floating-point"),
        ((torch.ones(2, 4), torch.ones(4).int()), {}, TypeError, "layer_norm: weight must be a"),
        ((torch.tensor(1.0),), {}, ValueError, "layer_norm: x must be of rank 1 or more"),
        (("x",), {}, TypeError, "layer_norm: x must be a tensor, got str"),
        ((torch.ones(2, 4), "w"), {}, TypeError, "layer_norm: weight must be a tensor, got str"),
        (
            (torch.ones(2, 4),),
            {"residual": torch.ones(2, 4).bfloat16()},
            ValueError,
            "layer_norm: residual must be torch.float32, got torch.bfloat16",
        ),
        (
            (torch.ones(2, 4),),
            {"residual": torch.ones(4, 2)},
            ValueError,
            r"layer_norm: residual must be \[2, 4\], got \[4, 2\]",
        ),
    ],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_bad_input_names_the_argument(args, kwargs, error, text, requires_grad):
    first = args[0]
    if requires_grad and isinstance(first, torch.Tensor) and first.is_floating_point():
        args = (first.clone().requires_grad_(), *args[1:])
    with pytest.raises(error, match=text):
        ops.layer_norm(*args, **kwargs)
