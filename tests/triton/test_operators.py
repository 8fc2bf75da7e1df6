"""The registered operators of Triton's backend: schemas, shape functions, what they alias."""

from __future__ import annotations

import pytest
import torch

OPS = torch.ops.fastlm
X, W, T = torch.randn(3, 8), torch.randn(8), torch.tensor([1, -100, 7])
Q = torch.randn(1, 4, 2, 8).transpose(1, 2)
LOSS = (T, None, torch.ones(3), -100, 0.1, 0.1, 5.0)
CALLS = {
    "rms_norm": (X, W, 1e-6, 0.0),
    "add_rms_norm": (X, X, W, 1e-6, 0.0),
    "rms_norm_backward": (X, X, X, W, 1e-6, 0.0),
    "layer_norm": (X, W, W, 1e-5),
    "add_layer_norm": (X, X, None, None, 1e-5),
    "layer_norm_backward": (X, None, X, W, True, 1e-5),
    "rope": (Q, Q.contiguous(), W.expand(4, 8), W.expand(4, 8), 8, False, False),
    "rope_single": (Q, W[:2].expand(4, 2), W[:2].expand(4, 2), 4, True, True),
    "activation": (X.t(), 0),
    "activation_backward": (X, X, 1),
    "gated_activation": (X, X.clone(), 2),
    "gated_activation_backward": (X, X, X, 3),
    "packed_activation": (X, 4),
    "packed_activation_backward": (X[:, :4], X, 0),
    "feed_forward": (X, X, X.t(), X.clone(), None, W, W[:3], 0),
    "feed_forward_hidden": (X, X, None, W[:3], None, 1),
    "feed_forward_backward": (torch.randn(3, 3), X[:, :3].contiguous(), None, 1),
    "cross_entropy": (X, *LOSS, 1, True),
    "linear_cross_entropy": (X, X, *LOSS[:1], None, *LOSS[1:], 0, True, True, True, 0, True),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    args = CALLS[name]
    if name == "linear_cross_entropy":
        args = (X, torch.randn(9, 8), *args[2:])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(OPS, name).triton, args, test_utils=checks)
