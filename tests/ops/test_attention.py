"""attention: every implementation against float64, forward and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.ops import _registry
from fastlm.testing import check, error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_native = pytest.mark.skipif(
    "cpu" not in ops.implementations("attention"), reason="no native kernels"
)


def heads(batch, count, rows, size, dtype=torch.float32):
    """[B, H, T, D] in the memory of [B, T, H, D], as projections make it."""
    return torch.randn(batch, rows, count, size).to(dtype).transpose(1, 2)


def seen_by(tq, tk, causal=False, window=None, mask=None):
    """The boolean mask that says what the options say."""
    ahead = torch.arange(tk) - torch.arange(tk - tq, tk)[:, None]
    seen = torch.ones(tq, tk, dtype=torch.bool)
    if causal:
        seen &= ahead <= 0
    if window is not None:
        seen &= (ahead > -window) & (ahead < window)
    return seen if mask is None else seen & mask


def baseline(q, k, v, *, causal=False, window=None, mask=None, scale=None):
    """PyTorch's own attention of the same dtype."""
    tq, tk, grouped = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    plain = window is None and mask is None and tq == tk
    if not plain:
        if mask is not None and mask.dtype != torch.bool:
            hidden = ~seen_by(tq, tk, causal, window)
            mask = mask.to(q.dtype).expand(*q.shape[:3], tk).masked_fill(hidden, -math.inf)
        else:
            mask = seen_by(tq, tk, causal, window, mask)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=plain and causal, scale=scale, enable_gqa=grouped
    )


def matches(inputs, options, theirs=None, **kw):
    check(
        lambda *x: ops.attention(*x, **options),
        theirs or (lambda *x: baseline(*x, **options)),
        lambda *x: reference.attention(*x, **options),
        inputs,
        **kw,
    )


def agrees(inputs, options, theirs=baseline):
    leaves = [x.double().requires_grad_() for x in inputs]
    ours, other = reference.attention(*leaves, **options), theirs(*leaves, **options)
    torch.testing.assert_close(ours, other)
    outputs = zip(*((f if isinstance(f, tuple) else (f,)) for f in (ours, other)), strict=True)
    for a, b in outputs:
        cotangent = torch.randn_like(a)
        grads = (torch.autograd.grad(o, leaves, cotangent, retain_graph=True) for o in (a, b))
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y)


# batch, heads of q, heads of k, Tq, Tk, D, Dv
SHAPES = {
    "one": ((1, 1, 1, 1, 1, 1, 1), {"causal": True}),
    "three": ((1, 1, 1, 1, 3, 4, 4), {"causal": True}),
    "ragged": ((1, 2, 1, 3, 5, 9, 7), {}),
    "small": ((1, 4, 4, 16, 16, 32, 32), {"causal": True}),
    "one_query": ((4, 12, 4, 1, 190, 64, 64), {"causal": True}),
    "full": ((2, 3, 3, 70, 70, 64, 64), {}),
    "causal": ((1, 2, 2, 200, 200, 64, 64), {"causal": True}),
    "grouped": ((2, 6, 2, 70, 70, 64, 64), {"causal": True}),
    "one_kv_head": ((1, 5, 1, 67, 67, 32, 32), {"causal": True}),
    "more_keys": ((2, 6, 2, 50, 130, 40, 40), {"causal": True}),
    "more_queries": ((1, 2, 2, 130, 70, 64, 64), {"causal": True}),
    "size_80": ((1, 2, 2, 65, 65, 80, 80), {"causal": True}),
    "size_100": ((1, 2, 1, 65, 129, 100, 100), {}),
    "size_256": ((1, 1, 1, 66, 66, 256, 256), {"causal": True}),
    "odd_size": ((2, 4, 4, 133, 147, 9, 9), {}),
    "other_value_size": ((2, 4, 4, 130, 130, 24, 40), {"causal": True}),
    "scale": ((1, 2, 2, 40, 40, 16, 16), {"scale": 0.3}),
    "window": ((1, 2, 1, 200, 200, 32, 32), {"causal": True, "window": 37}),
    "window_both_sides": ((1, 2, 2, 150, 170, 32, 32), {"window": 20}),
    "window_of_one": ((1, 2, 2, 70, 70, 32, 32), {"causal": True, "window": 1}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_reference_is_what_pytorch_computes(name):
    """The oracle of all other tests, against PyTorch's own attention, both in float64."""
    (batch, hq, hkv, tq, tk, d, dv), options = SHAPES[name]
    agrees([heads(batch, hq, tq, d), heads(batch, hkv, tk, d), heads(batch, hkv, tk, dv)], options)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_matches_float64(backend, dtype, name):
    (batch, hq, hkv, tq, tk, d, dv), options = SHAPES[name]
    q, k, v = heads(batch, hq, tq, d), heads(batch, hkv, tk, d), heads(batch, hkv, tk, dv)
    if backend == "torch" and ("window" in options or ("causal" in options and tq != tk)):
        pytest.skip("PyTorch's own has no such option")
    if backend not in ops.implementations("attention"):
        pytest.skip("no native kernels")
    with ops.use_backend(backend):
        matches([x.to(dtype) for x in (q, k, v)], options)


def in_steps(q, k, v, *, causal, softcap=None, alibi_slopes=None, sinks=None, return_lse=False):
    """Attention written out in PyTorch operations of the same dtype."""
    tq, tk, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        away = (torch.arange(tk) - torch.arange(tk - tq, tk)[:, None]).abs()
        slopes = alibi_slopes.view(-1, q.shape[1], 1, 1)
        scores = scores - (slopes * away).to(scores.dtype)
    scores = scores.masked_fill(~seen_by(tq, tk, causal), -math.inf)
    if sinks is not None:
        extra = sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, extra], -1)
    out = scores.softmax(-1)[..., :tk] @ v
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return (out, torch.logsumexp(wide, -1)) if return_lse else out


