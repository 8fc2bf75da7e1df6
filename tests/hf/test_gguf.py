"""GGUF files: every tensor type, the order of q and k, the tokenizer, broken files."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch

from fastlm import nn
from fastlm.hf import tokenizer
from fastlm.hf.weights import CheckpointError, convert_gguf
from fastlm.models import Config, Decoder

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS, HIDDEN, INNER, LAYERS = 4, 2, 64, 96, 2
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def letters() -> list[str]:
    """GPT-2's 256 printable letters for bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


TOKENS = [*letters(), "Ġt", "he", "Ġthe", "<|end|>", "<|user|>", "<|assistant|>"]
MERGES = ["Ġ t", "h e", "Ġt he"]
END = TOKENS.index("<|end|>")


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in the order llama.cpp keeps q and k in: pairs of neighbours."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def named(model: Decoder, arch: str) -> dict[str, torch.Tensor]:
    """A decoder's weights under GGUF's names."""
    c = model.config
    out = {}
    for name, value in model.state_dict().items():
        kind = name.rsplit(".", 1)[1]
        short = {"embed": "token_embd", "positions": "position_embd", "norm": "output_norm"}
        head = name.split(".")[0]
        if head in short:
            out[f"{short[head]}.{kind}"] = value
            continue
        if head == "head":
            out["output.weight"] = value
            continue
        _, layer, inner = name.split(".", 2)
        inner = inner.rsplit(".", 1)[0]
        if inner == "attention.qkv" and arch != "gpt2":
            q, k, v = value.split(c.qkv_rows)
            if arch == "llama":
                q, k = permuted(q, HEADS), permuted(k, KV_HEADS)
            for part, piece in (("q", q), ("k", k), ("v", v)):
                out[f"blk.{layer}.attn_{part}.{kind}"] = piece
            continue
        theirs = {
            "attention_norm": "attn_norm",
            "attention.qkv": "attn_qkv",
            "attention.out": "attn_output",
            "mlp_norm": "ffn_norm",
            "mlp.gate": "ffn_gate",
            "mlp.up": "ffn_up",
            "mlp.down": "ffn_down",
        }[inner]
        out[f"blk.{layer}.{theirs}.{kind}"] = value
    return out


