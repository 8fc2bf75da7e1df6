"""decode_attention: every implementation against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from fastlm import ops, reference
from fastlm.testing import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NATIVE = pytest.mark.skipif(
    "cpu" not in ops.implementations("decode_attention"), reason="no native kernels"
)

# batch, query heads, key heads, queries, cache size, D, Dv
SHAPES = [
    (4, 4, 4, 1, 300, 64, 64),
    (2, 9, 3, 1, 140, 64, 64),
    (4, 6, 1, 3, 40, 16, 16),
    (3, 8, 1, 5, 150, 80, 48),
    (1, 4, 2, 16, 90, 128, 128),
    (1, 32, 8, 1, 1100, 128, 128),
    (1, 2, 1, 2, 1300, 256, 256),
    (9, 6, 6, 1, 33, 23, 19),
    (1, 1, 1, 1, 8, 1, 1),
    (2, 2, 1, 1, 12, 8, 8),
    (3, 4, 2, 2, 17, 9, 5),
]
NOTHING = (0.0, None, None, None, None)  # no softcap, pages, mask or scales


def baseline(q, k, v, lengths, window=None):
    """PyTorch's own kernel with a mask."""
    last = torch.as_tensor(lengths).expand(q.shape[0])[:, None] - q.shape[2]
    position = (last + torch.arange(q.shape[2]))[..., None]
    at = torch.arange(k.shape[2])
    mask = at <= position
    if window is not None:
        mask &= at > position - window
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
    return torch.where(mask.any(-1)[:, None, :, None], out, 0.0)


def inputs(shape, dtype):
    batch, heads, kv_heads, queries, keys, size, value_size = shape
    q = torch.randn(batch, queries, heads, size, dtype=dtype).transpose(1, 2)
    k = torch.randn(batch, kv_heads, keys, size, dtype=dtype)
    return [q, k, torch.randn(batch, kv_heads, keys, value_size, dtype=dtype)]


@pytest.mark.parametrize("backend", ops.implementations("decode_attention"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 20], ids=["all_keys", "window"])
@pytest.mark.parametrize("form", ["full", "int", "int32", "int64"])
def test_matches_float64(backend, dtype, shape, window, form):
    lengths = shape[4]
    if form == "int":
        lengths = shape[4] - 7
    elif form != "full":
        lengths = torch.randint(1, shape[4] + 1, shape[:1], dtype=getattr(torch, form))
    with ops.use_backend(backend):
        check(
            lambda *x: ops.decode_attention(*x, lengths, window=window),
            lambda *x: baseline(*x, lengths, window),
            lambda *x: reference.decode_attention(*x, lengths, window=window),
            inputs(shape, dtype),
            gradients=False,
        )


def plain(q, k, v, *, lengths, softcap=None, alibi_slopes=None, sinks=None, **unused):
    """The options spelled out in the dtype of the arguments, one sequence after another."""
    rows = []
    for b, length in enumerate(lengths):
        group = q.shape[1] // k.shape[1]
        keys = k[b, :, :length].repeat_interleave(group, 0)
        values = v[b, :, :length].repeat_interleave(group, 0)
        s = q[b] @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
        if softcap is not None:
            s = (s / softcap).tanh() * softcap
        ahead = torch.arange(length) - torch.arange(length - q.shape[2], length)[:, None]
        if alibi_slopes is not None:
            s = s + alibi_slopes[:, None, None].to(s) * ahead
        s = s.masked_fill(ahead > 0, -torch.inf)
        if sinks is not None:
            s = torch.cat((s, sinks.to(s).view(-1, 1, 1).expand(-1, q.shape[2], 1)), -1)
        rows.append(s.softmax(-1)[..., :length] @ values)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["softcap", "alibi_slopes", "sinks", "alibi_slopes sinks"])
