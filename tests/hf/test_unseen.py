"""Modules that no release of transformers has: replaced right, or left alone with a reason."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.utils.deprecation import deprecate_kwarg

import fastlm
from fastlm.hf.patch import suspended
from fastlm.ops import _registry

WIDTH = 32


class Norm(nn.Module):
    """An RMSNorm as many write it; the subclasses turn it into something else."""

    def __init__(self, layer_idx=0):
        super().__init__()
        self.layer_idx, self.eps = layer_idx, 1e-6
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class ScaledByDepthNorm(Norm):
    def forward(self, x):
        return Norm.forward(self, x) / math.sqrt(3 - self.layer_idx)


class DroppingNorm(Norm):
    def forward(self, x):
        return F.dropout(Norm.forward(self, x), 0.2, self.training)


class OutsideTheRootNorm(Norm):
    def forward(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps) * self.weight


class ChannelNorm(nn.Module):
    """Over the second axis: of a matrix that is the last one."""

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


class SequenceNorm(nn.Module):
    """Over all axes but the first."""

    def forward(self, x):
        return F.layer_norm(x, x.shape[1:])


class ScaleAndGamma(nn.Module):
    """A LayerNorm whose parameters and epsilon have other names."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.rand(WIDTH))
        self.gamma = nn.Parameter(torch.rand(WIDTH))
        self.tiny = 1e-3

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        deviation = torch.sqrt((centred**2).mean(-1, keepdim=True) + self.tiny)
        return self.gamma * centred / deviation + self.beta


class NormWithScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        return F.rms_norm(x, (WIDTH,), self.scale, 1e-6)


class UnbiasedNorm(ScaleAndGamma):
    """By the sample's deviation, as the annotated transformer has it."""

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.gamma * centred / (x.std(-1, keepdim=True) + self.tiny) + self.beta


class Block(nn.Module):
    def __init__(self, layer_idx=0):
        super().__init__()
        self.layer_idx = layer_idx
        self.up, self.act, self.down = nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class ByLayer(Block):
    def forward(self, x):
        return Block.forward(self, x) * (2.0 if self.layer_idx == 0 else 1.0)


class DroppingBlock(Block):
    def forward(self, x):
        return F.dropout(Block.forward(self, x), 0.3, self.training)


class CentredBlock(Block):
    """Over the tokens of a sequence, which rows without one do not show."""

    def forward(self, x):
        y = Block.forward(self, x)
        return y - y.mean(1, keepdim=True) if x.dim() == 3 else y


