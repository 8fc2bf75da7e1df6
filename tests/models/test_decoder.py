"""The decoder, its cache and its generation, against itself."""

from __future__ import annotations

import pytest
import torch

from fastlm.models import Config, Decoder
from fastlm.models.step import make_step
from fastlm.testing import error

LLAMA = {"vocab": 50, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "max_positions": 40}
GPT2 = {
    "vocab": 50,
    "hidden": 32,
    "layers": 2,
    "heads": 4,
    "max_positions": 40,
    "norm": "layer",
    "positions": "learned",
    "gated": False,
    "activation": "gelu_tanh",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
}
SHAPES = {"llama": LLAMA, "window": {**LLAMA, "window": 3}, "gpt2": GPT2}


def make(shape: str, dtype=torch.float32, **changes) -> Decoder:
    model = Decoder(Config(**{**SHAPES[shape], **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # larger weights: far from ties in the logits
            parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(0.1)
    return model.to(dtype).eval()


def in_pieces(model: Decoder, tokens: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of tokens that enter a (too small) cache in pieces."""
    cache = model.new_cache(len(tokens), capacity=3)
    return torch.cat([model(piece, cache=cache) for piece in tokens.split(sizes, 1)], 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [[1] * 24, [10] + [1] * 14, [5, 12, 7], [24]], ids=str)
def test_cached_logits_agree_with_uncached(shape, dtype, sizes):
    model = make(shape, dtype)
    exact = make(shape, torch.float64)
    exact.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 50, (2, 24))
    with torch.no_grad():
        found = error("logits", in_pieces(model, tokens, sizes), model(tokens), exact(tokens))
    assert found.ok, str(found)


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_of_unequal_length_go_as_each_alone(shape):
    model = make(shape)
    prompts = [[1, 2, 3], list(range(20)), [7], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]
    together = model.generate(prompts, 12, eos=())
    assert together == [model.generate(prompt, 12, eos=()) for prompt in prompts]


@pytest.mark.parametrize("shape", SHAPES)
def test_generation_is_greedy_over_the_uncached_logits(shape):
    model = make(shape)
    tokens = [3, 1, 4, 1, 5]
    found = model.generate(tokens, 10)
    for token in found:
        with torch.no_grad():
            assert token == int(model(torch.tensor([tokens]))[0, -1].argmax())
        tokens = [*tokens, token]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unequal", [False, True])
def test_a_step_gives_the_bits_of_the_modules(shape, unequal):
    model = make(shape)
    tokens = torch.randint(0, 50, (2, 7))
    lengths = torch.tensor([7, 4]) if unequal else None
    caches = model.new_cache(2), model.new_cache(2)
    with torch.inference_mode():
        for cache in caches:
            model.hidden(tokens, cache=cache, lengths=lengths)
        step = make_step(model)
        for new in torch.randint(0, 50, (5, 2)):
            expected = model.hidden(new[:, None], cache=caches[0])[:, 0]
            assert torch.equal(step(new, caches[1]), expected)


def test_generation_runs_a_replaced_module():
    model = make("llama")
    plain = model.generate([1, 2, 3], 8)

    class Negated(torch.nn.Linear):
        def forward(self, x):
            return -super().forward(x)

    out = model.blocks[1].attention.out
    model.blocks[1].attention.out = Negated(32, 32, bias=False)
    model.blocks[1].attention.out.weight = out.weight
    changed = model.generate([1, 2, 3], 8)
    with torch.no_grad():
        expected = int(model(torch.tensor([[1, 2, 3, *changed[:-1]]]))[0, -1].argmax())
    assert changed != plain and changed[-1] == expected
    model.blocks[1].attention.out = out
    out.register_forward_hook(lambda module, args, y: -y)
    assert model.generate([1, 2, 3], 8) == changed


def test_generation_under_autocast_is_greedy_over_its_logits():
    model, tokens = make("llama"), [3, 1, 4]
    with torch.autocast("cpu", torch.bfloat16):
        found = model.generate(tokens, 6)
        cache, last = model.new_cache(), torch.tensor([tokens])
        with torch.no_grad():
            for token in found:
                last = model(last, cache=cache)[:, -1:].argmax(-1)
                assert token == int(last)


def test_a_cache_continues_a_conversation_and_forgets():
    model = make("llama")
    first, second = [1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    cache = model.new_cache()
    answer = model.generate(first, 5, cache=cache)
    assert cache.length == len(first) + 4  # the last token has not been read yet
    whole = model.generate(first + answer + second, 6)
    assert model.generate(answer[-1:] + second, 6, cache=cache) == whole
    cache.crop(len(first) + 4)
    assert model.generate(answer[-1:] + second, 6, cache=cache) == whole
    with pytest.raises(ValueError, match=r"KVCache.crop: length must be between 0 and"):
        cache.crop(100)


def test_stream_yields_what_generate_returns_and_leaves_inference_mode():
    model = make("llama")
    found = []
    for token in model.stream([1, 2, 3], 6, temperature=1.0, seed=4):
        assert not torch.is_inference_mode_enabled()
        found.append(token)
    seen = []
    again = model.generate([1, 2, 3], 6, temperature=1.0, seed=4, callback=seen.append)
    assert found == again == seen
    assert found != model.generate([1, 2, 3], 6, temperature=1.0, seed=5)


def test_an_end_token_ends_its_own_sequence_only():
    model = make("llama")
    prompts = [[1, 2, 3], [9, 8, 7]]
    free = model.generate(prompts, 8, eos=(), temperature=1.0)
    end = next(token for token in free[0] if token not in free[1])
    ended = free[0][: free[0].index(end) + 1]
    assert model.generate(prompts, 8, eos=end, temperature=1.0) == [ended, free[1]]
    alone = model.generate(prompts[0], 8, eos=())
    assert model.generate(prompts[0], 8, eos=alone[:1]) == alone[:1]


def test_a_sequence_ends_at_max_positions():
    model = make("llama")
    assert len(model.generate(list(range(38)), 100)) == 3  # positions 38, 39 and one unread
    assert model.generate(torch.arange(40), 100)
    with pytest.raises(ValueError, match="generate: tokens must fit max_positions = 40"):
        model.generate(list(range(41)), 1)


def test_padding_of_the_vocabulary_is_never_chosen():
    model = make("llama")
    for temperature in (0.0, 5.0):
        assert max(model.generate([1, 2], 30, temperature=temperature, vocab_limit=7)) < 7


def test_nothing_to_generate():
    model = make("llama")
    assert model.generate([1, 2], 0) == []
    assert model.generate(torch.empty(0, 3, dtype=torch.long), 4) == []
    assert model(torch.empty(0, 3, dtype=torch.long)).shape == (0, 3, 50)


def test_labels_give_the_mean_loss_of_the_next_tokens():
    model = make("llama", torch.float64)
    tokens = torch.randint(0, 50, (2, 9))
    labels = tokens.clone()
    labels[0, :4] = -100
    expected = torch.nn.functional.cross_entropy(
        model(tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(model(tokens, labels=labels), expected)


def test_positions_shift_the_rotation_only():
    model = make("llama", torch.float64)
    tokens = torch.randint(0, 50, (2, 9))
    shifted = model(tokens, positions=torch.arange(9) + 20)
    torch.testing.assert_close(shifted, model(tokens), rtol=1e-5, atol=1e-5)
    each = torch.stack([torch.arange(9), torch.arange(9) + 3])
    torch.testing.assert_close(model(tokens, positions=each)[0], model(tokens)[0])


def test_conversion_to_bf16_keeps_the_rotation_in_fp32():
    model = make("llama", torch.bfloat16)
    fresh = make("llama")
    assert model.rope.cos.dtype == torch.float32
    assert torch.equal(model.rope.cos, fresh.rope.cos)
    assert "rope" not in "".join(model.state_dict())
    assert model.rope.to("meta").to_empty(device="cpu").cos.equal(fresh.rope.cos)


def test_compiled_training_step_in_one_graph():
    model = make("llama", layers=1).train()
    tokens = torch.randint(0, 50, (2, 9))
    expected = torch.autograd.grad(model(tokens, labels=tokens), model.parameters())
    compiled = torch.compile(lambda x: model(x, labels=x), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(tokens), model.parameters())
    for ours, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"heads": 0}, "Config: heads must be a positive integer, got 0"),
        ({"hidden": "32"}, "Config: hidden must be a positive integer, got '32'"),
        ({"kv_heads": 3}, "Config: kv_heads must be a divisor of 4, got 3"),
        ({"hidden": 30}, "Config: heads must be a divisor of 30, got 4"),
        ({"head_dim": 7}, "Config: head_dim must be even for rope, got 7"),
        ({"norm": "batch"}, "Config: norm must be one of rms, layer, got 'batch'"),
        ({"activation": "tanh"}, "Config: activation must be one of silu"),
        ({"window": -1}, "Config: window must be a positive integer, got -1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope scaling: type must be one of"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope scaling: factor must be a positive"),
    ],
)
def test_a_config_that_does_not_fit_says_what(changes, text):
    with pytest.raises(ValueError, match=text):
        Config(**{**LLAMA, **changes})


@pytest.mark.parametrize(
    "call, kind, text",
    [
        (lambda m: m(torch.ones(2, 3)), TypeError, "tokens must be an int64 or int32 tensor"),
        (lambda m: m([1, 2]), TypeError, "tokens must be an int64 or int32 tensor, got list"),
        (lambda m: m(torch.arange(3)), ValueError, r"tokens must be \[B, T\], got \[3\]"),
        (
            lambda m: m(torch.zeros(1, 41, dtype=torch.long)),
            ValueError,
            r"tokens must end by position 40 \(max_positions\), got 0 in the cache and 41",
        ),
        (
            lambda m: m(torch.zeros(2, 3, dtype=torch.long), labels=torch.zeros(2, 4).long()),
            ValueError,
            r"labels must be \[2, 3\] like tokens, got \[2, 4\]",
        ),
        (
            lambda m: m(torch.zeros(2, 3, dtype=torch.long), mask=torch.ones(3)),
            ValueError,
            r"mask must be \[2, 3\] like tokens, got \[3\]",
        ),
        (
            lambda m: m(torch.zeros(2, 3, dtype=torch.long), positions=torch.arange(4)),
            ValueError,
            r"positions must be \[T\] or \[B, T\] for tokens \[2, 3\], got \[4\]",
        ),
        (
            lambda m: m(torch.zeros(2, 3, dtype=torch.long), cache=m.new_cache(3)),
            ValueError,
            r"tokens must be \[3, T\], got \[2, 3\]",
        ),
        (lambda m: m.generate([]), ValueError, "at least one token per prompt"),
        (lambda m: m.generate([[1], []]), ValueError, "at least one token per prompt"),
        (lambda m: m.generate([1, 50]), ValueError, r"tokens must be in \[0, 50\), got 50"),
        (lambda m: m.generate([-1]), ValueError, r"tokens must be in \[0, 50\), got -1"),
        (lambda m: m.generate(torch.ones(3)), TypeError, "tokens must be integers"),
        (lambda m: m.generate([1], -1), ValueError, "max_new_tokens must be 0 or more, got -1"),
        (lambda m: m.generate([1], temperature=-1), ValueError, "temperature must be 0 or more"),
        (lambda m: m.generate([1], top_k=0), ValueError, "top_k must be 1 or more, got 0"),
        (lambda m: m.generate([1], top_p=1.5), ValueError, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_input_names_the_argument(call, kind, text):
    with pytest.raises(kind, match=text):
        call(make("llama"))