def write(
    path, model, arch="llama", type_="F32", keys=(), tensors=None, pre="smollm", keep=None
) -> None:
    """Writes a model as GGUF; vectors stay F32 as llama.cpp keeps them."""
    writer = gguf.GGUFWriter(path, arch)
    c = model.config
    writer.add_block_count(c.layers)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.hidden)
    writer.add_feed_forward_length(c.intermediate)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    if c.norm == "rms":
        writer.add_layer_norm_rms_eps(c.norm_eps)
        writer.add_rope_freq_base(c.rope_theta)
    else:
        writer.add_layer_norm_eps(c.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in TOKENS])
    writer.add_eos_token_id(END)
    writer.add_chat_template(CHAT)
    for add, *args in keys:
        getattr(writer, add)(*args)
    for name, value in {**named(model, arch), **(tensors or {})}.items():
        array = value.detach().float().numpy()
        kind = gguf.GGMLQuantizationType[(keep or {}).get(name, type_)]
        if array.ndim == 1 or type_ == "F32":
            writer.add_tensor(name, array.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small(**changes) -> Decoder:
    base = {
        "vocab": len(TOKENS),
        "hidden": HIDDEN,
        "layers": LAYERS,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "intermediate": INNER,
        "max_positions": 64,
        "rope_theta": 5000.0,
        "norm_eps": 1e-5,
        "eos_ids": (END,),
    }
    model = Decoder(Config(**{**base, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("type_", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_every_type_becomes_what_gguf_says(type_, path):
    model = small()
    write(path, model, type_=type_)
    found = Decoder.from_pretrained(path)
    kind = gguf.GGMLQuantizationType[type_]
    expected = {"F16": torch.float16, "BF16": torch.bfloat16}.get(type_, torch.float32)
    assert found.embed.weight.dtype == expected
    for name, value in model.state_dict().items():
        array = value.numpy()
        if array.ndim == 2 and type_ != "F32":
            array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        assert torch.equal(found.state_dict()[name], torch.from_numpy(array).to(expected)), name
    assert found.config.norm_eps == 1e-5 and found.config.rope_theta == 5000.0
    assert found.config.eos_ids == (END,)


@pytest.mark.parametrize("type_", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_stay_as_they_are(type_, tied, dtype, path, tmp_path):
    arch = "llama" if tied else "qwen2"  # which keep the rows of q and k in different orders
    write(path, small(tied_head=tied, qkv_bias=arch == "qwen2"), arch, type_)
    model = Decoder.from_pretrained(path, dtype, quantized=True)
    wide = Decoder.from_pretrained(path)
    kinds = {name: m for name, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)}
    assert len(kinds) == LAYERS * 5 + 1
    for name, module in kinds.items():
        same = wide.head_weight if name == "head" else wide.get_submodule(name).weight
        assert torch.equal(module.qweight.dequantize(), same), name
        assert module.qweight.packed and module.scale.dtype == torch.float16
    assert torch.equal(model.embed.weight, wide.embed.weight.to(dtype))
    if arch == "qwen2":
        bias = model.blocks[0].attention.qkv.bias
        assert torch.equal(bias, wide.blocks[0].attention.qkv.bias.to(dtype))
    text = model.generate([5, 6, 7], 12)
    if dtype == torch.float32:
        assert text == wide.generate([5, 6, 7], 12)
    # and through a directory of our own, without the file
    model.save_pretrained(tmp_path / "out")
    path.unlink()
    again = Decoder.from_pretrained(tmp_path / "out")
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert again.generate([5, 6, 7], 12) == text


def test_files_without_integers(path):
    write(path, small(), type_="F16")
    with pytest.raises(CheckpointError, match="no weight is of Q8_0, Q4_0, Q4_1"):
        Decoder.from_pretrained(path, quantized=True)


def test_a_value_of_another_type_is_widened(path):
    model = small()
    write(path, model, type_="Q4_0", keep={"blk.0.attn_v.weight": "Q8_0"})
    found = Decoder.from_pretrained(path, quantized=True)
    wide = Decoder.from_pretrained(path)
    assert torch.equal(found.blocks[0].attention.qkv.weight, wide.blocks[0].attention.qkv.weight)
    assert isinstance(found.blocks[1].attention.qkv, nn.QuantizedLinear)
    assert found.generate([1, 2], 8) == wide.generate([1, 2], 8)


@pytest.mark.parametrize(
    "arch, changes",
    [
        ("llama", {"tied_head": False, "kv_heads": KV_HEADS}),
        ("qwen2", {"qkv_bias": True}),
        (
            "gpt2",
            {
                "kv_heads": HEADS,
                "norm": "layer",
                "positions": "learned",
                "gated": False,
                "activation": "gelu_tanh",
                "qkv_bias": True,
                "out_bias": True,
                "mlp_bias": True,
            },
        ),
    ],
)
def test_architectures(arch, changes, path, tmp_path):
    model = small(**changes)
    write(path, model, arch)
    found = Decoder.from_pretrained(path)
    assert found.config.family == arch
    tokens = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        assert torch.equal(found(tokens), model(tokens))
    transformers = pytest.importorskip("transformers")
    convert_gguf(path, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_converted_file_opens_in_transformers(dtype, path, tmp_path):
    transformers = pytest.importorskip("transformers")
    write(path, small(), type_="Q4_1")
    model = convert_gguf(path, tmp_path / "out", dtype)
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == dtype and theirs.generation_config.eos_token_id == END
    weights = theirs.state_dict()
    assert torch.equal(weights["model.embed_tokens.weight"], model.embed.weight)
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    said = "the 12 thes\n\n  né <|end|>x"
    tokens = text(said)["input_ids"]
    assert tokens == tokenizer.load(path).encode(said)
    assert tokens == tokenizer.load(tmp_path / "out").encode(said)
    digits = [TOKENS.index(c) for c in "12"]
    assert [t for t in tokens if t in digits] == digits
    assert TOKENS.index("Ġthe") in tokens and END in tokens
    assert text.decode(tokens) == said
    assert text.eos_token_id == END
    messages = [{"role": "user", "content": "the"}]
    asked = text.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    for source in (path, tmp_path / "out"):
        assert tokenizer.load(source).chat(messages) == asked
    assert text.decode(asked) == "<|user|>the<|assistant|>"


def test_frequencies_stretched_as_llama_3_does(path, tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = small(rope_theta=500000.0, rope_scaling=scaling)
    plain = small(rope_theta=500000.0).rope
    from fastlm.nn.rope import scaled_frequencies

    factors = scaled_frequencies(16, 5e5, None) / scaled_frequencies(16, 5e5, scaling)
    write(path, model, tensors={"rope_freqs.weight": factors})
    found = Decoder.from_pretrained(path)
    assert found.config.rope_scaling == scaling
    assert torch.equal(found.rope.cos, model.rope.cos)
    assert not torch.equal(found.rope.cos, plain.cos)
    write(path, model, tensors={"rope_freqs.weight": factors.flip(0)})
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight holds a scaling that is not"):
        Decoder.from_pretrained(path)


def test_text_comes_with_the_last_token_of_a_character(path):
    write(path, small())
    text = tokenizer.load(path)
    said = "né 🙂 the end"
    tokens = text.encode(said)
    step = text.streamer()
    pieces = [step(token) for token in tokens]
    assert "".join(pieces) == said
    assert "\ufffd" not in "".join(pieces) and "" in pieces


def test_a_begin_token_is_added_where_the_file_says_so(path):
    write(path, small(), keys=[("add_bos_token_id", END), ("add_add_bos_token", True)])
    text = tokenizer.load(path)
    assert text.encode("the")[0] == END != text.encode("the", special=False)[0]


@pytest.mark.parametrize(
    "options, text",
    [
        ({"arch": "mamba"}, "general.architecture must be one of llama, qwen2, gpt2, got 'mamba'"),
        ({"type_": "Q5_0"}, r"tensor token_embd.weight must be of a type among F32, .*got Q5_0"),
        (
            {"keys": [("add_rope_scaling_type", gguf.RopeScalingType.YARN)]},
            "llama.rope.scaling.type must be none or linear, got 'yarn'",
        ),
        (
            {"keys": [("add_rope_dimension_count", 8)]},
            "llama.rope.dimension_count must be 16, got 8",
        ),
        ({"tensors": {"extra.weight": torch.ones(3)}}, "unexpected tensors extra.weight"),
        (
            {"tensors": {"output_norm.weight": torch.ones(3)}},
            r"tensor output_norm.weight must be \[64\], got \[3\]",
        ),
    ],
)
def test_files_it_cannot_read_say_why(options, text, path):
    write(path, small(), **options)
    with pytest.raises(CheckpointError, match=text):
        Decoder.from_pretrained(path)


def test_an_unknown_splitting_of_text_is_refused(path):
    write(path, small(), pre="tekken")
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.pre must be one of .* got 'tekken'"):
        tokenizer.load(path)


@pytest.mark.parametrize("keep", [2, 20, 500, 9000, -100])
def test_a_truncated_file_says_so_and_writes_nothing(keep, path, tmp_path):
    write(path, small())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.gguf: not a (whole )?GGUF file"):
        convert_gguf(path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_a_foreign_file_and_a_missing_package(path, monkeypatch):
    path.write_bytes(b"PK\x03\x04" * 50)
    with pytest.raises(CheckpointError, match="not a GGUF file: it begins with b'PK"):
        Decoder.from_pretrained(path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"needs the package gguf: pip install 'fastlm\[gguf\]'"):
        Decoder.from_pretrained(path)
