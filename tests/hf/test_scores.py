"""Attention written out in a model's forward: its scores are put off, and made where need be."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import as_accurate, exactly
from torch import nn

import fastlm
from fastlm.hf._scores import Scores, product, released
from fastlm.ops import _registry
from tools.architectures import small

NAMES = ["bloom", "mpt", "xglm"]
IDS = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0  # queries that see no key, and one of them predicts the first token


def put_off(q, k):
    return product(nn.Linear(1, 1), torch.matmul, None, q, k.transpose(-1, -2))


def heads(seed=0, rows=5, keys=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, 3, rows, 8), (2, 3, keys, 8), (2, 3, keys, 8))
    return [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in sizes]


def attention_of(steps, q, k, v):
    """The usual lines around `steps`, on scores put off or on tensors."""
    made = steps(put_off(q, k))
    return torch.matmul(F.softmax(made, dim=-1), v)


BIAS = torch.linspace(0, -2, 7).view(1, 7) * torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1)
HIDDEN = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(2)) < 0.4
HIDDEN[1, 0, 3] = True  # a query that sees no key
LOWEST = torch.finfo(torch.float32).min
KNOWN = {
    "nothing": lambda s: s,
    "scale": lambda s: s * 0.5,
    "divided": lambda s: s / 8**0.5,
    "bias": lambda s: s * 0.25 + BIAS,
    "views": lambda s: s.view(6, 5, 7).view(2, 3, 5, -1).float() + BIAS,
    "mask": lambda s: s + LOWEST * HIDDEN.float(),
    "filled": lambda s: (s + BIAS).masked_fill(HIDDEN, LOWEST),
    "maximum": lambda s: torch.max(s + LOWEST * HIDDEN.float(), torch.tensor(LOWEST)),
}
UNKNOWN = {
    "scaled late": lambda s: (s + BIAS) * 0.5,
    "by a tensor": lambda s: s * BIAS.exp(),
    "capped": lambda s: s.tanh(),
    "cut": lambda s: s[..., :7] - BIAS,
    "filled mildly": lambda s: s.masked_fill(HIDDEN, -3.0),
    "larger": lambda s: torch.max(s, torch.tensor(-0.5)),
    "dropped out": lambda s: F.dropout(s, 0.0, True) + s.mean(),
    "own gradient": lambda s: s + BIAS.clone().requires_grad_(),
}


@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_the_same_in_value_and_gradients(name):
    """Known steps come to the kernel; the others make the scores, and all is right."""
    steps = (KNOWN | UNKNOWN)[name]
    ours, theirs = heads(), heads()
    with _registry.recording() as verdicts:
        made = attention_of(steps, *ours)
    assert ("attention" in {v.stem for v in verdicts}) == (name in KNOWN)
    q, k, v = theirs
    expected = torch.matmul(F.softmax(steps(torch.matmul(q, k.transpose(-1, -2))), dim=-1), v)
    torch.testing.assert_close(made, expected)
    weight = torch.linspace(-1, 1, made.numel()).view(made.shape)
    for result in (made, expected):
        (result * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_weights_that_were_never_made_are_not_returned():
    q, k, _ = heads()
    weights = F.softmax(put_off(q, k), dim=-1)
    assert isinstance(weights, Scores)
    assert released((q, weights)) == (q, None)
    torch.testing.assert_close(weights.value(), (q @ k.transpose(-1, -2)).softmax(-1))
    assert torch.is_tensor(product(nn.Linear(1, 1), torch.matmul, True, q, k.transpose(-1, -2)))
    dropped = F.dropout(weights, 0.5, True)
    assert torch.is_tensor(dropped)


@pytest.mark.parametrize("name", NAMES)
def test_training_with_padding(name):
    """Loss and gradients, of a query too that sees nothing; checkpointed ones are the same."""
    model = small(name)
    labels = IDS.masked_fill(MASK == 0, -100)

    def gradients(model):
        model.zero_grad()
        model(IDS, attention_mask=MASK, labels=labels, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected, exact = gradients(model), exactly(gradients, model)
    with fastlm.patch(model):
        made = gradients(model)
        as_accurate(made, expected, exact)
        model.gradient_checkpointing_enable()
        assert torch.equal(gradients(model), made)


@pytest.mark.parametrize("name", NAMES)
def test_bf16(name):
    model = small(name)
    model = model.bfloat16()

    def logits(model):
        with torch.no_grad():
            return model(IDS, attention_mask=MASK).logits[MASK.bool()]

    expected, exact = logits(model), exactly(logits, model)
    with fastlm.patch(model) as patch, _registry.recording() as verdicts:
        as_accurate(logits(model), expected, exact)
    deaf = "is not told whether its weights are wanted" in patch.report()  # MPT in 5.0
    assert [v.stem for v in verdicts].count("attention") == (0 if deaf else 2)


def test_who_looks_gets_weights():
    model = small("xglm")
    model.config.output_attentions = True
    with fastlm.patch(model), torch.no_grad():
        weights = model(IDS, attention_mask=MASK).attentions
    assert len(weights) == 2
    assert all(torch.is_tensor(w) for w in weights)


def test_compiled_and_copied():
    model = small("bloom")
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
    with fastlm.patch(model), torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(model)(IDS, use_cache=False).logits, expected)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)
