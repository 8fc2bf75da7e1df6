"""What happens to a patched model after the patch: other heads, weights, attention, adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import as_accurate, exactly, tiny, token_numbers

import fastlm
from fastlm.hf import _head
from fastlm.hf.attention_interface import attention
from fastlm.hf.patch import suspended
from fastlm.ops import _registry
from tools.architectures import small

IDS = token_numbers()


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    monkeypatch.setattr(_head, "WORTH", 0)


def logits(model, **kw):
    with torch.no_grad():
        return model(IDS, **kw).logits


def checked(model, **kw) -> set[str]:
    """Asserts the rule for a patched model as it is now; returns which operators ran."""
    with suspended(model):
        theirs, exact = logits(model, **kw), exactly(logits, model, **kw)
    with _registry.recording() as verdicts:
        as_accurate(logits(model, **kw), theirs, exact)
    return {v.stem for v in verdicts}


@pytest.mark.parametrize("order", ["patch first", "adapter first"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=str)
def test_adapters_are_merged(order, targets):
    peft = pytest.importorskip("peft", reason="pip install fastlm[integration]")
    model = tiny(tie_word_embeddings=False)
    patch = fastlm.patch(model) if order == "patch first" else None
    torch.manual_seed(5)
    options = {"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options, init_lora_weights=False))
    patch = patch or fastlm.patch(adapted)
    adapted.eval()
    if targets == "all-linear":
        assert "feed_forward" not in checked(adapted), "its maps have adapters"
    before = logits(adapted)
    merged = adapted.merge_and_unload().requires_grad_()
    assert merged is model
    assert list(merged.state_dict()) == list(tiny(tie_word_embeddings=False).state_dict())
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)
    assert checked(merged) >= {"attention", "rms_norm", "rope", "linear"}
    with fastlm.patch(merged):  # what was adapted while it was patched
        assert checked(merged) >= {"attention", "feed_forward", "rms_norm", "rope", "linear"}
        with _registry.recording() as verdicts:
            merged(IDS, labels=IDS).loss.backward()
        assert "linear_cross_entropy" in {v.stem for v in verdicts}
    patch.undo()
    assert all("forward" not in m.__dict__ for m in merged.modules())


@pytest.mark.parametrize("tied", [True, False])
def test_token_embeddings_are_resized(tied):
    model = tiny(tie_word_embeddings=tied)
    patch = fastlm.patch(model)
    model.resize_token_embeddings(120)
    assert logits(model).shape[-1] == 120
    checked(model)
    with suspended(model):
        tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), tokens)

    def gradients(model):
        model.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())])

    with suspended(model):
        theirs, exact = gradients(model), exactly(gradients, model)
    as_accurate(gradients(model), theirs, exact)
    with fastlm.patch(model, strict=True) as second:  # an untied head is another one now
        assert ("linear_cross_entropy" in second.report()) == (not tied)
        with _registry.recording() as verdicts:
            as_accurate(gradients(model), theirs, exact)
        assert "linear_cross_entropy" in {v.stem for v in verdicts}
    as_accurate(gradients(model), theirs, exact)
    patch.undo()
    assert all("forward" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_another_attention_is_chosen(name):
    """Eager masks are added to the scores, those of SDPA are not; both come to the kernel."""
    model = small(name)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    padded = mask.bool()

    def seen(model):
        return logits(model, attention_mask=mask)[padded]

    own = model.config._attn_implementation
    with fastlm.patch(model):
        for kind in ("eager", "sdpa", own):
            if kind == "sdpa" and not model._supports_sdpa:
                continue
            model.set_attn_implementation(kind)
            with suspended(model):
                theirs, exact = seen(model), exactly(seen, model)
            with _registry.recording() as verdicts:
                as_accurate(seen(model), theirs, exact)
            assert "attention" in {v.stem for v in verdicts}, kind
            if kind == "eager":
                wanted = model(IDS, output_attentions=True).attentions
                assert all(torch.is_tensor(w) for w in wanted)
    with suspended(model):
        assert model.config._attn_implementation == own


def test_dtype_and_back():
    model = tiny()
    plain = copy.deepcopy(model)
    with fastlm.patch(model):
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
            model.to(dtype)
            assert logits(model).dtype == dtype
            assert "attention" in checked(model)
        assert list(model.state_dict()) == list(plain.state_dict())


def test_layers_are_cut_off_and_frozen():
    """A shorter model, with parameters that are not trained."""
    model = tiny()
    with fastlm.patch(model):
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        model.model.embed_tokens.requires_grad_(False)
        assert checked(model) >= {"attention", "feed_forward"}
        model(IDS, labels=IDS).loss.backward()
        frozen = {n for n, p in model.named_parameters() if p.grad is None}
        assert frozen == {"model.embed_tokens.weight"}  # the tied head, too


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_dropout_that_is_a_number_is_the_models_own(name):
    model = small(name).train()
    blocks = [m for m in model.modules() if type(m).__name__.endswith("MLP")]
    with fastlm.patch(model):
        for rate, calls in ((0.0, 2), (0.5, 0)):
            for block in blocks:
                block.hidden_dropout = rate
            with _registry.recording() as verdicts:
                made = logits(model)
            assert [v.stem for v in verdicts].count("feed_forward") == calls
            assert torch.equal(made, logits(model)) == (rate == 0.0)


def test_arguments_that_attention_does_not_know():
    """In place of SDPA they are SDPA's, and said; asked for by name, dropout beside sinks fails."""
    model = tiny()
    plain = logits(model, colour="green")
    with fastlm.patch(model, ops=["attention"]), _registry.recording() as verdicts:
        with pytest.warns(UserWarning, match="does not know the arguments colour"):
            assert torch.equal(logits(model, colour="green"), plain)
        assert not verdicts
    q = torch.randn(1, 2, 3, 8)
    for options in ({"s_aux": torch.zeros(2)}, {"softcap": 2.0}):
        with pytest.raises(ValueError, match="no dropout beside softcap or sinks, got both"):
            attention(model, q, q, q, None, dropout=0.5, **options)
