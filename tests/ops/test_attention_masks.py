"""attention under masks: what they hide is left out, what they add is added."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from test_attention import DTYPES, agrees, heads, matches, needs_native

from fastlm import ops, reference
from fastlm.testing import check


def masks(batch, tq, tk):
    """Masks by name, among them rows that see nothing and dimensions of stride 0."""
    random = torch.rand(batch, 1, tq, tk) > 0.4
    random[:, :, 5] = False
    start = torch.arange(batch)[:, None, None, None] * (tk // 2)
    at = torch.arange(tk)
    added = torch.randn(4, tq, 1).masked_fill(torch.rand(4, tq, 1) > 0.9, -math.inf)
    return {
        "bool": random,
        "bool_per_head": torch.rand(batch, 4, tq, tk) > 0.3,
        "left_padding": at >= start,
        "right_padding": at < tk - start,
        "expanded": (at >= start).expand(batch, 4, tq, tk),
        "bool_column": torch.rand(tq, 1) > 0.3,
        "added": added,
        "added_bf16": torch.randn(tq, tk).bfloat16(),
        "added_fp16": torch.randn(tq, tk).half().masked_fill(torch.rand(tk) > 0.9, -math.inf),
        "added_transposed": torch.randn(batch, 1, tk, tq).mT,
        "hf_minimum": torch.zeros(batch, 1, tq, tk).masked_fill(at > 30, -1e9),
    }


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", masks(2, 70, 90))
def test_reference_masks_as_pytorch_does(causal, name):
    inputs = [heads(2, 4, 70, 32), heads(2, 2, 90, 32), heads(2, 2, 90, 32)]
    agrees(inputs, {"mask": masks(2, 70, 90)[name], "causal": causal})


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", masks(2, 70, 90))
def test_masks(dtype, causal, name):
    q, k, v = heads(2, 4, 70, 32, dtype), heads(2, 2, 90, 32, dtype), heads(2, 2, 90, 32, dtype)
    with ops.use_backend("cpu"):
        matches([q, k, v], {"mask": masks(2, 70, 90)[name], "causal": causal})


def sparse_masks(batch, tq, tk):
    """Masks that hide whole blocks of keys from whole blocks of queries."""
    at, position = torch.arange(tk), torch.arange(tk - tq, tk)[:, None]
    start = torch.tensor([0, 70, 130])[:batch, None, None, None]
    left = (at >= start) & (at <= position)
    documents = at // 90 == position // 90
    return {
        "left_padding_causal": left,
        "right_padding_causal": (at < tk - start) & (at <= position),
        "documents": documents,
        "documents_added": torch.zeros(tq, tk).masked_fill(~documents, -math.inf),
        "left_padding_bf16": torch.zeros(1).bfloat16().masked_fill(~left, -math.inf),
        "checks": (at // 64 + torch.arange(tq)[:, None] // 64) % 2 == 0,
        "per_head": torch.rand(batch, 6, tq // 10, tk // 10).gt(0.8).repeat_interleave(10, 2)
        .repeat_interleave(10, 3),
        "by_column": torch.arange(tq)[:, None] % 128 < 64,
    }  # fmt: skip


SPARSE = (3, 200, 330)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sparse_masks(*SPARSE))
def test_sparse_masks(dtype, name):
    q, k, v = heads(3, 6, 200, 64, dtype), heads(3, 6, 330, 64, dtype), heads(3, 6, 330, 80, dtype)
    with ops.use_backend("cpu"):
        matches([q, k, v], {"mask": sparse_masks(*SPARSE)[name]})


def with_gradients(q, k, v, **options):
    """Output, log-sum-exp and gradients on the native kernel."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with ops.use_backend("cpu"):
        out = ops.attention(*leaves, return_lse=True, **options)
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=g).to(x.dtype) for x in out]
    return *out, *torch.autograd.grad(out, leaves, cotangents)


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("added", [False, True], ids=["bool", "added"])
def test_a_causal_mask_gives_the_bits_of_causal(dtype, groups, added):
    """It is read once and its blocks are then treated as positions are."""
    q = heads(2, 2 * groups, 150, 32, dtype)
    k, v = heads(2, 2, 210, 32, dtype), heads(2, 2, 210, 32, dtype)
    mask = torch.ones(150, 210, dtype=torch.bool).tril(60)
    if added:
        mask = torch.zeros(150, 210).masked_fill(~mask, -math.inf)
    masked, causal = with_gradients(q, k, v, mask=mask), with_gradients(q, k, v, causal=True)
    assert equal(masked[:3], causal[:3])  # dk and dv sum the rows above the diagonal too


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_blocks_are_never_read(dtype):
    q, k, v = (heads(2, 2, 192, 32, dtype) for _ in "qkv")
    mask = torch.ones(2, 1, 1, 192, dtype=torch.bool)
    mask[1, ..., 64:128] = False
    before = with_gradients(q, k, v, mask=mask)
    k[1, :, 64:128] = v[1, :, 64:128] = math.nan
    after = with_gradients(q, k, v, mask=mask)
    assert equal(before, after)
    assert not after[3][1, :, 64:128].any() and not after[4][1, :, 64:128].any()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_gives_the_bits_of_shorter_sequences(dtype):
    q, k, v = (heads(1, 3, 200, 32, dtype) for _ in "qkv")
    mask = torch.arange(200) < 140
    short = with_gradients(q, k[:, :, :140], v[:, :, :140])
    long = with_gradients(q, k, v, mask=mask)
    assert equal(long[:3], short[:3])
    assert equal([x[:, :, :140] for x in long[3:]], short[3:])


