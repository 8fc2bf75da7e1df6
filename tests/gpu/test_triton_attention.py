"""attention's and decode_attention's Triton kernels on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check
from fastlm.triton import _configs

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or "triton" not in ops.implementations("attention", "cuda"),
    reason="needs a GPU and Triton",
)
DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [n for n in ops.implementations("attention", "cuda") if n not in ("torch", "reference")]


def heads(batch, count, rows, size, dtype):
    """[B, H, T, D] in the memory of [B, T, H, D], as projections make it."""
    return torch.randn(batch, rows, count, size, device=DEVICE).to(dtype).transpose(1, 2)


def hidden(q, k, causal, window):
    """What the options hide, as a boolean mask of what is seen."""
    tq, tk = q.shape[2], k.shape[2]
    at = torch.arange(tk, device=q.device)
    ahead = at - torch.arange(tk - tq, tk, device=q.device)[:, None]
    seen = torch.ones(tq, tk, dtype=torch.bool, device=q.device)
    if causal:
        seen &= ahead <= 0
    if window is not None:
        seen &= (ahead > -window) & (ahead < window)
    return seen


def theirs(q, k, v, causal=False, window=None):
    """PyTorch's own attention of the same dtype."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=hidden(q, k, causal, window), enable_gqa=True
    )


# batch, heads of q, heads of k, Tq, Tk, D, Dv
SHAPES = [
    (2, 4, 4, 128, 128, 64, 64),
    (1, 4, 1, 113, 203, 64, 64),
    (1, 2, 2, 1, 239, 128, 128),
    (1, 6, 2, 257, 129, 128, 128),
    (1, 4, 2, 384, 384, 96, 96),
    (1, 2, 1, 200, 300, 80, 40),
    (1, 2, 2, 130, 130, 256, 256),
    (2, 3, 3, 65, 65, 9, 21),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 70}], ids=str)
def test_matches_float64(backend, dtype, shape, options):
    batch, hq, hkv, tq, tk, d, dv = shape
    if "causal" in options and tq > tk:
        pytest.skip("PyTorch's rows that see nothing are not zeros")
    q, k = heads(batch, hq, tq, d, dtype), heads(batch, hkv, tk, d, dtype)
    with ops.use_backend(backend):
        check(
            lambda *x: ops.attention(*x, **options),
            lambda *x: theirs(*x, **options),
            lambda *x: reference.attention(*x, **options),
            [q, k, heads(batch, hkv, tk, dv, dtype)],
        )


def given(name, queries, keys):
    """Options by name for 2 sequences of 8 heads."""
    options = {"causal": "causal" in name}
    if "softcap" in name:
        options["softcap"] = 5.0
    if "slopes" in name:
        options["alibi_slopes"] = torch.rand(2, 8, device=DEVICE)
    if "window" in name:
        options["window"] = 40
    if "padding" in name:
        start = torch.tensor([0, keys // 2], device=DEVICE).view(2, 1, 1, 1)
        options["mask"] = torch.arange(keys, device=DEVICE) >= start
    if "added" in name:
        options["mask"] = torch.randn(8, queries, keys, device=DEVICE)
    return options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name",
    ["softcap", "causal slopes", "sinks", "window", "padding", "added", "causal padding all"],
)
def test_options_match_float64(dtype, name, queries=70, keys=150, draws=None):
    if "all" in name:
        name += " softcap slopes sinks window"
    options = given(name, queries, keys)
    inputs = [heads(2, 8, queries, 64, dtype), *(heads(2, 2, keys, 64, dtype) for _ in "kv")]

    def by(where):
        def run(q, k, v, sinks=None):
            return where.attention(q, k, v, sinks=sinks, return_lse=True, **options)

        return run

    with ops.use_backend("triton"):
        sinks = [torch.randn(8, device=DEVICE)] if "sinks" in name else []
        check(by(ops), by(reference), by(reference), [*inputs, *sinks], draws=draws)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", ["whole", "heads", "hidden"])
def test_gradients_of_slopes_and_masks(dtype, masked, queries=70, keys=150, draws=None):
    inputs = [heads(2, 8, queries, 64, dtype), *(heads(2, 2, keys, 64, dtype) for _ in "kv")]
    shape = {"whole": (2, 8, queries, keys), "heads": (8, 1, keys), "hidden": (queries, keys)}
    mask = torch.randn(shape[masked], device=DEVICE)
    if masked == "hidden":
        mask[:, keys // 3 :] = -torch.inf
    inputs += [torch.rand(8, device=DEVICE), mask]

    def by(where):
        return lambda q, k, v, slopes, mask: where.attention(
            q, k, v, causal=True, alibi_slopes=slopes, mask=mask
        )

    with ops.use_backend("triton"):
        check(by(ops), by(reference), by(reference), inputs, draws=draws)


def test_heads_that_share_a_tile_change_no_bit(monkeypatch):
    bf16 = torch.bfloat16
    inputs = [heads(64, 32, 24, 128, bf16), *(heads(64, 8, 500, 128, bf16) for _ in "kv")]
    with ops.use_backend("triton"):
        together = ops.attention(*inputs, causal=True)
        monkeypatch.setattr(_configs, "multiprocessors", lambda device: 2**30)
        assert torch.equal(together, ops.attention(*inputs, causal=True))


def gradients(inputs, **options):
    leaves = [x.detach().requires_grad_() for x in inputs]
    with ops.use_backend("triton"):
        out = ops.attention(*leaves, **options)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))


