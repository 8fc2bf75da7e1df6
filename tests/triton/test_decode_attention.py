"""decode_attention's Triton kernels against float64: pieces of 32 keys, tiles of 16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check
from fastlm.triton import decode_attention
from fastlm.triton._configs import Config, override

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(decode_attention, "_PIECE", 32)
    with override(decode_attention=Config((16, 16))):
        yield


def inputs(shape, dtype):
    batch, heads, kv_heads, queries, keys, size, value_size = shape
    q = torch.randn(batch, queries, heads, size).to(dtype).transpose(1, 2)
    k = torch.randn(batch, kv_heads, keys, size).to(dtype)
    return [q, k, torch.randn(batch, kv_heads, keys, value_size).to(dtype)]


def baseline(q, k, v, lengths, window=None, mask=None, alibi_slopes=None, sinks=None):
    """PyTorch's own kernel: slopes as an additive mask, the sink as a key of value zero."""
    last = torch.as_tensor(lengths).expand(q.shape[0])[:, None] - q.shape[2]
    position = (last + torch.arange(q.shape[2]))[..., None]
    ahead = torch.arange(k.shape[2]) - position
    seen = (ahead <= 0)[:, None]
    if window is not None:
        seen = seen & (ahead > -window)[:, None]
    bias = torch.zeros(())
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        bias = mask.float()
    if alibi_slopes is not None:
        bias = bias + alibi_slopes.view(-1, q.shape[1], 1, 1) * ahead[:, None]
    bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2]).masked_fill(
        ~seen, -torch.inf
    )
    any_seen = (bias > -torch.inf).any(-1, keepdim=True)
    if sinks is not None:
        bias = torch.cat([bias, sinks.view(-1, 1, 1).expand(*bias.shape[:-1], 1)], -1)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(wide), enable_gqa=True)
    return torch.where(any_seen, out, 0.0)


def matches(args, lengths, draws=4, **options):
    check(
        lambda *x: ops.decode_attention(*x, lengths, **options),
        lambda *x: baseline(*x, lengths, **options),
        lambda *x: reference.decode_attention(*x, lengths, **options),
        args,
        gradients=False,
        draws=draws,
    )


# batch, query heads, key heads, queries, cache size, D, Dv
SHAPES = [
    (2, 4, 4, 1, 30, 16, 16),
    (2, 6, 2, 1, 75, 32, 32),
    (1, 6, 1, 3, 40, 9, 21),
    (1, 72, 1, 1, 40, 16, 16),
    (1, 2, 1, 16, 70, 16, 16),
    (1, 1, 1, 1, 8, 1, 1),
]


