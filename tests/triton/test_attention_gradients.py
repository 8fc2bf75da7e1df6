"""attention's Triton kernels: gradients of masks and slopes, and of rows with one weight near 1."""

from __future__ import annotations

import math

import pytest
import torch

from fastlm import ops, reference
from fastlm.testing import check
from fastlm.triton._configs import override
from tests.triton.test_attention import DTYPES, FEW, TILES, heads, matches, theirs


@pytest.fixture(autouse=True)
def _small_tiles():
    with override(**TILES):
        yield


def learnt(name, batch, count, tq, tk):
    """(slopes or None, mask or None) that have gradients: whole, and broadcast in any dimension."""
    slopes = {"slopes": (count,), "slopes of each": (batch, count)}
    masks = {"mask": (batch, count, tq, tk), "one mask": (tq, tk), "keys": (count, 1, tk)}
    some = torch.randn(batch, 1, tq, tk).masked_fill(torch.rand(batch, 1, tq, tk) > 0.8, -math.inf)
    some[..., 16:32] = -math.inf  # a tile of keys that is hidden
    return (
        torch.rand(slopes[name])
        if name in slopes
        else torch.rand(count)
        if "both" in name
        else None,
        torch.randn(masks[name]) if name in masks else some if "both" in name else None,
    )


NAMES = ["slopes", "slopes of each", "mask", "one mask", "keys", "both", "both cap"]


@pytest.mark.parametrize(
    "name, dtype",
    [(name, dtype) for n, name in enumerate(NAMES) for dtype in (DTYPES[0], DTYPES[1 + n % 2])],
    ids=str,
)
def test_gradients_of_masks_and_slopes(name, dtype):
    batch, count, tq, tk = 2, 4, 9, 34
    slopes, mask = learnt(name, batch, count, tq, tk)
    q, k, v = (heads(batch, n, t, 16, dtype) for n, t in ((count, tq), (2, tk), (2, tk)))
    options = {"causal": True, "softcap": 1.5 if "cap" in name else None}

    def by(f):
        def run(q, k, v, *more):
            more = iter(more)
            given = {"alibi_slopes": next(more)} if slopes is not None else {}
            given |= {"mask": next(more)} if mask is not None else {}
            return f(q, k, v, **options, **given)

        return run

    inputs = [q, k, v, *(x for x in (slopes, mask) if x is not None)]
    draws = 12 if slopes is not None else 3  # of slopes only four numbers a draw
    check(by(ops.attention), by(theirs), by(reference.attention), inputs, draws=draws)


def test_gradients_of_slopes_of_packed_sequences():
    starts = torch.tensor([0, 20, 20, 21, 60], dtype=torch.int32)
    inputs = [torch.randn(60, n, 16) for n in (2, 1, 1)]

    def by(f):
        return lambda q, k, v, s: f(q, k, v, causal=True, alibi_slopes=s, cu_seqlens_q=starts)

    for shape in ((2,), (4, 2)):
        some = [*inputs, torch.rand(shape)]
        check(by(ops.attention), by(reference.attention), by(reference.attention), some, draws=8)


def test_only_what_is_asked_for():
    q, k = heads(1, 2, 5, 16), heads(1, 2, 20, 16)
    slopes, mask = torch.rand(2, dtype=torch.float64), torch.randn(20).bfloat16()
    both = slopes.requires_grad_(), mask.requires_grad_()

    def gradients(*wanted):
        out = ops.attention(q, k, k, alibi_slopes=slopes, mask=mask, deterministic=False)
        return torch.autograd.grad(out.square().sum(), wanted)

    first = gradients(*both)
    assert [x.dtype for x in first] == [torch.float64, torch.bfloat16]
    assert torch.equal(gradients(slopes)[0], first[0]) and torch.equal(gradients(mask)[0], first[1])


def test_second_derivatives_reach_masks_and_slopes():
    q, slopes, mask = heads(1, 2, 5, 16), torch.rand(2), torch.randn(5, 5)
    leaves = [x.requires_grad_() for x in (q, slopes, mask)]
    found = []
    for f in (ops.attention, reference.attention):
        out = f(q, q, q, alibi_slopes=slopes, mask=mask, causal=True)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", [41, 29])
def test_errors_of_weights_near_one_cancel(seed):
    """Of few keys one has nearly all the weight, and p (g . v - sum p g . v) is next to nothing."""
    torch.manual_seed(seed)
    (batch, hq, hkv, tq, tk, d, dv), options = FEW["more queries than keys"]
    options = {**options, "alibi_slopes": torch.rand(batch, hq)}
    q, k, v = heads(batch, hq, tq, d), heads(batch, hkv, tk, d), heads(batch, hkv, tk, dv)
    matches([q, k, v], {**options, "sinks": torch.randn(hq)})


@pytest.mark.parametrize("tq, tk", [(0, 3), (3, 0)])
def test_nothing_to_see_and_nobody_who_sees(tq, tk):
    q, k, v = torch.randn(1, 2, tq, 8), torch.randn(1, 2, tk, 8), torch.randn(1, 2, tk, 8)
    leaves = [x.requires_grad_() for x in (q, k, v, torch.rand(2), torch.randn(tq, tk))]
    out = ops.attention(*leaves[:3], alibi_slopes=leaves[3], mask=leaves[4])
    grads = torch.autograd.grad(out.sum(), leaves)
    assert not out.any() and not any(g.any() for g in grads)
    assert [g.shape for g in grads] == [x.shape for x in leaves]


def test_compiled_as_one_graph_of_any_number_of_tokens():
    def f(q, k, slopes, mask):
        return (
            ops.attention(q, k, 2 * k, alibi_slopes=slopes, mask=mask, causal=True).square().sum()
        )

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (9, 11):
        tensors = (
            heads(1, 4, rows, 16),
            heads(1, 2, rows, 16),
            torch.rand(4),
            torch.randn(rows, rows),
        )
        leaves = [x.requires_grad_() for x in tensors]
        expected = torch.autograd.grad(f(*leaves), leaves)
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = torch.autograd.grad(compiled(*leaves), leaves)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