def options_pytorch_lacks(option):
    """(options, sinks or nothing): sinks are an input, for they have a gradient."""
    options = {"causal": True}
    if option in ("softcap", "all"):
        options["softcap"] = 2.0
    if option in ("alibi", "all"):
        options["alibi_slopes"] = 2.0 ** -torch.arange(1.0, 5.0)
    if option == "alibi_per_sequence":
        options["alibi_slopes"] = torch.rand(2, 4)
    if option == "lse":
        options["return_lse"] = True
    return options, [torch.randn(4)] if option in ("sinks", "all") else []


OPTIONS = ["softcap", "alibi", "alibi_per_sequence", "sinks", "lse", "all"]


def with_sinks(f):
    return lambda q, k, v, *s, **o: f(q, k, v, **o, **({"sinks": s[0]} if s else {}))


@pytest.mark.parametrize("option", OPTIONS)
def test_reference_has_the_options_pytorch_lacks(option):
    options, sinks = options_pytorch_lacks(option)
    inputs = [heads(2, 4, 70, 32), heads(2, 2, 90, 32), heads(2, 2, 90, 32), *sinks]
    leaves = [x.double().requires_grad_() for x in inputs]
    if "alibi_slopes" in options:
        options["alibi_slopes"] = options["alibi_slopes"].double()
    ours = with_sinks(reference.attention)(*leaves, **options)
    theirs = with_sinks(in_steps)(*leaves, **options)
    torch.testing.assert_close(ours, theirs)
    if option != "lse":
        grads = [torch.autograd.grad(x.square().sum(), leaves) for x in (ours, theirs)]
        torch.testing.assert_close(*grads)


@needs_native
@pytest.mark.parametrize("size", [1.0, 4.0, 16.0])
def test_gradients_at_the_bound_of_a_soft_cap(size):
    """Where tanh is all but one, its slope is lost if it is taken from a rounded tanh."""
    inputs = [size * heads(1, 2, 40, 32), heads(1, 2, 60, 32), heads(1, 2, 60, 32)]
    with ops.use_backend("cpu"):
        theirs = lambda q, k, v: in_steps(q, k, v, causal=True, softcap=0.7)  # noqa: E731
        matches(inputs, {"causal": True, "softcap": 0.7}, theirs)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)]
)
def test_slopes_of_less_precision_than_the_queries(dtypes):
    """The products with the distances are made in the precision of the scores."""
    q, k, v = (torch.randn(1, 2, 300, 8, dtype=dtypes[0]) for _ in range(3))
    slopes = torch.tensor([0.3, 0.011]).to(dtypes[1])
    for backend in ("cpu", "reference"):
        if backend in ops.implementations("attention") and dtypes[0] != torch.float64:
            with ops.use_backend(backend):
                ours = ops.attention(q, k, v, alibi_slopes=slopes)
        else:
            ours = reference.attention(q, k, v, alibi_slopes=slopes)
        exact = reference.attention(*(x.double() for x in (q, k, v)), alibi_slopes=slopes.double())
        torch.testing.assert_close(ours, exact.to(ours.dtype))


