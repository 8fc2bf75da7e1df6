"""Tiny models of transformers' classes, with random weights."""

from __future__ import annotations

import pytest
import torch

from fastlm.hf import unpatch
from fastlm.hf._float64 import float64
from fastlm.hf.verify import exact_copy
from fastlm.testing import error

transformers = pytest.importorskip("transformers")

FAMILIES = ["llama", "gpt2", "mistral", "qwen2"]


def tiny(name: str = "llama", dtype: torch.dtype = torch.float32, **options):
    """A model of two layers."""
    torch.manual_seed(1)
    common = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name == "gpt2":
        config = transformers.GPT2Config(
            **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **common, **options}
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        }
        family = name.capitalize()
        config = getattr(transformers, f"{family}Config")(**{**sizes, **common, **options})
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0) if p.dim() > 1 else p.add_(0.3 * torch.randn_like(p))
    return model.to(dtype).eval()


def token_numbers(rows: int = 2, tokens: int = 12, seed: int = 3) -> torch.Tensor:
    """Rows of token numbers, none of them special."""
    return torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def exactly(run, model, *args, **kw):
    """run(model, ...) with the model in float64: the oracle."""
    twin = exact_copy(model)
    unpatch(twin)
    with float64():
        return run(twin, *args, **kw)


def as_accurate(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """Asserts the rule of fastlm.testing."""
    found = error("result", ours, theirs, exact)
    assert found.ok, str(found)
