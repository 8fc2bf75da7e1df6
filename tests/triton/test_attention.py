"""attention's Triton kernels against float64, forward and gradients, on tiles of 16."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check
from fastlm.triton import _configs, attention
from fastlm.triton._attention_call import near
from fastlm.triton._configs import Config, override

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TILES = {
    "attention": Config((16, 16)),
    "attention_kv": Config((32, 16)),
    "attention_q": Config((32, 16)),
    "attention_delta": Config((16,)),
}

TILES |= {f"{name}_fp32": TILES[name] for name in ("attention", "attention_kv", "attention_q")}


@pytest.fixture(autouse=True)
def _small_tiles():
    with override(**TILES):
        yield


def heads(batch, count, rows, size, dtype=torch.float32):
    """[B, H, T, D] in the memory of [B, T, H, D], as projections make it."""
    return torch.randn(batch, rows, count, size).to(dtype).transpose(1, 2)


def hidden_by(q, k, causal, window, mask, slopes):
    """What options say, as one additive mask."""
    tq, tk = q.shape[2], k.shape[2]
    ahead = torch.arange(tk) - torch.arange(tk - tq, tk)[:, None]
    seen = torch.ones(tq, tk, dtype=torch.bool)
    if causal:
        seen &= ahead <= 0
    if window is not None:
        seen &= (ahead > -window) & (ahead < window)
    bias = torch.zeros(1, 1, tq, tk, dtype=torch.float64)
    if slopes is not None:
        bias = bias - slopes.view(-1, q.shape[1], 1, 1) * ahead.abs()
    if mask is not None and mask.dtype != torch.bool:
        bias = bias + mask
    elif mask is not None:
        seen = seen & mask
    return bias.masked_fill(~seen, -math.inf).expand(*q.shape[:3], tk)


def theirs(
    q, k, v, sinks=None, *, causal=False, window=None, mask=None, alibi_slopes=None, softcap=None,
    scale=None, return_lse=False,
):  # fmt: skip
    """PyTorch's own attention of the same dtype; in its operations where it lacks an option."""
    bias = hidden_by(q, k, causal, window, mask, alibi_slopes)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if sinks is None and softcap is None and not return_lse:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias.to(wide), scale=scale, enable_gqa=True
        )
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias.to(scores.dtype)
    if sinks is not None:
        extra = sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, extra], -1)
    out = scores.softmax(-1)[..., : k.shape[2]] @ v
    return (out, torch.logsumexp(scores.to(wide), -1)) if return_lse else out


def with_sinks(f, **options):
    return lambda q, k, v, *s: f(q, k, v, **options, **({"sinks": s[0]} if s else {}))


def matches(inputs, options, draws=3, **kw):
    check(
        with_sinks(ops.attention, **options),
        lambda *x: theirs(*x, **options),
        with_sinks(reference.attention, **options),
        inputs,
        draws=draws,
        **kw,
    )


