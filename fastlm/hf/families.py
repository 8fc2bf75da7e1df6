"""The architectures: one row each, saying how a checkpoint's names become a Decoder's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastlm.models.config import Config

# Decoder module -> the checkpoint's modules (several: their rows one after the other). {} is the
# layer's number; weight and bias follow.
Names = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """How one architecture is written in a Hugging Face directory and in a GGUF file.

    Attributes:
        model_type, architecture: as in config.json.
        prefix: of every name but the head's; some checkpoints leave it out.
        keys: Config field -> key of config.json.
        defaults: what a key is when config.json leaves it out.
        fixed: Config fields that the architecture determines.
        known: keys that change the computation, with the value that Decoder computes.
        weights: the names; `transposed` are stored [in, out].
        buffers: ends of names that hold no weights.
        gguf: the architecture's name in GGUF files; "" for none.
        gguf_interleaved: whether GGUF stores the rows of q and k for interleaved rotation.
    """

    model_type: str
    architecture: str
    prefix: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    weights: Names
    known: Mapping[str, Any] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    buffers: tuple[str, ...] = ()
    gguf: str = ""
    gguf_interleaved: bool = False


_LLAMA_WEIGHTS: Names = {
    "embed": ("model.embed_tokens",),
    "blocks.{}.attention_norm": ("model.layers.{}.input_layernorm",),
    "blocks.{}.attention.qkv": tuple(f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"),
    "blocks.{}.attention.out": ("model.layers.{}.self_attn.o_proj",),
    "blocks.{}.mlp_norm": ("model.layers.{}.post_attention_layernorm",),
    "blocks.{}.mlp.gate": ("model.layers.{}.mlp.gate_proj",),
    "blocks.{}.mlp.up": ("model.layers.{}.mlp.up_proj",),
    "blocks.{}.mlp.down": ("model.layers.{}.mlp.down_proj",),
    "norm": ("model.norm",),
    "head": ("lm_head",),
}
_LLAMA_KEYS = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "tied_head": "tie_word_embeddings",
}
_LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_LLAMA_FIXED = {"norm": "rms", "positions": "rope", "gated": True}
_ROPE_BUFFERS = ("rotary_emb.inv_freq",)

FAMILIES = (
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        prefix="model.",
        keys={
            **_LLAMA_KEYS,
            "qkv_bias": "attention_bias",
            "out_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
        },
        defaults={
            **_LLAMA_DEFAULTS,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
        },
        fixed=_LLAMA_FIXED,
        weights=_LLAMA_WEIGHTS,
        buffers=_ROPE_BUFFERS,
        gguf="llama",
        gguf_interleaved=True,
    ),
    Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        prefix="model.",
        keys={**_LLAMA_KEYS, "window": "sliding_window"},
        defaults={
            **_LLAMA_DEFAULTS,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        fixed=_LLAMA_FIXED,
        weights=_LLAMA_WEIGHTS,
        buffers=_ROPE_BUFFERS,
    ),
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        prefix="model.",
        keys=_LLAMA_KEYS,
        defaults={**_LLAMA_DEFAULTS, "max_position_embeddings": 32768},
        fixed={**_LLAMA_FIXED, "qkv_bias": True},
        known={"use_sliding_window": False},
        weights=_LLAMA_WEIGHTS,
        buffers=_ROPE_BUFFERS,
        gguf="qwen2",
    ),
    Family(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        keys={
            "vocab": "vocab_size",
            "hidden": "n_embd",
            "layers": "n_layer",
            "heads": "n_head",
            "intermediate": "n_inner",
            "max_positions": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
            "tied_head": "tie_word_embeddings",
        },
        defaults={
            "n_inner": None,
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        },
        fixed={
            "norm": "layer",
            "positions": "learned",
            "gated": False,
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
        },
        known={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        weights={
            "embed": ("transformer.wte",),
            "positions": ("transformer.wpe",),
            "blocks.{}.attention_norm": ("transformer.h.{}.ln_1",),
            "blocks.{}.attention.qkv": ("transformer.h.{}.attn.c_attn",),
            "blocks.{}.attention.out": ("transformer.h.{}.attn.c_proj",),
            "blocks.{}.mlp_norm": ("transformer.h.{}.ln_2",),
            "blocks.{}.mlp.up": ("transformer.h.{}.mlp.c_fc",),
            "blocks.{}.mlp.down": ("transformer.h.{}.mlp.c_proj",),
            "norm": ("transformer.ln_f",),
            "head": ("lm_head",),
        },
        transposed=frozenset({"attention.qkv", "attention.out", "mlp.up", "mlp.down"}),
        buffers=(".attn.bias", ".attn.masked_bias"),
        gguf="gpt2",
    ),
)

# Hugging Face's names of activations -> ours; the first of each is the one that is written
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "relu_squared": "relu2",
}
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")


def by_model_type(model_type: object, where: str) -> Family:
    """The row of a `model_type`."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    names = ", ".join(f.model_type for f in FAMILIES)
    raise ValueError(f"{where}: model_type must be one of {names}, got {model_type!r}")


