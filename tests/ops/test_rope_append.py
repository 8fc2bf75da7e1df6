"""rope_append: every implementation against float64, and what it may not touch."""

from __future__ import annotations

import pytest
import torch

from fastlm import ops, reference
from fastlm.testing import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ops.implementations("rope_append")
NATIVE = pytest.mark.skipif("cpu" not in BACKENDS, reason="no native kernels")

# batch, query heads, key heads, new tokens, D, Dv, width of the tables, rotary_dim
SHAPES = [
    (4, 9, 3, 1, 64, 64, 32, None),
    (2, 4, 4, 3, 64, 64, 64, None),
    (3, 6, 1, 2, 80, 48, 32, None),
    (2, 4, 2, 5, 80, 80, 16, 32),
    (1, 2, 2, 1, 10, 7, 5, None),
    (2, 2, 1, 17, 6, 1, 6, 6),
    (1, 3, 3, 4, 16, 16, None, None),
]
PLACES = 40


def tables(width, dtype=torch.float32):
    angle = torch.randn(PLACES, width) * 3
    return angle.cos().to(dtype), angle.sin().to(dtype)


def inputs(shape, dtype):
    """q, k and v as views of one product, as a model makes them."""
    batch, heads, kv_heads, tokens, size, value_size = shape[:6]
    rows = torch.randn(batch, tokens, (heads + kv_heads) * size, dtype=dtype)
    every = rows.view(batch, tokens, heads + kv_heads, size).transpose(1, 2)
    q, k = every.split((heads, kv_heads), 1)
    return [q, k, torch.randn(batch, kv_heads, tokens, value_size, dtype=dtype)]


def caches(shape, dtype):
    batch, _, kv_heads, _, size, value_size = shape[:6]
    return tuple(torch.zeros(batch, kv_heads, PLACES, d, dtype=dtype) for d in (size, value_size))


def paged(cache, size, table):
    """A contiguous cache [B, H, S, D] cut into the pages that the table names."""
    pages = torch.zeros(int(table.max()) + 2, cache.shape[1], size, cache.shape[3]).to(cache)
    for b, names in enumerate(table.tolist()):
        for i, page in enumerate(names):
            pages[page] = cache[b, :, size * i : size * (i + 1)]
    return pages


def plain(q, k, v, tables, lengths, interleaved, rotary_dim, weights, eps=1e-6, offset=0.0):
    """The steps as transformers writes them, in the dtype of the arguments: q, caches."""
    batch, tokens = q.shape[0], q.shape[2]
    at = torch.as_tensor(lengths).expand(batch)[:, None] - tokens + torch.arange(tokens)
    q, k = (x if w is None else norm(x, w, eps, offset) for x, w in zip((q, k), weights))  # noqa: B905
    if tables is not None:
        rotary = reference.rotated_width(q.shape[-1], tables[0].shape[-1], rotary_dim)
        cos, sin = (wide(t, rotary, interleaved)[at][:, None].to(q.dtype) for t in tables)
        q, k = (rotate(x, cos, sin, rotary, interleaved) for x in (q, k))
    stored = [torch.zeros(batch, x.shape[1], PLACES, x.shape[3], dtype=x.dtype) for x in (k, v)]
    for cache, new in zip(stored, (k, v), strict=True):
        for b in range(batch):
            cache[b, :, at[b]] = new[b]
    return (q, *stored)


def norm(x, weight, eps, offset):
    y = x.float() if x.dtype != torch.float64 else x
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.to(x.dtype) + offset) * y.to(x.dtype)


def wide(table, rotary, interleaved):
    if table.shape[-1] == rotary:
        return table
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)