def with_bias(q, k, v, *, causal, alibi_slopes=None, sinks=None):
    """PyTorch's own attention: slopes as an additive mask, the sink as a key of value zero."""
    tq, tk = q.shape[2], k.shape[2]
    bias = torch.zeros(1, q.shape[1], tq, tk, dtype=torch.float32)
    if alibi_slopes is not None:
        away = (torch.arange(tk) - torch.arange(tk - tq, tk)[:, None]).abs()
        bias = bias - alibi_slopes.view(-1, q.shape[1], 1, 1) * away
    bias = bias.masked_fill(~seen_by(tq, tk, causal), -math.inf)
    if sinks is not None:
        bias = torch.cat([bias, sinks.view(-1, 1, 1).expand(1, -1, tq, 1)], -1)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_pytorch_lacks(dtype, option):
    """Soft-cap and lse against the same in PyTorch operations, which its attention lacks."""
    options, sinks = options_pytorch_lacks(option)
    in_operations = "softcap" in options or "return_lse" in options
    inputs = [heads(2, 4, 70, 32), heads(2, 2, 90, 32), heads(2, 2, 90, 32)]
    theirs = with_sinks(in_steps if in_operations else with_bias)
    if sinks and dtype != torch.float32:  # no gradient of theirs
        options["sinks"] = sinks.pop()
    with ops.use_backend("cpu"):
        check(
            lambda *x: with_sinks(ops.attention)(*x, **options),
            lambda *x: theirs(*x, **options),
            lambda *x: with_sinks(reference.attention)(*x, **options),
            [*(x.to(dtype) for x in inputs), *sinks],
        )


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_see_nothing_give_zeros(backend, dtype):
    if backend not in ops.implementations("attention"):
        pytest.skip("no native kernels")
    q, k, v = (heads(1, 2, 6, 16, dtype).requires_grad_() for _ in "qkv")
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    with ops.use_backend(backend):
        out = ops.attention(q, k, v, mask=mask)
        grads = torch.autograd.grad(out.sum(), [q, k, v])
        assert not out[:, :, 2].any()
        assert not any(g.isnan().any() for g in grads)
        assert not grads[0][:, :, 2].any()
        if backend != "torch":
            _, lse = ops.attention(q, k, v, mask=mask, return_lse=True)
            assert (lse[:, :, 2] == -math.inf).all() and lse[:, :, 3].isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 20])
def test_packed_sequences_equal_single_ones(backend, dtype, window):
    if backend not in ops.implementations("attention"):
        pytest.skip("no native kernels")
    starts_q = torch.tensor([0, 70, 70, 71, 100], dtype=torch.int32)
    starts_k = torch.tensor([0, 70, 75, 95, 190], dtype=torch.int32)
    shapes = ((100, 4, 32), (190, 2, 32), (190, 2, 32))
    q, k, v = (torch.randn(s).to(dtype).requires_grad_() for s in shapes)
    slopes, sinks = torch.rand(4, 4), torch.randn(4, requires_grad=dtype == torch.float32)
    options = {"causal": True, "window": window, "sinks": sinks, "return_lse": True}
    with ops.use_backend(backend):
        out, lse = ops.attention(
            q, k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, alibi_slopes=slopes, **options
        )
        assert out.shape == (100, 4, 32) and lse.shape == (4, 100)
        singles = []
        for n in range(4):
            rows, cols = slice(*starts_q[n : n + 2]), slice(*starts_k[n : n + 2])
            x = [t[r].transpose(0, 1)[None] for t, r in ((q, rows), (k, cols), (v, cols))]
            singles.append(ops.attention(*x, alibi_slopes=slopes[n : n + 1], **options))
    joined = torch.cat([o[0].transpose(0, 1) for o, _ in singles])
    joined_lse = torch.cat([s[0] for _, s in singles], -1)
    assert torch.equal(out, joined) and torch.equal(lse, joined_lse)
    cotangents = [torch.randn_like(out), torch.randn_like(lse)]
    ours = torch.autograd.grad([out, lse], [q, k, v], cotangents, True)
    for a, b in zip(ours, torch.autograd.grad([joined, joined_lse], [q, k, v], cotangents, True)):  # noqa: B905
        assert torch.equal(a, b)
    if sinks.requires_grad:
        both = [out, lse], [joined, joined_lse]
        torch.testing.assert_close(*(torch.autograd.grad(x, sinks, cotangents) for x in both))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    q, k, v = (heads(2, 3, 40, 48, dtype) for _ in "qkv")
    expected = ops.attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    gapped = torch.randn(2, 3, 40, 100).to(dtype)[..., :48].copy_(k)
    columns = torch.empty(2, 3, 48, 40, dtype=dtype).mT.copy_(v)
    assert torch.equal(ops.attention(q, gapped, columns, causal=True), expected)
    one = k[:, :1].expand(2, 3, 40, 48)
    copied = one.contiguous()
    assert torch.equal(ops.attention(q, one, one), ops.attention(q, copied, copied))


