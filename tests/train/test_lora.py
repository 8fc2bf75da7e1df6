"""LoRA: the same function as PEFT's, merged or not, and PEFT's files."""

from __future__ import annotations

import json

import pytest
import torch

from fastlm.hf.weights import CheckpointError
from fastlm.models import Config, Decoder
from fastlm.train import lora

GPT2 = {
    "norm": "layer",
    "positions": "learned",
    "gated": False,
    "activation": "gelu_tanh",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "family": "gpt2",
}
KINDS = {"llama": {"kv_heads": 2, "tied_head": False, "family": "llama"}, "gpt2": GPT2}


def decoder(kind: str = "llama", **options) -> Decoder:
    config = Config(64, 32, 2, 4, max_positions=64, **{**KINDS[kind], **options})
    return Decoder(config).eval()


def randomize(adapter: lora.LoRA) -> None:
    """B is zero at first: an update that changes nothing shows nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data.normal_(std=0.3, generator=generator)


def close(ours: torch.Tensor, theirs: torch.Tensor, oracle: torch.Tensor) -> None:
    """Both err alike: at most twice as much as the other, root mean square."""
    errors = [float((x.double() - oracle).square().mean().sqrt()) for x in (ours, theirs)]
    assert errors[0] <= 2 * errors[1], errors


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_begins_as_nothing_and_merges_into_the_same_function(kind):
    model = decoder(kind)
    before = model(tokens())
    adapter = lora.apply(model, 4)
    torch.testing.assert_close(model(tokens()), before, rtol=0, atol=0)
    randomize(adapter)
    exact = decoder(kind).double()
    wide = lora.apply(exact, 4)
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.data = parameter.data.double()
        oracle = exact(tokens())
        assert (oracle - before).abs().max() > 0.01
        apart, merged = model(tokens()), adapter.merge()(tokens())
    close(merged, apart, oracle)
    close(apart, merged, oracle)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_only_the_adapter_has_gradients_and_they_are_those_of_the_weights():
    """dA = scale B^T dW, dB = scale dW A^T."""
    model, plain = decoder(), decoder()
    plain.load_state_dict(model.state_dict())
    adapter = lora.apply(model, 4, alpha=4, targets="q_proj,v_proj,down_proj")
    randomize(adapter)
    model(tokens(), labels=tokens()).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads and all("lora_" in name for name in grads)
    assert len(adapter.parameters()) == 2 * 2 * 3
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            layer = name.removesuffix(".weight")
            try:
                wrapped = model.get_submodule(layer)
            except AttributeError:
                continue
            if isinstance(wrapped, lora.LoRALinear):
                pieces = parameter.split(wrapped.rows)
                for i, part in enumerate(wrapped.parts):
                    pieces[part].add_(wrapped.lora_b[i] @ wrapped.lora_a[i])
    plain(tokens(), labels=tokens()).backward()
    dense = plain.blocks[1].attention.qkv.weight.grad.split(plain.config.qkv_rows)[2]
    wrapped = model.blocks[1].attention.qkv
    assert wrapped.parts == [0, 2]
    torch.testing.assert_close(wrapped.lora_b[1].grad, dense @ wrapped.lora_a[1].T)
    torch.testing.assert_close(wrapped.lora_a[1].grad, wrapped.lora_b[1].T @ dense)


def test_an_adapter_is_saved_and_loaded(tmp_path):
    model = decoder()
    model.save_pretrained(tmp_path / "base")
    model = Decoder.from_pretrained(tmp_path / "base")
    adapter = lora.apply(model, 2, targets="attention")
    randomize(adapter)
    adapter.save(tmp_path / "adapter")
    again = Decoder.from_pretrained(tmp_path / "base")
    lora.load(again, tmp_path / "adapter")
    torch.testing.assert_close(again(tokens()), model(tokens()), rtol=0, atol=0)
    values = json.loads((tmp_path / "adapter" / lora.CONFIG).read_text())
    assert values["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert values["base_model_name_or_path"] == str(tmp_path / "base")
    with pytest.raises(ValueError, match="merge an adapter before saving"):
        model.save_pretrained(tmp_path / "no")


def test_decoding_sees_the_adapter():
    """The native decode plan knows plain layers alone and must step back."""
    model = decoder()
    randomize(lora.apply(model, 4))
    made = model.generate(tokens()[0].tolist(), 8, eos=())
    whole = torch.cat([tokens()[0], torch.tensor(made)])[None]
    assert model(whole)[0, 8:-1].argmax(-1).tolist() == made


@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_the_same(kind, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    decoder(kind).save_pretrained(tmp_path / "base")
    model = Decoder.from_pretrained(tmp_path / "base")
    adapter = lora.apply(model, 4, alpha=12)
    randomize(adapter)
    adapter.save(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ours = Decoder.from_pretrained(tmp_path / "base", "float64")
    wide = lora.load(ours, tmp_path / "adapter")
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.data = parameter.data.double()
        oracle = ours(tokens())
        close(model(tokens()), theirs(tokens()).logits, oracle)
    # and back: what PEFT writes opens here
    theirs.save_pretrained(tmp_path / "theirs")
    again = Decoder.from_pretrained(tmp_path / "base")
    lora.load(again, tmp_path / "theirs")
    torch.testing.assert_close(again(tokens()), model(tokens()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank must be 1 or more, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"targets": "query"}, "targets must be among all-linear, attention, mlp, down_proj"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        lora.apply(decoder(), **options)


def test_refuses_foreign_adapters(tmp_path):
    adapter = lora.apply(decoder(), 2)
    adapter.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"this model has no layer model\.layers\.1"):
        lora.load(Decoder(Config(64, 32, 1, 4, family="llama")), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"lora_A\.weight must be"):
        lora.load(Decoder(Config(64, 48, 2, 4, kv_heads=2, family="llama")), tmp_path / "a")
    config = tmp_path / "a" / lora.CONFIG
    values = json.loads(config.read_text())
    for key, value in [("use_dora", True), ("peft_type", "IA3"), ("bias", "all"), ("r", None)]:
        config.write_text(json.dumps({**values, key: value}))
        with pytest.raises(CheckpointError, match=f"{config}: {key}"):
            lora.load(decoder(), tmp_path / "a")
    config.write_text(json.dumps(values))
    (tmp_path / "a" / lora.WEIGHTS).write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        lora.load(decoder(), tmp_path / "a")
    with pytest.raises(ValueError, match="plain linear ones, got QuantizedLinear"):
        lora.apply(decoder().quantize(8), 2)
