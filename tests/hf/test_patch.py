"""fastlm.patch: what it replaces, and that a patched model computes and trains as before."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import transformers
from tiny_models import FAMILIES, as_accurate, exactly, tiny, token_numbers
from torch import nn

import fastlm
from fastlm.hf._head import worth
from fastlm.hf.patch import STEMS, suspended
from fastlm.ops import _registry
from fastlm.testing import Pool
from tools.architectures import small

IDS = token_numbers()
LOSS = {"cross_entropy", "linear_cross_entropy"}


def logits(model, ids=IDS, **kw):
    with torch.no_grad():
        return model(ids, **kw).logits


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_stay_within_the_rule(name, dtype):
    model = tiny(name, dtype)
    theirs, exact = logits(model), exactly(logits, model)
    with fastlm.patch(model, strict=True):
        as_accurate(logits(model), theirs, exact)


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gemma", "glm"])
def test_other_families_come_for_free(name):
    """Norms of q and k, gate and up in one matrix, 1 + weight, interleaved rotation."""
    model = tiny(name, head_dim=8)
    expected, exact = logits(model), exactly(logits, model)
    with fastlm.patch(model, strict=True), _registry.recording() as verdicts:
        as_accurate(logits(model), expected, exact)
    stems = {v.stem for v in verdicts}
    assert stems >= {"attention", "feed_forward", "linear", "rms_norm", "rope"}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_expected_kind_is_replaced(name):
    with fastlm.patch(tiny(name), strict=True) as p:
        replaced = {s for e in p.entries if e.state == "replaced" for s in e.stems}
        fused = [e for e in p.entries if "residual add" in e.text]
    norm = {"layer_norm"} if name == "gpt2" else {"rms_norm", "rope", "feed_forward"}
    plan = {"decode_plan"} if name != "mistral" else set()  # its attention has a window
    assert replaced == {"linear", "attention", "activation", *LOSS} | norm | plan
    assert len(fused) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_kernels_run(name):
    model = tiny(name)
    with fastlm.patch(model), _registry.recording() as verdicts:
        model(IDS, labels=IDS)
    called = [v.stem for v in verdicts]
    norm = "layer_norm" if name == "gpt2" else "rms_norm"
    assert called.count(norm) == 5  # two a layer, one of them with the sum, and the last
    assert called.count("attention") == 2
    assert called.count("cross_entropy") == 1
    if name == "llama":
        assert called.count("rope") == 2
        assert called.count("feed_forward") == 2


def test_a_decode_step_takes_the_decode_kernel():
    model = tiny()
    with fastlm.patch(model, ops=set(STEMS) - {"decode_plan"}), torch.no_grad():
        cache = model(IDS).past_key_values
        with _registry.recording() as verdicts:
            model(IDS[:, :1], past_key_values=cache)
    assert [v.stem for v in verdicts].count("decode_attention") == 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_honoured(name, side):
    model = tiny(name)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    if side == "right":
        mask = mask.flip(1)
    keep = mask.bool()
    expected = logits(model, attention_mask=mask)[keep]
    exact = exactly(logits, model, attention_mask=mask)[keep]
    unmasked = logits(model)[keep]
    with fastlm.patch(model):
        made = logits(model, attention_mask=mask)[keep]
    as_accurate(made, expected, exact)
    assert side == "right" or (unmasked - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_same_tokens(name, cache):
    model = tiny(name)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,
    }
    expected = model.generate(IDS, **options)
    with fastlm.patch(model):
        assert torch.equal(model.generate(IDS, **options), expected)


def test_a_sliding_window_is_honoured():
    model = tiny("mistral", sliding_window=4)
    expected, tokens = logits(model), model.generate(IDS, max_new_tokens=8, do_sample=False)
    exact = exactly(logits, model)
    with fastlm.patch(model, strict=True):
        as_accurate(logits(model), expected, exact)
        assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), tokens)
    assert (logits(tiny("mistral", sliding_window=None)) - expected).abs().max() > 1e-2


def test_packed_sequences_do_not_see_each_other():
    model = tiny()
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    options = {"position_ids": positions, "use_cache": False}
    expected, exact = (f(model, IDS[:1], **options) for f in (logits, partial(exactly, logits)))
    with fastlm.patch(model):
        as_accurate(logits(model, IDS[:1], **options), expected, exact)


def training_gradients(model, ids=IDS):
    model.train().zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    made = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return made


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_step_gradients(name, checkpointing):
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if name == "gpt2" else {}
    model = tiny(name, **dropout)
    plain = copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    pool = Pool()
    draws = [token_numbers(seed=seed) for seed in range(16)]
    others = [(training_gradients(model, x), exactly(training_gradients, plain, x)) for x in draws]
    with fastlm.patch(model):
        for ids, (theirs, exact) in zip(draws, others, strict=True):
            pool.add(training_gradients(model, ids), theirs, exact)
    bad = [str(e) for e in pool.errors() if not e.ok]
    assert not bad, "\n".join(bad)


def test_the_loss_counts_items_as_transformers_does():
    model = tiny()
    options = {"labels": IDS, "num_items_in_batch": torch.tensor(7)}
    expected = model(IDS, **options).loss
    with fastlm.patch(model):
        torch.testing.assert_close(model(IDS, **options).loss, expected)


def test_autocast():
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = logits(model)
        with fastlm.patch(model):
            ours = logits(model)
    assert ours.dtype == theirs.dtype
    as_accurate(ours, theirs, exactly(logits, model))


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_autocast_where_queries_and_values_differ(name):
    """Norms of queries and keys widen them; the values stay what a product made them."""
    model = small(name)

    def loss(model):
        model.zero_grad()
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())])

    exact = exactly(loss, model)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = loss(model)
        with fastlm.patch(model), _registry.recording() as verdicts:
            ours = loss(model)
    assert "attention" in {v.stem for v in verdicts}
    as_accurate(ours, theirs, exact)


def test_attention_dropout_is_left_to_pytorch_in_training():
    model = tiny(attention_dropout=0.5).train()
    with fastlm.patch(model), _registry.recording() as verdicts:
        model(IDS)
        model.eval()(IDS)
    assert [v.stem for v in verdicts].count("attention") == 2


def test_moving_and_loading_weights_keep_working():
    model = tiny()
    with fastlm.patch(model):
        model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
        model.to(torch.bfloat16)
        with suspended(model):
            theirs, exact = logits(model), exactly(logits, model)
        as_accurate(logits(model), theirs, exact)


def test_hooks_still_fire():
    model = tiny()
    seen = []
    layer = model.model.layers[0]
    for module in (layer, layer.mlp, layer.mlp.up_proj, layer.post_attention_layernorm):
        module.register_forward_hook(lambda m, a, out: seen.append(type(m).__name__))
    logits(model)
    theirs = list(seen)
    seen.clear()
    with fastlm.patch(model):
        logits(model)
    assert seen == theirs


def test_a_linear_map_wrapped_later_is_called():
    """As a LoRA adapter does."""

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.extra = base, nn.Linear(base.in_features, base.out_features)

        def forward(self, x):
            return self.base(x) + self.extra(x)

    model = tiny()
    before = logits(model)
    with fastlm.patch(model):
        for layer in model.model.layers:
            layer.mlp.up_proj = Adapter(layer.mlp.up_proj)
            layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
        made = logits(model)
        with suspended(model):
            as_accurate(made, logits(model), exactly(logits, model))
    assert (made - before).abs().max() > 1e-2


def test_nothing_is_replaced_where_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(_registry, "implementations", lambda stem, device: ["reference"])
    model = tiny()
    p = fastlm.patch(model)
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert "linear: no kernel here" in p.report()


def test_hidden_states_are_recorded():
    model = tiny()

    def states(model):
        with torch.no_grad():
            return model(IDS, output_hidden_states=True).hidden_states

    expected, exact = states(model), exactly(states, model)
    with fastlm.patch(model):
        made = states(model)
    assert torch.equal(made[0], expected[0])
    for three in list(zip(made, expected, exact, strict=True))[1:]:
        as_accurate(*three)


def test_eager_attention_keeps_its_weights_for_those_who_ask():
    model = tiny(attn_implementation="eager")

    def run(model):
        with torch.no_grad():
            return model(IDS, output_attentions=True)

    expected, plain, exact = run(model), logits(model), exactly(run, model)
    with fastlm.patch(model, strict=True) as p:
        assert "attention" in p.report()
        made = run(model)
        for three in zip(made.attentions, expected.attentions, exact.attentions, strict=True):
            as_accurate(*three)
        as_accurate(logits(model), plain, exact.logits)
        model.train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        assert not torch.equal(logits(model), logits(model)), "dropout is the model's own"


def test_softcap_sinks_and_windows_of_eager_models_run_in_the_kernel():
    for config, options in (
        (transformers.Gemma2Config, {"attn_logit_softcapping": 2.0, "sliding_window": 4}),
        (transformers.GptOssConfig, {"sliding_window": 4, "num_local_experts": 4}),
    ):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
        tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        made = config(**sizes, **heads, **tokens, **options, attn_implementation="eager")
        model = transformers.AutoModelForCausalLM.from_config(made).eval()
        expected, exact = logits(model), exactly(logits, model)
        with fastlm.patch(model), _registry.recording() as verdicts:
            as_accurate(logits(model), expected, exact)
        options = {o for v in verdicts if v.stem == "attention" for o in v.facts["options"]}
        assert options & {"softcap", "sinks"}


def test_experts_that_are_one_linear_map_each():
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}
    config = transformers.JetMoeConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, intermediate_size=48, **sizes
    )
    config.pad_token_id = None  # which the class of transformers 5.0 forgot
    torch.manual_seed(1)
    model = transformers.JetMoeForCausalLM(config).eval()
    theirs, exact = training_gradients(model), exactly(training_gradients, model)
    with fastlm.patch(model, ops=["linear"]) as patch, _registry.recording() as verdicts:
        assert "linear, for one expert after the other" in patch.report()
        ours = training_gradients(model)
        pool = Pool()
        pool.add(ours, theirs, exact)
    assert [v.stem for v in verdicts].count("linear") > 4 * 2 * 2
    assert all(e.ok for e in pool.errors()), pool.errors()
    experts = model.model.layers[0].mlp.input_linear
    with fastlm.patch(model):
        for sizes in ([0, 0, 0, 0], [0, 3, 0, 0]):
            x = torch.randn(sum(sizes), 32)
            with suspended(model):
                expected = experts(x, sizes)
            torch.testing.assert_close(experts(x, sizes), expected)


def test_half_of_a_wider_tensor_is_not_copied_for_its_activation():
    model = nn.Sequential(nn.SiLU())
    x = torch.randn(4, 64)
    with fastlm.patch(model), _registry.recording() as verdicts:
        assert torch.equal(model(x.chunk(2, -1)[0]), nn.functional.silu(x.chunk(2, -1)[0]))
        assert not verdicts
        model(x)
    assert [v.stem for v in verdicts] == ["activation"]


def test_a_norm_with_a_gate_is_left_alone():
    """Its second argument is no residual."""

    class GatedNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))
            self.eps = 1e-6

        def forward(self, x, gate=None):
            x = x if gate is None else x * torch.nn.functional.silu(gate)
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    patch = fastlm.patch(torch.nn.Sequential(GatedNorm()))
    assert "takes more than the hidden states" in patch.report()


def test_fullgraph_compile_forward_and_backward():
    model = tiny()
    theirs, exact = training_gradients(model), exactly(training_gradients, model)
    with fastlm.patch(model):
        made = training_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    for name, value in theirs.items():
        as_accurate(made[f"_orig_mod.{name}"], value, exact[name])


def test_a_subset_of_the_operators():
    model = tiny()
    with fastlm.patch(model, ops=["rms_norm"], strict=True) as p:
        assert {s for e in p.entries for s in e.stems} <= {"rms_norm"}
        assert "forward" not in model.lm_head.__dict__
        with _registry.recording() as verdicts:
            model(IDS, labels=IDS)
    assert {v.stem for v in verdicts} == {"rms_norm"}


@pytest.mark.parametrize("stem", STEMS)
def test_each_operator_alone(stem):
    model = tiny("gpt2" if stem == "layer_norm" else "llama")
    expected, exact = logits(model), exactly(logits, model)
    with (
        fastlm.patch(model, ops=[stem], strict=True),
        _registry.recording() as verdicts,
        worth(0),
    ):
        made = logits(model, labels=IDS)
        assert model(IDS, labels=IDS).loss.requires_grad
    as_accurate(made, expected, exact)
    assert stem in ("activation", "decode_plan") or stem in {v.stem for v in verdicts}


class ShiftedNorm(nn.Module):
    """Looks like an RMSNorm and adds one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-6

    def forward(self, x):
        return self.weight * nn.functional.rms_norm(x, x.shape[-1:], None, self.eps) + 1


