"""rope: every implementation against float64, forward and gradients."""

from __future__ import annotations

import pytest
import torch

from fastlm import ops, reference
from fastlm.testing import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# head size, width of the tables, rotary_dim
WIDTHS = [(64, 64, None), (64, 32, None), (80, 32, None), (80, 16, 32), (10, 5, None), (6, 6, 6)]


def baseline(q, k, cos, sin, interleaved=False, rotary_dim=None):
    """The formula of Hugging Face transformers, in the dtype of the arguments."""
    rotary = reference.rotated_width(q.shape[-1], cos.shape[-1], rotary_dim)
    if cos.shape[-1] != rotary:
        cos, sin = (
            t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin)
        )
    cos, sin = (t.unsqueeze(-3).to(q.dtype) for t in (cos, sin))

    def rotate(x):
        turned, rest = x[..., :rotary], x[..., rotary:]
        if interleaved:
            partner = torch.stack((-turned[..., 1::2], turned[..., 0::2]), -1).flatten(-2)
        else:
            first, second = turned.chunk(2, -1)
            partner = torch.cat((-second, first), -1)
        return torch.cat((turned * cos + partner * sin, rest), -1)

    return rotate(q), rotate(k)


def tables(*shape, dtype=torch.float32):
    angle = torch.randn(shape) * 3
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("backend", ops.implementations("rope"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("width", WIDTHS, ids=str)
@pytest.mark.parametrize("form", ["per_token", "shared", "per_sequence", "fp32_tables"])
def test_matches_float64(backend, dtype, interleaved, width, form):
    head, w, rotary_dim = width
    q = torch.randn(2, 7, 5, head, dtype=dtype).transpose(1, 2)  # as a projection leaves it
    k = torch.randn(2, 3, 7, head, dtype=dtype)
    rows = {"shared": (1, 7), "per_sequence": (2, 7)}.get(form, (7,))
    cos, sin = tables(*rows, w, dtype=torch.float32 if form == "fp32_tables" else dtype)

    def ours(q, k):
        return ops.rope(q, k, cos, sin, interleaved=interleaved, rotary_dim=rotary_dim)

    def exact(q, k):
        wide = cos.double(), sin.double()
        return reference.rope(q, k, *wide, interleaved=interleaved, rotary_dim=rotary_dim)

    def theirs(q, k):
        return baseline(q, k, cos, sin, interleaved, rotary_dim)

    with ops.use_backend(backend):
        check(ours, theirs, exact, [q, k])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_gradient_of_the_tables_goes_through_the_reference(interleaved):
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8)
    check(
        lambda *args: ops.rope(*args, interleaved=interleaved),
        lambda *args: baseline(*args, interleaved),
        lambda *args: reference.rope(*args, interleaved=interleaved),
        [q, k, *tables(3, 8)],
    )
    cos = torch.ones(3, 8, requires_grad=True)
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match="forced but cannot run"):
        ops.rope(q, k, cos, cos)


@pytest.mark.parametrize("tokens", [1, 5, 70], ids=lambda t: f"{t}_tokens")
@pytest.mark.parametrize("heads", [1, 4, 9], ids=lambda h: f"{h}_heads")
def test_any_strides_and_the_order_of_memory_is_kept(tokens, heads):
    cos, sin = tables(2, tokens, 16)
    plain = torch.randn(2, heads, tokens, 16)
    k = torch.randn(2, 2, tokens, 16)
    expected, _ = ops.rope(plain, k, cos, sin)
    by_token = plain.transpose(1, 2).contiguous().transpose(1, 2)
    packed = torch.randn(2, tokens, heads, 48)[..., 16:32].transpose(1, 2).copy_(plain)
    scattered = torch.randn(2, heads, 16, tokens).transpose(2, 3).copy_(plain)
    for q in (by_token, packed, scattered):
        y, z = ops.rope(q, k, cos, sin)
        assert torch.equal(y, expected)
        assert torch.equal(ops.rope(q, None, cos, sin)[0], expected)
        assert z.is_contiguous()
    assert expected.is_contiguous()
    assert ops.rope(by_token, None, cos, sin)[0].transpose(1, 2).is_contiguous()
    assert ops.rope(packed, None, cos, sin)[0].transpose(1, 2).is_contiguous()
    # tables may be views too
    wide = torch.stack((cos, sin), -1)
    assert torch.equal(ops.rope(plain, None, wide[..., 0], wide[..., 1])[0], expected)
    shared = cos[:1].expand(2, -1, -1), sin[:1].expand(2, -1, -1)
    one = ops.rope(plain, None, cos[:1], sin[:1])[0]
    assert torch.equal(ops.rope(plain, None, *shared)[0], one)