def test_options_match_float64_with_gradients(dtype, option):
    shape, lengths = (2, 6, 2, 2, 50, 32, 32), [45, 7]
    offered = {
        "softcap": 5.0,
        "alibi_slopes": torch.rand(6) / 8,
        "sinks": torch.randn(6),
    }
    options = {name: offered[name] for name in option.split()}
    args = inputs(shape, dtype)

    def ours(q, k, v):
        return ops.decode_attention(q, k, v, torch.tensor(lengths), **options)

    def theirs(q, k, v):
        return plain(q, k, v, lengths=lengths, **options)

    check(ours, theirs, theirs, args)
    with torch.no_grad():  # the kernel, where it knows the option
        check(lambda *x: ours(*(t.detach() for t in x)), theirs, theirs, args, gradients=False)


def test_slopes_of_each_sequence():
    q, k, v = inputs((2, 4, 2, 1, 50, 16, 16), torch.float32)
    slopes = torch.rand(2, 4)
    got = ops.decode_attention(q, k, v, 50, alibi_slopes=slopes)
    for b in range(2):
        one = ops.decode_attention(
            q[b : b + 1], k[b : b + 1], v[b : b + 1], 50, alibi_slopes=slopes[b]
        )
        assert torch.equal(one[0], got[b])


def paged(cache, size, table):
    """A contiguous cache [B, H, S, D] cut into the pages that the table names."""
    pages = torch.full((int(table.max()) + 2, cache.shape[1], size, *cache.shape[3:]), 99).to(cache)
    if cache.is_floating_point():
        pages[:] = torch.nan  # nobody's page
    for b, names in enumerate(table.tolist()):
        for i, page in enumerate(names):
            if page >= 0:
                pages[page] = cache[b, :, size * i : size * (i + 1)]
    return pages


