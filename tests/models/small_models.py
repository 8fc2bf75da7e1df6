"""Small decoders whose layers say more than the token does: an error in one shows in the logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastlm.models import Config, Decoder

GPT2 = {
    "vocab": 150,
    "layers": 2,
    "norm": "layer",
    "positions": "learned",
    "gated": False,
    "activation": "gelu_tanh",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
}


def make(shape: Mapping, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder of a shape, weights drawn from the current seed."""
    model = Decoder(Config(**{"max_positions": 400, **shape}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(10 if name.startswith("blocks") else 3)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()