def rotate(x, cos, sin, rotary, interleaved):
    turned, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., 0::2]), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        partner = torch.cat((-second, first), -1)
    return torch.cat((turned * cos + partner * sin, rest), -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("form", ["plain", "norms", "own_type", "pages"])
def test_matches_float64(backend, dtype, shape, interleaved, form):
    batch, _, _, tokens, size, _, width, rotary_dim = shape
    own = dtype if form == "own_type" else torch.float32
    angles = None if width is None else tables(width, own)
    lengths = torch.randint(tokens, PLACES + 1, (batch,), dtype=torch.int32)
    if form == "plain":
        lengths = int(lengths[0])
    weights = [None, None]
    if form in ("norms", "own_type"):
        weights = [torch.randn(size).to(own), torch.randn(size).to(own)]
    offset = 1.0 if form == "norms" else 0.0
    options = {"interleaved": interleaved, "rotary_dim": rotary_dim, "weight_offset": offset}
    table = torch.randperm(batch * PLACES // 8).view(batch, -1)

    def ours(q, k, v, q_weight, k_weight):
        cos, sin = (None, None) if angles is None else angles
        stored, pages = caches(shape, q.dtype), None
        if form == "pages":
            stored, pages = tuple(paged(x, 8, table) for x in stored), table.to(torch.int32)
        norms = {"q_weight": q_weight, "k_weight": k_weight}
        where = (*stored, lengths)
        y = ops.rope_append(q, k, v, cos, sin, *where, block_table=pages, **norms, **options)
        if form == "pages":
            stored = (x[table].transpose(1, 2).flatten(2, 3) for x in stored)
        return (y, *stored)

    def theirs(q, k, v, *weights):
        both = None if angles is None else tuple(t.to(q.dtype) for t in angles)
        return plain(q, k, v, both, lengths, interleaved, rotary_dim, weights, offset=offset)

    with ops.use_backend(backend):
        check(ours, theirs, theirs, [*inputs(shape, dtype), *weights], gradients=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_new_rows_are_written(backend):
    q, k, v = before = inputs(SHAPES[1], torch.float32)
    kept = [x.clone() for x in before]
    stored = [torch.full_like(x, torch.nan) for x in caches(SHAPES[1], torch.float32)]
    lengths = torch.tensor([3, 40])
    with ops.use_backend(backend):
        ops.rope_append(q, k, v, *tables(32), *stored, lengths)
    for cache in stored:
        written = torch.zeros(2, PLACES, dtype=torch.bool)
        written[0, :3] = written[1, 37:] = True
        assert torch.equal(cache.isfinite().all(-1), written[:, None].expand(-1, 4, -1))
        assert cache.isfinite().any(-1).equal(cache.isfinite().all(-1))
    assert all(torch.equal(x, y) for x, y in zip(before, kept, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_rope_and_then_a_copy(dtype):
    q, k, v = inputs(SHAPES[1], dtype)
    cos, sin = tables(32)
    stored = caches(SHAPES[1], dtype)
    y = ops.rope_append(q, k, v, cos, sin, *stored, 9)
    z, w = ops.rope(q, k, cos[6:9], sin[6:9])
    assert torch.equal(stored[1][:, :, 6:9], v)
    if dtype != torch.float16 or len(BACKENDS) == 1:  # rope's kernel may not take fp16
        assert torch.equal(y, z) and torch.equal(stored[0][:, :, 6:9], w)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(backend, dtype):
    q, k, v = inputs(SHAPES[1], dtype)
    cos, sin = tables(32)
    expected = caches(SHAPES[1], dtype)
    lengths = torch.tensor([3, 40])
    with ops.use_backend(backend):
        y = ops.rope_append(q, k, v, cos, sin, *expected, lengths)
        dense = [x.contiguous() for x in (q, k, v)]
        scattered = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
        both = torch.stack((cos, sin), -1)
        far = torch.tensor([3, 0, 40, 0])[::2]
        for args in (dense, scattered):
            # tokens before heads, and a window of wider rows
            by_token = torch.zeros(2, PLACES, 4, 64, dtype=dtype).transpose(1, 2)
            window = torch.zeros(2, 4, PLACES + 3, 80, dtype=dtype)[:, :, 2:-1, 8:72]
            z = ops.rope_append(*args, both[..., 0], both[..., 1], by_token, window, far)
            assert torch.equal(y, z)
            assert torch.equal(by_token, expected[0]) and torch.equal(window, expected[1])
    if backend != "reference":
        assert y.transpose(1, 2).is_contiguous()  # as q lies


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_of_one_column_has_any_stride(backend):
    x, (cos, sin) = torch.randn(1, 1, 3, 2), torch.randn(2, 9, 2)[..., ::2]
    found = []
    for tables in (
        (cos, sin),
        (cos.contiguous(), sin.contiguous()),
    ):
        caches = torch.zeros(1, 1, 8, 2), torch.zeros(1, 1, 8, 2)
        with ops.use_backend(backend):
            found.append((ops.rope_append(x, x, x, *tables, *caches, 5), *caches))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads_and_alone(dtype):
    shape = (2, 16, 4, 40, 64, 64)
    q, k, v = inputs(shape, dtype)
    cos, sin = tables(32)
    weights = {"q_weight": torch.randn(64), "k_weight": torch.randn(64)}
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            stored = caches(shape, dtype)
            results.append((ops.rope_append(q, k, v, cos, sin, *stored, 40, **weights), *stored))
    finally:
        torch.set_num_threads(before)
    for b in range(2):
        stored = tuple(x[b : b + 1] for x in caches(shape, dtype))
        alone = (x[b : b + 1] for x in (q, k, v))
        y = ops.rope_append(*alone, cos, sin, *stored, torch.tensor([40]), **weights)
        results.append(tuple(torch.cat((x, x)) for x in (y, *stored)))
    for other in results[1:3]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
    for b, other in enumerate(results[3:]):
        assert all(torch.equal(x[b], y[b]) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 2, 1, 8, 8), (2, 4, 2, 0, 8, 8)], ids=str)
def test_nothing_new_changes_nothing(backend, shape):
    q, k, v = inputs(shape, torch.float32)
    stored = caches(shape, torch.float32)
    with ops.use_backend(backend):
        y = ops.rope_append(q, k, v, *tables(8), *stored, torch.full(shape[:1], 5))
    assert y.shape == q.shape
    assert not any(x.any() for x in stored)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_reads_what_was_appended(backend):
    """Token by token against all tokens at once."""
    shape = (2, 4, 2, 12, 16, 16)
    q, k, v = inputs(shape, torch.float32)
    cos, sin = tables(8)
    turned = ops.rope(q, k, cos[:12], sin[:12])
    expected = ops.attention(*turned, v, causal=True)
    stored = caches(shape, torch.float32)
    with ops.use_backend(backend):
        for t in range(12):
            new = (x[:, :, t : t + 1] for x in (q, k, v))
            y = ops.rope_append(*new, cos, sin, *stored, t + 1)
            got = reference.decode_attention(y, *stored, t + 1)
            torch.testing.assert_close(got[:, :, 0], expected[:, :, t])


def test_fullgraph_compile():
    q, k, v = inputs((2, 4, 2, 1, 16, 16), torch.float32)
    cos, sin = tables(8)

    def f(q, k, v, k_cache, v_cache, lengths):
        y = ops.rope_append(q, k, v, cos, sin, k_cache, v_cache, lengths, q_weight=cos[0].repeat(2))
        return ops.decode_attention(y, k_cache, v_cache, lengths) * 2

    ours, theirs = caches((2, 4, 2, 1, 16, 16), q.dtype), caches((2, 4, 2, 1, 16, 16), q.dtype)
    lengths = torch.tensor([30, 7])
    compiled = torch.compile(f, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(
                compiled(q, k, v, *ours, lengths), f(q, k, v, *theirs, lengths)
            )
            lengths = lengths + 1
    torch.testing.assert_close(ours, theirs)


@NATIVE
def test_opcheck():
    q, k, v = inputs((2, 4, 2, 3, 16, 8), torch.float32)
    op, (cos, sin) = torch.ops.fastlm.rope_append.default, tables(8)
    stored = caches((2, 4, 2, 3, 16, 8), q.dtype)
    weight = torch.rand(16)
    form = (16, False, 1e-6, 0.0)
    lengths = torch.tensor([30, 4])
    torch.library.opcheck(op, (q, k, v, cos, sin, *stored, lengths, 0, None, weight, weight, *form))
    table = torch.tensor([[1, 0]])
    none = (0, True, 1e-6, 1.0)
    one = tuple(x[:1] for x in (q, k, v))
    torch.library.opcheck(op, (*one, None, None, *stored, None, 50, table, None, None, *none))


def test_writing_is_seen_by_autograd():
    """A cache kept for a backward pass was changed since: that must not go unnoticed."""
    q, k, v = inputs((1, 2, 2, 1, 8, 8), torch.float32)
    stored = caches((1, 2, 2, 1, 8, 8), q.dtype)
    w = torch.ones(8, requires_grad=True)
    out = (stored[0] * w).sum()
    ops.rope_append(q, k, v, *tables(4), *stored, 5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


Q = torch.ones(2, 4, 2, 8)
K = torch.ones(2, 2, 2, 8)
CACHE = torch.zeros(2, 2, 9, 8)
T = torch.ones(20, 4)
PAGES = torch.zeros(2, 3, dtype=torch.int64)
OK = (Q, K, K, T, T, CACHE, CACHE, 9)


def but(**changed):
    names = ("q", "k", "v", "cos", "sin", "k_cache", "v_cache", "lengths")
    return tuple(changed.get(name, x) for name, x in zip(names, OK, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "args, kwargs, error, text",
    [
        (but(q="x"), {}, TypeError, "rope_append: q must be a tensor, got str"),
        (but(q=Q.int()), {}, TypeError, "q must be a floating-point tensor"),
        (but(q=Q[0]), {}, ValueError, "q must be of rank 4, got rank 3"),
        (but(k=K[:1]), {}, ValueError, r"k must be \[2, 2, 2, 8\], got \[1, 2, 2, 8\]"),
        (but(v=K[:, :, :1]), {}, ValueError, r"v must be \[2, 2, 2, 8\], got \[2, 2, 1, 8\]"),
        (but(k=K.bfloat16()), {}, ValueError, "k must be torch.float32, got torch.bfloat16"),
        (but(v_cache=CACHE.half()), {}, ValueError, "v_cache must be torch.float32, got torch.fl"),
        (but(k_cache=CACHE[..., :4]), {}, ValueError, r"k_cache must be \[2, 2, 9, 8\], got"),
        (but(v_cache=CACHE[:1]), {}, ValueError, r"v_cache must be \[2, 2, 9, 8\], got \[1, 2"),
        (but(k_cache=CACHE.to("meta")), {}, ValueError, "k_cache must be on cpu, got meta"),
        (
            but(k_cache=torch.zeros(2, 2, 8, 9).transpose(2, 3)),
            {},
            ValueError,
            "k_cache must be of a last stride of 1, got strides",
        ),
        (but(cos=None), {}, ValueError, "cos must be given with the other, got None"),
        (but(sin=None), {}, ValueError, "sin must be given with the other, got None"),
        (but(cos=T[:, :3], sin=T[:, :3]), {}, ValueError, "cos must be of a width even"),
        (but(cos=T[None], sin=T[None]), {}, ValueError, "cos must be of rank 2, got rank 3"),
        (but(cos=T.half(), sin=T.half()), {}, ValueError, "cos must be torch.float32 or torch.fl"),
        (but(sin=T[:5]), {}, ValueError, r"sin must be \[20, 4\], got \[5, 4\]"),
        (OK, {"rotary_dim": 10}, ValueError, "rotary_dim must be even and at most 8, got 10"),
        (but(cos=None, sin=None), {"rotary_dim": 4}, ValueError, "rotary_dim must be None without"),
        (but(lengths=10), {}, ValueError, "lengths must be between 2, the new tokens, and 9, the"),
        (but(lengths=1), {}, ValueError, "lengths must be between 2, .* got 1"),
        (but(lengths=torch.tensor([9, 12])), {}, ValueError, "lengths must be between 2, .*got 12"),
        (but(lengths=torch.tensor([9])), {}, ValueError, r"lengths must be \[2\], got \[1\]"),
        (but(lengths=torch.ones(2)), {}, TypeError, "lengths must be int32 or int64, got torch.fl"),
        (but(lengths=9.0), {}, TypeError, "lengths must be a tensor or an int, got float"),
        (but(cos=T[:8], sin=T[:8]), {}, ValueError, "lengths must be at most 8, the rows of cos"),
        (OK, {"q_weight": torch.ones(7)}, ValueError, r"q_weight must be \[8\], got \[7\]"),
        (OK, {"k_weight": torch.ones(8).half()}, ValueError, "k_weight must be torch.float32 or"),
        (OK, {"eps": -1.0}, ValueError, "eps must be 0 or more, got -1.0"),
        (OK, {"block_table": PAGES[:1]}, ValueError, r"block_table must be \[2, 3\], got \[1, 3"),
        (OK, {"block_table": PAGES / 2}, TypeError, "block_table must be int32 or int64"),
        (but(lengths=28), {"block_table": PAGES}, ValueError, "between 2, the new tokens, and 27"),
        (OK, {"block_table": PAGES - 1}, ValueError, "block_table must be of pages 0 to 1, got -1"),
        (but(q=Q.clone().requires_grad_()), {}, RuntimeError, "no argument may require a gradient"),
    ],
)
def test_bad_input_names_the_argument_before_anything_is_written(
    backend, args, kwargs, error, text
):
    with ops.use_backend(backend), pytest.raises(error, match=text):
        ops.rope_append(*args, **kwargs)
    assert not CACHE.any()


@NATIVE
def test_the_kernel_says_what_it_cannot_and_checks_again():
    wide = [torch.zeros(1, 1, 1, 1026) for _ in range(3)]
    cache = torch.zeros(1, 1, 4, 1026)
    refused = pytest.raises(RuntimeError, match="heads of at most 1024 elements, not 1026")
    with ops.use_backend("cpu"), refused:
        ops.rope_append(*wide, None, None, cache, cache.clone(), 1)
    assert ops.rope_append(*wide, None, None, cache, cache.clone(), 1).shape == wide[0].shape
    op, rest = torch.ops.fastlm.rope_append.default, (None, None, 8, False, 1e-6, 0.0)
    with pytest.raises(RuntimeError, match="lengths must be between 2 and 9, got 10"):
        op(Q, K, K, T, T, CACHE, CACHE, None, 10, None, *rest)
    with pytest.raises(RuntimeError, match="block_table must name pages 0 to 1, got 2"):
        op(Q, K, K, T, T, CACHE, CACHE, None, 9, PAGES + 2, *rest)
    with pytest.raises(RuntimeError, match="do not fit each other"):
        op(Q, K, K, T, T, CACHE[..., :4], CACHE, None, 9, None, *rest)
    assert not CACHE.any()
