"""Patched models in fp16, and under autocast to it: kernels, not the reference."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny, token_numbers

import fastlm
from fastlm import _ext
from fastlm.ops import _registry
from fastlm.testing import error

NATIVE = pytest.mark.skipif(_ext.native is None, reason="no native kernels")
HALF = torch.float16


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_patched_model_is_verified(name):
    with fastlm.patch(model := tiny(name, HALF)):
        report = fastlm.verify(model)
    assert report.ok, str(report)


@NATIVE
@pytest.mark.parametrize("autocast", [False, True])
def test_every_operator_runs_natively(autocast):
    model, tokens = tiny("llama", torch.float32 if autocast else HALF), token_numbers(2, 12)
    with (
        fastlm.patch(model),
        _registry.recording() as verdicts,
        torch.autocast("cpu", HALF, enabled=autocast),
    ):
        model(tokens, labels=tokens).loss.backward()
        model.generate(tokens, max_new_tokens=2, do_sample=False)
    ran = {(v.stem, v.chosen) for v in verdicts}
    assert {"rms_norm", "rope", "feed_forward", "attention"} <= {stem for stem, _ in ran}
    assert not [stem for stem, chosen in ran if chosen == "reference"]
    assert any(v.dtype == HALF for v in verdicts)


def test_autocast_with_a_scaled_loss_has_the_gradients_of_pytorch():
    """A step under autocast with GradScaler's scale, patched and not, against float64."""
    tokens = token_numbers(2, 24)
    scale = 2.0**12

    def gradients(patched, dtype):
        model = tiny("llama", dtype)
        with torch.autocast("cpu", HALF, enabled=dtype == torch.float32):
            if patched:
                fastlm.patch(model)
            (model(tokens, labels=tokens).loss * scale).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    ours, theirs = gradients(True, torch.float32), gradients(False, torch.float32)
    exact = gradients(False, torch.float64)
    for name in exact:
        verdict = error(name, ours[name], theirs[name], exact[name])
        assert verdict.ours <= verdict.allowed, str(verdict)