# batch, heads of q, heads of k, Tq, Tk, D, Dv
SHAPES = {
    "one": ((1, 1, 1, 1, 1, 1, 1), {"causal": True}),
    "one_query": ((2, 3, 1, 1, 37, 16, 16), {"causal": True}),
    "full": ((1, 2, 2, 32, 32, 16, 16), {}),
    "edges": ((1, 2, 1, 33, 47, 16, 16), {}),
    "causal": ((1, 2, 2, 48, 48, 16, 16), {"causal": True}),
    "causal_edges": ((1, 3, 1, 41, 41, 16, 16), {"causal": True}),
    "more_keys": ((2, 2, 1, 19, 50, 16, 16), {"causal": True}),
    "more_queries": ((1, 2, 2, 50, 19, 16, 16), {"causal": True}),
    "odd_sizes": ((1, 2, 1, 20, 37, 9, 21), {"causal": True}),
    "size_80": ((1, 1, 1, 20, 20, 80, 40), {"causal": True}),
    "size_256": ((1, 1, 1, 17, 17, 256, 256), {"causal": True}),
    "scale": ((1, 2, 2, 20, 20, 16, 16), {"scale": 0.7, "causal": True}),
    "negative_scale": ((1, 2, 2, 20, 20, 16, 16), {"scale": -0.3}),
    "no_scale": ((1, 2, 2, 20, 20, 16, 16), {"scale": 0.0, "causal": True}),
    "window": ((1, 2, 1, 60, 70, 16, 16), {"causal": True, "window": 19}),
    "window_of_two": ((1, 1, 1, 33, 33, 16, 16), {"causal": True, "window": 2}),
    "window_of_a_tile": ((1, 1, 1, 64, 64, 16, 16), {"causal": True, "window": 16}),
    "window_both_sides": ((1, 2, 1, 50, 61, 16, 16), {"window": 18}),
    "window_more_queries": ((1, 1, 1, 61, 30, 16, 16), {"window": 9}),
    "endless_window": ((1, 1, 1, 30, 30, 16, 16), {"causal": True, "window": 2**62}),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_matches_float64(dtype, name):
    (batch, hq, hkv, tq, tk, d, dv), options = SHAPES[name]
    q, k, v = heads(batch, hq, tq, d), heads(batch, hkv, tk, d), heads(batch, hkv, tk, dv)
    matches([x.to(dtype) for x in (q, k, v)], options, 16 if name == "one" else 3)


# batch, heads of q, heads of k, Tq, Tk, D, Dv: few queries, many heads
FEW = {
    "plain": ((2, 8, 2, 5, 40, 16, 16), {}),
    "causal": ((3, 4, 1, 3, 37, 9, 21), {"causal": True}),
    "odd group": ((1, 12, 2, 3, 33, 16, 16), {"causal": True}),  # 12 rows of a tile of 16
    "group as large as a tile": ((1, 16, 1, 3, 20, 16, 16), {"causal": True, "window": 7}),
    "more queries than keys": ((2, 8, 2, 7, 5, 16, 16), {"causal": True}),
    "window": ((2, 8, 2, 7, 61, 16, 16), {"window": 18, "softcap": 1.5}),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_heads_of_a_group_share_a_tile_of_few_queries(dtype, name, monkeypatch):
    (batch, hq, hkv, tq, tk, d, dv), options = FEW[name]
    many = name != "window"
    if many:
        options = {**options, "alibi_slopes": torch.rand(batch, hq)}
    q, k, v = heads(batch, hq, tq, d), heads(batch, hkv, tk, d), heads(batch, hkv, tk, dv)
    inputs = [x.to(dtype) for x in (q, k, v)] + [torch.randn(hq)] * many
    packs = watched(monkeypatch, "PACK")
    matches(inputs, options, gradients=False)
    assert set(packs) == {hq // hkv}, "of every forward pass"
    f = with_sinks(ops.attention, return_lse=True, **options)
    together = gradients(f, inputs)
    monkeypatch.setattr(_configs, "multiprocessors", lambda device: 2**30)
    torch.testing.assert_close(together, gradients(f, inputs))
    assert packs[-2:] == [hq // hkv, 1]


def test_a_window_of_one_sees_itself():
    q, k, v = (heads(1, 2, 33, 16, torch.bfloat16) for _ in "qkv")
    assert torch.equal(ops.attention(q, k, v, causal=True, window=1), v)
    assert torch.equal(ops.attention(q, k, v, window=1), v)


def options_of(name, batch=1, count=4):
    """(options, sinks or nothing): sinks are an input, for they have a gradient."""
    options = {"causal": True}
    if "cap" in name:
        options["softcap"] = 1.5
    if "slopes" in name:
        options["alibi_slopes"] = torch.rand(batch, count) if batch > 1 else torch.rand(count)
    if "window" in name:
        options["window"] = 17
    if "lse" in name:
        options["return_lse"] = True
    return options, [torch.randn(count)] if "sinks" in name else []


OPTIONS = ["cap", "slopes", "sinks", "lse", "sinks_lse", "cap_slopes_window_sinks_lse"]


# every option in fp32, and in one of the narrow types
@pytest.mark.parametrize(
    "name, dtype",
    [(name, dtype) for n, name in enumerate(OPTIONS) for dtype in (DTYPES[0], DTYPES[1 + n % 2])],
    ids=str,
)
def test_options(dtype, name):
    options, sinks = options_of(name, count=8)
    keys = 34 if "window" in name else 18  # two tiles of keys; three where one is hidden
    inputs = [heads(1, 8, 9, 16), heads(1, 4, keys, 16), heads(1, 4, keys, 16), *sinks]
    # the gradient of a sink is eight numbers a draw: few of them say little about an error
    matches([x.to(dtype) for x in inputs], options, draws=16 if sinks else 4)


def watched(monkeypatch, name):
    """A list that gets a constant's value from every launch that has it."""
    launch, values = attention.launch, []

    def record(*args, **constants):
        if name in constants:
            values.append(constants[name])
        launch(*args, **constants)

    monkeypatch.setattr(attention, "launch", record)
    return values


def masks(batch, tq, tk):
    """Masks by name: rows and tiles that see nothing, dimensions of stride 0, any strides."""
    at, start = torch.arange(tk), torch.arange(batch)[:, None, None, None] * 20
    random = torch.rand(batch, 1, tq, tk) > 0.4
    random[:, :, 5] = False
    left = at >= start
    return {
        "bool": random,
        "per_head": torch.rand(batch, 2, tq, tk) > 0.3,
        "left_padding": left,
        "expanded": left.expand(batch, 2, tq, tk),
        "tiles": ((at // 16 + torch.arange(tq)[:, None] // 16) % 2 == 0),
        "column": torch.rand(tq, 1) > 0.3,
        "added": torch.randn(2, tq, 1).masked_fill(torch.rand(2, tq, 1) > 0.9, -math.inf),
        "added_bf16": torch.randn(tq, tk).bfloat16(),
        "added_transposed": torch.randn(batch, 1, tk, tq).mT,
        "added_fp64": torch.randn(tk, dtype=torch.float64),
        "added_lowest": torch.zeros(tq, tk).masked_fill(at > 20, torch.finfo(torch.float32).min),
    }


@pytest.mark.parametrize("name", masks(2, 34, 45))
@pytest.mark.parametrize("option", ["plain", "causal", "all"])
def test_masks(name, option):
    mask = masks(2, 34, 45)[name]
    dtype = torch.float32 if option == "plain" else torch.bfloat16
    q, k, v = heads(2, 2, 34, 16, dtype), heads(2, 1, 45, 16, dtype), heads(2, 1, 45, 16, dtype)
    options, sinks = {"causal": option != "plain"}, []
    if option == "all":
        options, sinks = options_of("cap_slopes_window_sinks", 2, 2)
    if not sinks and name in ("bool", "column", "added"):
        hidden = hidden_by(q, k, options["causal"], None, mask, None).amax(-1) == -math.inf
        assert hidden.any() and not (hidden & ~hidden_rows(q, k, v, mask, options)).any()
    matches([q, k, v, *sinks], {**options, "mask": mask}, draws=1)


def hidden_rows(q, k, v, mask, options):
    """The rows whose log-sum-exp is -inf, which must be those of zeros."""
    out, lse = ops.attention(q, k, v, mask=mask, return_lse=True, **options)
    none = lse == -math.inf
    assert not out[none].any() and out[~none].any(-1).all() and not out.isnan().any()
    return none


def gradients(f, inputs, cotangents=None):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = f(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    if cotangents is None:
        g = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(x.shape, generator=g).to(x.dtype) for x in out]
    return *out, *torch.autograd.grad(out, leaves, cotangents)


def equal(ours, others):
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_hidden_tiles_are_never_read(dtype, kind):
    q, k, v = (heads(2, 1, 64, 16, dtype) for _ in "qkv")
    mask = torch.ones(2, 1, 1, 64, dtype=torch.bool)
    mask[1, ..., 32:] = False
    if kind == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)

    def f(q, k, v):
        return ops.attention(q, k, v, mask=mask)

    before = gradients(f, (q, k, v))
    k[1, :, 32:] = v[1, :, 32:] = math.nan
    after = gradients(f, (q, k, v))
    assert equal(before, after) and not after[2][1, :, 32:].any() and not after[3][1, :, 32:].any()


def test_a_causal_mask_gives_what_causal_gives():
    q, k, v = heads(1, 4, 40, 16), heads(1, 2, 50, 16), heads(1, 2, 50, 16)
    mask = torch.ones(40, 50, dtype=torch.bool).tril(10)
    masked = gradients(lambda *x: ops.attention(*x, mask=mask), (q, k, v))
    causal = gradients(lambda *x: ops.attention(*x, causal=True), (q, k, v))
    assert equal(masked, causal)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("same", [True, False], ids=["self", "cross"])
def test_packed_sequences_equal_single_ones(dtype, window, same):
    starts_q = torch.tensor([0, 20, 20, 21, 60], dtype=torch.int32)
    starts_k = starts_q if same else torch.tensor([0, 17, 20, 51, 60], dtype=torch.int32)
    q, k, v = (torch.randn(60, n, 16).to(dtype) for n in (2, 1, 1))
    slopes, sinks = torch.rand(4, 2), torch.randn(2)
    options = {"causal": True, "window": window, "return_lse": True}

    def packed(q, k, v, sinks):
        return ops.attention(
            q, k, v, sinks=sinks, alibi_slopes=slopes, cu_seqlens_q=starts_q,
            cu_seqlens_k=None if same else starts_k, **options,
        )  # fmt: skip

    def singly(q, k, v, sinks):
        found = []
        for n in range(4):
            rows, cols = slice(*starts_q[n : n + 2]), slice(*starts_k[n : n + 2])
            x = [t[r].transpose(0, 1)[None] for t, r in ((q, rows), (k, cols), (v, cols))]
            found.append(ops.attention(*x, sinks=sinks, alibi_slopes=slopes[n], **options))
        out = torch.cat([o[0].transpose(0, 1) for o, _ in found])
        return out, torch.cat([s[0] for _, s in found], -1)

    ours, single = (gradients(f, (q, k, v, sinks)) for f in (packed, singly))
    assert ours[0].shape == (60, 2, 16) and ours[1].shape == (2, 60)
    assert equal(ours[:5], single[:5])
    torch.testing.assert_close(ours[5], single[5])


def test_sequences_of_many_lengths():
    """More sequences than tiles, empty ones first, last and in a row."""
    lengths = torch.tensor([0, 0, 1, 16, 0, 17, 2, 1, 1, 15, 0, 33, 0, 0])
    starts = F.pad(lengths.cumsum(0), (1, 0)).int()
    q = torch.randn(int(starts[-1]), 1, 16)
    ours = gradients(lambda q: ops.attention(q, q, q, cu_seqlens_q=starts), (q,))
    expected = gradients(lambda q: reference.attention(q, q, q, cu_seqlens_q=starts), (q,))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_any_strides(dtype):
    q, k, v = (heads(2, 2, 20, 24, dtype) for _ in "qkv")

    def f(*x):
        return ops.attention(*x, causal=True)

    expected = gradients(f, [x.contiguous() for x in (q, k, v)])
    gapped = torch.randn(2, 2, 20, 50).to(dtype)[..., 3:27].copy_(k)
    columns = torch.empty(2, 2, 24, 20, dtype=dtype).mT.copy_(v)
    ours = gradients(f, (q, gapped, columns))
    assert equal(ours, expected)
    assert ours[0].transpose(1, 2).is_contiguous() and ours[1].transpose(1, 2).is_contiguous()
    copied = k[:, :1].contiguous().expand(2, 2, 20, 24)
    assert torch.equal(f(q, k[:, :1].expand_as(k), copied), f(q, copied, copied))
    summed = gradients(f, (q, k, v), [torch.ones(()).to(dtype).expand(2, 2, 20, 24)])
    assert equal(summed, gradients(f, (q, k, v), [torch.ones(2, 2, 20, 24, dtype=dtype)]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_sums_of_no_fixed_order(dtype, causal):
    """deterministic=False: dq comes from the kernel of dk and dv."""
    inputs = [heads(1, 4, 37, 24, dtype), heads(1, 2, 50, 24, dtype), heads(1, 2, 50, 24, dtype)]
    check(
        lambda *x: ops.attention(*x, causal=causal, deterministic=False),
        lambda *x: theirs(*x, causal=causal),
        lambda *x: reference.attention(*x, causal=causal),
        inputs,
        draws=2,
    )


def test_the_deterministic_mode_asks_for_order_whatever_the_call_allows(monkeypatch):
    seen = watched(monkeypatch, "ATOMIC")
    x = heads(1, 1, 5, 16).requires_grad_()
    try:
        for mode in (False, True):
            torch.use_deterministic_algorithms(mode)
            for asked in (None, True, False):
                ops.attention(x, x, x, deterministic=asked).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, False, True, False, False, False]


def test_same_bits_every_time():
    inputs = [heads(1, 4, 37, 16, torch.bfloat16), *heads(2, 2, 50, 16, torch.bfloat16).split(1)]

    def f(*x):
        return ops.attention(*x, window=21, return_lse=True)

    assert equal(gradients(f, inputs), gradients(f, inputs))


def test_large_scores_stay_finite():
    q, k, v = heads(1, 1, 35, 16) * 60, heads(1, 1, 35, 16) * 60, heads(1, 1, 35, 16)
    matches([q, k, v], {"causal": True})
    lowest = torch.full((35, 35), torch.finfo(torch.float32).min)
    found = gradients(lambda *x: ops.attention(*x, mask=lowest, return_lse=True), (q, k, v))
    assert all(x.isfinite().all() for x in found)
    torch.testing.assert_close(found[0], v.mean(2, keepdim=True).expand_as(v))


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)], ids=str)
def test_empty_inputs_give_empty_results(shape):
    q = torch.empty(shape, requires_grad=True)
    k = torch.randn(shape[0], 2, 3, 8, requires_grad=True)
    out, lse = ops.attention(q, k, k, return_lse=True)
    assert out.shape == shape and lse.shape == shape[:3]
    out.sum().backward()
    assert q.grad.shape == shape and not k.grad.any()


@pytest.mark.parametrize("deterministic", [True, False])
def test_no_keys_give_zeros(deterministic):
    q, k = torch.randn(1, 2, 3, 8, requires_grad=True), torch.empty(1, 2, 0, 8)
    out, lse = ops.attention(q, k, k, return_lse=True, deterministic=deterministic)
    assert not out.any() and (lse == -math.inf).all()
    out.sum().backward()
    assert not q.grad.any()


def test_a_sink_of_nothing_and_rows_that_see_only_the_sink():
    q, k, v = heads(1, 2, 20, 16), heads(1, 2, 5, 16), heads(1, 2, 5, 16)
    sinks = torch.tensor([-math.inf, 0.5], requires_grad=True)
    out, lse = ops.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert not out[:, :, :15].any() and out[:, :, 15:].any(-1).all()
    assert (lse[:, 0, :15] == -math.inf).all() and (lse[:, 1, :15] == 0.5).all()
    (gradient,) = torch.autograd.grad(out.sum(), sinks)
    assert gradient[0] == 0 and gradient[1] != 0


def test_rows_far_apart_are_copied():
    """Offsets within a tile are 32 bits wide."""
    far = torch.empty(0, device="meta").as_strided((1, 2, 20, 16), (16, 16, 2**24, 1))
    long = torch.empty(1, 2, 2**24, 16, device="meta")
    assert near(far).is_contiguous() and near(long) is long
    packed = torch.empty(0, device="meta").as_strided((20, 2, 16), (2**24, 16, 1))
    assert near(packed).is_contiguous() and near(packed[:1]).stride() == packed[:1].stride()


def test_refuses_what_it_cannot():
    wide = torch.randn(1, 1, 2, 264)
    with pytest.raises(RuntimeError, match="heads of at most 256 elements"):
        ops.attention(wide, wide, wide)
    q = torch.randn(1, 1, 2, 8)
    with pytest.raises(RuntimeError, match="not float64"):
        ops.attention(q.double(), q.double(), q.double())


def test_opcheck():
    q, k = heads(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    tables = (torch.rand(6, 6) > 0.3, torch.rand(4), torch.randn(4), None, None)
    numbers = (True, 0, 0.3, 0.0)
    checks = {"test_utils": ["test_schema", "test_faketensor"]}
    torch.library.opcheck(torch.ops.fastlm.attention.triton, (q, k, k, *tables, *numbers), **checks)
    lse_op = torch.ops.fastlm.attention_lse.triton
    torch.library.opcheck(lse_op, (q, k, k, *tables, *numbers), **checks)
    out, lse = lse_op(q, k, k, *tables, *numbers)
    tables = (torch.randn(6, 1), *tables[1:])
    args = (out, lse[0], q, k, k, out, lse, *tables, *numbers, True)
    for asked in ((False, False), (True, True)):
        operator = torch.ops.fastlm.attention_gradients.triton
        torch.library.opcheck(operator, (*args, *asked), **checks)


def test_fullgraph_compile_forward_and_backward():
    def f(q, k, v, sinks):
        out, lse = ops.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
        return out.square().sum() + lse.sum()

    args = [heads(1, 4, 9, 16), *torch.randn(2, 1, 2, 9, 16), torch.randn(4)]
    leaves = [x.requires_grad_() for x in args]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(grads, torch.autograd.grad(f(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)