def of(config: Config) -> Family:
    """The row a config is saved as: the one it came from, or the first that can express it."""
    for family in FAMILIES:
        if config.family not in (None, family.model_type):
            continue
        if not _inexpressible(config, family):
            return family
    if config.family is None:
        raise ValueError("Config: no architecture of fastlm.hf.families can express it")
    reasons = "; ".join(_inexpressible(config, by_model_type(config.family, "Config.family")))
    raise ValueError(f"Config: {config.family} cannot express it: {reasons}")


def read(values: Mapping[str, Any], where: str) -> Config:
    """The Config of a parsed config.json.

    Raises:
        ValueError: an unknown architecture, a missing key, an option that Decoder does not compute.
    """
    family = by_model_type(values.get("model_type"), where)
    for key, value in family.known.items():
        if values.get(key, value) != value:
            raise ValueError(f"{where}: {key} must be {value!r}, got {values[key]!r}")
    method = (values.get("quantization_config") or {}).get("quant_method", "another")
    if "quantization_config" in values and method != "fastlm":
        raise ValueError(f"{where}: quantization_config is not supported; use the plain weights")
    fields: dict[str, Any] = dict(family.fixed)
    for name, key in family.keys.items():
        if key not in values and key not in family.defaults:
            raise ValueError(f"{where}: the key {key!r} is missing")
        fields[name] = values.get(key, family.defaults.get(key))
    if fields["activation"] not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        key = family.keys["activation"]
        raise ValueError(f"{where}: {key} must be one of {names}, got {fields['activation']!r}")
    fields["activation"] = ACTIVATIONS[fields["activation"]]
    if fields["positions"] == "rope":
        fields.update(_read_rope(values, where))
    eos = values.get("eos_token_id")
    used = {*family.keys.values(), *_ROPE_KEYS, "eos_token_id", "bos_token_id"}
    used |= {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version"}
    try:
        return Config(
            **fields,
            bos_id=values.get("bos_token_id"),
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            family=family.model_type,
            extra={key: value for key, value in values.items() if key not in used},
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def write(config: Config, dtype: str) -> dict[str, Any]:
    """The config.json of a Config, which transformers opens."""
    family = of(config)
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        **config.extra,
    }
    for name, key in family.keys.items():
        values[key] = getattr(config, name)
    key = family.keys["activation"]
    values[key] = _written_activation(config, family)
    if config.positions == "rope":
        values["rope_theta"] = config.rope_theta
        if config.rope_scaling is not None:
            values["rope_scaling"] = dict(config.rope_scaling)
    values["bos_token_id"] = config.bos_id
    ends = list(config.eos_ids)
    values["eos_token_id"] = None if not ends else ends[0] if len(ends) == 1 else ends
    return values


def _written_activation(config: Config, family: Family) -> str:
    default = family.defaults[family.keys["activation"]]
    if ACTIVATIONS[default] == config.activation:
        return str(default)
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)


def _read_rope(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """theta and scaling, from one mapping (transformers 5) or from two keys (before)."""
    parameters = dict(values.get("rope_parameters") or {})
    theta = parameters.pop("rope_theta", values.get("rope_theta", 10000.0))
    partial = parameters.pop("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise ValueError(f"{where}: partial_rotary_factor must be 1, got {partial!r}")
    scaling = parameters or values.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        scaling = None
    return {"rope_theta": theta, "rope_scaling": scaling}


def _inexpressible(config: Config, family: Family) -> list[str]:
    """What a config has that a family's config.json cannot say."""
    reasons = []
    for name, value in family.fixed.items():
        if getattr(config, name) != value:
            reasons.append(f"{name} is {getattr(config, name)!r}, there always {value!r}")
    defaults = {"window": None, "qkv_bias": False, "out_bias": False, "mlp_bias": False}
    for name, value in defaults.items():
        told = name in family.keys or name in family.fixed
        if not told and getattr(config, name) != value:
            reasons.append(f"{name} is {getattr(config, name)!r}, there always {value!r}")
    by_key: dict[str, str] = {}
    for name, key in family.keys.items():
        first = by_key.setdefault(key, name)
        if getattr(config, first) != getattr(config, name):
            reasons.append(f"{first} and {name} differ, there both are {key}")
    if "kv_heads" not in family.keys and config.kv_heads != config.heads:
        reasons.append(f"kv_heads is {config.kv_heads}, there always heads = {config.heads}")
    if "head_dim" not in family.keys and config.head_dim != config.hidden // config.heads:
        reasons.append(f"head_dim is {config.head_dim}, there always hidden / heads")
    return reasons