def test_inputs_stay_and_the_rest_is_copied():
    q = torch.randn(1, 2, 3, 10)
    before = q.clone()
    y, none = ops.rope(q, None, *tables(3, 4), rotary_dim=4)
    assert none is None
    assert torch.equal(q, before)
    assert torch.equal(y[..., 4:], q[..., 4:])
    assert y.data_ptr() != q.data_ptr()


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)], ids=str)
def test_empty_batch_gives_empty_result(shape):
    q = torch.empty(shape, requires_grad=True)
    k = torch.empty(shape[0], 1, *shape[2:], requires_grad=True)
    y, z = ops.rope(q, k, *tables(shape[2], 8))
    assert y.shape == q.shape and z.shape == k.shape
    (y.sum() + z.sum()).backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    q = torch.randn(1, 300, 8, 64, dtype=dtype).transpose(1, 2).requires_grad_()
    k = torch.randn(1, 3, 300, 64, dtype=dtype).requires_grad_()
    cos, sin = tables(300, 64)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, z = ops.rope(q, k, cos, sin)
            results.append((y, z, *torch.autograd.grad(y.sum() + z.square().sum(), (q, k))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_sequence_rotates_as_it_does_in_a_batch():
    q, k = torch.randn(3, 4, 5, 16), torch.randn(3, 2, 5, 16)
    cos, sin = tables(3, 5, 8)
    y, z = ops.rope(q, k, cos, sin)
    for b in range(3):
        alone = ops.rope(q[b : b + 1], k[b : b + 1], cos[b], sin[b])
        assert torch.equal(alone[0][0], y[b]) and torch.equal(alone[1][0], z[b])


def test_fullgraph_compile_forward_and_backward():
    cos, sin = tables(1, 6, 16)

    def f(q, k):
        y, z = ops.rope(q, k, cos, sin)
        alone, _ = ops.rope(q, None, cos, sin, interleaved=True)
        return (y.transpose(1, 2).flatten(2) ** 2).sum() + (z * z).sum() + alone.sum()

    q = torch.randn(2, 6, 4, 16).transpose(1, 2).requires_grad_()
    k = torch.randn(2, 2, 6, 16, requires_grad=True)
    got = torch.autograd.grad(torch.compile(f, fullgraph=True)(q, k), (q, k))
    expected = torch.autograd.grad(f(q, k), (q, k))
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif("cpu" not in ops.implementations("rope"), reason="no native kernels")
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
def test_opcheck(transposed):
    q, k = torch.randn(2, 3, 4, 8).transpose(1, 2), torch.randn(2, 1, 3, 8)
    cos, sin = tables(3, 4)
    for x in (q, k, torch.randn(2, 8, 4, 3).transpose(1, 3)):
        torch.library.opcheck(
            torch.ops.fastlm.rope_single.default, (x, *tables(x.shape[2], 4), 8, False, transposed)
        )
    torch.library.opcheck(torch.ops.fastlm.rope.default, (q, k, cos, sin, 8, True, transposed))


def layouts(x):
    """x [B, H, T, D] in the layouts that are written where they lie, and one that is not."""
    batch, heads, tokens, size = x.shape
    packed = torch.randn(batch, tokens, heads, 3 * size, dtype=x.dtype)[..., size : 2 * size]
    yield x.clone()
    yield x.transpose(1, 2).contiguous().transpose(1, 2)
    yield packed.transpose(1, 2).copy_(x)
    yield x.mT.contiguous().mT


@pytest.mark.parametrize("backend", ops.implementations("rope"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("width", WIDTHS[1:4], ids=str)
def test_overwrites_q_and_k_with_the_bits_of_rope(backend, dtype, interleaved, width):
    head, w, rotary_dim = width
    q, k = torch.randn(2, 9, 7, head, dtype=dtype), torch.randn(2, 2, 7, head, dtype=dtype)
    (cos, sin), form = tables(2, 7, w), {"interleaved": interleaved, "rotary_dim": rotary_dim}
    with ops.use_backend(backend):
        expected = ops.rope(q, k, cos, sin, **form)
        for x, y in zip(layouts(q), layouts(k), strict=True):
            for second in (y, None):
                first = x.clone(memory_format=torch.preserve_format)
                got = ops.rope_(first, second, cos, sin, **form)
                assert got[0] is first and got[1] is second
                assert torch.equal(first, expected[0])
            assert torch.equal(y, expected[1])
        for x in layouts(q):  # where it lies, and only there
            around, before = x._base, None if x._base is None else x._base.clone()
            assert torch.equal(ops.rope_(x, None, cos, sin, **form)[0], expected[0])
            if around is not None and around.shape[-1] == 3 * head:
                assert torch.equal(around[..., :head], before[..., :head])
                assert torch.equal(around[..., 2 * head :], before[..., 2 * head :])


def test_overwrites_parts_of_one_tensor_and_says_so_to_autograd():
    qkv, (cos, sin) = torch.randn(2, 5, 6, 16), tables(5, 16)
    q, k = qkv[:, :, :4].transpose(1, 2), qkv[:, :, 4:5].transpose(1, 2)
    expected, version, values = ops.rope(q, k, cos, sin), qkv._version, qkv[:, :, 5].clone()
    ops.rope_(q, k, cos, sin)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])
    assert torch.equal(qkv[:, :, 5], values)
    assert qkv._version > version
    weight = torch.ones(1, requires_grad=True)
    loss = (weight * q).sum()  # keeps q
    ops.rope_(q, None, cos, sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        inside = torch.randn(1, 1, 5, 16)
        assert ops.rope_(inside, None, cos, sin)[0] is inside


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)], ids=str)
def test_overwrites_nothing_where_there_is_nothing(shape):
    q, k = torch.empty(shape), torch.empty(shape[0], 1, *shape[2:])
    assert ops.rope_(q, k, *tables(shape[2], 8)) == (q, k)


