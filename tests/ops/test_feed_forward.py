"""feed_forward: every implementation against float64, forward and gradients."""

from __future__ import annotations

import importlib

import pytest
import torch

import fastlm
from fastlm import ops, reference
from fastlm.ops import _product
from fastlm.ops.activation import KINDS
from fastlm.testing import check

# x's leading dimensions, width, hidden width, width of the result; one hidden element would judge
# the activation at one place only
SHAPES = [
    ((1,), 1, 40, 1),
    ((1,), 3, 21, 2),
    ((2, 3), 24, 50, 17),
    ((7,), 33, 97, 31),
    ((1,), 333, 490, 471),
    ((3,), 240, 706, 331),
    ((2, 8), 165, 1000, 640),
    ((20,), 248, 1031, 501),
    ((300,), 264, 496, 330),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NATIVE = pytest.mark.skipif(
    "cpu" not in ops.implementations("feed_forward"), reason="no native kernels"
)
BACKENDS = ops.implementations("feed_forward")
if "cpu" not in BACKENDS:
    BACKENDS.remove("torch")


def weights(d, h, e, dtype=torch.float32, gated=True, bias=True, transposed=False):
    """w_in, w_out, w_gate, b_in, b_out, b_gate of a size that keeps activations near one."""

    def matrix(n, k):
        w = torch.randn(n, k, dtype=dtype) / k**0.5
        return w.t().contiguous().t() if transposed else w

    def vector(n):
        return torch.randn(n, dtype=dtype) if bias else None

    gate = matrix(h, d) if gated else None
    return [matrix(h, d), matrix(e, h), gate, vector(h), vector(e), vector(h) if gated else None]


def call(function, kind):
    """A function of positional tensors, as `check` wants it."""

    def run(x, w_in, w_out, w_gate, b_in, b_out, b_gate):
        biases = {"b_in": b_in, "b_out": b_out, "b_gate": b_gate}
        return function(x, w_in, w_out, w_gate=w_gate, **biases, activation=kind)

    return run


def compare(x, tensors, kind, **kwargs):
    theirs = call(reference.feed_forward, kind)
    check(call(ops.feed_forward, kind), theirs, theirs, [x, *tensors], **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, d, h, e", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "gated"])
def test_matches_float64(backend, dtype, rows, d, h, e, form):
    x = torch.randn(*rows, d, dtype=dtype)
    with ops.use_backend(backend):
        compare(x, weights(d, h, e, dtype, form == "gated"), "gelu")
        compare(x, weights(d, h, e, dtype, form == "gated", bias=False), "silu", gradients=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True])
def test_every_activation(backend, dtype, kind, gated):
    x = 3 * torch.randn(9, 232, dtype=dtype)
    with ops.use_backend(backend):
        compare(x, weights(232, 660, 317, dtype, gated), kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [7, 20])
@pytest.mark.parametrize("gated", [False, True])
def test_transposed_weights(backend, dtype, rows, gated):
    x = torch.randn(rows, 240, dtype=dtype)
    with ops.use_backend(backend):
        compare(x, weights(240, 670, 330, dtype, gated, transposed=True), "gelu_tanh")


@NATIVE
def test_without_gradients_as_with_them(monkeypatch):
    monkeypatch.setattr(importlib.import_module("fastlm.ops.feed_forward"), "_BLOCK", 192)
    x, tensors = torch.randn(500, 24), weights(24, 50, 20)
    for backend in ("cpu", "torch"):
        with ops.use_backend(backend):
            y = call(ops.feed_forward, "silu")(x, *tensors)
            x.requires_grad_()
            kept = call(ops.feed_forward, "silu")(x, *tensors)
            x = x.detach()
        torch.testing.assert_close(y, kept)


def test_only_the_wanted_gradients():
    x, tensors = torch.randn(30, 8), weights(8, 12, 8)
    tensors[1].requires_grad_()
    (grad,) = torch.autograd.grad(call(ops.feed_forward, "silu")(x, *tensors).sum(), tensors[1])
    assert grad.shape == tensors[1].shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_empty_batch_gives_empty_result(backend, shape):
    x = torch.empty(shape, requires_grad=True)
    with ops.use_backend(backend):
        y = call(ops.feed_forward, "silu")(x, *weights(8, 12, 5))
        with torch.no_grad():
            assert call(ops.feed_forward, "silu")(x, *weights(8, 12, 5)).shape == y.shape
    assert y.shape == (*shape[:-1], 5)
    y.sum().backward()
    assert x.grad.shape == x.shape


@NATIVE
@pytest.mark.parametrize("rows", [2, 200])
def test_same_bits_for_any_number_of_threads(rows):
    x, tensors = torch.randn(rows, 200), weights(200, 333, 100)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with ops.use_backend("cpu"):
                results.append(call(ops.feed_forward, "silu")(x, *tensors))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True])
