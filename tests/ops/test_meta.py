"""Every operator takes tensors of the meta device, of which autocast cannot be asked."""

from __future__ import annotations

import pytest
import torch

from fastlm import ops

X, W = torch.empty(2, 32, device="meta"), torch.empty(32, 32, device="meta")
Q = torch.empty(1, 2, 3, 32, device="meta")
TABLE = torch.empty(3, 32, device="meta")
TARGET = torch.zeros(2, dtype=torch.long, device="meta")
LENGTHS = torch.ones(1, dtype=torch.int32, device="meta")
CALLS = {
    "activation": lambda: ops.activation(X, "silu"),
    "attention": lambda: ops.attention(Q, Q, Q, causal=True),
    "attention, window": lambda: ops.attention(Q, Q, Q, causal=True, window=2),
    "cross_entropy": lambda: ops.cross_entropy(X, TARGET),
    "decode_attention": lambda: ops.decode_attention(Q[:, :, :1], Q, Q, LENGTHS),
    "feed_forward": lambda: ops.feed_forward(X, W, W),
    "layer_norm": lambda: ops.layer_norm(X),
    "linear": lambda: ops.linear(X, W),
    "linear_cross_entropy": lambda: ops.linear_cross_entropy(X, W, TARGET),
    "rms_norm": lambda: ops.rms_norm(X),
    "rope": lambda: ops.rope(Q, Q, TABLE, TABLE)[0],
}
SHAPES = {"attention": Q.shape, "attention, window": Q.shape, "rope": Q.shape}
SHAPES |= {"decode_attention": Q[:, :, :1].shape, "cross_entropy": (), "linear_cross_entropy": ()}


@pytest.mark.parametrize("name", CALLS)
def test_meta(name):
    made = CALLS[name]()
    assert made.is_meta
    assert made.shape == SHAPES.get(name, X.shape)