@needs_native
@pytest.mark.parametrize("batch", [1, 4])
def test_same_bits_for_any_number_of_threads_under_a_mask(batch):
    q, k, v = (heads(batch, 2, 330, 16, torch.bfloat16) for _ in "qkv")
    mask = torch.rand(330, 11).gt(0.7).repeat_interleave(30, 1)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradients(q, k, v, mask=mask))
    finally:
        torch.set_num_threads(before)
    assert equal(results[0], results[1]) and equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)  # fp16's minimum hides no score
def test_a_row_hidden_by_a_finite_mask_sees_all_keys_alike(dtype):
    """transformers' eager masks hold the lowest number, not -inf: a padded row of them is flat."""
    q, k, v = (torch.randn(1, 2, 5, 16).to(dtype) for _ in range(3))
    mask = torch.zeros(1, 1, 5, 5, dtype=dtype)
    mask[0, 0, 1] = torch.finfo(dtype).min

    def ours(q, k, v):
        return ops.attention(q, k, v, mask=mask)

    def baseline(q, k, v):  # not SDPA, whose gradients of such a row are wrong
        return ((q @ k.mT) / 4 + mask).softmax(-1) @ v

    def oracle(q, k, v):
        return reference.attention(q, k, v, mask=mask.double())

    check(ours, baseline, oracle, (q, k, v))
    weights = ours(q, k, torch.eye(5, 16, dtype=dtype).expand(1, 2, 5, 16))[0, 0, 1, :5]
    torch.testing.assert_close(weights, torch.full((5,), 0.2, dtype=dtype))


@needs_native
def test_a_gradient_of_sinks_in_half_precision_is_not_the_kernels():
    q = torch.randn(1, 2, 8, 8, dtype=torch.bfloat16)
    sinks = torch.randn(2, requires_grad=True)
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match="sinks in float32 only"):
        ops.attention(q, q, q, sinks=sinks)
    ops.attention(q, q, q, sinks=sinks).float().sum().backward()
    assert sinks.grad.isfinite().all()


@pytest.mark.parametrize("backend", ops.implementations("attention"))
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("added", [False, True], ids=["bool", "added"])
def test_a_mask_of_few_dimensions_is_broadcast(backend, dtype, added):
    q, k, v = heads(2, 4, 5, 8, dtype), heads(2, 2, 7, 8, dtype), heads(2, 2, 7, 8, dtype)
    row = torch.randn(7) if added else torch.arange(7) % 3 > 0
    for mask in (row, row[3]):
        with ops.use_backend(backend if dtype != torch.float64 or backend != "cpu" else None):
            out = ops.attention(q, k, v, mask=mask)
            assert torch.equal(out, ops.attention(q, k, v, mask=mask.expand(2, 4, 5, 7)))


@pytest.mark.parametrize("backend", ops.implementations("attention"))
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_widest_window_hides_nothing(backend, causal):
    """As sys.maxsize, which overflows where a position is added to it."""
    q = heads(1, 2, 70, 16)
    with ops.use_backend(backend):
        out = ops.attention(q, q, q, causal=causal, window=100)
        assert torch.equal(out, ops.attention(q, q, q, causal=causal, window=sys.maxsize))