def test_layouts_that_make_reshapes_free():
    q = heads(2, 3, 5, 8).requires_grad_()
    k = torch.randn(2, 3, 5, 8, requires_grad=True)
    with ops.use_backend(ops.implementations("attention")[0]):
        out = ops.attention(q, k, k)
        dq, dk = torch.autograd.grad(out.sum(), [q, k])
    if "cpu" in ops.implementations("attention"):
        assert out.transpose(1, 2).is_contiguous()
        assert dq.transpose(1, 2).is_contiguous() and dk.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)], ids=str)
def test_empty_inputs_give_empty_results(shape):
    q = torch.empty(shape, requires_grad=True)
    k = torch.randn(shape[0], 2, 3, 8, requires_grad=True)
    out, lse = ops.attention(q, k, k, return_lse=True)
    assert out.shape == shape and lse.shape == shape[:3]
    out.sum().backward()
    assert q.grad.shape == shape and not k.grad.any()


def test_no_keys_give_zeros():
    q, k = torch.randn(1, 2, 3, 8, requires_grad=True), torch.empty(1, 2, 0, 8)
    out, lse = ops.attention(q, k, k, return_lse=True)
    assert not out.any() and (lse == -math.inf).all()
    out.sum().backward()
    assert not q.grad.any()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, causal", [(1, True), (4, False)])
def test_same_bits_for_any_number_of_threads(dtype, batch, causal):
    """One head goes to several threads in another way than many heads do."""
    q = heads(batch, 4, 300, 32, dtype).requires_grad_()
    k, v = (heads(batch, 2, 300, 32, dtype).requires_grad_() for _ in "kv")
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            out = ops.attention(q, k, v, causal=causal, window=150)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_stay_finite(dtype):
    q, k = heads(1, 1, 70, 32, dtype) * 60, heads(1, 1, 70, 32, dtype) * 60
    v = heads(1, 1, 70, 32, dtype)
    matches([q, k, v], {"causal": True})
    hidden = torch.full((70, 70), torch.finfo(torch.float32).min)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = ops.attention(*leaves, mask=hidden, return_lse=True)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(x.isfinite().all() for x in (out, lse, *grads))
    spread = v.double().mean(2, keepdim=True).expand_as(v)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden.to(dtype))
    assert error("out", out.detach(), theirs, spread).ok


def test_gradients_of_mask_slopes_and_sinks_go_to_pytorch_operations():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    mask = torch.randn(5, 5, requires_grad=True)
    slopes, sinks = torch.rand(2, requires_grad=True), torch.rand(2, requires_grad=True)
    with _registry.recording() as verdicts:
        out = ops.attention(q, k, k, mask=mask, alibi_slopes=slopes, sinks=sinks)
        grads = torch.autograd.grad(out.square().sum(), [mask, slopes, sinks])
    assert verdicts[0].chosen == "reference" and all(g.any() for g in grads)
    if "cpu" in ops.implementations("attention"):
        assert "gradient of mask" in " ".join(verdicts[0].refused["cpu"])


def test_gradients_of_the_reference_are_exact():
    q = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 1, 5, 3, dtype=torch.float64, requires_grad=True) for _ in "kv")
    extra = [torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    mask = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, slopes, sinks, mask):
        options = {"window": 3, "softcap": 2.0, "return_lse": True}
        return ops.attention(q, k, v, alibi_slopes=slopes, sinks=sinks, mask=mask, **options)

    assert torch.autograd.gradcheck(call, (q, k, v, *extra, mask))


def test_autocast_casts_as_matrix_products_do():
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.attention(q, q, q)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_fullgraph_compile_forward_and_backward():
    def f(q, k, v, mask, sinks):
        out, lse = ops.attention(q, k, v, mask=mask, sinks=sinks, return_lse=True)
        plain = ops.attention(q, k, v, causal=True)
        return (out + plain).square().sum() + lse.sum()

    args = [torch.randn(1, 4, 9, 16, requires_grad=True), *torch.randn(2, 1, 2, 9, 16)]
    args += [torch.rand(9, 9) > 0.3, torch.randn(4, requires_grad=True)]
    wanted = (args[0], args[4])
    grads = torch.autograd.grad(torch.compile(f, fullgraph=True)(*args), wanted)
    expected = torch.autograd.grad(f(*args), wanted)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


