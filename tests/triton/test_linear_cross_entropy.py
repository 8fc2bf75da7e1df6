"""linear_cross_entropy over Triton's cross_entropy against float64, forward and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check
from fastlm.triton._configs import Config, override

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "bias": True},
    "all": {
        "class_weight": True,
        "token_weight": True,
        "label_smoothing": 0.2,
        "z_loss": 1e-2,
        "softcap": 20.0,
    },
}


@pytest.mark.parametrize("form", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype, form):
    x, weight = torch.randn(2, 5, 16).to(dtype), torch.randn(37, 16).to(dtype)
    target = torch.randint(0, 37, (2, 5))
    target[0, 1] = -100
    kw = dict(OPTIONS[form])
    bias = torch.randn(37).to(dtype) if kw.pop("bias", False) else None
    if kw.pop("class_weight", False):
        kw["class_weight"] = torch.rand(37) + 0.5
        kw["token_weight"] = torch.rand(2, 5)

    def theirs(x, weight, bias):
        logits, class_weight = F.linear(x, weight, bias), kw.get("class_weight")
        others = {k: v for k, v in kw.items() if k != "class_weight"}
        return reference.cross_entropy(logits, target, weight=class_weight, **others)

    with override(linear_cross_entropy=Config((4,))):
        check(
            lambda x, w, b: ops.linear_cross_entropy(x, w, target, bias=b, **kw),
            theirs,
            lambda x, w, b: reference.linear_cross_entropy(x, w, target, bias=b, **kw),
            [x, weight, bias],
            draws=4,
        )


def test_gradients_that_are_not_wanted_and_no_rows():
    x, weight = torch.randn(6, 8), torch.randn(11, 8, requires_grad=True)
    target = torch.randint(0, 11, (6,))
    loss = ops.linear_cross_entropy(x, weight, target)
    (dweight,) = torch.autograd.grad(loss, weight)
    both = x.clone().requires_grad_()
    made = torch.autograd.grad(ops.linear_cross_entropy(both, weight, target), (both, weight))
    assert torch.equal(dweight, made[1])
    assert torch.equal(ops.linear_cross_entropy(x, weight.detach(), target), loss.detach())
    none = ops.linear_cross_entropy(x[:0], weight, target[:0], reduction="sum")
    assert none == 0 and not torch.autograd.grad(none, weight)[0].any()


def test_bad_input_is_named():
    x, weight = torch.randn(6, 8), torch.randn(11, 8)
    with pytest.raises(IndexError, match="linear_cross_entropy: target must be"):
        ops.linear_cross_entropy(x, weight, torch.full((6,), 11))
    with pytest.raises(ValueError, match="linear_cross_entropy: target must be"):
        ops.linear_cross_entropy(x, weight, torch.zeros(5, dtype=torch.int64))
