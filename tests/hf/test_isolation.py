"""A patch touches one instance, and every bit of it comes off again."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import as_accurate, exactly, tiny, token_numbers

import fastlm
from fastlm.hf import unpatch
from fastlm.hf.patch import suspended
from fastlm.ops import _registry

IDS = token_numbers()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def instance_attributes(model):
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if not isinstance(value, dict)
    }


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_only_this_instance_changes(name):
    patched, other = tiny(name), tiny(name)
    expected = logits(other)
    classes = {type(m) for m in other.modules()}
    forwards = {cls: vars(cls).get("forward") for cls in classes}
    functions = dict(vars(sys.modules[type(other).__module__]))
    config = copy.deepcopy(patched.config.to_dict())
    patched.config = shared = other.config  # one configuration for both
    cross_entropy = torch.nn.functional.cross_entropy
    with fastlm.patch(patched):
        assert torch.equal(logits(other), expected)
        assert torch.equal(logits(tiny(name)), expected)  # built later
        assert patched.config is shared and shared.to_dict() == config
        assert {cls: vars(cls).get("forward") for cls in classes} == forwards
        assert dict(vars(sys.modules[type(other).__module__])) == functions
        assert torch.nn.functional.cross_entropy is cross_entropy
        assert all("forward" not in m.__dict__ for m in other.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_undo_restores_the_very_objects(name):
    model = tiny(name)
    expected, before = logits(model), instance_attributes(model)
    p = fastlm.patch(model)
    assert instance_attributes(model).keys() != before.keys()
    p.undo()
    p.undo()
    after = instance_attributes(model)
    assert after.keys() == before.keys()
    assert all(after[k] is before[k] for k in before)
    assert torch.equal(logits(model), expected)
    assert "(undone)" in p.report()


def test_the_random_state_is_not_touched():
    model, state = tiny(), torch.get_rng_state()
    with fastlm.patch(model):
        assert torch.equal(torch.get_rng_state(), state)


def test_undo_leaves_what_another_tool_has_wrapped_since():
    model = tiny()
    p = fastlm.patch(model)
    theirs = model.lm_head.forward = lambda x: x
    with pytest.raises(RuntimeError, match="1 forwards were replaced by another tool"):
        p.undo()
    assert model.lm_head.forward is theirs
    assert "forward" not in model.model.norm.__dict__


def test_what_another_tool_has_replaced_is_left_alone():
    model = tiny()
    model.lm_head.forward = theirs = lambda x: x
    with fastlm.patch(model) as p:
        assert model.lm_head.forward is theirs
        assert "another tool has replaced its forward" in p.report()


def test_patching_twice_adds_what_is_missing():
    model = tiny()
    first = fastlm.patch(model, ops=["rms_norm"])
    second = fastlm.patch(model)
    assert "replaced by an earlier patch" in second.report()
    third = fastlm.patch(model, strict=True)
    assert not [e for e in third.entries if e.state == "replaced"]
    third.undo()
    first.undo()
    assert "forward" not in model.model.norm.__dict__
    assert "forward" in model.lm_head.__dict__
    second.undo()
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_a_copy_is_patched_and_independent():
    model = tiny()
    with fastlm.patch(model):
        twin = copy.deepcopy(model)
    assert twin.lm_head.forward.__self__ is twin.lm_head
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    with suspended(twin):
        expected = logits(twin)
    with _registry.recording() as verdicts:
        as_accurate(logits(twin), expected, exactly(logits, twin))
    assert verdicts
    assert unpatch(twin) > 20
    assert torch.equal(logits(twin), expected)


def test_state_dict_and_saving(tmp_path):
    model = tiny()
    keys, expected = list(model.state_dict()), logits(model)
    with fastlm.patch(model):
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
        torch.save(model, tmp_path / "whole.pt")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), expected)
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(logits(whole), expected)  # comes back without the patch,
    with fastlm.patch(whole, strict=True) as p:  # and can be patched
        assert len([e for e in p.entries if e.state == "replaced"]) > 20


def test_attn_implementation_by_name():
    from fastlm.hf.attention_interface import register

    register()
    model = tiny()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0

    def kept(model):
        with torch.no_grad():
            return model(IDS, attention_mask=mask).logits[mask.bool()]

    expected, exact = kept(model), exactly(kept, model)
    model.set_attn_implementation("fastlm")
    with _registry.recording() as verdicts:
        made = kept(model)
    as_accurate(made, expected, exact)
    assert {v.stem for v in verdicts} == {"attention"}
    with pytest.raises(TypeError, match="fastlm attention: unknown arguments colour"):
        model(IDS, colour="green")


def test_importing_fastlm_imports_no_transformers():
    code = "import sys, fastlm, fastlm.hf; fastlm.patch; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
