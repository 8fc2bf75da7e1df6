"""The shapes of fresh models, by name or field by field."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastlm.models.config import Config

# Llama's architecture: RMS norms, rotary positions, gated SiLU, tied head.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 128, "layers": 4, "heads": 4, "intermediate": 352},
    "260K": {"hidden": 64, "layers": 5, "heads": 8, "kv_heads": 4, "intermediate": 172},
    "15M": {"hidden": 288, "layers": 6, "heads": 6, "intermediate": 768},
    "42M": {"hidden": 512, "layers": 8, "heads": 8, "intermediate": 1376},
    "110M": {"hidden": 768, "layers": 12, "heads": 12, "intermediate": 2048},
    "gpt2": {
        "hidden": 768,
        "layers": 12,
        "heads": 12,
        "norm": "layer",
        "positions": "learned",
        "activation": "gelu_tanh",
        "gated": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
}
_FIELDS = {f.name: f for f in dataclasses.fields(Config)}
_NOT_HERE = ("vocab", "eos_ids", "bos_id", "family", "extra", "rope_scaling")


def parse(text: str) -> dict[str, Any]:
    """Config fields of a text like "tiny", "hidden=384,layers=6,heads=6" or "15M,layers=4".

    Raises:
        ValueError: an unknown name, a value that is none, fields that are missing.
    """
    values: dict[str, Any] = {}
    for part in filter(None, (x.strip() for x in text.split(","))):
        name, equals, value = (x.strip() for x in part.partition("="))
        if not equals:
            if name not in PRESETS:
                raise ValueError(f"shape: expected one of {', '.join(PRESETS)}, got {name!r}")
            values = {**PRESETS[name], **values}
        elif name not in _FIELDS or name in _NOT_HERE:
            known = ", ".join(n for n in _FIELDS if n not in _NOT_HERE)
            raise ValueError(f"shape: unknown field {name!r}; known are {known}")
        else:
            values[name] = _value(name, value)
    missing = [name for name in ("hidden", "layers", "heads") if name not in values]
    if missing:
        raise ValueError(f"shape: {', '.join(missing)} must be given, got {text!r}")
    return values


def _value(name: str, text: str) -> Any:
    kind = str(_FIELDS[name].type)
    try:
        if "bool" in kind:
            return {"true": True, "false": False}[text.lower()]
        if "int" in kind:
            return int(text)
        return float(text) if "float" in kind else text
    except (KeyError, ValueError):
        expected = "true or false" if "bool" in kind else f"a value of type {kind}"
        raise ValueError(f"shape: {name} must be {expected}, got {text!r}") from None
