"""fastlm.verify and fastlm.explain on whole models."""

from __future__ import annotations

import importlib
import json
import re
import sys
import types

import pytest
import torch
from tiny_models import tiny, token_numbers
from torch import nn

import fastlm
from fastlm.hf import coverage
from fastlm.hf._float64 import float64
from fastlm.hf.patch import is_ours


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_patched_model_is_verified(name, dtype):
    model = tiny(name, dtype)
    with fastlm.patch(model):
        report = fastlm.verify(model)
    assert report.ok, str(report)
    names = [e.name for e in report.errors]
    assert "logits" in names and "loss" in names
    assert "gradient of " + ("model.layers.*." if name == "llama" else "transformer.h.*.") in str(
        sorted(names)
    )
    assert any("DecoderLayer" in n or "Block" in n for n in names)
    assert str(report).endswith("verified")
    assert json.loads(json.dumps(report.to_dict()))["ok"]


def test_an_unpatched_model_is_left_as_it_was():
    model = tiny().train()
    for p in model.parameters():
        p.requires_grad_(False)
    assert fastlm.verify(model, token_numbers(1, 8)).ok
    assert model.training and all(m.training for m in model.modules())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_a_wrong_kernel_is_found():
    model = tiny()
    with fastlm.patch(model):
        layer = model.model.layers[1].mlp
        good = layer.__dict__["forward"]

        def wrong(self, x):
            return good(x) * 1.001

        wrong.fastlm = True
        layer.__dict__["forward"] = types.MethodType(wrong, layer)
        report = fastlm.verify(model)
        layer.__dict__["forward"] = good
    assert not report.ok
    assert "TOO LARGE" in str(report) and str(report).endswith("NOT verified")
    bad = [e.name for e in report.errors if not e.ok]
    assert "logits" in bad and "model.layers.1.mlp (LlamaMLP)" in bad
    assert "model.layers.0.mlp (LlamaMLP)" not in bad