@pytest.mark.parametrize("backend", ops.implementations("decode_attention"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size, index", [(8, torch.int32), (7, torch.int64), (64, torch.int32)])
@pytest.mark.parametrize("queries, window", [(1, None), (3, 30)])
def test_paged_cache_gives_the_bits_of_a_contiguous_one(
    backend, dtype, size, index, queries, window
):
    pages = -(-300 // size)
    q, k, v = inputs((2, 4, 2, queries, pages * size, 16, 24), dtype)
    lengths = torch.tensor([300, 41])
    table = torch.randperm(2 * pages).view(2, pages).to(index)
    table[1, -(-41 // size) :] = -1
    with ops.use_backend(backend):
        expected = ops.decode_attention(q, k, v, lengths, window=window)
        caches = (paged(k, size, table), paged(v, size, table))
        got = ops.decode_attention(q, *caches, lengths, block_table=table, window=window)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ops.implementations("decode_attention"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["padding", "per_head", "rows", "added", "added_bf16"])
def test_masks(backend, dtype, kind):
    shape = (3, 6, 2, 4, 300, 64, 64)
    batch, heads, _, queries, keys = shape[:5]
    mask = {
        "padding": torch.arange(keys) >= torch.tensor([0, 40, 290])[:, None, None, None],
        "per_head": torch.rand(batch, heads, 1, keys) > 0.3,
        "rows": torch.rand(queries, keys) > 0.3,
        "added": torch.randn(heads, queries, keys).masked_fill(torch.rand(keys) > 0.9, -torch.inf),
        "added_bf16": torch.randn(1, 1, 1, keys).bfloat16(),
    }[kind]

    def theirs(q, k, v):
        causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        if mask.dtype == torch.bool:
            both = mask & causal
        else:
            both = mask.to(q.dtype).expand(batch, heads, queries, keys)
            both = both.masked_fill(~causal, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=both, enable_gqa=True)

    with ops.use_backend(backend):
        check(
            lambda *x: ops.decode_attention(*x, keys, mask=mask),
            theirs,
            lambda *x: reference.decode_attention(*x, keys, mask=mask),
            inputs(shape, dtype),
            gradients=False,
        )


@pytest.mark.parametrize("backend", ops.implementations("decode_attention"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [None, 24])
def test_int8_cache(backend, dtype, scale_dtype, size):
    """Against the cache it stands for, in the dtype of the queries and in float64."""
    q = inputs((2, 6, 2, 3, 240, 80, 40), dtype)[0]
    k, v = (torch.randint(-127, 128, (2, 2, 240, d), dtype=torch.int8) for d in (80, 40))
    k_scale, v_scale = ((torch.rand(2, 2, 240) / 64).to(scale_dtype) for _ in "kv")
    lengths, caches, table = torch.tensor([240, 201]), (k, v, k_scale, v_scale), None
    if size is not None:
        table = torch.randperm(20).view(2, 10)
        caches = tuple(paged(x, size, table) for x in caches)

    def theirs(q):
        wide = [(x * s[..., None].to(q)).to(q) for x, s in ((k, k_scale), (v, v_scale))]
        return plain(q, *wide, lengths=lengths.tolist())

    def ours(q, f=ops.decode_attention):
        k, v, *scales = caches
        scales = dict(zip(("k_scale", "v_scale"), scales, strict=True))
        return f(q, k, v, lengths, block_table=table, **scales)

    with ops.use_backend(backend):
        check(ours, theirs, lambda q: ours(q, reference.decode_attention), [q], gradients=False)


@pytest.mark.parametrize("backend", ops.implementations("decode_attention"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 4])
def test_what_lies_beyond_the_length_is_never_used(backend, dtype, queries):
    q, k, v = inputs((3, 4, 2, queries, 700, 40, 40), dtype)
    lengths = torch.tensor([5, 611, 256])
    with ops.use_backend(backend):
        expected = ops.decode_attention(q, k, v, lengths)
        for b, length in enumerate(lengths):
            k[b, :, length:] = torch.nan
            v[b, :, length:] = torch.nan
        assert torch.equal(ops.decode_attention(q, k, v, lengths), expected)


@pytest.mark.parametrize("backend", ops.implementations("decode_attention"))
@pytest.mark.parametrize("sinks", [None, torch.zeros(4)], ids=["plain", "sinks"])
def test_a_query_that_sees_nothing_gives_zeros(backend, sinks):
    q, k, v = inputs((3, 4, 2, 3, 20, 16, 16), torch.float32)
    lengths = torch.tensor([0, 1, 20])  # of three queries none, the last, all see a key
    with ops.use_backend(backend):
        out = ops.decode_attention(q, k, v, lengths, sinks=sinks)
    assert (out[0] == 0).all() and (out[1, :, :2] == 0).all()
    assert (out[1, :, 2] != 0).all() and out.isfinite().all()
    if sinks is None:
        torch.testing.assert_close(out[1, :, 2], v[1, :, 0].repeat_interleave(2, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    q, k, v = inputs((2, 4, 2, 3, 70, 32, 32), dtype)
    expected = ops.decode_attention(q, k, v, 65)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    window = [torch.randn(2, 2, 90, 64, dtype=dtype)[:, :, 10:80, 8:40].copy_(x) for x in (k, v)]
    scattered = [torch.randn(2, 2, 32, 70, dtype=dtype).transpose(2, 3).copy_(x) for x in (k, v)]
    for other in (by_token, window, scattered):
        assert torch.equal(ops.decode_attention(q, *other, 65), expected)
        assert torch.equal(ops.decode_attention(q.contiguous(), *other, 65), expected)
    lengths = torch.tensor([65, 0, 65])[::2]
    assert torch.equal(ops.decode_attention(q, *by_token, lengths), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    q, k, v = inputs((2, 6, 2, 2, 900, 64, 64), dtype)
    lengths = torch.tensor([900, 371])
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.decode_attention(q, k, v, lengths))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_alone_as_in_a_batch(dtype):
    q, k, v = inputs((3, 6, 2, 1, 900, 64, 64), dtype)
    lengths = torch.tensor([900, 371, 12])
    together = ops.decode_attention(q, k, v, lengths)
    for b, length in enumerate(lengths.tolist()):
        alone = ops.decode_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], length)
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("shape", [(0, 4, 2, 1, 9, 8, 8), (2, 4, 2, 0, 9, 8, 8)], ids=str)
def test_empty_batch_gives_empty_result(shape):
    q, k, v = inputs(shape, torch.float32)
    assert ops.decode_attention(q, k, v, 9).shape == q.shape
    assert ops.decode_attention(q, k, v, torch.full((shape[0],), 9)).shape == q.shape


def test_empty_cache_gives_zeros():
    q, k, v = inputs((2, 4, 2, 1, 0, 8, 8), torch.float32)
    assert (ops.decode_attention(q, k, v, 0) == 0).all()


def test_autocast_computes_in_its_dtype():
    q, k, v = inputs((1, 4, 2, 1, 30, 16, 16), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.decode_attention(q, k, v, 30)
    assert out.dtype == torch.bfloat16
    half = ops.decode_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 30)
    assert torch.equal(out, half)


def test_fullgraph_compile():
    q, k, v = inputs((2, 4, 2, 1, 30, 16, 16), torch.float32)

    def f(*args):
        return ops.decode_attention(*args, window=9).transpose(1, 2).flatten(2) * 2

    args = (q, k, v, torch.tensor([30, 7]))
    torch.testing.assert_close(torch.compile(f, fullgraph=True)(*args), f(*args))


def test_compiled_once_for_all_lengths_and_with_gradients():
    q, k, v = inputs((2, 4, 2, 1, 30, 16, 16), torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.decode_attention, fullgraph=True, backend=counter)
    for length in (30, 29, 28, 27):
        expected = ops.decode_attention(q, k, v, length)
        torch.testing.assert_close(compiled(q, k, v, length), expected)
    assert counter.frame_count == 2  # the second time for any length
    q.requires_grad_()
    results = []
    for call in (compiled, reference.decode_attention):
        out = call(q, k, v, torch.tensor([30, 7]))
        results.append((out, *torch.autograd.grad(out.square().sum(), q)))
    torch.testing.assert_close(*results)


@NATIVE
@pytest.mark.parametrize("queries", [1, 3])
def test_opcheck(queries):
    q, k, v = inputs((2, 4, 2, queries, 30, 16, 8), torch.float32)
    op = torch.ops.fastlm.decode_attention.default
    torch.library.opcheck(op, (q, k, v, torch.tensor([30, 4]), 0, 0.25, 0, None, None, *NOTHING))
    some = (2.0, None, torch.rand(30) > 0.3, None, None)
    torch.library.opcheck(op, (q, k, v, None, 9, 0.25, 4, torch.rand(4), torch.rand(4), *some))
    table, scales = torch.tensor([[1, 0]]), torch.rand(2, 2, 30)
    paged = (None, 50, 0.25, 0, None, None, 0.0, table, None, scales, scales)
    torch.library.opcheck(op, (q[:1], k.char(), v.char(), *paged))


@NATIVE
def test_the_kernel_says_what_it_cannot():
    q, k, v = inputs((1, 2, 1, 1, 8, 8, 8), torch.float32)
    wide = inputs((1, 2, 1, 1, 8, 264, 8), torch.float32)
    with ops.use_backend("cpu"):
        for args, options, text in (
            ((q.clone().requires_grad_(), k, v, 8), {}, "has no gradient"),
            ((*wide, 8), {}, "heads of at most 256 elements, not 264"),
            ((q.double(), k.double(), v.double(), 8), {}, "bfloat16, float16, not float64"),
        ):
            with pytest.raises(RuntimeError, match=text):
                ops.decode_attention(*args, **options)
    assert ops.decode_attention(*wide, 8).shape == (1, 2, 1, 8)
    # a length that only the operator sees must not make it read beyond the cache
    with pytest.raises(RuntimeError, match="lengths must be between 0 and 8"):
        torch.ops.fastlm.decode_attention.default(q, k, v, None, 9, 1.0, 0, None, None, *NOTHING)
    with pytest.raises(RuntimeError, match="block_table must name pages 0 to 0, got -1"):
        ops.decode_attention(q, k, v, 9, block_table=torch.tensor([[0, -1]]))


Q = torch.ones(2, 4, 1, 8)
K = torch.ones(2, 2, 9, 8)
TABLE = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "args, kwargs, error, text",
    [
        (("x", K, K, 9), {}, TypeError, "decode_attention: q must be a tensor, got str"),
        ((Q.int(), K, K, 9), {}, TypeError, "q must be a floating-point tensor"),
        ((Q[0], K, K, 9), {}, ValueError, "q must be of rank 4, got rank 3"),
        ((Q, K.bfloat16(), K, 9), {}, ValueError, "k_cache must be torch.float32, got torch.bf"),
        ((Q, K, K.to("meta"), 9), {}, ValueError, "v_cache must be on cpu, got meta"),
        ((Q, K[..., :4], K, 9), {}, ValueError, r"k_cache must be \[2, 2, 9, 8\], got \[2, 2, 9"),
        ((Q, K, K[:, :, :5], 9), {}, ValueError, r"v_cache must be \[2, 2, 9, 8\], got \[2, 2, 5"),
        ((Q[:1], K, K, 9), {}, ValueError, r"k_cache must be \[1, 2, 9, 8\]"),
        ((Q[:, :3], K, K, 9), {}, ValueError, "k_cache must be of a head count that divides 3, go"),
        ((Q, K[:, :0], K[:, :0], 9), {}, ValueError, "k_cache must be of a head count that div"),
        (
            (Q, K, K, 10),
            {},
            ValueError,
            "lengths must be between 0 and 9, the cache's size, got 10",
        ),
        ((Q, K, K, -1), {}, ValueError, "lengths must be between 0 and 9"),
        ((Q, K, K, torch.tensor([9, 12])), {}, ValueError, "lengths must be between 0 and 9, .*12"),
        ((Q, K, K, torch.tensor([9])), {}, ValueError, r"lengths must be \[2\], got \[1\]"),
        ((Q, K, K, torch.ones(2)), {}, TypeError, "lengths must be int32 or int64, got torch.flo"),
        ((Q, K, K, 9.0), {}, TypeError, "lengths must be a tensor or an int, got float"),
        ((Q, K, K, 9), {"window": 0}, ValueError, "window must be 1 or more, got 0"),
        ((Q, K, K, 9), {"softcap": -1.0}, ValueError, "softcap must be positive"),
        ((Q, K, K, 9), {"sinks": torch.ones(3)}, ValueError, r"sinks must be \[4\], got \[3\]"),
        ((Q, K, K, 9), {"alibi_slopes": torch.ones(3)}, ValueError, r"slopes must be \[4\], got"),
        ((Q, K, K, 9), {"block_table": TABLE[:1]}, ValueError, r"block_table must be \[2, 3\]"),
        ((Q, K, K, 9), {"block_table": TABLE / 2}, TypeError, "block_table must be int32 or int64"),
        ((Q, K, K, 28), {"block_table": TABLE}, ValueError, "lengths must be between 0 and 27"),
        (
            (Q, K, K, 9),
            {"block_table": TABLE + 2},
            ValueError,
            "block_table must be of pages below 2",
        ),
        (
            (Q, K, K, 9),
            {"mask": torch.ones(5)},
            ValueError,
            r"mask must be broadcastable to \[2, 4",
        ),
        ((Q, K, K, 9), {"mask": TABLE}, TypeError, "mask must be bool or floating-point"),
        ((Q, K, K, 9), {"sinks": torch.ones(4).int()}, TypeError, "sinks must be a floating-point"),
        ((Q, K, K, 9), {"alibi_slopes": torch.ones(4) > 0}, TypeError, "alibi_slopes must be a f"),
        ((Q, K, K, 9), {"softcap": torch.inf}, ValueError, "softcap must be positive and finite"),
        ((Q, K, K, 9), {"k_scale": torch.ones(2, 2, 9)}, ValueError, "k_cache must be torch.int8"),
        (
            (Q, K.char(), K.char(), 9),
            {"k_scale": torch.ones(2, 2, 9)},
            ValueError,
            "v_scale must be given for an int8 cache, got None",
        ),
        (
            (Q, K.char(), K.char(), 9),
            {"k_scale": torch.ones(2, 2, 8), "v_scale": torch.ones(2, 2, 9)},
            ValueError,
            r"k_scale must be \[2, 2, 9\], got \[2, 2, 8\]",
        ),
    ],
)
def test_bad_input_names_the_argument(args, kwargs, error, text):
    with pytest.raises(error, match=text):
        ops.decode_attention(*args, **kwargs)
