"""Attention outside transformers' interface: a method of the model's own, or PyTorch's."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny_models import as_accurate, exactly
from torch import nn

import fastlm
from fastlm.hf._own_attention import match_method
from fastlm.hf.attention_interface import sdpa
from fastlm.ops import _registry
from tools.architectures import small

IDS = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
NAMES = ["bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt", "xglm"]


def logits(model, **kw):
    with torch.no_grad():
        return model(IDS, attention_mask=MASK, **kw).logits[MASK.bool()]


@pytest.mark.parametrize("name", NAMES)
def test_padding_windows_and_caches(name):
    model = small(name)
    expected, exact = logits(model), exactly(logits, model)
    options = {"attention_mask": MASK, "max_new_tokens": 8, "do_sample": False}
    tokens = model.generate(IDS, **options)
    with fastlm.patch(model) as patch, _registry.recording() as verdicts:
        as_accurate(logits(model), expected, exact)
        deaf = "is not told whether its weights are wanted" in patch.report()  # MPT in 5.0
        assert [v.stem for v in verdicts].count("attention") == (0 if deaf else 2)
        assert torch.equal(model.generate(IDS, **options), tokens)


@pytest.mark.parametrize("name", NAMES)
def test_weights_for_those_who_ask(name):
    model = small(name)
    if model._supports_sdpa:  # which has none to give: Falcon, from 5.24 on CodeGen and GPT-J
        model.set_attn_implementation("eager")

    def weights(model):
        with torch.no_grad():
            return model(IDS, output_attentions=True).attentions

    expected, exact = weights(model), exactly(weights, model)
    with fastlm.patch(model):
        made = weights(model)
    assert len(made) == len(expected) == 2
    for three in zip(made, expected, exact, strict=True):
        as_accurate(*three)


def test_a_number_that_no_score_comes_near_hides_as_well():
    """openai-gpt hides by -1e4: a kernel's mask while all scores are small, which is looked at."""
    model = small("openai-gpt")
    right = MASK.flip(1)

    def run(model, mask=None, factor=1.0):
        model = copy.deepcopy(model)
        model.transformer.h[0].attn.c_attn.weight.data.mul_(factor)
        out = model(IDS, attention_mask=mask, labels=IDS)
        out.loss.backward()
        gradient = model.transformer.h[0].attn.c_attn.weight.grad.flatten()
        kept = (torch.ones_like(IDS) if mask is None else mask).bool()
        return out.logits[kept].detach(), gradient / gradient.norm()

    for options, calls in (
        ({}, 2),
        ({"mask": right}, 2),
        ({"mask": MASK}, 0),  # queries that see no key
        ({"factor": 1e4}, 1),  # scores of thousands
    ):
        expected, exact = run(model, **options), exactly(run, model, **options)
        with fastlm.patch(model), _registry.recording() as verdicts:
            made = run(model, **options)
        assert [v.stem for v in verdicts].count("attention") == calls, options
        for three in zip(made, expected, exact, strict=True):
            as_accurate(*three)
    with torch.no_grad(), fastlm.patch(model):
        expected = model(IDS).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(IDS).logits, expected)
        weights = model(IDS, output_attentions=True).attentions
    assert len(weights) == 2 and all(torch.is_tensor(w) for w in weights)


def test_alibi():
    config = transformers.FalconConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = transformers.FalconForCausalLM(config).eval()
    expected, exact = logits(model), exactly(logits, model)
    with fastlm.patch(model), _registry.recording() as verdicts:
        as_accurate(logits(model), expected, exact)
    assert "attention" in {v.stem for v in verdicts}


class Own(nn.Module):
    """A method as GPT-J has it, with something of its own."""

    def __init__(self, scale=0.25, seen=None, power=1.0, head_dim=16, low=-torch.inf):
        super().__init__()
        self.seen, self.scale, self.power, self.head_dim = seen, scale, power, head_dim
        self.low = low
        self.bias = nn.Buffer(torch.ones(1, 1, 32, 32, dtype=torch.bool))
        self.proj = nn.Linear(1, 1)

    def _attn(self, query, key, value, attention_mask=None):
        scores = query @ key.transpose(-1, -2) * self.scale
        t = torch.arange(scores.shape[-1])
        if self.seen is not None:
            scores = scores.masked_fill(~self.seen(t[:, None], t), self.low)
        weights = scores.softmax(-1) ** self.power
        return weights @ value, weights


def test_what_a_method_does_is_measured():
    x = [torch.randn(1, 2, 9, 16) for _ in range(3)]
    for options in (
        {},
        {"scale": 1.0},
        {"scale": 0.3},
        {"seen": lambda i, j: j <= i},
        {"seen": lambda i, j: (j <= i) & (j > i - 4)},
    ):
        layer = Own(**options)
        ours = match_method(layer, ("_attn",))
        made, _ = ours(layer, layer._attn, None, *x, None)
        torch.testing.assert_close(made, layer._attn(*x)[0])
        assert layer.training
    for options, reason in (
        ({"seen": lambda i, j: (j <= i) & (j % 3 != 1)}, "hides keys in another way"),
        ({"head_dim": None}, "has heads of unknown size"),
        ({"seen": lambda i, j: j <= i, "low": -5.0}, "hides keys in another way"),
        ({"seen": lambda i, j: (j <= i) & (j > i - 4), "low": -1e4}, "by a number that scores can"),
    ):
        assert reason in match_method(Own(**options), ("_attn",))
    assert "could not be tried" in match_method(Own(), ("missing",))
    assert "several methods" in match_method(Own(), ("a", "b"))


def test_pytorch_runs_what_the_kernel_does_otherwise():
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 4, 9, 16)
    attend = nn.functional.scaled_dot_product_attention
    with _registry.recording() as verdicts:
        assert torch.equal(sdpa(q, k, k, is_causal=True), attend(q, k, k, is_causal=True))
        assert torch.equal(sdpa(q[0], k[0], k[0]), attend(q[0], k[0], k[0]))
    assert not verdicts
    torch.testing.assert_close(sdpa(q, k[:, :1], k[:, :1]), attend(q, k[:, :1], k[:, :1]))
    torch.testing.assert_close(sdpa(q[:, :, :1], k, k), attend(q[:, :, :1], k, k))
