"""The static step: against the modules, and that it never asks the device; graphs are for GPUs."""

from __future__ import annotations

import contextlib
import copy
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastlm
from fastlm import _ext, nn
from fastlm.models import Decoder, graph, static_step
from fastlm.models.sampling import Options, Sampler
from fastlm.models.static_step import StaticStep
from fastlm.models.step import make_step
from fastlm.ops._registry import recording, use_backend
from fastlm.testing import error
from tests.models import small_models

LLAMA = {"vocab": 211, "hidden": 64, "layers": 2, "heads": 6, "kv_heads": 2, "head_dim": 32}
GPT2 = {**small_models.GPT2, "hidden": 64, "heads": 4, "intermediate": 96}
SHAPES = {
    "llama": LLAMA,
    "qwen": {**LLAMA, "tied_head": False, "qkv_bias": True},
    "window": {**LLAMA, "window": 5},
    "gpt2": GPT2,
}
PROMPTS = {"one": [[5, 1, 7]], "unequal": [[1, 2, 3], [*range(11)], [4], [9, 8, 7, 6, 5]]}


def make(shape: str, dtype=torch.float32, bits: int | None = None, **changes) -> Decoder:
    torch.manual_seed(0)
    model = small_models.make({**SHAPES[shape], **changes}, dtype)
    return model if bits is None else model.quantize(bits)


@pytest.fixture
def on_cpu(monkeypatch):
    """Lets generation take the static steps on a CPU, where they run without being recorded."""
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))


def begin(model: Decoder, prompts: list[list[int]], capacity: int = 32):
    """A cache with prompts in it, and the next token of each."""
    cache = model.new_cache(len(prompts), capacity)
    lengths = torch.tensor([len(p) for p in prompts])
    rows = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    model.hidden(rows, cache=cache, lengths=None if len(prompts) == 1 else lengths)
    return cache, torch.arange(len(prompts)) + 3