def test_second_derivatives(backend, gated):
    x, tensors = torch.randn(5, 6, requires_grad=True), weights(6, 7, 4, gated=gated)
    tensors[0].requires_grad_()

    def penalty(function):
        y = call(function, "silu")(x, *tensors)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), tensors[0])[0]

    with ops.use_backend(backend):
        torch.testing.assert_close(penalty(ops.feed_forward), penalty(reference.feed_forward))


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_other_types_take_the_reference(dtype):
    x, tensors = torch.randn(3, 8, dtype=dtype), weights(8, 12, 5, dtype)
    ours = call(ops.feed_forward, "gelu")(x, *tensors)
    assert torch.equal(ours, call(reference.feed_forward, "gelu")(x, *tensors))


def test_autocast():
    x, tensors = torch.randn(40, 16, requires_grad=True), weights(16, 24, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(ops.feed_forward, "silu")(x, *tensors)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@NATIVE
@pytest.mark.parametrize("own", [False, True])
def test_the_measurement_decides_for_many_rows(monkeypatch, own):
    chosen = _product.Winners(own, own, own, own, "set by the test")
    monkeypatch.setattr(_product, "_measure", lambda dtype, threads: chosen)
    x, tensors = torch.randn(140, 224), weights(224, 550, 320)
    with ops.use_backend(None):  # forgets earlier verdicts
        text = fastlm.explain(call(ops.feed_forward, "silu"), x, *tensors)
        assert text.splitlines()[0].endswith(": cpu" if own else ": torch")
        compare(x, tensors, "silu")


@pytest.mark.parametrize("rows", [3, 40])
def test_fullgraph_compile_forward_and_backward(rows):
    x, tensors = torch.randn(rows, 116), weights(116, 320, 212, bias=False)
    biased = call(ops.feed_forward, "silu")
    theirs = call(reference.feed_forward, "silu")
    check(torch.compile(biased, fullgraph=True), theirs, theirs, [x, *tensors])


@NATIVE
def test_opcheck():
    x, up, gate = torch.randn(2, 3, 16), torch.randn(4, 20), torch.randn(4, 20)
    w_in, w_out, w_gate, b_in, b_out, b_gate = weights(16, 20, 12)
    fastlm_ops, opcheck = torch.ops.fastlm, torch.library.opcheck
    opcheck(fastlm_ops.feed_forward.default, (x, w_in, w_out, w_gate, b_in, b_out, b_gate, 0))
    opcheck(fastlm_ops.feed_forward.default, (x, w_in, w_out, None, None, None, None, 1))
    opcheck(fastlm_ops.feed_forward_hidden.default, (x, w_in, w_gate, b_in, b_gate, 0))
    opcheck(fastlm_ops.feed_forward_hidden.default, (x, w_in, None, None, None, 1))
    opcheck(fastlm_ops.feed_forward_activation.default, (up, gate, 2))
    opcheck(fastlm_ops.feed_forward_backward.default, (torch.randn(4, 20), up, gate, 2))
    opcheck(fastlm_ops.feed_forward_backward.default, (torch.randn(4, 20), up, None, 4))


X, W, V = torch.ones(2, 4), torch.ones(3, 4), torch.ones(5, 3)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize(
    "args, kwargs, error, text",
    [
        (("x", W, V), {}, TypeError, "feed_forward: x must be a tensor, got str"),
        ((X, W.t(), V), {}, ValueError, r"w_in must be \[N, 4\], got \[4, 3\]"),
        ((X, W, V.t()), {}, ValueError, r"feed_forward: w_out must be \[E, 3\], got \[3, 5\]"),
        ((X, W, V.bfloat16()), {}, ValueError, "w_out must be torch.float32, got torch.bfloat16"),
        ((X, W, V), {"w_gate": W[:2]}, ValueError, r"w_gate must be \[3, 4\], got \[2, 4\]"),
        ((X, W, V), {"b_in": torch.ones(4)}, ValueError, r"b_in must be \[3\], got \[4\]"),
        ((X, W, V), {"b_out": torch.ones(1)}, ValueError, r"b_out must be \[5\], got \[1\]"),
        ((X, W, V), {"b_gate": torch.ones(3)}, ValueError, "b_gate must be None without w_gate"),
        ((X, W, V), {"activation": "tanh"}, ValueError, "activation must be one of silu, gelu"),
        ((X, W, V), {"activation": None}, ValueError, "activation must be one of silu, gelu"),
    ],
)
def test_bad_input_names_the_argument(rows, args, kwargs, error, text):
    if isinstance(args[0], torch.Tensor):
        args = (args[0][:1].expand(rows, 4), *args[1:])
    with pytest.raises(error, match=text):
        ops.feed_forward(*args, **kwargs)
