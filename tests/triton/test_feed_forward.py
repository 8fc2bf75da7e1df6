"""feed_forward's Triton kernels against float64: own products, the library's, every gradient."""

from __future__ import annotations

import pytest
import torch

from fastlm import ops, reference
from fastlm.ops.activation import KINDS
from fastlm.testing import check
from fastlm.triton import feed_forward as kernels
from fastlm.triton._configs import LIBRARY, Config, override

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("feed_forward", "feed_forward_kept", "feed_forward_few", "feed_forward_fp32")
OWN = dict.fromkeys(NAMES, Config((32, 16, 16), 4, 2))


def weights(d, h, e, dtype, gated=True, bias=True, transposed=False):
    def matrix(n, k):
        w = torch.randn(n, k, dtype=dtype) / k**0.5
        return w.t().contiguous().t() if transposed else w

    def vector(n):
        return torch.randn(n, dtype=dtype) if bias else None

    gate = matrix(h, d) if gated else None
    return [matrix(h, d), matrix(e, h), gate, vector(h), vector(e), vector(h) if gated else None]


def call(function, kind):
    def run(x, w_in, w_out, w_gate, b_in, b_out, b_gate):
        biases = {"b_in": b_in, "b_out": b_out, "b_gate": b_gate}
        return function(x, w_in, w_out, w_gate=w_gate, **biases, activation=kind)

    return run


def compare(x, tensors, kind, configs=OWN, **kw):
    theirs = call(reference.feed_forward, kind)
    with override(**configs):
        check(call(ops.feed_forward, kind), theirs, theirs, [x, *tensors], **kw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_activation(dtype, kind, gated):
    compare(torch.randn(40, 33, dtype=dtype), weights(33, 50, 24, dtype, gated), kind, draws=2)


@pytest.mark.parametrize("configs", [OWN, dict.fromkeys(NAMES, LIBRARY)], ids=["own", "library"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("form", ["strided", "transposed", "one row", "no bias, even"])
def test_where_things_lie(configs, dtype, form):
    gated, transposed = form != "no bias, even", form == "transposed"
    x = torch.randn(3, 7, 48, dtype=dtype)
    if form == "strided":
        x = torch.randn(7, 3, 64, dtype=dtype).transpose(0, 1)[..., 5:53]
    x = x[:1, :1] if form == "one row" else x
    tensors = weights(48, 40, 20, dtype, gated, gated, transposed)
    compare(x, tensors, "silu", configs, draws=2)


def test_an_expanded_input_and_a_weight_of_no_unit_stride():
    x, tensors = torch.randn(1, 20).expand(9, 20), weights(20, 24, 8, torch.float32)
    far = torch.randn(24, 40)[:, ::2]
    compare(x.contiguous(), [far, *tensors[1:]], "gelu", gradients=False)
    with override(**OWN):
        y = call(ops.feed_forward, "gelu")(x, far, *tensors[1:])
        assert torch.equal(y, call(ops.feed_forward, "gelu")(x.contiguous(), far, *tensors[1:]))


def test_bands_of_tiles_cover_everything(monkeypatch):
    monkeypatch.setattr(kernels, "_BAND", 2)
    x, tensors = torch.randn(150, 16), weights(16, 70, 4, torch.float32)
    compare(x, tensors, "relu", gradients=False, draws=1)


def test_the_same_bits_with_and_without_gradients_and_every_time():
    x, tensors = torch.randn(20, 40).bfloat16(), weights(40, 60, 16, torch.bfloat16)
    run = call(ops.feed_forward, "silu")
    with override(**OWN):
        plain, again = run(x, *tensors), run(x, *tensors)
        assert torch.equal(plain, again)
        results = []
        for _ in range(2):
            y = x.clone().requires_grad_()
            kept = run(y, *tensors)
            assert torch.equal(kept, plain)
            results.append(torch.autograd.grad(kept.float().sum(), y)[0])
    assert torch.equal(*results)


def test_only_what_the_contract_saves_is_kept():
    x, tensors = torch.randn(4, 8, requires_grad=True), weights(8, 12, 8, torch.float32)
    kept = []
    with override(**OWN), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        call(ops.feed_forward, "silu")(x, *tensors)
    given = {t.data_ptr() for t in (x, *tensors)}
    own = [t for t in kept if t.data_ptr() not in given]
    assert [list(t.shape) for t in own] == [[4, 12], [4, 12]]  # up and gate, not hidden


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("configs", [OWN, {}], ids=["own", "table"])
def test_zero_rows(shape, configs):
    x, tensors = torch.empty(shape, requires_grad=True), weights(8, 12, 5, torch.float32)
    with override(**configs):
        y = call(ops.feed_forward, "silu")(x, *tensors)
        with torch.no_grad():
            assert call(ops.feed_forward, "silu")(x, *tensors).shape == y.shape == (*shape[:-1], 5)
        y.sum().backward()
    assert x.grad.shape == x.shape


def test_autocast_second_derivatives_and_bad_input():
    x, tensors = torch.randn(9, 16, requires_grad=True), weights(16, 24, 8, torch.float32)
    run = call(ops.feed_forward, "silu")
    with override(**OWN), torch.autocast("cpu", torch.bfloat16):
        assert run(x, *tensors).dtype == torch.bfloat16

    def slope(function):
        def run(x, *tensors):
            x = x if x.requires_grad else x.detach().requires_grad_()
            y = call(function, "silu")(x, *tensors)
            return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]

        return run

    theirs = slope(reference.feed_forward)
    check(slope(ops.feed_forward), theirs, theirs, [x, *tensors], draws=4)
    with pytest.raises(ValueError, match="feed_forward: w_out must be"):
        run(x, tensors[0], tensors[0], *tensors[2:])
    with pytest.raises(RuntimeError, match="feed_forward: the arguments do not fit"):
        torch.ops.fastlm.feed_forward_hidden.triton(x, tensors[0].t(), None, None, None, 0)


def test_fullgraph_with_dynamic_rows():
    tensors = weights(16, 24, 8, torch.float32)
    run = call(ops.feed_forward, "gelu")
    with override(**OWN):
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (5, 9):
            x, y = (torch.ones(rows, 16).requires_grad_() for _ in range(2))
            made, plain = compiled(x, *tensors), run(y, *tensors)
            made.sum().backward()
            plain.sum().backward()
            assert torch.equal(made, plain) and torch.equal(x.grad, y.grad)
