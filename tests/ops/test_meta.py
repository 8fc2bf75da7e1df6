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


ROW = torch.randn(2, 32)
HEADS, COS = torch.randn(1, 2, 3, 32), torch.randn(3, 32)
AT = torch.zeros(2, dtype=torch.long)
STRAY = {
    "rms_norm weight": lambda: ops.rms_norm(ROW, X[0]),
    "rms_norm residual": lambda: ops.rms_norm(ROW, residual=X),
    "layer_norm weight": lambda: ops.layer_norm(ROW, X[0]),
    "layer_norm bias": lambda: ops.layer_norm(ROW, ROW[0], X[0]),
    "gated_activation up": lambda: ops.gated_activation(ROW, X, "silu"),
    "linear w": lambda: ops.linear(ROW, W),
    "linear bias": lambda: ops.linear(ROW, torch.randn(32, 32), W[0]),
    "feed_forward w_in": lambda: ops.feed_forward(ROW, W, torch.randn(32, 32)),
    "feed_forward w_out": lambda: ops.feed_forward(ROW, torch.randn(32, 32), W),
    "cross_entropy target": lambda: ops.cross_entropy(ROW, TARGET),
    "cross_entropy weight": lambda: ops.cross_entropy(ROW, AT, weight=X[0]),
    "linear_cross_entropy weight": lambda: ops.linear_cross_entropy(ROW, W, AT),
    "attention k": lambda: ops.attention(HEADS, Q, HEADS),
    "attention sinks": lambda: ops.attention(HEADS, HEADS, HEADS, sinks=X[0, :2]),
    "decode_attention lengths": lambda: ops.decode_attention(HEADS, HEADS, HEADS, LENGTHS),
    "decode_attention sinks": lambda: ops.decode_attention(HEADS, HEADS, HEADS, 3, sinks=X[0, :2]),
    "rope cos": lambda: ops.rope(HEADS, HEADS, TABLE, COS),
    "rope_append sin": lambda: ops.rope_append(
        HEADS, HEADS, HEADS, COS, TABLE, HEADS.clone(), HEADS.clone(), 3
    ),
    "rope_append q_weight": lambda: ops.rope_append(
        HEADS, HEADS, HEADS, COS, COS, HEADS.clone(), HEADS.clone(), 3, q_weight=TABLE[0]
    ),
    "quantized_linear bias": lambda: ops.quantized_linear(
        ROW, ops.quantize_weight(torch.randn(32, 32)), X[0]
    ),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("case", STRAY)
def test_one_meta_tensor_among_others_is_refused(case, grad):
    """PyTorch runs the shape function then, whose empty tensors must not pass for results."""
    name, argument = case.split()
    leaves = [] if name == "rope_append" else [ROW, HEADS]
    try:
        for x in leaves:
            x.requires_grad_(grad)
        with pytest.raises(ValueError, match=f"^{name}: {argument} must be on cpu, got meta"):
            STRAY[case]()
    finally:
        for x in leaves:
            x.requires_grad_(False)
