"""What fp16 has and the other types have not: a small range, and losses that are scaled for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import _ext, ops, reference
from fastlm.testing import error

pytestmark = pytest.mark.skipif(_ext.native is None, reason="no native kernels")
HALF = torch.float16
INFINITE = float("inf")


def test_what_leaves_the_range_is_infinite():
    x = torch.tensor([300.0, -300.0, 1.0, 0.0] * 5).half()
    assert torch.equal(ops.activation(x, "relu2"), F.relu(x).square())
    assert ops.activation(x, "relu2")[0] == INFINITE
    y = ops.rms_norm(torch.eye(4).half(), torch.full((4,), 6e4).half())
    assert torch.equal(y.isinf(), torch.eye(4, dtype=torch.bool))
    doubled = ops.rms_norm(x, residual=torch.full_like(x, 65504.0))[1]
    assert torch.equal(doubled, x + 65504.0)
    assert doubled[0] == INFINITE


@pytest.mark.parametrize("scale", [1.0, 2.0**16], ids=["plain", "scaled"])
@pytest.mark.parametrize("form", ["mean", "sum", "weights", "z_loss", "none"])
def test_gradients_of_a_scaled_loss(form, scale):
    """Over many tokens: a logit's own gradient would vanish before the scale reaches it."""
    rows, classes = 1500, 50
    x, target = torch.randn(rows, classes).half() * 3, torch.randint(classes, (rows,))
    target[::3] = -100
    weight = torch.rand(classes) + 0.5
    options = {
        "mean": {},
        "sum": {"reduction": "sum"},
        "weights": {"weight": weight, "token_weight": torch.rand(rows) * 100},
        "z_loss": {"z_loss": 1e-2, "softcap": 30.0, "label_smoothing": 0.1},
        "none": {"reduction": "none"},
    }[form]
    if form in ("sum", "none"):
        scale /= 2**10  # or PyTorch's gradients are infinite

    def gradient(function, dtype):
        leaf = x.to(dtype).requires_grad_()
        loss = function(leaf, target, **options)
        return torch.autograd.grad(loss, leaf, torch.full_like(loss, scale))[0]

    made = gradient(ops.cross_entropy, HALF), gradient(reference.cross_entropy, HALF)
    verdict = error("gradient", *made, gradient(reference.cross_entropy, torch.float64))
    assert verdict.ok, str(verdict)


def test_a_scaled_loss_without_tokens():
    x = torch.randn(3, 5).half().requires_grad_()
    loss = ops.cross_entropy(x, torch.full((3,), -100))
    assert loss.isnan()
    loss.backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    empty = torch.randn(0, 5).half().requires_grad_()
    ops.cross_entropy(empty, torch.zeros(0, dtype=torch.int64), reduction="sum").backward()
    assert empty.grad.shape == (0, 5)


def test_scaled_gradients_are_made_twice_from_one_graph():
    x, target = torch.randn(2000, 11).half().requires_grad_(), torch.randint(11, (2000,))
    loss = ops.cross_entropy(x, target) * 1024.0
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert first.abs().max() > 0
    assert torch.equal(first, second)


@pytest.mark.parametrize("scale", [1.0, 2.0**16], ids=["plain", "scaled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scaled_gradients_of_the_fused_loss(reduction, scale):
    rows, width, classes = 700, 40, 90
    target = torch.randint(classes, (rows,))
    target[::3] = -100
    inputs = torch.randn(rows, width), torch.randn(classes, width) * 0.3, torch.randn(classes)
    inputs = [t.half() for t in inputs]
    if reduction == "none":
        scale /= 2**10

    def gradients(library, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        x, weight, bias = leaves
        options = {"bias": bias, "reduction": reduction}
        loss = library.linear_cross_entropy(x, weight, target, **options)
        return torch.autograd.grad(loss, leaves, torch.full_like(loss, scale))

    exact = gradients(reference, torch.float64)
    for ours, theirs, right in zip(
        gradients(ops, HALF), gradients(reference, HALF), exact, strict=True
    ):
        verdict = error("gradient", ours, theirs, right)
        assert verdict.ok, str(verdict)