class Clipped(nn.Module):
    """A feed-forward block with an activation that has no kernel."""

    def __init__(self, act):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(8, 16), nn.Linear(16, 8), act

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class WithResidual(Clipped):
    """Its parts are those of a feed-forward block, its forward does more."""

    def forward(self, x):
        return x + super().forward(x)


def test_what_does_not_match_is_left_alone_and_reported():
    model = nn.ModuleList([ShiftedNorm(), Clipped(nn.Hardtanh()), WithResidual(nn.GELU())])
    with fastlm.patch(model) as p:
        kept = {e.path: e.text for e in p.entries if e.state == "kept"}
        assert all("forward" not in m.__dict__ for m in model)
    assert "computes neither rms_norm nor layer_norm" in kept["0"]
    assert "its activation is none of" in kept["1"]
    assert "every assignment of its linear maps" in kept["2"]
    assert "left alone:" in p.report()
    with pytest.raises(RuntimeError, match="strict, but left alone"):
        fastlm.patch(model, strict=True)
    assert all("forward" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("make", [nn.RMSNorm, nn.LayerNorm], ids=lambda m: m.__name__)
def test_norms_of_torch(make, eps):
    norm, x = make(16, eps=eps), torch.randn(3, 16) * 1e-2
    expected = norm(x)
    with fastlm.patch(norm, strict=True):
        torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("order", ["gate first", "up first"])
@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU()], ids=str)
def test_gate_and_up_are_told_apart_by_their_values(order, act):
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = nn.Linear(8, 24), nn.Linear(24, 8)
            self.w3, self.act = nn.Linear(8, 24), act

        def forward(self, x):
            a, b = (self.w1, self.w3) if order == "gate first" else (self.w3, self.w1)
            return self.w2(self.act(a(x)) * b(x))

    model, x = Mlp(), torch.randn(5, 8)
    expected = model(x)
    with fastlm.patch(model, ops=["feed_forward"], strict=True):
        torch.testing.assert_close(model(x), expected)


def test_report_groups_the_layers():
    text = fastlm.patch(tiny()).report()
    assert text.startswith("fastlm.patch(LlamaForCausalLM): 31 modules replaced, 0 left alone")
    assert "model.layers.{0-1}.mlp " in text and "feed_forward (gated silu)" in text


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"patch: model must be a torch.nn.Module, got str"):
        fastlm.patch("gpt2")
    with pytest.raises(ValueError, match=r"patch: ops must be names among .*, got 'flash'"):
        fastlm.patch(tiny(), ops=["flash"])
    with pytest.raises(TypeError, match="must not be compiled yet"):
        fastlm.patch(torch.compile(nn.Linear(2, 2)))