def test_a_wrong_gradient_of_a_module_is_found():
    """Its results are right: only the backward pass of single modules tells which one it is."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            return g * 1.001

    model = tiny()
    with fastlm.patch(model):
        norm = model.model.norm
        good = norm.__dict__["forward"]

        def wrong(self, x, residual=None):
            return good(Wrong.apply(x), residual)

        wrong.fastlm = True
        norm.__dict__["forward"] = types.MethodType(wrong, norm)
        report = fastlm.verify(model)
        assert not any("backward" in e.name for e in fastlm.verify(model, gradients=False).errors)
        norm.__dict__["forward"] = good
    errors = {e.name: e for e in report.errors}
    assert not errors["model.norm (LlamaRMSNorm), backward"].ok
    assert errors["model.norm (LlamaRMSNorm)"].ok and errors["logits"].ok
    others = [e for n, e in errors.items() if n.endswith("backward") and "model.norm" not in n]
    assert len(others) >= 5 and all(e.ok for e in others), report


def test_a_wrong_loss_is_found(monkeypatch):
    made = importlib.import_module("fastlm.hf.patch")
    good = made.causal_lm_loss

    def wrong(*args, **kw):
        return good(*args, **kw) * (1 + 1e-6)

    monkeypatch.setattr(made, "causal_lm_loss", wrong)
    report = fastlm.verify(tiny(), gradients=False)
    assert [e.name for e in report.errors if not e.ok] == ["loss"], str(report)


@pytest.mark.parametrize("given", ["made up", "tokens", "dict", "embeddings"])
def test_the_luck_of_one_draw_is_no_verdict(given, monkeypatch):
    """One gradient is over its budget for the first inputs alone."""
    module = sys.modules["fastlm.hf.verify"]
    good, judged = module._pool, []

    def pool(pooled, *rest):
        good(pooled, *rest)
        for name, squares in pooled.items():
            if name.endswith("down_proj.weight") and name not in judged:
                judged.append(name)
                allowed = squares.error(name, torch.float32).allowed
                squares.ours = (1.5 * allowed) ** 2 * squares.count

    monkeypatch.setattr(module, "_pool", pool)
    model, ids = tiny(), token_numbers(2, 9)
    inputs = {
        "made up": None,
        "tokens": ids,
        "dict": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "embeddings": {"inputs_embeds": torch.randn(2, 9, model.config.hidden_size), "labels": ids},
    }
    report = fastlm.verify(model, inputs[given])
    assert len(judged) == 1
    bad = [e.name for e in report.errors if not e.ok]
    assert bad == (judged if given == "embeddings" else []), str(report)


def test_a_loss_that_tokens_alone_do_not_give_is_left_out():
    """GIT's wants an image; its text stands behind the image's places."""
    model = tiny()
    model.loss_function = lambda logits, labels, **_: (logits[:, 4:, 0] - labels).mean()
    report = fastlm.verify(model)
    assert report.ok, str(report)
    assert "loss" not in [e.name for e in report.errors]
    assert any(e.name.startswith("gradient of") for e in report.errors)
    (note,) = report.notes
    assert re.match(
        r"its own loss was not compared, it fails with labels \[2, 48\] alone: Run", note
    )
    assert note in str(report) and report.to_dict()["notes"] == [note]
    ids = token_numbers(2, 9)
    with pytest.raises(RuntimeError, match="must match the size"):  # somebody's own labels
        fastlm.verify(model, {"input_ids": ids, "labels": ids})
    with pytest.raises(IndexError):  # not the labels' fault
        fastlm.verify(model, ids + model.config.vocab_size)


def test_any_module_with_inputs():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    report = fastlm.verify(model, {"input": torch.randn(3, 8)})
    assert report.ok and len([e for e in report.errors if "gradient of" in e.name]) == 4
    assert all(e.torch < 1e-5 for e in report.errors), report  # of the same cotangent in float64
    with pytest.raises(TypeError, match="verify: inputs must be given"):
        fastlm.verify(model)
    with pytest.raises(TypeError, match=r"verify: model must be a torch.nn.Module, got str"):
        fastlm.verify("gpt2")


def test_the_float64_run_casts_nothing_down():
    x = torch.randn(4, dtype=torch.float64)
    with float64():
        made = [x.float(), x.to(torch.float32), x.to(dtype=torch.bfloat16), x.half()]
        made += [torch.softmax(x, 0, dtype=torch.float32), torch.zeros(2), torch.rand(2)]
    assert all(t.dtype == torch.float64 for t in made)
    assert torch.equal(made[0], x)
    assert torch.zeros(2).dtype == torch.float32


def test_explain_a_model():
    model = tiny()
    text = str(fastlm.explain(model))
    assert "model.layers.{0-1}.self_attn" in text
    assert "one forward pass calls fastlm's operators" in text
    assert "attention on cpu, float32" in text
    lines = text.splitlines()
    norms = next(i for i, line in enumerate(lines) if line.startswith("  rms_norm on cpu"))
    # the norm after the residual addition runs inside the layer
    assert lines[norms].endswith("(5 times)")
    named = "in model.layers.{0-1}.input_layernorm, model.layers.{0-1}, model.norm"
    assert lines[norms + 1].strip() == named
    assert not any(is_ours(m.__dict__.get("forward")) for m in model.modules())
    assert not torch.nn.modules.module._global_forward_hooks


def test_coverage():
    made = coverage(tiny())
    assert (made.modules, made.of, dict(made.without)) == (20, 21, {"Embedding": 1})
    assert 0 < made.time < 1 and made.others[0][1] < 1
    assert str(made).startswith("coverage: 20 of 21 modules with parameters (not 1 Embedding); ")
    model = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Conv1d(1, 1, 3))
    part = coverage(model, {"input": torch.randn(64, 1, 512)})
    assert (part.modules, part.of) == (1, 3 - 1)
    with fastlm.patch(model):
        assert coverage(model, {"input": torch.randn(64, 1, 512)}).modules == 1
    # with nothing but PyTorch's own products and functions, nothing is ours
    assert coverage(nn.Conv1d(1, 1, 3), {"input": torch.randn(2, 1, 64)}).time == 0


def test_the_share_of_time_is_of_a_warm_pass_and_nothing_else_is_printed(capfd):
    """A first pass pays for memory that it touches first: here some 50 ms of one operator."""

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(64, 64), 0

        def forward(self, input):
            self.calls += 1
            size = 2**23 if self.calls in (1, 2, 7) else 2  # at first, and once again
            return self.linear(input) + torch.zeros(size)[0]

    made = coverage(Slow(), {"input": torch.randn(4096, 64)})
    assert made.time > 0.3 and dict(made.others).get("aten::zeros", 0) < 0.3, made
    fastlm.explain(tiny())
    assert capfd.readouterr() == ("", "")


def test_a_decoder_of_ones_own_is_called_by_its_own_names():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(96, 32)
            self.norm = nn.LayerNorm(32)
            self.head = nn.Linear(32, 96)

        def forward(self, tokens):
            return self.head(self.norm(self.embed(tokens)))

    report = fastlm.verify(Net(), token_numbers())
    assert report.ok, report
    assert any("head.weight" in e.name for e in report.errors)
