"""The decode plan: against float64, the modules, itself with other threads, and what it refuses."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import fastlm
from fastlm import _ext, nn
from fastlm.models import Decoder, parts, plan
from fastlm.models.plan import DecodePlan, NextLogits, unsupported
from fastlm.models.step import make_step
from fastlm.ops import _product
from fastlm.ops._registry import recording, use_backend
from fastlm.testing import error
from tests.models import small_models

pytestmark = pytest.mark.skipif(
    plan.STEM not in _ext.native_stems, reason="no native kernels with a plan"
)

LLAMA = {"vocab": 211, "hidden": 72, "layers": 2, "heads": 6, "kv_heads": 2, "head_dim": 20}
GPT2 = {**small_models.GPT2, "hidden": 48, "heads": 3, "intermediate": 100}
SHAPES = {
    "llama": LLAMA,
    "untied": {**LLAMA, "tied_head": False, "qkv_bias": True, "intermediate": 130},
    "window": {**LLAMA, "window": 5, "kv_heads": 6},
    "gpt2": GPT2,
    "odd": {**GPT2, "gated": True, "activation": "gelu", "norm": "rms", "heads": 1},
    "wide": {**LLAMA, "head_dim": 256, "heads": 2, "kv_heads": 1, "activation": "relu2"},
}


def make(shape: str, dtype=torch.float32, **changes) -> Decoder:
    return small_models.make({**SHAPES[shape], **changes}, dtype)


def begin(model: Decoder, prompts: list[int], capacity: int = 4):
    """A cache with prompts of these lengths in it, and the next token of each."""
    cache = model.new_cache(len(prompts), capacity)
    tokens = torch.randint(0, model.config.vocab, (len(prompts), max(prompts)))
    lengths = torch.tensor(prompts) if len(set(prompts)) > 1 else None
    with torch.inference_mode():
        model.hidden(tokens, cache=cache, lengths=lengths)
    return cache, torch.randint(0, model.config.vocab, (len(prompts),))


def follow(model: Decoder, prompts: list[int], steps: int, seed: int = 0) -> torch.Tensor:
    """Logits [steps, B, vocab] of given tokens after given prompts, by a plan."""
    torch.manual_seed(seed)
    cache, tokens = begin(model, prompts)
    assert unsupported(model, cache) == []
    made = DecodePlan(model, cache)
    found = []
    for _ in range(steps):
        made.step(tokens)
        found.append(made.logits.clone())
        assert torch.equal(made.best, made.logits.argmax(-1))
        tokens = torch.randint(0, model.config.vocab, tokens.shape)
    return torch.stack(found)


def follow_modules(model: Decoder, prompts: list[int], steps: int, seed: int = 0) -> torch.Tensor:
    """The same by the modules."""
    torch.manual_seed(seed)
    cache, tokens = begin(model, prompts)
    step = make_step(model)
    found = []
    with torch.inference_mode():
        for _ in range(steps):
            found.append(model.logits(step(tokens, cache)))
            tokens = torch.randint(0, model.config.vocab, tokens.shape)
    return torch.stack(found)


DTYPES = parts.DTYPES
PROMPTS = {"one": [7], "unequal": [3, 11, 1], "full": [2] * 16, "long": [300, 129]}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prompts", PROMPTS)
def test_logits_are_as_near_to_float64_as_the_modules(shape, dtype, prompts):
    model = make(shape, dtype)
    exact = make(shape, torch.float64)
    exact.load_state_dict(model.state_dict())
    lengths = PROMPTS[prompts]
    found = error(
        "logits",
        follow(model, lengths, 6),
        follow_modules(model, lengths, 6),
        follow_modules(exact, lengths, 6),
    )
    assert found.ok, str(found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt", [[5], [[1, 2, 3], list(range(9)), [4]]], ids=["one", "batch"])
def test_greedy_text_is_the_modules(shape, prompt, monkeypatch):
    model = make(shape)
    text = model.generate(prompt, 24, eos=())
    few = model.generate(prompt, 24, eos=(), vocab_limit=9)
    drawn = model.generate(prompt, 24, eos=(), temperature=0.7, top_k=20)
    monkeypatch.setattr(plan, "unsupported", lambda model, cache: ["not here"])
    assert model.generate(prompt, 24, eos=()) == text
    assert model.generate(prompt, 24, eos=(), vocab_limit=9) == few
    assert model.generate(prompt, 24, eos=(), temperature=0.7, top_k=20) == drawn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(dtype):
    model = make("llama", dtype, hidden=512, heads=8, head_dim=64, intermediate=1536, vocab=5000)
    before = torch.get_num_threads()
    found = []
    own = _product.Winners(True, True, True, True, "own")  # PyTorch's promise nothing
    try:
        with _product.fixed({dtype: own}):
            for threads in (1, 2, 3, 7):  # more than there are processors, too
                torch.set_num_threads(threads)
                found.append(follow(model, [200, 3], 4))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_plans_run_beside_each_other_and_the_thread_count_may_change():
    model = make("llama", hidden=512, heads=8, head_dim=64, intermediate=1536, vocab=5000)
    expected = follow(model, [20], 30)[-1]
    found: dict[int, torch.Tensor] = {}
    cache, tokens = [], []
    for _ in range(3):
        torch.manual_seed(0)
        made = begin(model, [20])
        cache.append(made[0])
        tokens.append([made[1], *(torch.randint(0, 5000, (1,)) for _ in range(29))])

    def work(i: int) -> None:
        made = DecodePlan(model, cache[i])
        for n, token in enumerate(tokens[i]):
            torch.set_num_threads(1 + (n + i) % 4)
            made.step(token)
        found[i] = made.logits.clone()

    before = torch.get_num_threads()
    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(before)
    assert len(found) == 3 and all(torch.equal(x, expected) for x in found.values())


@pytest.mark.parametrize("change", ["data", "parameter", "in place", "module", "hook", "moved"])
def test_a_changed_weight_is_seen(change):
    model = make("llama")
    expected = model.generate([1, 2, 3], 12, eos=())
    other = copy.deepcopy(model)
    down = other.blocks[1].mlp.down
    with torch.no_grad():
        down.weight.neg_()
    changed = other.generate([1, 2, 3], 12, eos=())
    assert changed != expected

    mlp = model.blocks[1].mlp
    following = NextLogits(model, begin(model, [3])[0])
    with torch.inference_mode():
        following(torch.tensor([1]))  # the plan is made
    if change == "data":
        mlp.down.weight.data = -mlp.down.weight.data
    elif change == "parameter":
        mlp.down.weight = torch.nn.Parameter(-mlp.down.weight.detach())
    elif change == "in place":
        with torch.no_grad():
            mlp.down.weight.neg_()
    elif change == "module":
        mlp.down = down
    elif change == "hook":
        mlp.register_forward_hook(lambda module, args, y: -y)
    else:
        model.load_state_dict(other.state_dict())
        model.to(torch.float64).to(torch.float32)
    assert model.generate([1, 2, 3], 12, eos=()) == changed
    if change in ("data", "parameter"):
        assert following._plan.stale()
        with torch.inference_mode():
            following(torch.tensor([1]))  # made anew
        assert not following._plan.stale()


def test_a_weight_replaced_between_two_tokens():
    model, other = make("llama"), make("llama")
    steps = model.stream([1, 2, 3], 6, eos=())
    first = [next(steps) for _ in range(3)]
    model.norm.weight = torch.nn.Parameter(torch.zeros_like(model.norm.weight))
    assert next(steps) == 0  # all logits are zero now: the first token wins
    model.norm.weight = other.norm.weight
    assert len([*first, *steps]) == 5


def test_copies_and_saved_models_have_plans_of_their_own(tmp_path):
    model = make("llama", hidden=48, heads=4, head_dim=12)
    text = model.generate([1, 2, 3], 12, eos=())
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.embed.weight.neg_()
    assert twin.generate([1, 2, 3], 12, eos=()) == text
    assert Decoder.from_pretrained(tmp_path).generate([1, 2, 3], 12, eos=()) == text


KINDS = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "minimum": {"bits": 4, "symmetric": False, "group_size": 64},
    "rounded": {"bits": 8, "activations": "int8"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prompts", ["one", "unequal"])
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_integer_weights(kind, dtype, prompts, shape):
    sizes = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "intermediate": 128}
    model = make(shape, **sizes)
    exact = copy.deepcopy(model).double()
    model.to(dtype).quantize(**KINDS[kind])
    with torch.no_grad():  # the same integers, in float64
        for name, module in model.named_modules():
            if isinstance(module, nn.QuantizedLinear):
                wide = module.qweight.dequantize(torch.float64)
                if name == "head":
                    exact.head = torch.nn.Linear(64, wide.shape[0], bias=False).double()
                exact.get_submodule(name).weight.data = wide
        for name, parameter in model.named_parameters():
            exact.get_parameter(name).copy_(parameter)
    lengths = PROMPTS[prompts]
    found = error(
        "logits",
        follow(model, lengths, 5),
        follow_modules(model, lengths, 5),
        follow_modules(exact, lengths, 5),
    )
    assert found.ok, str(found)


def test_integer_weights_that_do_not_fit():
    model = make("llama", hidden=64, head_dim=32).quantize()
    assert reasons(model) == ""
    assert reasons(copy.deepcopy(model).bfloat16()) == ""
    assert model.generate([1, 2, 3], 9) == copy.deepcopy(model).generate([1, 2, 3], 9)
    with pytest.raises(ValueError, match="quantize: the model is held in integers already"):
        model.quantize()
    model.blocks[0].mlp.up = make("llama", hidden=64, head_dim=32).blocks[0].mlp.up
    assert "gate and up of layer 0 are quantized differently" in reasons(model)
    other = make("llama", hidden=64, head_dim=40, heads=4, intermediate=64)
    assert "must be a multiple of 16, not 40" in reasons(other.quantize())


def reasons(model: Decoder, batch: int = 1, **cache) -> str:
    made = model.new_cache(batch)
    for name, value in cache.items():
        setattr(made, name, value)
    return "; ".join(unsupported(model, made))


def test_it_says_what_it_cannot_do():
    model = make("llama")
    assert reasons(model) == ""
    assert "takes up to 16 sequences, not 17" in reasons(model, 17)
    assert "takes float32, bfloat16, float16, not float64" in reasons(make("llama", torch.float64))
    assert "heads of up to 256, not 258" in reasons(make("llama", head_dim=258))
    with use_backend("reference"):
        assert reasons(model) == "reference is forced"
    with use_backend("cpu"):
        assert reasons(model) == ""
    with torch.autocast("cpu"):
        assert reasons(model) == "autocast is on"
    half = model.new_cache().keys
    assert "cache is not of the model's shape" in reasons(model, keys=[x.half() for x in half])
    mixed = make("llama", torch.bfloat16)
    mixed.norm.float()
    assert "norm.weight is not a contiguous bfloat16" in reasons(mixed)
    mixed = make("llama")
    mixed.blocks[1].mlp_norm.eps = 0.5
    assert "norms' eps differ" in reasons(mixed)
    mixed = make("llama")
    mixed.blocks[0].mlp.activation = "relu"
    assert "feed-forward of layer 0" in reasons(mixed)
    mixed = make("llama")
    mixed.blocks[0].mlp.up.weight = torch.nn.Parameter(torch.randn(9, 9))
    assert "layer 0.up.weight is [9, 9], not" in reasons(mixed)


def test_explain_shows_the_verdict():
    model = make("llama")
    text = fastlm.explain(model.generate, [1, 2], 3)
    assert "decode_plan on cpu, float32, batch=1: cpu" in text
    model.mlp = torch.nn.Identity()
    text = fastlm.explain(model.generate, [1, 2], 3)
    assert "decode_plan on cpu, float32, batch=1: modules" in text
    assert "a module was replaced or has hooks" in text
    with use_backend("reference"), recording() as verdicts:
        make("llama").generate([1, 2], 3)
    assert "cpu" not in {verdict.chosen for verdict in verdicts}


def test_tokens_and_positions_that_are_not_there():
    model = make("llama", max_positions=8)
    cache, _ = begin(model, [6])
    made = DecodePlan(model, cache)
    for bad in (-1, 211):
        with pytest.raises(IndexError, match=r"a token must be in \[0, 211\)"):
            made.step(torch.tensor([bad]))
    for _ in range(2):
        made.step(torch.tensor([1]))
    with torch.no_grad():
        model.norm.weight.mul_(torch.nan)
    with pytest.raises(RuntimeError, match="a logit is not finite"):
        DecodePlan(model, begin(model, [2])[0]).step(torch.tensor([1]))
    with pytest.raises(IndexError, match=r"a position must be in \[0, 8\), got 8"):
        made.step(torch.tensor([1]))