class Gated(nn.Module):
    """Its activation is a line of its forward."""

    def __init__(self):
        super().__init__()
        self.w1, self.w3 = nn.Linear(WIDTH, 48, bias=False), nn.Linear(WIDTH, 48, bias=False)
        self.w2 = nn.Linear(48, WIDTH, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SquaredRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48, bias=False), nn.Linear(48, WIDTH, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class LowRank(nn.Module):
    """Two maps and nothing between them: no feed-forward block."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)

    def forward(self, x):
        return self.b(self.a(x))


class Residual(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = x + part(x)
        return x


def results(model, x):
    """The result and all gradients, with the same random numbers every time."""
    torch.manual_seed(3)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def same(model):
    """Asserts what a patched model computes, in both modes; returns the operators that ran."""
    ran = set()
    torch.manual_seed(1)
    for mode in (model.eval, model.train):
        mode()
        for x in (3 * torch.randn(2, 9, WIDTH), torch.randn(1, 1, WIDTH), torch.randn(7, WIDTH)):
            with suspended(model):
                try:
                    expected = results(model, x)
                except Exception:
                    continue  # takes no such input
            with _registry.recording() as verdicts:
                made = results(model, x)
            ran |= {v.stem for v in verdicts}
            for a, b in zip(made, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    return ran


@pytest.mark.parametrize(
    "kind",
    [
        ScaledByDepthNorm,
        DroppingNorm,
        ChannelNorm,
        SequenceNorm,
        OutsideTheRootNorm,
        UnbiasedNorm,
    ],
)
def test_what_is_nearly_a_norm_is_left_alone(kind):
    parts = [kind(i) for i in range(3)] if issubclass(kind, Norm) else [kind()]
    model = Residual(*parts)
    with fastlm.patch(model) as patch:
        assert not same(model) & {"rms_norm", "layer_norm"} or kind is ScaledByDepthNorm
        assert "computes neither rms_norm nor layer_norm" in patch.report()
    with pytest.raises(RuntimeError, match="strict, but left alone"):
        fastlm.patch(model, strict=True)


@pytest.mark.parametrize("kind", [Norm, NormWithScale, ScaleAndGamma])
def test_norms_under_other_names(kind):
    model = Residual(kind())
    with fastlm.patch(model, strict=True):
        assert same(model) == {"layer_norm" if kind is ScaleAndGamma else "rms_norm"}


@pytest.mark.parametrize("kind", [ByLayer, DroppingBlock, CentredBlock])
def test_what_is_more_than_a_feed_forward_block(kind):
    model = Residual(*(kind(i) for i in range(3)))
    with fastlm.patch(model) as patch:
        ran = same(model)
        assert ("feed_forward" in ran) == (kind is not CentredBlock)
        text = {DroppingBlock: "evaluation only", CentredBlock: "differs for every"}
        assert text.get(kind, "") in patch.report()


@pytest.mark.parametrize("kind", [Gated, SquaredRelu, LowRank])
def test_an_activation_that_is_a_line_of_the_forward(kind):
    model = Residual(kind())
    with fastlm.patch(model, strict=True):
        assert ("feed_forward" in same(model)) == (kind is not LowRank)


class Scaled(Block):
    def forward(self, hidden, scale=1.0):
        return Block.forward(self, hidden) * scale


def test_arguments_that_no_trial_run_had_are_the_modules_own():
    x = torch.randn(2, 3, WIDTH)
    model = nn.ModuleList([Scaled(), Norm()])
    expected = [model[0](x, 2.0), model[0](x, scale=3.0), model[0](hidden=x), model[1](x=x)]
    with fastlm.patch(model, strict=True):
        made = [model[0](x, 2.0), model[0](x, scale=3.0), model[0](hidden=x), model[1](x=x)]
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b)


class Attention(nn.Module):
    """Written out; the subclasses are the ways in which that is done."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seen", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def heads(self, x):
        shape = (*x.shape[:2], 4, -1)
        return (t.view(shape).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))

    def merged(self, y):
        return self.out(y.transpose(1, 2).flatten(2))


class Matmul(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.seen[:, :, : x.shape[1], : x.shape[1]] == 0, float("-inf"))
        return self.merged(self.dropout(F.softmax(scores, dim=-1)) @ v)


