"""What users of other patches ran into, and what a patched model has to live through."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import as_accurate, exactly, tiny, token_numbers
from torch import nn

import fastlm
from fastlm.hf.patch import suspended
from fastlm.ops import _registry

IDS = token_numbers()


def logits(model, **kw):
    with torch.no_grad():
        return model(IDS, **kw).logits


# ---- known failures of others ------------------------------------------------------------------


def test_activations_are_not_taken_for_silu():
    """Liger computes SwiGLU whatever `hidden_act` says."""
    for act in ("gelu_pytorch_tanh", "relu", "gelu"):
        model = tiny(hidden_act=act)
        expected, exact = logits(model), exactly(logits, model)
        with fastlm.patch(model, strict=True):
            as_accurate(logits(model), expected, exact)
    model = tiny(hidden_act="mish")
    expected, exact = logits(model), exactly(logits, model)
    with fastlm.patch(model) as patch:
        as_accurate(logits(model), expected, exact)
        assert "its activation is none of" in patch.report()
    with pytest.raises(RuntimeError, match="strict, but left alone"):
        fastlm.patch(model, strict=True)


def test_nothing_is_a_silent_no_op():
    """A model without anything to replace says so; with strict it is an error."""
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Tanh())
    assert fastlm.patch(model).report().startswith("fastlm.patch(Sequential): 0 modules replaced")
    with pytest.raises(RuntimeError, match="patch: strict, but no module for any op"):
        fastlm.patch(model, strict=True)
    with pytest.raises(RuntimeError, match="patch: strict, but no module for layer_norm"):
        fastlm.patch(tiny(), ops=["rms_norm", "layer_norm"], strict=True)


def test_rotation_of_a_model_built_before_stays():
    """Liger patches a function of the module, so that models in use change as well."""
    other, model = tiny(), tiny()
    expected = logits(other)
    rotate = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    with fastlm.patch(model, ops=["rope"], strict=True):
        assert transformers.models.llama.modeling_llama.apply_rotary_pos_emb is rotate
        with _registry.recording() as verdicts:
            assert torch.equal(logits(other), expected)
        assert not verdicts


def test_classes_stay_what_they_are():
    """isinstance, type and the printed model are the same with the patch."""
    model = tiny()
    before = {name: type(m) for name, m in model.named_modules()}
    text = repr(model)
    with fastlm.patch(model):
        assert {name: type(m) for name, m in model.named_modules()} == before
        assert repr(model) == text and isinstance(model, transformers.LlamaForCausalLM)


def test_padding_is_not_lost_with_an_attention_of_ones_own():
    """An attention function registered without its mask function ignores padding in silence."""
    model = tiny()
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    kept = mask.bool()
    expected, exact = (
        logits(model, attention_mask=mask),
        exactly(logits, model, attention_mask=mask),
    )
    with fastlm.patch(model):
        made = logits(model, attention_mask=mask)
        as_accurate(made[kept], expected[kept], exact[kept])
        moved = IDS.clone()
        moved[0, :5] = 7  # what is padded does not matter
        with torch.no_grad():
            again = model(moved, attention_mask=mask).logits
        assert torch.equal(again[kept], made[kept])


def test_inputs_of_the_backward_pass_are_not_overwritten():
    """Liger's cross-entropy wrote the gradient into the logits."""
    model = tiny()
    with fastlm.patch(model, logits="always"):
        out = model(IDS, labels=IDS)
        before = out.logits.clone()
        out.loss.backward()
        assert torch.equal(out.logits, before)


# ---- what happens to models --------------------------------------------------------------------


@pytest.mark.parametrize("to", ["half", "bfloat16", "double"])
def test_another_dtype_after_the_patch(to):
    model = tiny()
    with fastlm.patch(model):
        getattr(model, to)()
        made = logits(model)
        with suspended(model):
            theirs, exact = logits(model), exactly(logits, model)
    assert made.dtype == theirs.dtype
    as_accurate(made, theirs, exact)


def placed(model):
    """As device_map over several devices leaves it: weights come when a module runs, then go."""
    accelerate = pytest.importorskip("accelerate", reason="pip install fastlm[integration]")
    parts = ("embed_tokens", "norm", "layers.0", "layers.1", "rotary_emb")
    places = {"lm_head": "cpu", **{f"model.{part}": "cpu" for part in parts}}
    return accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)


def test_placed_over_devices_after_the_patch():
    model = tiny()
    expected, exact = logits(model), exactly(logits, model)
    fastlm.patch(model, strict=True)
    model = placed(model)
    with _registry.recording() as verdicts:
        as_accurate(logits(model), expected, exact)
    assert {"attention", "rms_norm", "linear"} <= {v.stem for v in verdicts}


def test_placed_over_devices_before_the_patch():
    model = tiny()
    expected, exact = logits(model), exactly(logits, model)
    model = placed(model)
    with fastlm.patch(model) as patch:
        as_accurate(logits(model), expected, exact)
        assert "accelerate has wrapped its forward (device_map): patch before" in patch.report()
    assert torch.equal(logits(model), expected)


def test_from_pretrained_with_a_device_map(tmp_path):
    pytest.importorskip("accelerate", reason="pip install fastlm[integration]")
    tiny().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    expected, exact = logits(model), exactly(logits, model)
    with fastlm.patch(model, strict=True):
        as_accurate(logits(model), expected, exact)


def test_compiled_by_inductor():
    """Without a break in the graph, and the same as the patched model without compiling."""
    model = tiny(num_hidden_layers=1)
    expected, exact = logits(model), exactly(logits, model)
    with fastlm.patch(model):
        compiled = torch.compile(model, fullgraph=True)
        as_accurate(logits(compiled, use_cache=False), expected, exact)
        with torch.autograd.profiler.profile() as profile:
            logits(compiled, use_cache=False)
    assert "fastlm::attention" in {event.name for event in profile.function_events}


def test_exported():
    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    model = tiny(num_hidden_layers=1)
    expected, exact = logits(model), exactly(logits, model)
    with fastlm.patch(model), torch.no_grad():
        program = torch.export.export(Logits(model), (IDS,))
    names = {str(node.target) for node in program.graph.nodes}
    assert {n for n in names if n.startswith("fastlm.")}
    as_accurate(program.module()(IDS).detach(), expected, exact)


def test_a_state_dict_goes_through_a_file(tmp_path):
    model = tiny()
    with fastlm.patch(model):
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
        assert list(loaded) == list(model.state_dict())
        twin = tiny()
        twin.load_state_dict(loaded, strict=True)
    assert torch.equal(logits(twin), logits(model))
