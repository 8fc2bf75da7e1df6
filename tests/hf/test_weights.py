"""Checkpoints on disk: what is written, and what is said of broken ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlm.hf import tokenizer
from fastlm.hf.weights import CheckpointError, write_directory
from fastlm.models import Config, Decoder

LLAMA = {"vocab": 50, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "max_positions": 40}
STORY = "Once upon a time"


@pytest.fixture
def saved(tmp_path) -> Path:
    """A directory with a small model."""
    Decoder(Config(**LLAMA, eos_ids=(2, 3))).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def stories(data) -> Path:
    path = data / "models" / "stories260K" / "hf"
    if not path.is_dir():
        pytest.skip(f"no {path}")
    return path


def same(a: Decoder, b: Decoder) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_saved_and_opened_is_the_same(dtype, tmp_path):
    model = Decoder(Config(**LLAMA, eos_ids=(2, 3), bos_id=1, tied_head=False)).to(dtype)
    model.save_pretrained(tmp_path / "a")
    again = Decoder.from_pretrained(tmp_path / "a")
    assert same(model, again)
    assert again.embed.weight.dtype == dtype
    assert again.config.eos_ids == (2, 3) and again.config.bos_id == 1
    wide = Decoder.from_pretrained(str(tmp_path / "a"), "float32")
    assert torch.equal(wide.embed.weight, model.embed.weight.float())


@pytest.mark.parametrize("kind", [(8, True, "exact"), (4, True, "int8"), (4, False, "exact")])
@pytest.mark.parametrize("gpt2", [False, True])
def test_a_quantized_model_is_saved_in_integers(kind, gpt2, tmp_path):
    other = {"kv_heads": 4, "norm": "layer", "positions": "learned", "gated": False}
    other |= {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "activation": "gelu_tanh"}
    sizes = {**LLAMA, "head_dim": 8, **(other if gpt2 else {"tied_head": False})}
    model = Decoder(Config(**sizes, eos_ids=())).bfloat16()
    bits, symmetric, activations = kind
    model.quantize(bits, symmetric=symmetric, activations=activations)
    model.save_pretrained(tmp_path / "a", max_shard_bytes=4000)
    size = sum(p.stat().st_size for p in (tmp_path / "a").glob("*.safetensors"))
    again = Decoder.from_pretrained(tmp_path / "a")
    assert same(model, again) and size < 1.6 * sum(x.nbytes for x in model.state_dict().values())
    assert {m.activations for m in again.modules() if hasattr(m, "activations")} == {activations}
    assert again.generate([1, 2], 9) == model.generate([1, 2], 9)
    Decoder(Config(**sizes)).save_pretrained(tmp_path / "b")
    again.save_pretrained(tmp_path / "b")  # and on, over another
    assert not [*(tmp_path / "b").glob("model*")]
    assert same(model, Decoder.from_pretrained(tmp_path / "b"))
    transformers = pytest.importorskip("transformers")
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_integers_that_do_not_fit(tmp_path):
    model = Decoder(Config(**LLAMA)).quantize(4)
    model.save_pretrained(tmp_path)
    file = tmp_path / "quantized.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    for part, value, text in (
        ("scale", tensors[f"{name}.scale"][:5], "scale .* does not fit the integers"),
        ("scale", None, "lacks its values or scale"),
        ("values", tensors[f"{name}.values"][:, :8], "must be .*128, 32"),
    ):
        changed = {k: v.contiguous() for k, v in tensors.items() if k != f"{name}.{part}"}
        if value is not None:
            changed[f"{name}.{part}"] = value.contiguous()
            if part == "values":
                changed[f"{name}.scale"] = tensors[f"{name}.scale"].contiguous()
        save_file(changed, file)
        with pytest.raises(CheckpointError, match=text):
            Decoder.from_pretrained(tmp_path)
    model.blocks[0].mlp.up.activations = "int8"
    with pytest.raises(ValueError, match="activations must be alike"):
        model.save_pretrained(tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_large_weights_are_split_over_files(saved, tmp_path):
    model = Decoder.from_pretrained(saved)
    model.save_pretrained(tmp_path / "split", max_shard_bytes=10_000)
    shards = sorted(p.name for p in (tmp_path / "split").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert same(model, Decoder.from_pretrained(tmp_path / "split"))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "split")
    assert torch.equal(theirs.model.embed_tokens.weight, model.embed.weight)
    (tmp_path / "split" / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{shards[1]}: the index names it, but it is not"):
        Decoder.from_pretrained(tmp_path / "split")


def test_saving_over_an_older_save_leaves_nothing_of_it(saved):
    model = Decoder.from_pretrained(saved)
    model.save_pretrained(saved, max_shard_bytes=10_000)
    assert not (saved / "model.safetensors").exists()
    assert same(model, Decoder.from_pretrained(saved))
    model.save_pretrained(saved)
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(saved.parent)) == ["model"]


def test_a_failed_save_changes_nothing(saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def fail(directory: Path) -> None:
        (directory / "config.json").write_text("{")
        raise OSError("disk full")

    for target in (saved, saved.parent / "new"):
        with pytest.raises(OSError, match="disk full"):
            write_directory(target, fail)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert os.listdir(saved.parent) == ["model"]


def test_the_model_does_not_change_with_its_file(saved):
    model = Decoder.from_pretrained(saved)
    before = model.embed.weight.detach().clone()
    with open(saved / "model.safetensors", "r+b") as file:
        file.seek(2000)
        file.write(b"\xff" * 20_000)
    assert torch.equal(model.embed.weight, before)


def test_names_without_the_base_models_prefix(tmp_path):
    config = {"norm": "layer", "positions": "learned", "gated": False, "activation": "gelu_tanh"}
    biases = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
    model = Decoder(Config(50, 32, 2, 4, **config, **biases))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # the causal mask that GPT-2's files carry
    save_file(bare, tmp_path / "model.safetensors")
    assert same(model, Decoder.from_pretrained(tmp_path))


def test_more_end_tokens_from_generation_config(saved):
    (saved / "generation_config.json").write_text('{"eos_token_id": [5, 6, 7]}')
    assert Decoder.from_pretrained(saved).config.eos_ids == (5, 6, 7)


def test_keys_it_does_not_know_are_kept(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "initializer_range": 0.5}))
    Decoder.from_pretrained(saved).save_pretrained(saved)
    assert json.loads((saved / "config.json").read_text())["initializer_range"] == 0.5


def test_a_shape_no_architecture_has_cannot_be_saved(tmp_path):
    model = Decoder(Config(**LLAMA, norm="layer"))
    with pytest.raises(ValueError, match=r"no architecture of fastlm.hf.families can express it"):
        model.save_pretrained(tmp_path / "x")
    model = Decoder(Config(**LLAMA, window=4, family="llama"))
    with pytest.raises(ValueError, match="llama cannot express it: window is 4"):
        model.save_pretrained(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def edit(path: Path, **changes) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def retensor(path: Path, **changes) -> None:
    tensors = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda d: (d / "config.json").unlink(), "config.json: the file is missing"),
        (lambda d: truncate(d / "config.json", 30), "config.json: not a JSON file"),
        (lambda d: (d / "config.json").write_text("[1]"), "expected a JSON object, got list"),
        (
            lambda d: edit(d / "config.json", model_type="mamba"),
            "config.json: model_type must be one of llama, mistral, qwen2, gpt2, got 'mamba'",
        ),
        (
            lambda d: edit(d / "config.json", hidden_size=...),
            "config.json: the key 'hidden_size' is missing",
        ),
        (
            lambda d: edit(d / "config.json", num_key_value_heads=3),
            "config.json: Config: kv_heads must be a divisor of 4, got 3",
        ),
        (
            lambda d: edit(d / "config.json", hidden_act="mish"),
            "config.json: hidden_act must be one of silu, .* got 'mish'",
        ),
        (
            lambda d: edit(d / "config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0}),
            "config.json: .*type must be one of default, linear, llama3, got 'yarn'",
        ),
        (
            lambda d: edit(d / "config.json", partial_rotary_factor=0.5),
            "partial_rotary_factor must be 1, got 0.5",
        ),
        (
            lambda d: edit(d / "config.json", quantization_config={"bits": 4}),
            "quantization_config is not supported",
        ),
        (
            lambda d: truncate(d / "model.safetensors", 5000),
            "model.safetensors: not a whole safetensors file",
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"PK\x03\x04" * 100),
            "model.safetensors: not a whole safetensors file",
        ),
        (lambda d: truncate(d / "model.safetensors", 0), "not a whole safetensors file"),
        (
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            "holds no model.safetensors .*; pytorch_model.bin is a pickle",
        ),
        (
            lambda d: retensor(d / "model.safetensors", **{NORM: None}),
            rf"model.safetensors: tensor {NORM} is missing",
        ),
        (
            lambda d: retensor(d / "model.safetensors", **{NORM: torch.ones(31)}),
            rf"model.safetensors: tensor {NORM} must be \[32\], got \[31\]",
        ),
        (
            lambda d: retensor(d / "model.safetensors", **{"model.layers.0.q_norm": torch.ones(1)}),
            "unexpected tensors model.layers.0.q_norm: this is not the architecture llama",
        ),
    ],
)
def test_a_broken_directory_says_what_is_wrong(damage, text, saved):
    damage(saved)
    with pytest.raises(CheckpointError, match=text):
        Decoder.from_pretrained(saved)


def test_nothing_there_and_unknown_dtype(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint directory"):
        Decoder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected a floating-point dtype .* got 'int8'"):
        Decoder.from_pretrained(saved, "int8")


def test_stories_goes_through_transformers_and_back(stories, tmp_path):
    model = Decoder.from_pretrained(stories)
    model.save_pretrained(tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (stories / name).read_bytes()
    text = tokenizer.load(tmp_path / "copy")
    tokens = text.encode(STORY)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")(STORY)["input_ids"] == (
        tokens
    )
    expected = theirs.generate(torch.tensor([tokens]), max_new_tokens=40, do_sample=False)
    found = model.generate(tokens, 40)
    assert tokens + found == expected[0].tolist()
    assert text.decode(tokens + found).startswith(f"{STORY}, there was a little girl named Lily.")


def test_without_its_source_the_tokenizer_cannot_be_copied(stories, tmp_path):
    shutil.copytree(stories, tmp_path / "source")
    model = Decoder.from_pretrained(tmp_path / "source")
    shutil.rmtree(tmp_path / "source")
    with pytest.raises(FileNotFoundError, match="source: the checkpoint this model came from is"):
        model.save_pretrained(tmp_path / "out")
    assert os.listdir(tmp_path) == []
    model.save_pretrained(tmp_path / "out", companions=False)
    assert same(model, Decoder.from_pretrained(tmp_path / "out"))
