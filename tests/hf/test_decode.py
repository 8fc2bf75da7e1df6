"""A patched model's `generate` by the decode plan: what it computes, its cache, what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny_models import FAMILIES, as_accurate, exactly, tiny, token_numbers

import fastlm
from fastlm import _ext
from fastlm.hf import decode
from fastlm.hf.patch import suspended
from fastlm.models.parts import DTYPES
from fastlm.models.plan import STEM
from fastlm.ops._registry import recording, use_backend

pytestmark = pytest.mark.skipif(STEM not in _ext.native_stems, reason="no native plan")

GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


def plain(name="llama", dtype=torch.float32, **options):
    """A tiny model whose attention has no window and that never ends by itself."""
    window = {"sliding_window": None} if name == "mistral" else {}
    model = tiny(name, dtype, **window, **options)
    model.generation_config.eos_token_id = None
    return model


def padded(rows=3, tokens=9):
    """Token numbers, and a mask with padding on the left of the first row."""
    ids = token_numbers(rows, tokens)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask


def text(model, ids=None, mask=None, **options):
    if ids is None:
        ids, mask = padded()
    return model.generate(ids, attention_mask=mask, **{**GREEDY, **options}).tolist()


def plans(verdicts):
    """What was decided about the steps of a model: (chosen, reasons)."""
    found = [v for v in verdicts if v.stem == STEM]
    return [(v.chosen, *v.refused.get("cpu", [])) for v in found]


def ran(options):
    """What must have run; older static caches do not tell their length."""
    told = hasattr(transformers.cache_utils.StaticLayer(4), "cumulative_length")
    return "cpu" if told or "cache_implementation" not in options else "modules"


def follow(model, steps=4, mask=None):
    """Logits of given tokens after a padded prompt, a token of each sequence at a time."""
    ids, padding = padded(3, 9 + steps)
    mask = padding if mask is None else mask
    where = (mask.cumsum(1) - 1).clamp(min=0)
    cache, found = transformers.DynamicCache(config=model.config), []
    with torch.no_grad():
        for first, last in [(0, 9), *((i, i + 1) for i in range(9, 9 + steps))]:
            out = model(
                ids[:, first:last],
                attention_mask=mask[:, :last],
                position_ids=where[:, first:last],
                past_key_values=cache,
            )
            found.append(out.logits[:, -1:])
    return torch.cat(found[1:], 1)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_are_as_accurate_as_the_models_own(name, dtype):
    model = plain(name, dtype)
    theirs, exact = follow(model), exactly(follow, model)
    with fastlm.patch(model, strict=True), recording() as verdicts:
        ours = follow(model)
    assert plans(verdicts) == [("cpu",)]
    assert ours.dtype == dtype and ours.shape == theirs.shape
    as_accurate(ours, theirs, exact)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"do_sample": True, "temperature": 0.8, "top_k": 12},
        {"num_beams": 3, "num_return_sequences": 2},
        {"repetition_penalty": 1.3, "max_new_tokens": 50},  # beyond the cache's first room
    ],
    ids=["greedy", "static", "sampled", "beams", "long"],
)
def test_generate_writes_the_same_text(name, options):
    model = plain(name, **({"n_positions": 96} if name == "gpt2" else {}))
    torch.manual_seed(5)
    expected = text(model, **options)
    with fastlm.patch(model), recording() as verdicts:
        torch.manual_seed(5)
        assert text(model, **options) == expected
    assert {found for found, *_ in plans(verdicts)} == {ran(options)}


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_batches(rows):
    model, ids = plain(), token_numbers(rows, 6)
    expected = text(model, ids)
    with fastlm.patch(model), recording() as verdicts:
        assert text(model, ids) == expected
    reason = ("modules", "takes up to 16 sequences, not 17")
    assert plans(verdicts)[0] == (("cpu",) if rows < 17 else reason)


@pytest.mark.parametrize(
    "options",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}},
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        {"head_dim": 24, "rms_norm_eps": 0.1, "tie_word_embeddings": False},
        {"num_key_value_heads": 1},
    ],
    ids=["linear rope", "biases", "wide heads", "one head of keys"],
)
def test_variants_of_an_architecture(options):
    model = plain(**options)
    theirs, exact = follow(model), exactly(follow, model)
    with fastlm.patch(model), recording() as verdicts:
        as_accurate(follow(model), theirs, exact)
    assert plans(verdicts) == [("cpu",)]


@pytest.mark.parametrize("rows", [1, 3])
def test_attention_without_sdpa(rows):
    model = plain(attn_implementation="eager")
    ids, mask = padded(rows)
    for options in ({}, {"cache_implementation": "static"}):
        expected = text(model, ids, mask, **options)
        with fastlm.patch(model), recording() as verdicts:
            assert text(model, ids, mask, **options) == expected
        assert plans(verdicts)[0][0] == ran(options)


# What stands in the way: the modules answer, and the reason is told.


def step_after(model, **options):
    """The output of one token after a prompt."""
    ids = token_numbers(2, 6)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
    return model(ids[:, 5:], past_key_values=cache, **options)


def hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda m, args, out: out + 1)


def adapter(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config, model)
    model.eval()


def own_forward(model):
    norm = model.model.norm
    norm.forward = lambda x, residual=None: x * 2


def exchanged(model):
    attention = model.model.layers[0].self_attn
    attention.o_proj = torch.nn.Sequential(attention.o_proj, torch.nn.ReLU()).eval()


def training(model):
    model.model.layers[0].train()


def eps(model):
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook, "has hooks"),
        (adapter, "not what its configuration says"),
        (own_forward, "another tool"),
        (exchanged, "not what its configuration says"),
        (training, "training mode"),
        (eps, "not what its configuration says"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("when", ["before", "between", "at first"])
def test_a_changed_model_runs_its_modules(change, reason, when):
    model, twin = plain(), plain()
    ids, mask = padded(2, 8)
    if when == "at first":
        change(model)
        change(twin)
        with fastlm.patch(model), recording() as verdicts:
            assert text(model, ids, mask) == text(twin, ids, mask)
        assert {found for found, *_ in plans(verdicts)} <= {"modules"}
        return
    if when == "between" and change is eps:
        pytest.skip("a number is read when a generation begins")
    fastlm.patch(model)
    with torch.no_grad(), recording() as verdicts:
        caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
        for m, cache in zip((model, twin), caches, strict=True):
            m(ids[:, :5], past_key_values=cache)
        if when == "between":
            for m, cache in zip((model, twin), caches, strict=True):
                m(ids[:, 5:6], past_key_values=cache)
            assert plans(verdicts) == [("cpu",)]
        change(model)
        change(twin)
        found = [
            m(ids[:, 6:7], past_key_values=cache).logits
            for m, cache in zip((model, twin), caches, strict=True)
        ]
    torch.testing.assert_close(found[0], found[1])
    assert plans(verdicts)[-1][0] == "modules" and reason in plans(verdicts)[-1][1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"labels": torch.zeros(2, 1, dtype=torch.long)}, "labels"),
        ({"use_cache": False}, "no cache"),
        ({"return_dict": False}, "a tuple"),
        ({"logits_to_keep": torch.tensor([0])}, "logits_to_keep"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1]] * 2)}, "more than padding"),
        ({"attention_mask": torch.ones(2, 1, 1, 6, dtype=torch.bool).tril(-9)}, "more than"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_an_unusual_call_runs_the_modules(options, reason):
    model = plain(attn_implementation="eager") if "output_attentions" in options else plain()

    def run():
        try:
            with torch.no_grad():
                out = step_after(model, **options)
        except Exception as error:
            return type(error)
        return out if isinstance(out, tuple) else {k: v for k, v in out.items() if v is not None}

    expected = run()
    with fastlm.patch(model), recording() as verdicts:
        found = run()
    assert plans(verdicts)[-1][0] == "modules" and reason in plans(verdicts)[-1][1]
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found["logits"], expected["logits"], equal_nan=True)
    else:
        assert found is expected or len(found) == len(expected)


def test_where_a_plan_cannot_be():
    model = plain()
    with fastlm.patch(model), recording() as verdicts:
        assert step_after(model).logits.requires_grad  # gradients are on
        assert plans(verdicts) == []
        with torch.no_grad(), use_backend("reference"):
            step_after(model)
        with torch.no_grad(), torch.autocast("cpu"):
            step_after(model)
    assert [reason for _, reason in plans(verdicts)] == ["reference is forced", "autocast is on"]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny("mistral", sliding_window=8), "sliding window"),
        (
            lambda: tiny(rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "dynamic",
        ),
        (lambda: tiny(dtype=torch.float64), "float64"),
        (lambda: tiny("gpt2", scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx"),
    ],
    ids=["window", "dynamic rope", "float64", "scaled layers"],
)
def test_models_that_a_plan_cannot_decode(model, reason):
    made = model()
    expected = text(made)
    with fastlm.patch(made, strict=True) as p:
        assert text(made) == expected
        (note,) = [e for e in p.entries if e.text.startswith("decode_plan: ")]
        assert note.state == "noted" and reason in note.text


# The cache remains transformers' own.


def test_a_cache_can_be_looked_at_cropped_copied_and_reordered():
    model = plain()
    ids = token_numbers(2, 14)

    def run(model):
        cache = transformers.DynamicCache(config=model.config)
        found, kept = [], []

        def step(first, last):
            found.append(model(ids[:, first:last], past_key_values=cache).logits[:, -1])
            kept.append([layer.keys for layer in cache.layers])

        with torch.no_grad():
            step(0, 6)
            step(6, 7)
            step(7, 8)
            assert cache.get_seq_length() == 8 and cache.layers[0].keys.shape == (2, 2, 8, 8)
            snapshot = [k.clone() for k in kept[-1]]
            twin = copy.deepcopy(cache)
            cache.crop(-2)
            step(9, 10)
            step(10, 11)
            assert all(map(torch.equal, kept[2], snapshot))  # what somebody holds stays
            cache.reorder_cache(torch.tensor([1, 0]))
            step(11, 12)
            step(2, 5)  # several tokens: the modules
            step(12, 13)
            found.append(model(ids[:, 8:9], past_key_values=twin).logits[:, -1])
            cache.batch_select_indices(torch.tensor([1]))
            found.append(model(ids[:1, :1], past_key_values=cache).logits[:, -1])
        return torch.cat(found), [k for layer in cache.layers for k in (layer.keys, layer.values)]

    theirs, exact = run(model), exactly(run, model)
    with fastlm.patch(model), recording() as verdicts:
        ours = run(model)
    assert {found for found, *_ in plans(verdicts)} == {"cpu"}
    as_accurate(ours[0], theirs[0], exact[0])
    for a, b, c in zip(ours[1], theirs[1], exact[1], strict=True):
        as_accurate(a, b, c)


def test_two_generations_in_turns_and_one_cache_for_two_models():
    model, other = plain(), plain("qwen2")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
    ids = token_numbers(1, 9)

    def run(models):
        caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
        found = []
        with torch.no_grad():
            for first, last in ((0, 5), (5, 6), (6, 7)):
                for at, m in zip(caches, models, strict=True):
                    found.append(m(ids[:, first:last], past_key_values=at).logits[:, -1])
            for m in models:
                found.append(m(ids[:, 7:8], past_key_values=caches[0]).logits[:, -1])
        return torch.cat(found)

    expected = run((model, other))
    with fastlm.patch(model), fastlm.patch(other), recording() as verdicts:
        torch.testing.assert_close(run((model, other)), expected)
    assert {found for found, *_ in plans(verdicts)} == {"cpu"}


@pytest.mark.parametrize("change", ["moved", "in place", "bf16 and back"])
def test_changed_weights_are_seen(change):
    model = plain()
    ids = token_numbers(1, 9)
    with fastlm.patch(model), torch.no_grad():
        cache = transformers.DynamicCache(config=model.config)
        for first, last in ((0, 6), (6, 7)):
            model(ids[:, first:last], past_key_values=cache)
        weight = model.model.layers[0].self_attn.k_proj.weight
        if change == "moved":
            model.model.layers[0].self_attn.k_proj.weight = torch.nn.Parameter(weight * 3)
        elif change == "in place":
            weight.mul_(3)
        else:
            model.bfloat16().float()
        twin = copy.deepcopy(cache)
        with recording() as verdicts:
            found = model(ids[:, 7:8], past_key_values=cache).logits
        with suspended(model):
            torch.testing.assert_close(
                found, model(ids[:, 7:8], past_key_values=twin).logits, rtol=1e-3, atol=1e-4
            )
    assert {found for found, *_ in plans(verdicts)} <= {"cpu"}


def test_assisted_generation():
    model, draft = plain(), plain(num_hidden_layers=1)
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.assistant_confidence_threshold = 0.0
    ids = token_numbers(1, 6)
    expected = text(model, ids, assistant_model=draft)
    with fastlm.patch(model), fastlm.patch(draft), recording() as verdicts:
        assert text(model, ids, assistant_model=draft) == expected
    assert "cpu" in {found for found, *_ in plans(verdicts)}


def test_it_comes_off_and_copies_have_their_own(tmp_path):
    model = plain()
    expected, before = text(model), model.__dict__.get("forward")
    with fastlm.patch(model) as p:
        assert "decode_plan (single tokens of generate)" in p.report()
        assert text(model) == expected
        twin = copy.deepcopy(model)
        torch.save(model, tmp_path / "whole.pt")
        ids = padded()[0]
        told = fastlm.explain(model.generate, ids, **GREEDY)
        assert "decode_plan on cpu, float32, batch=3, model=LlamaForCausalLM: cpu" in told
    assert model.__dict__.get("forward") is before
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.3)
    with recording() as verdicts:
        found = text(twin)
    assert plans(verdicts)[0] == ("cpu",)
    with suspended(twin):
        assert found == text(twin)
    assert text(torch.load(tmp_path / "whole.pt", weights_only=False)) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_verify_covers_it(dtype, monkeypatch):
    model = plain(dtype=dtype)
    name = "logits of single tokens (decode_plan)"
    (found,) = [e for e in fastlm.verify(model, gradients=False).errors if e.name == name]
    assert found.ok and found.ours > 0
    right = decode.BoundPlan.step

    def wrong(self, tokens, logits, **options):
        right(self, tokens, logits, **options)
        logits[:, 7] += 0.5

    monkeypatch.setattr(decode.BoundPlan, "step", wrong)
    with fastlm.patch(model, ops=["rms_norm"]):  # no plan, and nothing to judge
        assert name not in {e.name for e in fastlm.verify(model, gradients=False).errors}
    monkeypatch.undo()
    with fastlm.patch(model):
        monkeypatch.setattr(decode.BoundPlan, "step", wrong)
        assert not fastlm.verify(model, gradients=False).ok


def test_infinite_logits_are_no_error():
    model = plain()
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.nan)
    with fastlm.patch(model), torch.no_grad():
        assert step_after(model).logits.isnan().all()


def test_compiled_models_do_not_see_it():
    model = plain()
    with fastlm.patch(model), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        ids = token_numbers(1, 6)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_a_plan_ends_with_its_cache():
    model = plain()
    with fastlm.patch(model):
        before = len(decode._runs)
        text(model)
        assert len(decode._runs) == before