@pytest.mark.parametrize(
    "dtype, window",
    [(DTYPES[0], None), (DTYPES[1], 20), (DTYPES[1], None), (DTYPES[2], 20)],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(dtype, shape, window):
    lengths = torch.randint(1, shape[4] + 1, shape[:1])
    matches(inputs(shape, dtype), lengths, 16 if shape[-1] == 1 else 4, window=window)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_one_length_for_all(dtype):
    matches(inputs((2, 4, 2, 2, 75, 16, 16), dtype), 71)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("keys", [20, 75], ids=["one_piece", "pieces"])
@pytest.mark.parametrize("form", ["padding", "per_head", "added", "all"])
def test_masks_slopes_and_sinks(dtype, keys, form):
    args = inputs((2, 4, 2, 2, keys, 16, 16), dtype)
    at, sparse = torch.arange(keys), torch.rand(2, 4, 2, keys)
    options = {
        "padding": {"mask": at >= torch.tensor([0, 12])[:, None, None, None]},
        "per_head": {"mask": sparse[:, :, :1] > 0.4},
        "added": {"mask": torch.randn(4, 2, keys).masked_fill(sparse[0] > 0.8, -torch.inf)},
        "all": {
            "mask": sparse[:, :1] > 0.4,
            "alibi_slopes": torch.rand(2, 4),
            "sinks": torch.randn(4),
            "window": 33,
        },
    }[form]
    matches(args, torch.tensor([keys, keys - 7], dtype=torch.int32), **options)


@pytest.mark.parametrize("keys", [20, 75], ids=["one_piece", "pieces"])
def test_softcap(keys):
    """Against the same options in PyTorch's operations, which its attention lacks."""
    q, k, v = inputs((2, 4, 2, 2, keys, 16, 16), torch.float32)

    def theirs(q, k, v):
        wide = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        s = 3 * torch.tanh(q @ wide[0].mT / 4 / 3)
        ahead = torch.arange(keys) - torch.arange(keys - 2, keys)[:, None]
        return s.masked_fill(ahead > 0, -torch.inf).softmax(-1) @ wide[1]

    check(
        lambda *x: ops.decode_attention(*x, keys, softcap=3.0),
        theirs,
        lambda *x: reference.decode_attention(*x, keys, softcap=3.0),
        [q, k, v],
        gradients=False,
        draws=4,
    )


def paged(cache, size, table):
    """A contiguous cache [B, H, S, D] cut into the pages that the table names."""
    pages = torch.full((int(table.max()) + 2, cache.shape[1], size, *cache.shape[3:]), 99).to(cache)
    for b, names in enumerate(table.tolist()):
        for n, page in enumerate(names):
            if page >= 0:
                pages[page] = cache[b, :, size * n : size * (n + 1)]
    return pages


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("size, index", [(8, torch.int32), (7, torch.int64), (64, torch.int32)])
@pytest.mark.parametrize("window", [None, 30])
def test_paged_cache_gives_the_bits_of_a_contiguous_one(dtype, size, index, window):
    pages = -(-75 // size)
    q, k, v = inputs((2, 4, 2, 2, pages * size, 16, 24), dtype)
    lengths = torch.tensor([75, 41])
    table = torch.randperm(2 * pages).view(2, pages).to(index)
    table[1, -(-41 // size) :] = -1
    expected = ops.decode_attention(q, k, v, lengths, window=window)
    caches = paged(k, size, table), paged(v, size, table)
    got = ops.decode_attention(q, *caches, lengths, block_table=table, window=window)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [None, 24])
def test_int8_cache(dtype, size):
    q = inputs((2, 6, 2, 2, 72, 16, 16), dtype)[0]
    k, v = (torch.randint(-127, 128, (2, 2, 72, 16), dtype=torch.int8) for _ in "kv")
    k_scale, v_scale = (torch.rand(2, 2, 72) / 64 for _ in "kv")
    lengths, caches, table = torch.tensor([72, 51]), (k, v, k_scale, v_scale), None
    if size is not None:
        table = torch.randperm(6).view(2, 3)
        caches = tuple(paged(x, size, table) for x in caches)

    def ours(q, f=ops.decode_attention):
        k, v, k_scale, v_scale = caches
        return f(q, k, v, lengths, block_table=table, k_scale=k_scale, v_scale=v_scale)

    def theirs(q):
        wide = [(x * s[..., None]).to(q.dtype) for x, s in ((k, k_scale), (v, v_scale))]
        return baseline(q, *wide, lengths)

    check(
        ours,
        theirs,
        lambda q: ours(q, reference.decode_attention),
        [q],
        gradients=False,
        draws=4,
    )


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_what_lies_beyond_the_length_is_never_used(dtype):
    q, k, v = inputs((3, 4, 2, 1, 75, 16, 16), dtype)
    lengths = torch.tensor([5, 61, 32])
    expected = ops.decode_attention(q, k, v, lengths)
    for b, length in enumerate(lengths):
        k[b, :, length:] = torch.nan
        v[b, :, length:] = torch.nan
    assert torch.equal(ops.decode_attention(q, k, v, lengths), expected)


@pytest.mark.parametrize("sinks", [None, torch.zeros(4)], ids=["plain", "sinks"])
@pytest.mark.parametrize("keys", [20, 75], ids=["one_piece", "pieces"])
def test_a_query_that_sees_nothing_gives_zeros(sinks, keys):
    q, k, v = inputs((3, 4, 2, 3, keys, 16, 16), torch.float32)
    lengths = torch.tensor([0, 1, keys])  # of three queries none, the last, all see a key
    out = ops.decode_attention(q, k, v, lengths, sinks=sinks)
    assert (out[0] == 0).all() and (out[1, :, :2] == 0).all()
    assert (out[1, :, 2] != 0).all() and out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_same_bits_alone_as_in_a_batch_and_any_strides(dtype):
    q, k, v = inputs((3, 6, 2, 1, 75, 16, 16), dtype)
    lengths = torch.tensor([75, 37, 12])
    together = ops.decode_attention(q, k, v, lengths)
    for b, length in enumerate(lengths.tolist()):
        one = [x[b : b + 1] for x in (q, k, v)]
        assert torch.equal(ops.decode_attention(*one, length)[0], together[b])
    scattered = [x.mT.contiguous().mT for x in (k, v)]
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    for other in (scattered, by_token):
        assert torch.equal(ops.decode_attention(q, *other, lengths), together)


@pytest.mark.parametrize(
    "shape", [(0, 4, 2, 1, 9, 8, 8), (2, 4, 2, 0, 9, 8, 8), (2, 4, 2, 1, 0, 8, 8)], ids=str
)
def test_empty(shape):
    q, k, v = inputs(shape, torch.float32)
    out = ops.decode_attention(q, k, v, torch.full((shape[0],), shape[4]))
    assert out.shape == q.shape and not (shape[4] == 0 and out.any())


def test_refuses_what_it_cannot():
    q, k, v = inputs((1, 2, 1, 1, 8, 264, 8), torch.float32)
    with pytest.raises(RuntimeError, match="heads of at most 256 elements, not 264"):
        ops.decode_attention(q, k, v, 8)


def test_opcheck():
    q, k, v = inputs((2, 4, 2, 3, 75, 16, 8), torch.float32)
    op, lengths = torch.ops.fastlm.decode_attention.triton, torch.tensor([75, 4])
    rest = (0, 0.25, 0, None, None, 0.0, None, None, None, None)
    torch.library.opcheck(
        op, (q, k, v, lengths, *rest), test_utils=["test_schema", "test_faketensor"]
    )