@torch.inference_mode()
def follow(model: Decoder, prompts: list[list[int]], steps: int, static: bool) -> torch.Tensor:
    """Logits [steps, B, vocab] of given tokens after given prompts."""
    cache, tokens = begin(model, prompts)
    sampler = Sampler(Options(), 0, prompts, model.config.vocab)
    step = StaticStep(model, cache, sampler)
    step.begin(tokens, cache, sampler)
    modules = make_step(model)
    found = []
    for i in range(steps):
        tokens = (tokens * 7 + i) % model.config.vocab
        if static:
            step.tokens.copy_(tokens)
            step.run()
            assert torch.equal(step.tokens, step.logits.argmax(-1))
            found.append(step.logits.clone())
        else:
            found.append(model.logits(modules(tokens, cache)))
    return torch.stack(found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prompts", PROMPTS)
def test_logits_are_as_near_to_float64_as_the_modules(shape, dtype, prompts):
    model = make(shape, dtype)
    exact = make(shape, torch.float64)
    exact.load_state_dict(model.state_dict())
    found = error(
        "logits",
        follow(model, PROMPTS[prompts], 6, static=True),
        follow(model, PROMPTS[prompts], 6, static=False),
        follow(exact, PROMPTS[prompts], 6, static=False),
    )
    assert found.ok, str(found)


CHOICES = {
    "greedy": {},
    "limit": {"vocab_limit": 40},
    "drawn": {"temperature": 0.9, "top_k": 50, "seed": 3},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("choice", CHOICES)
def test_text_is_that_of_the_other_ways(shape, prompts, choice, monkeypatch):
    model, given = make(shape), PROMPTS[prompts]
    options = {"eos": (), **CHOICES[choice]}
    expected = model.generate(given, 80, **options)  # more than a block of random numbers
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    with recording() as verdicts:
        assert model.generate(given, 80, **options) == expected
    assert [v.chosen for v in verdicts if v.stem == graph.STEM] == ["graph"]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_rehearsal_leaves_no_trace(choice, on_cpu, monkeypatch):
    model, given = make("llama"), PROMPTS["unequal"]
    expected = model.generate(given, 20, eos=(), **CHOICES[choice])
    run = graph.Bound.run
    monkeypatch.setattr(graph.Bound, "run", lambda self: [graph.rehearse(self.step), run(self)])
    cache = model.new_cache(len(given), 4)  # which grows
    assert model.generate(given, 20, eos=(), cache=cache, **CHOICES[choice]) == expected


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_integer_weights(bits, prompts, monkeypatch):
    model = make("llama", bits=bits)
    expected = model.generate(PROMPTS[prompts], 20, eos=())
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    assert model.generate(PROMPTS[prompts], 20, eos=()) == expected


def test_end_tokens_and_the_callers_own_ends(monkeypatch):
    model = make("llama")
    free = model.generate(PROMPTS["unequal"], 30, eos=())
    ends = {"eos": (free[0][4], free[2][9]), "until": lambda row, token: token == free[3][7]}
    expected = model.generate(PROMPTS["unequal"], 30, **ends)
    one = model.generate(PROMPTS["one"][0], 30, eos=free[0][4])
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    assert model.generate(PROMPTS["unequal"], 30, **ends) == expected
    assert len(expected[0]) == 5 and len({len(row) for row in expected}) > 1
    assert model.generate(PROMPTS["one"][0], 30, eos=free[0][4]) == one


def test_a_cache_grows_and_continues_a_conversation(monkeypatch):
    """At every token the cache says what it holds, whatever was queued beyond."""
    model = make("llama")

    def talk() -> list[int]:
        cache, said = model.new_cache(1, 4), []
        for turn in ([1, 2, 3], [4, 5], [6]):
            stream = model.stream(turn, 20, cache=cache, eos=(), temperature=0.5)
            before = cache.length + len(turn)
            for i, token in enumerate(stream):
                assert cache.length == before + i
                said.append(token)
                if i == 11 and turn == [4, 5]:
                    stream.close()
            cache.crop(cache.length - 1)
        assert cache.capacity >= cache.length
        return said

    expected = talk()
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    assert talk() == expected


def test_unequal_sequences_leave_a_cache_as_the_modules_do(monkeypatch):
    model, given = make("llama"), PROMPTS["unequal"]
    found = []
    for device in ("cuda", "cpu"):  # the second takes static steps
        monkeypatch.setattr(graph, "DEVICES", (device,))
        cache = model.new_cache(len(given), 4)
        first = model.generate(given, 9, cache=cache, eos=())
        again = model.generate([[row[-1]] for row in first], 9, cache=cache, eos=())
        found.append((first, again, cache.length, cache.lengths.tolist()))
    assert found[0] == found[1]


def test_the_text_ends_where_positions_do(on_cpu):
    model = make("gpt2", max_positions=20)
    assert len(model.generate([1] * 15, 50, eos=())) == 6
    assert len(model.generate([1] * 20, 50, eos=())) == 1
    assert model.generate([1], 0) == []


def test_what_is_bound_is_kept_with_the_cache(on_cpu, monkeypatch):
    made = []

    class Counted(StaticStep):
        def __init__(self, *args):
            made.append(self)
            super().__init__(*args)

    monkeypatch.setattr(graph, "StaticStep", Counted)
    model = make("llama")
    text = model.generate([1, 2, 3], 20, eos=())
    assert model.generate([1, 2, 3], 20, eos=()) == text
    assert len(made) == 1  # the same cache again
    model.generate([1, 2, 3], 20, eos=(), temperature=0.5)
    assert len(made) == 2  # other options
    model.generate(PROMPTS["unequal"], 20, eos=())
    assert len(made) == 3  # another batch
    streams = [model.stream([1, 2, 3], 20, eos=()) for _ in range(2)]
    together = [list(pair) for pair in zip(*streams, strict=True)]
    assert [a for a, _ in together] == [b for _, b in together] == text
    for block in model.blocks:
        block.mlp_norm = nn.RMSNorm(model.config.hidden, eps=1.0)
    before = len(made)
    other = model.generate([1, 2, 3], 20, eos=())
    assert other != text and len(made) > before
    graph.release(model)
    assert model not in graph._spares
    monkeypatch.setattr(graph, "DEVICES", ())
    assert model.generate([1, 2, 3], 20, eos=()) == other


def test_a_replaced_weight_is_noticed_between_two_tokens(on_cpu, monkeypatch):
    model, other = make("llama"), make("qwen")
    texts = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(graph, "DEVICES", devices)
        monkeypatch.setattr(graph, "AHEAD", 0)  # replaced in time for the very next token
        model = make("llama")
        stream = model.stream([1, 2, 3], 12, eos=())
        text = [next(stream) for _ in range(5)]
        for block, source in zip(model.blocks, other.blocks, strict=True):
            block.mlp.down.weight = torch.nn.Parameter(-source.mlp.down.weight.detach().clone())
        texts.append([*text, *stream])
    assert texts[0] == texts[1]
    assert texts[0] != make("llama").generate([1, 2, 3], 12, eos=())


def test_the_model_can_be_copied_and_let_go(on_cpu):
    model = make("llama")
    text = model.generate([1, 2, 3], 9, eos=())
    assert copy.deepcopy(model).generate([1, 2, 3], 9, eos=()) == text
    graph._spares.clear()
    model.generate([1, 2, 3], 9, eos=())
    del model
    assert not graph._spares  # what is kept does not keep the model


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("choice", ["greedy", "drawn", "penalised"])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_step_never_asks_the_device(kind, shape, choice, bits, monkeypatch):
    """With tensors that have no values, whatever needs one is an error: an item, a shape.

    "fake" tensors go through the native operators' shape functions, "meta" ones through the
    reference, as tensors of a device without kernels would.
    """
    options = {k: v for k, v in CHOICES[choice].items() if k != "seed"}
    options = {**options, "top_p": 0.9, "min_p": 0.01} if "temperature" in options else options
    for place in (torch, *(m for n, m in sys.modules.items() if n.startswith("fastlm.ops."))):
        if hasattr(place, "is_autocast_enabled"):  # which knows no meta device
            monkeypatch.setattr(place, "is_autocast_enabled", lambda *device: False)
    model, fakes = make(shape, torch.bfloat16, bits), FakeTensorMode()
    device = "meta" if kind == "meta" else "cpu"
    for module in model.modules():
        if isinstance(module, nn.QuantizedLinear) and kind == "meta":
            module.values, module.scale, module.minimum, *_, module.outputs = (
                module.qweight.unpack()
            )
        for names in (module._parameters, module._buffers):
            for name, x in names.items():
                if x is not None:
                    empty = (
                        x.detach().to("meta") if kind == "meta" else fakes.from_tensor(x.detach())
                    )
                    names[name] = torch.nn.Parameter(empty, False) if x.requires_grad else empty
    with fakes if kind == "fake" else contextlib.nullcontext(), torch.inference_mode():
        cache = model.new_cache(3, 64)
        sampler = Sampler(Options(**options), 0, [[]] * 3, model.config.vocab, device)
        step = StaticStep(model, cache, sampler)
        step.begin(step.tokens + 1, cache, sampler)
        for _ in range(2):
            step.run()
        assert step.logits.shape == (3, model.config.vocab)
        with pytest.raises(RuntimeError):
            int(step.tokens[0])  # so an item in the step would have been one


@pytest.mark.parametrize(
    "spoil, text",
    [
        (lambda m, patch: None, "serves cuda tensors, not cpu"),
        (lambda m, patch: patch.setattr(graph, "DEVICES", ("cpu",)), ""),
        (lambda m, patch: patch.setenv("FASTLM_GRAPHS", "0"), "FASTLM_GRAPHS=0"),
        (
            lambda m, patch: m.blocks[0].mlp.register_forward_hook(lambda *a: None),
            "a module was replaced or has hooks",
        ),
        (lambda m, patch: setattr(m.blocks[1], "mlp", torch.nn.Identity()), "a module was repl"),
        (lambda m, patch: m.bfloat16(), "the cache is not of the model's type and device"),
    ],
    ids=["cpu", "nothing", "setting", "hook", "module", "dtype"],
)
def test_what_it_cannot_do_it_says(spoil, text, monkeypatch):
    model = make("llama")
    cache = model.new_cache(1, 16)
    if "cuda" not in text:
        monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    spoil(model, monkeypatch)
    reasons = graph.unsupported(model, cache)
    assert any(text in reason for reason in reasons) if text else reasons == []


def test_explain_shows_the_verdict(on_cpu, monkeypatch):
    model = make("llama")
    shown = fastlm.explain(model.generate, [1, 2, 3], 4)
    assert f"{graph.STEM} on cpu, float32, batch=1, capacity=256: graph" in shown
    with torch.autocast("cpu", torch.bfloat16):
        shown = fastlm.explain(model.generate, [1, 2, 3], 4)
    assert "capacity=256: modules\n  graph     autocast is on" in shown
    monkeypatch.setenv("FASTLM_GRAPHS", "no")
    with pytest.raises(ValueError, match="FASTLM_GRAPHS: expected 0 or 1, got 'no'"):
        model.generate([1], 2)


@pytest.mark.skipif(_ext.native is None, reason="no native kernels")
def test_forcing_a_backend_binds_anew(on_cpu):
    model = make("llama")
    text = model.generate([1, 2, 3], 12, eos=())
    with use_backend("reference"):
        assert model.generate([1, 2, 3], 12, eos=()) == text


def test_a_block_of_random_numbers_is_what_they_are_one_by_one():
    prompts = [[1], [2]]
    one, other = (Sampler(Options(temperature=1.0), 7, prompts, 20) for _ in range(2))
    for sampler in (one, other):
        sampler.uniforms.next()
    rows = torch.cat(
        [one.uniforms.rows(5), one.uniforms.rows(static_step.BLOCK), one.uniforms.rows(3)]
    )
    assert torch.equal(rows, torch.stack([other.uniforms.next() for _ in rows]))
