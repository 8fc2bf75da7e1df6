"""Inspection: maps that reproduce the model's attention, probabilities that are the model's own."""

from __future__ import annotations

import io

import pytest
import torch

from fastlm import nn, ops
from fastlm.models import Config, Decoder
from fastlm.models.inspect import attention_weights, inspect
from fastlm.models.inspect_plot import draw, visible
from fastlm.testing import error

LLAMA = {"vocab": 50, "hidden": 32, "layers": 3, "heads": 4, "kv_heads": 2, "max_positions": 400}
GPT2 = {
    **{"vocab": 50, "hidden": 32, "layers": 3, "heads": 4, "max_positions": 400},
    **{"norm": "layer", "positions": "learned", "gated": False, "activation": "gelu_tanh"},
    **{"qkv_bias": True, "out_bias": True, "mlp_bias": True},
}
SHAPES = {"llama": LLAMA, "window": {**LLAMA, "window": 5}, "gpt2": GPT2}


def make(shape: str, dtype=torch.float32) -> Decoder:
    model = Decoder(Config(**SHAPES[shape]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(0.1)
    return model.to(dtype).eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maps_reproduce_the_models_attention(shape, dtype, monkeypatch):
    model = make(shape, dtype)
    seen = []
    attention = ops.attention

    def watched(q, k, v, **options):
        out = attention(q, k, v, **options)
        seen.append((q.clone(), k.clone(), v.clone(), out.clone()))
        return out

    monkeypatch.setattr(ops, "attention", watched)
    found = inspect(model, torch.randint(0, 50, (17,)).tolist())
    assert list(found.attention) == [0, 1, 2] and len(seen) == 3
    for maps, (q, k, v, out) in zip(found.attention.values(), seen, strict=True):
        assert maps.shape == (4, 17, 17) and maps.dtype == torch.float32
        values = v.double().repeat_interleave(4 // v.shape[1], 1)
        exact = attention_weights(q.double(), k.double(), model.config.window) @ values
        torch.testing.assert_close(maps.sum(-1), torch.ones(4, 17))
        assert not maps.triu(1).any()
        if model.config.window:
            assert not maps.tril(-model.config.window).any()
        ours = (maps[None] @ values.float()).to(dtype)
        judged = error("maps", ours, out, exact)
        assert judged.ok, str(judged)


@pytest.mark.parametrize("shape", SHAPES)
def test_probabilities_are_those_of_the_models_logits(shape):
    model = make(shape)
    tokens = torch.randint(0, 45, (300,)).tolist()
    found = inspect(model, tokens, top=4, layers=(), limit=45)
    with torch.no_grad():
        p = model(torch.tensor([tokens]))[0, :, :45].log_softmax(-1)
    assert found.logprobs[0] is found.entropy[0] is None and found.attention == {}
    expected = p[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found.logprobs[1:]), expected)
    torch.testing.assert_close(torch.tensor(found.entropy[1:]), -(p.exp() * p).sum(-1)[:-1])
    assert len(found.likeliest) == 301 and len(found.entropy) == 300 and not found.likeliest[0]
    for best, row in zip(found.likeliest[1:], p, strict=True):
        assert [t for t, _ in best] == row.topk(4).indices.tolist()
    loss = torch.nn.functional.cross_entropy(p[:-1], torch.tensor(tokens[1:]))
    assert found.loss == pytest.approx(float(loss), rel=1e-5)


def test_the_model_is_left_as_it_was():
    model = make("llama")
    tokens = torch.randint(0, 50, (1, 20))
    with torch.no_grad():
        before, text = model(tokens), model.generate(tokens[0].tolist(), 10)
    modules = {name: (type(m), m.__dict__.keys()) for name, m in model.named_modules()}
    inspect(model, tokens[0].tolist())
    assert {n: (type(m), m.__dict__.keys()) for n, m in model.named_modules()} == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(tokens), before)
    assert model.generate(tokens[0].tolist(), 10) == text


def test_logits_under_inspection_are_the_ordinary_ones(monkeypatch):
    model = make("llama")
    tokens = torch.randint(0, 50, (1, 20))
    seen = []
    monkeypatch.setattr(
        Decoder, "logits", lambda self, h: seen.append(h) or ops.linear(h, self.head_weight)
    )
    inspect(model, tokens[0].tolist())
    with torch.no_grad():
        model(tokens)
    assert torch.equal(seen[0], seen[1][0])


def test_one_token_and_a_quantized_model():
    assert torch.isnan(torch.tensor(inspect(make("llama"), [3]).loss))
    model = make("gpt2").quantize(8)
    assert isinstance(model.head, nn.QuantizedLinear)
    assert len(inspect(model, [3, 4]).likeliest) == 3


def test_a_token_beyond_the_limit_has_no_probability():
    found = inspect(make("llama"), [3, 48, 4], limit=40)
    assert found.logprobs[1] == -float("inf") and found.logprobs[2] > -100


@pytest.mark.parametrize(
    "tokens, options, text",
    [
        ([], {}, r"must have 1 to 400 tokens \(max_positions\), got 0"),
        ([1] * 401, {}, "got 401"),
        ([1, 50], {}, r"tokens must be in \[0, 50\)"),
        ([1], {"layers": [3]}, r"layers must be in \[0, 3\), got 3"),
        ([1], {"top": 0}, "top must be 1 to 50, got 0"),
    ],
)
def test_wrong_arguments_are_named(tokens, options, text):
    with pytest.raises(ValueError, match=f"inspect: .*{text}"):
        inspect(make("llama"), tokens, **options)


def test_a_picture_of_any_text():
    pytest.importorskip("matplotlib")
    found = inspect(make("llama"), [1, 2, 3, 4, 5] * 20)
    texts = ["a", " $b_{", "\n\x1b[31m", "日本", "😀"] * 20
    file = io.BytesIO()
    draw(found, texts, file, title="$x")
    assert file.getvalue().startswith(b"\x89PNG") and len(file.getvalue()) > 20_000
    assert visible(" a\n\x1b[") == "·a⏎?["
    few = io.BytesIO()
    draw(inspect(make("llama"), [1], layers=()), ["a"], few)
    assert few.getvalue().startswith(b"\x89PNG")
