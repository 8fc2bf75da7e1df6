"""Decoding by CUDA graphs: the tokens of single launches, capture, growth, replaced weights."""

from __future__ import annotations

import pytest
import torch

from fastlm.models import Config, Decoder, graph
from fastlm.ops._registry import recording

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LLAMA = {"vocab": 512, "hidden": 256, "layers": 2, "heads": 8, "kv_heads": 2, "head_dim": 64}
GPT2 = {
    **{"vocab": 500, "hidden": 256, "layers": 2, "heads": 4, "norm": "layer", "gated": False},
    **{"positions": "learned", "activation": "gelu_tanh", "qkv_bias": True, "out_bias": True},
    "mlp_bias": True,
}
SHAPES = {"llama": LLAMA, "qwen": {**LLAMA, "tied_head": False, "qkv_bias": True}, "gpt2": GPT2}
PROMPTS = {"one": [[5, 1, 7]], "unequal": [[1, 2, 3], [*range(11)], [4], [9, 8, 7, 6, 5]]}
CHOICES = {
    "greedy": {},
    "drawn": {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 3},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
}


def make(shape: str, dtype=torch.float32, bits: int | None = None) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(Config(**{"max_positions": 1024, **SHAPES[shape]}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # layers that say more than the token
            if parameter.dim() == 2:
                parameter.mul_(10 if name.startswith("blocks") else 3)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model = model.to("cuda", dtype).eval()
    return model if bits is None else model.quantize(bits)


def one_by_one(monkeypatch, model, *args, **options):
    """The same generation without graphs."""
    with monkeypatch.context() as patch:
        patch.setenv("FASTLM_GRAPHS", "0")
        return model.generate(*args, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("choice", CHOICES)
def test_text_is_that_of_single_launches(shape, prompts, choice, monkeypatch):
    model, options = make(shape), {"eos": (), **CHOICES[choice]}
    expected = one_by_one(monkeypatch, model, PROMPTS[prompts], 80, **options)
    with recording() as verdicts:
        assert model.generate(PROMPTS[prompts], 80, **options) == expected
    assert [v.chosen for v in verdicts if v.stem == graph.STEM] == ["graph"]
    assert model.generate(PROMPTS[prompts], 80, **options) == expected  # replayed


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_bf16_and_integer_weights(bits, monkeypatch):
    model = make("llama", torch.bfloat16, bits)
    for prompts in PROMPTS.values():
        text = model.generate(prompts, 40, eos=())
        assert model.generate(prompts, 40, eos=()) == text
        assert text == one_by_one(monkeypatch, model, prompts, 40, eos=())


def test_a_cache_grows_between_two_tokens(monkeypatch):
    model = make("llama")
    texts = []
    for off in ("1", "0"):
        monkeypatch.setenv("FASTLM_GRAPHS", off)
        cache, said = model.new_cache(1, 4), []
        for turn in ([1, 2, 3], [4, 5]):
            said += model.generate(turn, 150, cache=cache, eos=(), temperature=0.5)
        texts.append(said)
        assert cache.capacity > 256 and cache.length == 2 * 150 - 2 + 5
    assert texts[0] == texts[1]


def test_what_was_recorded_is_replayed_until_a_weight_is_replaced(monkeypatch):
    recorded = []
    record = graph.Bound._record
    monkeypatch.setattr(graph.Bound, "_record", lambda self: recorded.append(1) or record(self))
    model = make("llama")
    text = model.generate([1, 2, 3], 20, eos=())
    assert model.generate([1, 2, 3], 20, eos=()) == text and len(recorded) == 1
    for block in model.blocks:
        weight = block.mlp.down.weight
        block.mlp.down.weight = torch.nn.Parameter(-weight.detach())
    other = model.generate([1, 2, 3], 20, eos=())
    assert len(recorded) == 2 and other != text
    assert other == one_by_one(monkeypatch, model, [1, 2, 3], 20, eos=())


def test_no_step_waits_for_the_device(monkeypatch):
    """PyTorch calls every synchronising call an error while a step runs."""
    model = make("qwen", torch.bfloat16)
    run = graph.StaticStep.run

    def watched(self):
        if torch.cuda.is_current_stream_capturing():  # the kernels are compiled by now
            torch.cuda.set_sync_debug_mode("error")
        try:
            run(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(graph.StaticStep, "run", watched)
    model.generate([1, 2, 3], 20, eos=(), **CHOICES["penalised"])


def test_a_stream_that_is_left_leaves_the_cache_as_it_says():
    model = make("llama")
    expected = model.generate([1, 2, 3], 30, eos=())
    cache = model.new_cache(1, 64)
    stream = model.stream([1, 2, 3], 30, cache=cache, eos=())
    text = [next(stream) for _ in range(12)]
    stream.close()
    assert text == expected[:12] and cache.length == 3 + 11
    assert model.generate([text[-1]], 18, cache=cache, eos=()) == expected[12:]
