"""The modules against torch.nn: same arguments, same parameters, as accurate."""

from __future__ import annotations

import pytest
import torch

from fastlm import nn
from fastlm.testing import check


def twins(ours: type, theirs: type, *args, **kwargs):
    """A module of ours, PyTorch's with the same weights, and that in float64."""
    mine, its = ours(*args, **kwargs), theirs(*args, **kwargs)
    with torch.no_grad():
        for parameter in its.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    mine.load_state_dict(its.state_dict(), strict=True)
    exact = theirs(*args, **kwargs)
    exact.load_state_dict(its.state_dict())
    return mine, its, exact.double()


@pytest.mark.parametrize(
    "ours, theirs, args, kwargs",
    [
        (nn.Linear, torch.nn.Linear, (16, 24), {}),
        (nn.Linear, torch.nn.Linear, (16, 24, False), {}),
        (nn.LayerNorm, torch.nn.LayerNorm, (16,), {}),
        (nn.LayerNorm, torch.nn.LayerNorm, (16, 1e-3), {"bias": False}),
        (nn.LayerNorm, torch.nn.LayerNorm, (16, 1e-5, False), {}),
        (nn.LayerNorm, torch.nn.LayerNorm, ((5, 16),), {}),
        (nn.RMSNorm, torch.nn.RMSNorm, (16,), {}),
        (nn.RMSNorm, torch.nn.RMSNorm, (16, 1e-3, False), {}),
        (nn.RMSNorm, torch.nn.RMSNorm, ((5, 16), 1e-6), {}),
    ],
)
def test_drops_in(ours, theirs, args, kwargs):
    mine, its, exact = twins(ours, theirs, *args, **kwargs)
    assert isinstance(mine, theirs)
    if "RMS" in ours.__name__ and mine.eps is None:
        exact.eps = torch.finfo(torch.float32).eps  # the default is the dtype's
    check(mine, its, exact, [torch.randn(3, 5, 16)])


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("shape", [16, (5, 16)], ids=str)
def test_a_norm_takes_the_residual_along(kind, shape):
    norm = kind(shape)
    x, residual = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    y, summed = norm(x, residual)
    assert torch.equal(summed, x + residual)
    assert torch.equal(y, norm(summed))
    with pytest.raises(ValueError):
        norm(torch.randn(3, 4, 15))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1, "ignore_index": 2},
        {"weight": torch.linspace(0.5, 2, 7)},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
@pytest.mark.parametrize("shape", [(7,), (6, 7), (2, 7, 3), (2, 7, 3, 2)], ids=str)
def test_cross_entropy_drops_in(options, shape):
    target = torch.randint(0, 7, shape[:1] * (len(shape) > 1) + shape[2:])
    target = target.fill_(3) if target.dim() == 0 else target
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    mine, its = nn.CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)
    exact = torch.nn.CrossEntropyLoss(**wide)
    check(
        lambda x: mine(x, target),
        lambda x: its(x, target),
        lambda x: exact(x, target),
        [torch.randn(shape)],
    )


def test_cross_entropy_of_probabilities():
    x, target = torch.randn(4, 7), torch.rand(4, 7).softmax(-1)
    assert torch.equal(nn.CrossEntropyLoss()(x, target), torch.nn.CrossEntropyLoss()(x, target))


@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_is_a_linear_layer_and_a_loss(bias):
    loss = nn.LinearCrossEntropyLoss(16, 30, bias=bias, ignore_index=5, label_smoothing=0.1)
    plain = torch.nn.CrossEntropyLoss(ignore_index=5, label_smoothing=0.1)
    target = torch.randint(0, 30, (12,))
    weight, offset = loss.linear.weight.detach(), loss.linear.bias
    offset = None if offset is None else offset.detach()

    def theirs(x, weight, bias):
        return plain(torch.nn.functional.linear(x, weight, bias), target)

    def ours(x, weight, bias):
        given = {"linear.weight": weight} | ({} if bias is None else {"linear.bias": bias})
        return torch.func.functional_call(loss, given, (x, target))

    check(ours, theirs, theirs, [torch.randn(12, 16), weight, offset])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_feed_forward_is_its_layers(gated, bias):
    block = nn.FeedForward(16, 24, "silu", gated=gated, bias=bias).double()
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    up = torch.nn.functional.silu(block.up(x))
    if gated:
        up = torch.nn.functional.silu(block.gate(x)) * block.up(x)
    torch.testing.assert_close(block(x), block.down(up))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_self_attention_is_pytorchs(kv_heads):
    block = nn.SelfAttention(32, 4, kv_heads, bias=True, out_bias=True).double()
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    q, k, v = block.qkv(x).split([32, 8 * kv_heads, 8 * kv_heads], -1)
    q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(block(x), block.out(out.transpose(1, 2).flatten(2)))


def test_self_attention_names_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="SelfAttention: kv_heads must divide heads = 4, got 3"):
        nn.SelfAttention(32, 4, 3)


def test_rotary_tables_are_those_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=300)
    theirs = llama.LlamaRotaryEmbedding(config)
    cos, sin = theirs(torch.empty(1), torch.arange(300)[None])
    ours = nn.RotaryTable(16, 300)
    assert torch.equal(ours.cos, cos[0, :, :8]) and torch.equal(ours.sin, sin[0, :, :8])
    assert torch.equal(ours(torch.tensor([7, 9]))[0], ours.cos[[7, 9]])


def test_rotary_table_names_an_odd_width():
    with pytest.raises(ValueError, match="RotaryTable: dim must be positive and even, got 7"):
        nn.RotaryTable(7, 10)
