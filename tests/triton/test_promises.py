"""What every Triton kernel keeps: 64-bit offsets, no look at the device, any input, one graph."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.triton._configs import ARCHITECTURES, Config, override
from fastlm.triton._launch import recording

MODULES = sorted(
    file.stem
    for file in Path(importlib.import_module("fastlm.triton").__file__).parent.glob("[a-z]*.py")
)
FAR = 2**30  # elements; three of it are beyond 32 bits, of which it takes one itself


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """8 GB of zeros in a file without content: only what is touched takes memory."""
    file = tmp_path_factory.mktemp("far") / "zeros"
    with file.open("wb") as f:
        f.truncate(2 * (3 * FAR + 2**22))
    yield torch.from_file(str(file), True, 3 * FAR + 2**22, dtype=torch.bfloat16)
    file.unlink()


def far(space, offset, shape, strides):
    """A tensor of random numbers whose last element lies more than 2^31 elements from its first."""
    x = space.as_strided(shape, strides, offset)
    assert sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) > 2**31
    return x.copy_(torch.randn(shape))


def near(*tensors):
    return [t.contiguous() for t in tensors]


def rows_far_apart(space):
    return far(space, 0, (4, 40), (FAR, 1)), far(space, 64, (4, 40), (FAR, 1))


def test_rows_beyond_32_bits(space):
    x, r = rows_far_apart(space)
    w, t = torch.randn(40).bfloat16(), torch.tensor([1, 2, 3, 39])
    gate, a = torch.randn(24, 40).bfloat16(), torch.randn(40, 24).bfloat16()
    qweight = reference.quantize_weight(torch.randn(8, 32), 8, 32, True)
    calls = {
        "rms_norm": lambda x, r: ops.rms_norm(x, w, residual=r),
        "layer_norm": lambda x, r: ops.layer_norm(x, w, w, residual=r),
        "activation": lambda x, r: ops.gated_activation(x, r, "silu"),
        "cross_entropy": lambda x, r: ops.cross_entropy(x, t, reduction="none"),
        "linear_cross_entropy": lambda x, r: ops.linear_cross_entropy(x, gate, t % 24),
        "feed_forward": lambda x, r: ops.feed_forward(x, gate, a, w_gate=gate, activation="silu"),
        "quantized_linear": lambda x, r: ops.quantized_linear(x[:, :32], qweight),
    }
    with override(feed_forward_few=Config((16, 16, 16), 4, 2)):
        for name, call in calls.items():
            made, plain = call(x, r), call(*near(x, r))
            for y, z in zip(
                *[o if isinstance(o, tuple) else (o,) for o in (made, plain)], strict=True
            ):
                assert torch.equal(y, z), name


@pytest.mark.parametrize("wide", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_gradients_of_rows_beyond_32_bits(space, norm, wide):
    x, grad = rows_far_apart(space)
    w = torch.randn(40).bfloat16()
    found = []
    tiles = {"norm": Config((16,)), "norm_backward": Config((16, 1))} if wide else {}
    with override(**tiles):
        for some, g in ((x, grad), near(x, grad)):
            # a view as it lies: a leaf of its own would be a copy
            leaf, weight = some.detach().requires_grad_(), w.clone().requires_grad_()
            y = getattr(ops, norm)(leaf, weight)
            found.append(torch.autograd.grad(y, (leaf, weight), g))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_heads_beyond_32_bits(space):
    # sequences far apart, and heads far apart
    for shape, strides in (
        ((4, 1, 3, 16), (FAR, 512, 16, 1)),
        ((1, 4, 3, 16), (512, FAR, 16, 1)),
    ):
        q, k, v = (far(space, n, shape, strides) for n in (0, 4096, 8192))
        angle = torch.randn(3, 16)
        cos, sin = angle.cos(), angle.sin()
        plain = near(q, k, v)
        for a, b in zip(ops.rope(q, k, cos, sin), ops.rope(*plain[:2], cos, sin), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(ops.attention(q, k, v), ops.attention(*plain))
        leaves = [[t.detach().requires_grad_() for t in group] for group in ((q, k, v), plain)]
        found = [torch.autograd.grad(ops.attention(*g).float().sum(), g) for g in leaves]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        lengths = torch.tensor([3, 2, 1, 3])[: shape[0]]
        one = q[:, :, :1]
        y = ops.decode_attention(one, k, v, lengths)
        assert torch.equal(y, ops.decode_attention(one.contiguous(), *plain[1:], lengths))
        caches = [c.clone() for c in plain[1:]]
        y = ops.rope_append(one, one, one, cos, sin, k, v, lengths)
        z = ops.rope_append(*near(one, one, one), cos, sin, *caches, lengths)
        assert torch.equal(y, z) and torch.equal(k, caches[0]) and torch.equal(v, caches[1])


def test_masks_beyond_32_bits(space):
    q, k, v = (torch.randn(1, 4, 3, 16) for _ in range(3))
    mask = far(space, 0, (1, 4, 3, 3), (0, FAR, 3, 1)).float().bfloat16()
    there = space.as_strided((1, 4, 3, 3), (0, FAR, 3, 1), 0)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    expected = ops.attention(q, k, v, mask=mask.contiguous())
    assert torch.equal(ops.attention(q, k, v, mask=there), expected)


@pytest.mark.parametrize("name", MODULES)
def test_launching_reads_no_number_from_the_device(name):
    """Tensors of the device "meta" hold none: a look at one would raise."""
    module = importlib.import_module(f"fastlm.triton.{name}")
    for arch in ARCHITECTURES[:2]:
        for label, call in module.examples():
            with recording(arch) as launches:
                call()
            assert launches, label


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_zero_rows(shape):
    x, w = torch.empty(shape, requires_grad=True), torch.randn(8, requires_grad=True)
    m, t = torch.randn(12, 8), torch.empty(shape[:-1], dtype=torch.int64)
    outputs = [
        ops.rms_norm(x, w),
        ops.layer_norm(x, w, w),
        ops.activation(x, "gelu"),
        ops.gated_activation(x, x, "silu"),
        ops.feed_forward(x, m, m.t(), activation="gelu"),
        ops.cross_entropy(x, t, reduction="none"),
        ops.linear_cross_entropy(x, m, t, reduction="sum"),
    ]
    grads = torch.autograd.grad([y.sum() for y in outputs], (x, w))
    assert grads[0].shape == shape and torch.equal(grads[1], torch.zeros(8))


def test_gradients_that_are_expanded_or_strided():
    """sum().backward() hands over one number with strides of zero."""
    x, w = torch.randn(3, 5, 8), torch.randn(8)
    q = torch.randn(1, 2, 5, 8)
    calls = {
        "rms_norm": (lambda x: ops.rms_norm(x, w), x),
        "layer_norm": (lambda x: ops.layer_norm(x, w, w), x),
        "activation": (lambda x: ops.activation(x, "gelu"), x),
        "packed": (lambda x: ops.gated_activation(x, None, "silu"), x),
        "rope": (lambda q: ops.rope(q, None, w.expand(5, 8), w.expand(5, 8))[0], q),
        "attention": (lambda q: ops.attention(q, q, q, causal=True), q),
    }
    for name, (call, inputs) in calls.items():
        leaf = inputs.clone().requires_grad_()
        y = call(leaf)
        some = torch.randn(*y.shape[:-1], 2 * y.shape[-1])[..., ::2]
        for g in (torch.ones(()).expand_as(y), some, torch.randn_like(y.mT).mT):
            strided = torch.autograd.grad(y, leaf, g, retain_graph=True)[0]
            dense = torch.autograd.grad(y, leaf, g.contiguous(), retain_graph=True)[0]
            assert torch.equal(strided, dense), name


def test_one_graph_for_any_number_of_tokens():
    # Dynamo takes no tensor twice in one call with a gradient
    w, bias = (torch.randn(16, requires_grad=True) for _ in range(2))
    m, gate, out = (torch.randn(n, requires_grad=True) for n in ((24, 16), (24, 16), (16, 24)))

    def step(x, cos, sin, target):
        y = ops.layer_norm(ops.rms_norm(x, w), w, bias, residual=x)[0]
        q = y[:, None].expand(-1, 2, -1, -1)
        q, k = ops.rope(q, 2 * q, cos, sin)
        y = ops.attention(q, k, q + k, causal=True)[:, 0]
        y = ops.feed_forward(y, m, out, w_gate=gate, activation="silu")
        y = ops.gated_activation(y, 2 * y, "gelu") + ops.activation(y, "relu")
        return ops.linear_cross_entropy(y, m, target) + ops.cross_entropy(y, target % 16)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (9, 11):  # more than 16 rows: a product of few is another choice
        x, angle = torch.randn(2, tokens, 16), torch.randn(tokens, 16)
        target = torch.randint(0, 24, (2, tokens))
        found = []
        for run in (step, compiled):
            leaf = x.clone().requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=True):
                loss = run(leaf, angle.cos(), angle.sin(), target)
            found.append((loss, *torch.autograd.grad(loss, (leaf, w, m))))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_one_graph_of_decoding_for_any_number_of_sequences():
    qweight = reference.quantize_weight(torch.randn(8, 64), 4, 32, False)
    angle = torch.randn(20, 16)
    cos, sin = angle.cos(), angle.sin()

    def step(q, k, v, k_cache, v_cache, lengths):
        q = ops.rope_append(q, k, v, cos, sin, k_cache, v_cache, lengths)
        y = ops.decode_attention(q, k_cache, v_cache, lengths)
        return ops.quantized_linear(y.transpose(1, 2).flatten(2)[:, 0], qweight)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5):
        new = [torch.randn(batch, n, 1, 16) for n in (4, 2, 2)]
        caches = [torch.randn(batch, 2, 20, 16) for _ in "kv"]
        lengths = torch.randint(1, 21, (batch,))
        found = []
        for run in (step, compiled):
            mine = [c.clone() for c in caches]
            with torch._dynamo.config.patch(error_on_recompile=True):
                found.append((run(*new, *mine, lengths), *mine))
        assert all(map(torch.equal, *found))
        assert not torch.equal(found[0][1], caches[0])


def test_autocast_and_the_deterministic_mode():
    x, m = torch.randn(1, 2, 5, 16), torch.randn(24, 16)
    t, qweight = (
        torch.randint(0, 24, (10,)),
        reference.quantize_weight(torch.randn(8, 32), 8, 32, True),
    )
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            half = [
                ops.attention(x, x, x),
                ops.decode_attention(x[:, :, :1], x, x, 5),
                ops.feed_forward(x, m, m.t(), activation="gelu"),
                ops.quantized_linear(torch.randn(3, 32), qweight),
            ]
            loss = ops.linear_cross_entropy(x.view(10, 16), m, t)
            wide = ops.rms_norm(x, torch.ones(16))
    finally:
        torch.use_deterministic_algorithms(False)
    assert {y.dtype for y in half} == {torch.bfloat16}
    assert loss.dtype == torch.float32 and wide.dtype == torch.float32
    expected = F.cross_entropy(F.linear(x.view(10, 16).bfloat16(), m.bfloat16()).float(), t)
    torch.testing.assert_close(loss, expected, rtol=2**-8, atol=0)
