"""linear: every implementation against float64, forward and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm import ops, reference
from fastlm.ops import _product
from fastlm.testing import check

# rows of x (with leading dimensions), out, in: every tile and tail of rows, panel and k
SHAPES = [
    ((1,), 1, 1),
    ((2, 1), 50, 63),
    ((3,), 7, 130),
    ((4,), 48, 64),
    ((5,), 97, 33),
    ((2, 4), 96, 768),
    ((13,), 49, 1500),
    ((16,), 51, 4099),
    ((70,), 101, 2100),
    ((300,), 64, 96),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NATIVE = pytest.mark.skipif("cpu" not in ops.implementations("linear"), reason="no native kernels")


@pytest.mark.parametrize("backend", ops.implementations("linear"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, out, k", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_matches_float64(backend, dtype, rows, out, k, with_bias):
    x, w = torch.randn(*rows, k, dtype=dtype), torch.randn(out, k, dtype=dtype)
    bias = torch.randn(out, dtype=dtype) if with_bias else None
    with ops.use_backend(backend):
        check(ops.linear, F.linear, reference.linear, [x, w, bias])


@pytest.mark.parametrize("backend", ops.implementations("linear"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, out, k", [(1, 9000, 9), (3, 50, 768), (16, 1030, 67), (17, 60, 33)])
def test_transposed_weight_matches_float64(backend, dtype, rows, out, k):
    x, w = torch.randn(rows, k, dtype=dtype), torch.randn(k, out, dtype=dtype).t()
    bias = torch.randn(out, dtype=dtype)
    with ops.use_backend(backend):
        check(ops.linear, F.linear, reference.linear, [x, w, bias])


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_other_types(dtype):
    x, w = torch.randn(3, 40, dtype=dtype), torch.randn(9, 40, dtype=dtype)
    assert torch.equal(ops.linear(x, w), F.linear(x, w))


@NATIVE
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("rows", [40, 140])
def test_either_winner(monkeypatch, rows, own):
    chosen = _product.Winners(own, own, own, own, "set by the test")
    monkeypatch.setattr(_product, "_measure", lambda dtype, threads: chosen)
    x, w, bias = torch.randn(rows, 137), torch.randn(450, 137), torch.randn(450)
    with ops.use_backend(None):  # forgets earlier verdicts
        text = fastlm.explain("linear", x, w).splitlines()[0]
        assert text.endswith(": cpu" if own else ": torch")
        check(ops.linear, F.linear, reference.linear, [x, w, bias])


@NATIVE
def test_measures_once_and_says_so():
    x, w = torch.randn(400, 32), torch.randn(8, 32)
    assert _product.winners(x.dtype) is _product.winners(x.dtype)
    assert fastlm.explain("linear", x[:3], w).splitlines()[0].endswith(": cpu")
    with ops.use_backend(None):
        text = fastlm.explain("linear", x, w)
    assert text.splitlines()[0].endswith(": cpu") or "measured once with" in text


@NATIVE
def test_the_measurement_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    _product._measure.__wrapped__(torch.float32, 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", ops.implementations("linear"))
def test_strided_arguments_equal_contiguous_ones(backend):
    x, bias = torch.randn(6, 40, 8).transpose(1, 2), torch.randn(60)[::2]
    for w in (torch.randn(30, 50)[:, :40], torch.randn(30, 80)[:, ::2]):
        with ops.use_backend(backend):
            expected = ops.linear(x.contiguous(), w.contiguous(), bias.contiguous())
            assert torch.equal(ops.linear(x, w, bias), expected)


@pytest.mark.parametrize("backend", ops.implementations("linear"))
@pytest.mark.parametrize("shape, out", [((0, 8), 5), ((2, 0, 8), 5), ((3, 0), 5), ((3, 8), 0)])
def test_empty(backend, shape, out):
    x, w = torch.randn(shape, requires_grad=True), torch.randn(out, shape[-1])
    with ops.use_backend(backend):
        y = ops.linear(x, w, torch.ones(out))
    assert torch.equal(y, torch.ones(*shape[:-1], out))
    y.sum().backward()
    assert x.grad.shape == x.shape


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_same_bits_for_any_number_of_threads(rows, dtype):
    x, w = torch.randn(rows, 515, dtype=dtype), torch.randn(1000, 515, dtype=dtype)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with ops.use_backend("cpu"):
                results.append(ops.linear(x, w))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("rows", [2, 40])
def test_second_derivatives(rows):
    x, w = torch.randn(rows, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)

    def penalty(linear):
        (dx,) = torch.autograd.grad(linear(x, w).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), w)[0]

    torch.testing.assert_close(penalty(ops.linear), penalty(F.linear))


@pytest.mark.parametrize("rows", [2, 40])
def test_autocast(rows):
    x, w = torch.randn(rows, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    bias = torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, w, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ops.linear(x.bfloat16(), w.bfloat16(), bias.bfloat16()))
    y.sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32


@pytest.mark.parametrize("rows", [3, 40])
def test_fullgraph_compile_forward_and_backward(rows):
    x, w, bias = torch.randn(rows, 132), torch.randn(310, 132), torch.randn(310)
    compiled = torch.compile(lambda x, w: ops.linear(x, w, bias), fullgraph=True)
    exact = bias.double()
    check(compiled, lambda x, w: F.linear(x, w, bias), lambda x, w: F.linear(x, w, exact), [x, w])


@NATIVE
def test_opcheck():
    x, w, bias = torch.randn(2, 3, 16), torch.randn(7, 16), torch.randn(7)
    torch.library.opcheck(torch.ops.fastlm.linear.default, (x, w, bias))
    torch.library.opcheck(torch.ops.fastlm.linear.default, (x.bfloat16(), w.bfloat16(), None))


X, W = torch.ones(2, 4), torch.ones(3, 4)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize(
    "x, w, bias, error, text",
    [
        ("x", W, None, TypeError, "linear: x must be a tensor, got str"),
        (X.int(), W, None, TypeError, "linear: x must be a floating-point tensor"),
        (X, None, None, TypeError, "linear: w must be a tensor"),
        (torch.tensor(1.0), W, None, ValueError, "linear: x must be of rank 1 or more"),
        (X, W.t(), None, ValueError, r"linear: w must be \[N, 4\], got \[4, 3\]"),
        (X, W[0], None, ValueError, r"linear: w must be \[N, 4\], got \[4\]"),
        (X, W.bfloat16(), None, ValueError, "linear: w must be torch.float32, got torch.bfloat16"),
        (X, W, torch.ones(1), ValueError, r"linear: bias must be \[3\], got \[1\]"),
        (X, W, torch.ones(3).half(), ValueError, "linear: bias must be torch.float32"),
        (X, W.to("meta"), None, ValueError, "linear: w must be on cpu, got meta"),
    ],
)
def test_bad_input_names_the_argument(rows, x, w, bias, error, text):
    if isinstance(x, torch.Tensor) and x.dim():
        x = x[:1].expand(rows, 4)
    with pytest.raises(error, match=text):
        ops.linear(x, w, bias)


@pytest.mark.parametrize("rows", [1, 16, 17, 96])
@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (1, 1)], ids=str)
def test_one_column_has_any_stride(rows, shape):
    """A dimension of size 1 may carry any stride: transposes of gates to one output do."""
    if "cpu" not in ops.implementations("linear"):
        pytest.skip("no native kernels")
    w = torch.randn(shape).t()
    x = torch.randn(rows, w.shape[1])
    with ops.use_backend("cpu"):
        made = ops.linear(x, w)
    torch.testing.assert_close(made, x @ w.t())
    odd = torch.randn(shape[0] * 7, shape[1] * 5)[::7, ::5]
    with ops.use_backend("cpu"):
        made = ops.linear(torch.ones(rows, shape[1]), odd)
    torch.testing.assert_close(made, odd.sum(1).expand(rows, -1))