class OneLine(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        return self.merged((8**-0.5 * (q @ k.transpose(-2, -1))).softmax(-1) @ v)


class WrittenInto(Attention):
    """A mask that is written into the scores, where one is given."""

    def forward(self, x, mask=None):
        q, k, v = self.heads(x)
        scores = torch.matmul(q, k.transpose(-2, -1)) / 8**0.5
        if mask is not None:
            scores.masked_fill_(mask, float("-inf"))
        return self.merged(torch.matmul(scores.softmax(-1), v))


class SetItem(Attention):
    def forward(self, x, mask=None):
        q, k, v = self.heads(x)
        scores = torch.matmul(q, k.transpose(-2, -1)) / 8**0.5
        if mask is not None:
            scores[mask.expand_as(scores)] = float("-inf")
        return self.merged(torch.matmul(scores.softmax(-1), v))


class WithWeights(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        weights = F.softmax(torch.matmul(q, k.transpose(-2, -1)) / 8**0.5, dim=-1)
        return self.merged(torch.matmul(weights, v)), weights


class Remembering(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        self.weights = F.softmax(torch.matmul(q, k.transpose(-2, -1)) / 8**0.5, dim=-1)
        return self.merged(torch.matmul(self.weights, v))


class Einsum(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        weights = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
        return self.merged(torch.einsum("bhqk,bhkd->bhqd", weights, v))


@pytest.mark.parametrize("kind", [Matmul, OneLine, WrittenInto, SetItem])
def test_attention_written_out(kind):
    model = Residual(kind())
    with fastlm.patch(model, strict=True):
        assert "attention" in same(model)
        if kind in (WrittenInto, SetItem):
            x, mask = torch.randn(2, 5, WIDTH), torch.ones(5, 5, dtype=torch.bool).triu(1)
            with suspended(model):
                expected = model.parts[0](x, mask)
            torch.testing.assert_close(model.parts[0](x, mask), expected)


@pytest.mark.parametrize("kind", [WithWeights, Remembering, Einsum])
def test_attention_that_shows_its_weights_is_left_alone(kind):
    model = kind().eval()
    expected = model(torch.ones(1, 3, WIDTH))
    with fastlm.patch(model) as patch:
        torch.testing.assert_close(model(torch.ones(1, 3, WIDTH)), expected)
        told = "no call that is known" if kind is Einsum else "not told whether its weights"
        assert told in patch.report()
    with pytest.raises(RuntimeError, match="strict, but left alone"):
        fastlm.patch(model, strict=True)


def test_pytorchs_own_attention_is_named():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True)
    with fastlm.patch(layer) as patch:
        assert "PyTorch's own attention" in patch.report()
        assert "self_attn.out_proj" not in [e.path for e in patch.entries]
        same(layer.eval())


class SelfAttention(Matmul):
    pass


class WrapperAttention(nn.Module):
    """BERT's form: a module called attention around the one that computes it."""

    def __init__(self):
        super().__init__()
        self.inner = SelfAttention()

    def forward(self, x):
        return self.inner(x)


class TokenEmbeddings(nn.Module):
    """An addition beside a norm, and no layer of a decoder."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, WIDTH), nn.Embedding(50, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids):
        _, count = ids.shape
        x = self.tokens(ids) + self.places(torch.arange(count))
        x = self.norm(x)
        return x


def test_no_failure_where_nothing_was_to_be_replaced():
    """A wrapper around an attention, an embedding with a norm: strict does not mind."""
    model = nn.Sequential(TokenEmbeddings(), WrapperAttention()).eval()
    ids = torch.arange(6)[None]
    expected = model(ids)
    with fastlm.patch(model, strict=True) as patch:
        torch.testing.assert_close(model(ids), expected)
        assert "the trial run failed" in patch.report()


class ByHand(Attention):
    """What it rotates by comes as two arguments, or as one of complex numbers."""

    def forward(self, x, cos, sin, mask=None):
        q, k, v = self.heads(x)
        q, k = (self.turned(t, cos[:, None], sin[:, None]) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.merged(y)

    def turned(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin


class Complex(Attention):
    def forward(self, x, freqs_cis):
        q, k, v = self.heads(x)
        q, k = (self.turned(t, freqs_cis) for t in (q, k))
        return self.merged(F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def turned(self, x, by):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * by).flatten(3)


@pytest.mark.parametrize("kind", [ByHand, Complex])
def test_attention_that_is_given_its_rotation(kind):
    model = nn.Module()
    model.rotary = nn.Module()
    model.rotary.register_buffer("inv_freq", 100.0 ** (-torch.arange(4) / 4))
    model.attention = kind()
    x, angles = torch.randn(2, 6, WIDTH), torch.outer(torch.arange(6.0), model.rotary.inv_freq)
    tables = torch.cat((angles, angles), -1)[None]
    given = (
        (tables.cos(), tables.sin()) if kind is ByHand else (torch.polar(angles * 0 + 1, angles),)
    )
    expected = model.attention(x, *given)
    with fastlm.patch(model, strict=True), _registry.recording() as verdicts:
        torch.testing.assert_close(model.attention(x, *given), expected)
    assert "attention" in {v.stem for v in verdicts}


class OwnLoss(transformers.PreTrainedModel):
    """A model that knows transformers, and computes its loss by itself."""

    config_class = transformers.PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50)
        self.post_init()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embed(input_ids))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def test_a_loss_that_the_forward_computes_is_named():
    model, ids = OwnLoss(transformers.PretrainedConfig()), torch.arange(6)[None]
    expected = model(ids, labels=ids).loss
    with fastlm.patch(model) as patch:
        assert "cross_entropy: its forward computes the loss itself" in patch.report()
        assert "_loss_function" not in model.__dict__
        torch.testing.assert_close(model(ids, labels=ids).loss, expected)


class Renamed(Attention):
    """As transformers 5.24 writes its forwards, whose arguments have got other names."""

    @deprecate_kwarg("weight", "99.0", new_name="scale")
    def forward(self, x, scale=1.0):
        q, k, v = self.heads(x)
        return self.merged(F.scaled_dot_product_attention(q, k, v, scale=scale))


def test_a_renamed_argument_keeps_both_names():
    model, x = Residual(Renamed()), torch.randn(2, 5, WIDTH)
    with fastlm.patch(model, strict=True), _registry.recording() as verdicts:
        made = model.parts[0](x, scale=0.5)
        with pytest.warns(FutureWarning, match="`weight` is deprecated"):
            assert torch.equal(model.parts[0](x, weight=0.5), made)
        assert [v.stem for v in verdicts].count("attention") == 2
    torch.testing.assert_close(made, model.parts[0](x, scale=0.5))