@needs_native
@pytest.mark.parametrize("packed", [False, True], ids=["heads", "packed"])
def test_opcheck(packed):
    if packed:
        q, k = torch.randn(6, 4, 8), torch.randn(6, 2, 8)
        starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    else:
        q, k, starts = heads(1, 4, 6, 8), torch.randn(1, 2, 6, 8), None
    mask = None if packed else torch.rand(1, 1, 6, 6) > 0.3
    tables = (mask, torch.rand(4), torch.randn(4), starts, None)
    numbers = (True, 0, 0.3, 0.0)
    check_op = torch.library.opcheck
    check_op(torch.ops.fastlm.attention.default, (q, k, k, *tables, *numbers))
    check_op(torch.ops.fastlm.attention_lse.default, (q, k, k, *tables, *numbers))
    out, lse = torch.ops.fastlm.attention_lse(q, k, k, *tables, *numbers)
    rest = (q, k, k, out, lse, mask, tables[1], starts, None, *numbers)
    check_op(torch.ops.fastlm.attention_backward.default, (out, lse, *rest))
    sinks = (out, lse[0], out, lse, tables[2], starts)
    check_op(torch.ops.fastlm.attention_sinks_backward.default, sinks)


Q, K = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8)
STARTS = torch.tensor([0, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    "args, kwargs, kind, text",
    [
        (("x", K, K), {}, TypeError, "attention: q must be a tensor, got str"),
        ((Q.int(), K, K), {}, TypeError, "attention: q must be a floating-point tensor"),
        ((Q[0], K, K), {}, ValueError, "attention: q must be of rank 4, got rank 3"),
        ((Q, K.bfloat16(), K), {}, ValueError, "k must be torch.float32, got torch.bfloat16"),
        ((Q[:, :3], K, K), {}, ValueError, "k must be of a head count that divides 3, got 2"),
        ((Q, K[:, :0], K[:, :0]), {}, ValueError, "k must be of a head count that divides 4"),
        ((Q, K[..., :4], K), {}, ValueError, r"k must be \[1, 2, 3, 8\], got \[1, 2, 3, 4\]"),
        ((Q, K, K[:, :, :2]), {}, ValueError, r"v must be \[1, 2, 3, 8\], got \[1, 2, 2, 8\]"),
        ((Q[..., :0], K[..., :0], K), {}, ValueError, "q must be of a head size of 1 or more"),
        ((Q, K, K), {"window": 0}, ValueError, "window must be 1 or more, got 0"),
        ((Q, K, K), {"window": -3}, ValueError, "window must be 1 or more, got -3"),
        ((Q, K, K), {"softcap": 0.0}, ValueError, "softcap must be positive and finite, got 0"),
        ((Q, K, K), {"sinks": torch.ones(3)}, ValueError, r"sinks must be \[4\], got \[3\]"),
        (
            (Q, K, K),
            {"alibi_slopes": torch.ones(3)},
            ValueError,
            r"slopes must be \[4\] or .*\[3\]",
        ),
        (
            (Q, K, K),
            {"mask": torch.ones(2, 3, 3, dtype=torch.bool)},
            ValueError,
            r"mask must be broadcastable to \[1, 4, 3, 3\], got \[2, 3, 3\]",
        ),
        ((Q, K, K), {"mask": torch.ones(3, 3).int()}, TypeError, "mask must be bool or floating"),
        ((Q, K, K), {"cu_seqlens_k": STARTS}, ValueError, "cu_seqlens_k must be given with"),
        ((Q, K, K), {"cu_seqlens_q": STARTS}, ValueError, "q must be of rank 3"),
        (
            (Q[0].mT, K[0].mT, K[0].mT),
            {"cu_seqlens_q": STARTS.long()},
            ValueError,
            "got torch.int64",
        ),
        (
            (Q[0, :, :, :], K[0, :, :, :].repeat(2, 1, 1), K[0].repeat(2, 1, 1)),
            {"cu_seqlens_q": STARTS},
            ValueError,
            r"cu_seqlens_q must be rising from 0 to 4, got \[0, 3\]",
        ),
    ],
)
def test_bad_input_names_the_argument(args, kwargs, kind, text):
    with pytest.raises(kind, match=text):
        ops.attention(*args, **kwargs)


def test_forcing_pytorchs_own_names_what_it_lacks():
    with ops.use_backend("torch"):
        with pytest.raises(RuntimeError, match="cannot run: has no window"):
            ops.attention(Q, K, K, window=2)
        with pytest.raises(RuntimeError, match="first query, not the last"):
            ops.attention(Q[:, :, :1], K, K, causal=True)
