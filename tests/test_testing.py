"""The rule that judges the kernels: it passes good ones on any seed and finds worse ones."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import Pool, check, compare, draws_for, error

SHAPES = [(1, 1), (1, 3), (3, 63), (1, 768)]
EPS = 1e-6


def theirs(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def ours(x, weight):
    return ops.rms_norm(x, weight, EPS)


def exact(x, weight):
    return reference.rms_norm(x, weight, EPS)


def inputs(shape, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)]


def accepted(call, shape, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return all(e.ok for e in compare(call, theirs, exact, inputs(shape, dtype), seed=seed))


def noisy(shape, seed, dtype):
    """Ours and an error of three times PyTorch's, or what stands for it where that is exact."""
    torch.manual_seed(seed)
    size = 1.5 * compare(theirs, theirs, exact, inputs(shape, dtype), seed=seed)[0].allowed

    def call(x, weight):
        y = ours(x, weight)
        return (y.double() + torch.randn(y.shape) * size).to(y.dtype)

    return call


def without_the_last(x, weight):
    keep = torch.ones(x.shape)
    keep[..., -1] = 0
    return ours(x, weight) * keep


def rounded_between(x, weight):
    y = ours(x, None)
    return (y.bfloat16().float() - y).detach() * weight + ours(x, weight)


def wrong_eps(x, weight):
    return ops.rms_norm(x, weight, 2 * EPS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_good_kernels_pass_on_any_seed(shape, dtype):
    assert all(accepted(ours, shape, seed, dtype) for seed in range(3))
    assert all(accepted(theirs, shape, seed, dtype) for seed in range(3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_three_times_the_error_is_found(shape, dtype):
    assert not any(accepted(noisy(shape, seed, dtype), shape, seed, dtype) for seed in range(3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("call", [without_the_last, rounded_between, wrong_eps])
def test_wrong_kernels_are_found(call, shape):
    assert not any(accepted(call, shape, seed) for seed in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_gradient_alone_is_found(dtype):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * (1 + 4 * torch.finfo(dtype).eps)

    x, weight = inputs((2, 5), dtype)
    errors = compare(lambda x, w: ours(Wrong.apply(x), w), theirs, exact, [x, weight])
    assert [e.ok for e in errors] == [True, False, True]


def test_a_scalar_is_judged_over_many_draws():
    target = torch.tensor([1, 0, 3])

    def loss(x):
        return F.cross_entropy(x, target)

    def wrong(x):
        return loss(x) * (1 + 4 * torch.finfo(x.dtype).eps)

    for seed in range(3):
        x = torch.randn(3, 5)
        assert all(e.ok for e in compare(loss, loss, loss, [x], seed=seed))
        assert not compare(wrong, loss, loss, [x], seed=seed, gradients=False)[0].ok


def test_draws_follow_the_smallest_tensor():
    assert draws_for([1]) == draws_for([5, 100]) == 32
    assert draws_for([512, 4000]) == 16  # rows of one draw may share an error
    assert draws_for([100_000]) == draws_for([20_000], 80_000) == 5
    assert draws_for([10**6]) == 1
    assert draws_for([500_000, 1]) == 16 and draws_for([10**8, 1]) == 1
    assert draws_for([]) == 1


def test_jitter_keeps_what_has_a_meaning():
    seen = []

    def call(mask, x, n):
        seen.append((mask, x, n))
        return x * 1.0

    mask = torch.tensor([0.0, -math.inf, torch.finfo(torch.float32).min, 2.0])
    x, n = torch.randn(3, 4).t(), torch.arange(3)
    check(call, call, call, [mask, x, n], gradients=False, draws=3)
    for other, moved, same in seen[3:]:
        assert same is n and moved.stride() == x.stride()
        assert other[0] == 0 and other[1] == -math.inf and other[2].isfinite()
        ratio = moved.double() / x
        assert (ratio - 1).abs().max() <= 0.2501 and (ratio != 1).any()
    assert not torch.equal(seen[3][1], seen[6][1])


def test_where_pytorch_is_exact_a_rounding_is_allowed():
    exact = torch.linspace(1.0, 2.0, 1000, dtype=torch.float64) * (1 + 1e-9)
    rounded = exact.float()
    assert error("y", rounded, exact, exact).ok
    off = rounded * (1 + 2 * torch.finfo(torch.float32).eps)
    assert not error("y", off, exact, exact).ok
    zero = torch.zeros(20)
    assert error("zero", zero, zero, zero.double()).ok
    assert not error("zero", zero + 1e-30, zero, zero.double()).ok


def test_infinities_equal_and_nan_never():
    exact = torch.tensor([-math.inf, 1.0])
    assert error("lse", exact, exact, exact.double()).ok
    assert not error("lse", torch.tensor([-math.inf, math.nan]), exact, exact.double()).ok
    assert not error("lse", torch.tensor([-1e30, 1.0]), exact, exact.double()).ok


def test_shapes_and_names_must_agree():
    x = torch.randn(3)
    with pytest.raises(AssertionError, match=r"y: shape \[3\], expected \[1, 3\]"):
        error("y", x, x, x[None].double())
    with pytest.raises(AssertionError):
        Pool().add({"a": x}, {"a": x}, {"a": x, "b": x})


def test_the_table_says_both_errors():
    x = torch.ones(20)
    made = error("y", x * 1.5, x, x.double())
    assert str(made).startswith("y: error 5.000e-01, PyTorch's 0.000e+00, allowed ")
    assert "at most 5.000e-01" in str(made) and str(made).endswith("TOO LARGE")
    with pytest.raises(AssertionError, match=r"output 0: .* TOO LARGE"):
        check(lambda x: x * 1.5, torch.clone, torch.clone, [x])