@pytest.mark.skipif("cpu" not in ops.implementations("rope"), reason="no native kernels")
def test_in_place_opcheck_and_fullgraph():
    (cos, sin), checks = (
        tables(3, 4),
        ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"],
    )
    q, k = torch.randn(2, 3, 4, 8).transpose(1, 2), torch.randn(2, 1, 3, 8)
    own = torch.ops.fastlm
    torch.library.opcheck(own.rope_.default, (q, k, cos, sin, 8, True), test_utils=checks)
    torch.library.opcheck(own.rope_single_.default, (q, cos, sin, 8, False), test_utils=checks)

    def f(qkv):
        q, k = qkv[:, :, :3].transpose(1, 2), qkv[:, :, 3:4].transpose(1, 2)
        ops.rope_(q, k, cos, sin)
        return ops.rope_(q * 2, None, cos, sin)[0] + 1, k

    plain = torch.randn(2, 3, 5, 8)
    compiled = plain.clone()
    got, expected = torch.compile(f, fullgraph=True)(compiled), f(plain)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("backend", ops.implementations("rope"))
def test_in_place_refuses_before_it_writes(backend):
    q, k, table = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.ones(3, 8)
    before, leaf = (q.clone(), k.clone()), torch.ones(3, 8, requires_grad=True)
    cases = [
        ((q.requires_grad_(), k, table, table), RuntimeError, "rope_: no argument may require a"),
        ((q.detach(), k, leaf, leaf), RuntimeError, "rope_: no argument may require a gradient"),
        ((q.detach(), k[:1], table, table), ValueError, r"rope_: k must be \[2, 2, 3, 8\], got"),
        ((q.detach(), k, table[:2], table[:2]), ValueError, r"rope_: cos must be \[3, 8\]"),
        ((q.detach(), q.detach(), table, table), ValueError, "rope_: k must be apart from q"),
        ((q[:1].detach().expand(2, -1, -1, -1), k, table, table), ValueError, "rope_: q must be w"),
        ((q.detach(), k[:, :1].expand(2, 4, 3, 8), table, table), ValueError, "rope_: k must be w"),
    ]
    for args, error, text in cases:
        with ops.use_backend(backend), pytest.raises(error, match=text):
            ops.rope_(*args)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])


X = torch.ones(2, 4, 3, 8)
K = torch.ones(2, 2, 3, 8)
TABLE = torch.ones(3, 8)


@pytest.mark.parametrize(
    "args, kwargs, error, text",
    [
        (("x", K, TABLE, TABLE), {}, TypeError, "rope: q must be a tensor, got str"),
        ((X.int(), K, TABLE, TABLE), {}, TypeError, "rope: q must be a floating-point"),
        ((X[0], K, TABLE, TABLE), {}, ValueError, "rope: q must be of rank 4, got rank 3"),
        ((X, K[:1], TABLE, TABLE), {}, ValueError, r"rope: k must be \[2, 2, 3, 8\], got \[1, 2"),
        ((X, K.bfloat16(), TABLE, TABLE), {}, ValueError, "rope: k must be torch.float32"),
        ((X, K, TABLE[:2], TABLE[:2]), {}, ValueError, r"rope: cos must be \[3, 8\], got \[2, 8\]"),
        ((X, K, TABLE, TABLE[:, :4]), {}, ValueError, r"rope: sin must be \[3, 8\]"),
        ((X, K, TABLE.expand(3, 3, 8), TABLE), {}, ValueError, r"rope: cos must be \[2, 3, 8\]"),
        ((X, K, TABLE[0], TABLE[0]), {}, ValueError, "rope: cos must be of rank 2 or 3"),
        ((X, K, TABLE.half(), TABLE.half()), {}, ValueError, "rope: cos must be torch.float32"),
        ((X, K, TABLE.long(), TABLE), {}, TypeError, "rope: cos must be a floating-point"),
        ((X, K, TABLE, TABLE.double()), {}, ValueError, "rope: sin must be torch.float32"),
        ((X, K, TABLE[:, :3], TABLE[:, :3]), {}, ValueError, "rope: cos must be of a width even"),
        ((X, K, TABLE, TABLE), {"rotary_dim": 4}, ValueError, "rope: cos must be of a width 4 or"),
        ((X, K, TABLE, TABLE), {"rotary_dim": 10}, ValueError, "rope: rotary_dim must be even and"),
        ((X, K, TABLE, TABLE), {"rotary_dim": -8}, ValueError, "rope: rotary_dim must be even and"),
        ((X.to("meta"), K, TABLE, TABLE), {}, ValueError, "rope: k must be on meta, got cpu"),
    ],
)
def test_bad_input_names_the_argument(args, kwargs, error, text):
    with pytest.raises(error, match=text):
        ops.rope(*args, **kwargs)
