"""GGUF files: the weights, the config and the tokenizer in them.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlm.hf import families
from fastlm.hf.weights import CheckpointError, write_json
from fastlm.models.config import Config
from fastlm.nn.rope import scaled_frequencies
from fastlm.reference.quantized_weight import GGUF as KINDS
from fastlm.reference.quantized_weight import QuantizedWeight

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
_STORED = {"F16": torch.float16, "BF16": torch.bfloat16}

# Decoder module -> GGUF module, for every architecture
_WEIGHTS: families.Names = {
    "embed": ("token_embd",),
    "positions": ("position_embd",),
    "blocks.{}.attention_norm": ("blk.{}.attn_norm",),
    "blocks.{}.attention.qkv": ("blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v"),
    "blocks.{}.attention.out": ("blk.{}.attn_output",),
    "blocks.{}.mlp_norm": ("blk.{}.ffn_norm",),
    "blocks.{}.mlp.gate": ("blk.{}.ffn_gate",),
    "blocks.{}.mlp.up": ("blk.{}.ffn_up",),
    "blocks.{}.mlp.down": ("blk.{}.ffn_down",),
    "norm": ("output_norm",),
    "head": ("output",),
}
_ROPE_FACTORS = "rope_freqs.weight"
# Llama 3's stretching of the frequencies, of which GGUF keeps only the result
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class GGUFFile:
    """One GGUF file, memory-mapped.

    Raises:
        ImportError: the package gguf is not installed.
        CheckpointError: not a whole GGUF file, an unknown architecture, a tensor type not in TYPES.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ImportError(
                f"{path}: reading GGUF files needs the package gguf: pip install 'fastlm[gguf]'"
            ) from error
        self.path = path
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise CheckpointError(f"{path}: not a GGUF file: it begins with {magic!r}, not b'GGUF'")
        try:
            reader = GGUFReader(path)
        except Exception as error:  # the reader checks nothing: numpy's errors come through
            raise CheckpointError(
                f"{path}: not a whole GGUF file: {type(error).__name__}: {error}"
            ) from error
        # plain values: the reader's own are a hundred thousand arrays for the tokenizer alone
        self._values = {key: field.contents() for key, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.arch = self.get("general.architecture")
        rows = [family for family in families.FAMILIES if family.gguf]
        found = [family for family in rows if family.gguf == self.arch]
        if not found:
            names = ", ".join(family.gguf for family in rows)
            raise CheckpointError(
                f"{path}: general.architecture must be one of {names}, got {self.arch!r}"
            )
        self.family = found[0]
        for name, tensor in self._tensors.items():
            if tensor.tensor_type.name not in TYPES:
                raise CheckpointError(
                    f"{path}: tensor {name} must be of a type among {', '.join(TYPES)}, got"
                    f" {tensor.tensor_type.name}"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> GGUFFile:
        return self  # read only: a copied model shares it

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata."""
        return self._values.get(key, default)

    def config(self) -> Config:
        """The shape of the model."""

        def number(key: str) -> Any:
            value = self.get(f"{self.arch}.{key}")
            if value is None:
                raise CheckpointError(f"{self.path}: the key {self.arch}.{key} is missing")
            return value

        def optional(key: str, default: Any = None) -> Any:
            return self.get(f"{self.arch}.{key}", default)

        fixed = dict(self.family.fixed)
        if "token_embd.weight" not in self._tensors:
            raise CheckpointError(f"{self.path}: tensor token_embd.weight is missing")
        vocab, hidden = self.shapes()["token_embd.weight"]
        heads = number("attention.head_count")
        head_dim = optional("attention.key_length", hidden // heads)
        kind = "rms_" if fixed["norm"] == "rms" else ""
        eps = number(f"attention.layer_norm_{kind}epsilon")
        biased = {
            "qkv_bias": "blk.0.attn_q.bias",
            "out_bias": "blk.0.attn_output.bias",
            "mlp_bias": "blk.0.ffn_up.bias",
        }
        for name, tensor in biased.items():
            fixed.setdefault(name, tensor in self._tensors)
        if fixed["positions"] == "rope":
            if optional("rope.dimension_count", head_dim) != head_dim:
                raise CheckpointError(
                    f"{self.path}: {self.arch}.rope.dimension_count must be {head_dim}, got"
                    f" {optional('rope.dimension_count')}"
                )
            fixed["rope_theta"] = optional("rope.freq_base", 10000.0)
            fixed["rope_scaling"] = self._rope_scaling(head_dim, fixed["rope_theta"])
        if "window" in self.family.keys:
            fixed["window"] = optional("attention.sliding_window")
        default_activation = self.family.defaults[self.family.keys["activation"]]
        try:
            return Config(
                vocab=vocab,
                hidden=hidden,
                layers=number("block_count"),
                heads=heads,
                kv_heads=optional("attention.head_count_kv", heads),
                head_dim=head_dim,
                intermediate=number("feed_forward_length"),
                max_positions=number("context_length"),
                norm_eps=float(f"{eps:.6g}"),  # stored in fp32: 9.9999997e-06 was 1e-05
                activation=families.ACTIVATIONS[default_activation],
                tied_head="output.weight" not in self._tensors,
                bos_id=self.get("tokenizer.ggml.bos_token_id"),
                eos_ids=self._ends(),
                family=self.family.model_type,
                **fixed,
            )
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def names(self) -> Callable[[str, Config], tuple[list[str], bool]]:
        """Parameter name -> the file's names; matrices are [out, in] in every architecture."""

        def names(parameter: str, config: Config) -> tuple[list[str], bool]:
            module, kind = parameter.rsplit(".", 1)
            head, _, rest = module.partition(".")
            layer, _, inner = rest.partition(".")
            key = module if head != "blocks" else f"blocks.{{}}.{inner}"
            fused = f"blk.{layer}.attn_qkv.{kind}"
            if inner == "attention.qkv" and fused in self._tensors:
                return [fused], False
            return [f"{name.format(layer)}.{kind}" for name in _WEIGHTS[key]], False

        return names

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
            if name != _ROPE_FACTORS
        }

    def dtype(self) -> torch.dtype:
        return _STORED.get(self._tensors["token_embd.weight"].tensor_type.name, torch.float32)

    def read(self, name: str) -> Tensor:
        """One tensor in fp32, q and k in half-split order."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        values = torch.from_numpy(
            np.require(dequantize(tensor.data, tensor.tensor_type), requirements="W")
        )
        return self._half_split(name, values.view(self.shapes().get(name, (-1,))))

    def integers(self, name: str) -> QuantizedWeight | None:
        tensor = self._tensors.get(name)
        kind = "" if tensor is None else tensor.tensor_type.name
        if tensor is None or kind not in KINDS:
            return None
        # copied out of the file, which may change under its mapping
        blocks = torch.from_numpy(np.array(tensor.data)).view(self.shapes()[name][0], -1)
        return QuantizedWeight.from_gguf(self._half_split(name, blocks), kind)

    def head_integers(self) -> QuantizedWeight | None:
        return self.integers("token_embd.weight")

    def _half_split(self, name: str, values: Tensor) -> Tensor:
        """The rows of a tensor, those of q and k in half-split order."""
        module = name.rsplit(".", 1)[0]
        if self.family.gguf_interleaved and module.endswith((".attn_q", ".attn_k")):
            heads = self.get(f"{self.arch}.attention.head_count")
            if module.endswith(".attn_k"):
                heads = self.get(f"{self.arch}.attention.head_count_kv", heads)
            pairs = values.view(heads, -1, 2, *values.shape[1:])
            values = pairs.transpose(1, 2).reshape(values.shape)
        return values

    def write_companions(self, directory: Path) -> None:
        """Writes the tokenizer's files and generation_config.json as transformers wants them."""
        from fastlm.hf.tokenizer import from_gguf

        text = from_gguf(self)
        text.tokenizer.save(str(directory / "tokenizer.json"))
        values: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.get(f"{self.arch}.context_length"),
            "clean_up_tokenization_spaces": False,
            **text.special,
        }
        if text.template is not None:
            values["chat_template"] = text.template
        write_json(directory / "tokenizer_config.json", values)
        ends = self._ends()
        generation = {
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id"),
        }
        present = {key: value for key, value in generation.items() if value not in (None, [])}
        write_json(directory / "generation_config.json", present)

    def _ends(self) -> tuple[int, ...]:
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        ids = [self.get(f"tokenizer.ggml.{key}") for key in keys]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def _rope_scaling(self, head_dim: int, theta: float) -> dict[str, Any] | None:
        kind = self.get(f"{self.arch}.rope.scaling.type", "none")
        if kind == "linear":
            return {"rope_type": "linear", "factor": self.get(f"{self.arch}.rope.scaling.factor")}
        if kind != "none":
            raise CheckpointError(
                f"{self.path}: {self.arch}.rope.scaling.type must be none or linear, got {kind!r}"
            )
        if _ROPE_FACTORS not in self._tensors:
            return None
        factors = self.read(_ROPE_FACTORS)
        scaling = {**_LLAMA3, "factor": float(factors.max())}
        plain = scaled_frequencies(head_dim, theta, None)
        expected = plain / scaled_frequencies(head_dim, theta, scaling)
        if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-3):
            raise CheckpointError(
                f"{self.path}: tensor {_ROPE_FACTORS} holds a scaling that is not Llama 3's"
            )
        return scaling