@pytest.mark.parametrize("options", [{"causal": True}, {"window": 300}], ids=str)
def test_same_bits_every_time(options):
    inputs = [heads(2, n, 2048, 128, torch.bfloat16) for n in (16, 4, 4)]
    first = gradients(inputs, **options)
    for _ in range(20):
        assert all(map(torch.equal, first, gradients(inputs, **options)))


def test_unordered_sums_are_near_the_ordered_ones():
    inputs = [heads(1, n, 1000, 64, torch.bfloat16) for n in (8, 2, 2)]
    ordered = gradients(inputs, causal=True)
    unordered = gradients(inputs, causal=True, deterministic=False)
    torch.testing.assert_close(ordered, unordered)


def test_packed_sequences_and_sparse_masks_equal_single_ones():
    lengths = torch.tensor([0, 300, 1, 129, 700])
    starts = F.pad(lengths.cumsum(0), (1, 0)).int().to(DEVICE)
    q, k, v = (torch.randn(1130, n, 64, device=DEVICE, dtype=torch.bfloat16) for n in (8, 2, 2))
    packed = gradients((q, k, v), causal=True, cu_seqlens_q=starts)
    rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
    names = torch.repeat_interleave(torch.arange(5), lengths).to(DEVICE)
    mask = (names[:, None] == names) & hidden(rows[0], rows[1], True, None)
    masked = gradients(rows, mask=mask)
    for a, b in zip(packed, masked, strict=True):
        torch.testing.assert_close(a, b[0].transpose(0, 1), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("backward", [False, True])
def test_graph_capture(backward):
    inputs = [heads(1, n, 300, 64, torch.bfloat16) for n in (8, 2, 2)]
    for _ in range(3):
        expected = gradients(inputs, causal=True)
    graph = torch.cuda.CUDAGraph()
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    with ops.use_backend("triton"), torch.cuda.graph(graph):
        found = [ops.attention(*leaves, causal=True)]
        if backward:
            found += torch.autograd.grad(found[0], leaves, torch.ones_like(found[0]))
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, expected, found))


def test_more_than_two_to_the_31_elements():
    """The last head lies beyond 2^31 elements; so do its outputs."""
    rows = 2**20 + 5
    q = torch.empty(1, 33, rows, 64, device=DEVICE, dtype=torch.bfloat16)
    q[:, -1] = torch.randn(1, rows, 64, device=DEVICE, dtype=torch.bfloat16)
    with ops.use_backend("triton"):
        out = ops.attention(q, q, q, causal=True, window=64)
        last = q[:, -1:].contiguous()
        assert torch.equal(out[:, -1:], ops.attention(last, last, last, causal=True, window=64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 32, 8, 1, 4096, 128), (2, 12, 2, 4, 777, 80)], ids=str)
def test_decode(dtype, shape):
    batch, hq, hkv, tq, keys, d = shape
    lengths = torch.randint(tq, keys + 1, (batch,), device=DEVICE)
    inputs = [heads(batch, hq, tq, d, dtype), *(heads(batch, hkv, keys, d, dtype) for _ in "kv")]
    position = lengths[:, None] - tq + torch.arange(tq, device=DEVICE)
    seen = torch.arange(keys, device=DEVICE) <= position[..., None]

    def baseline(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True)

    with ops.use_backend("triton"):
        check(
            lambda *x: ops.decode_attention(*x, lengths),
            baseline,
            lambda *x: reference.decode_attention(*x, lengths),
            inputs,
            gradients=False,
        )
        first = ops.decode_attention(*inputs, lengths)
        assert all(torch.equal(first, ops.decode_attention(*inputs, lengths)) for _ in range(20))
