"""cross_entropy's Triton kernels against float64, forward and gradients, every option."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check
from fastlm.triton._configs import Config, override
from tests.ops.test_cross_entropy import OPTIONS, baseline, options

DTYPES = [torch.float32, torch.bfloat16]
TILED = {"cross_entropy": Config((64,)), "cross_entropy_sums": Config((4,))}

# every form whole with one type and tiled with the other
CASES = [(form, DTYPES[tiled], bool(tiled)) for form in OPTIONS for tiled in (0, 1)]
CASES += [("plain", DTYPES[1], False), ("all", DTYPES[0], True)]
CASES += [(form, torch.float16, form == "all") for form in ("plain", "none", "z_loss", "all")]


@pytest.mark.parametrize("form, dtype, tiled", CASES, ids=str)
def test_matches_float64(dtype, tiled, form):
    shape = (2, 5, 101) if tiled else (16, 77)
    x = torch.randn(shape).to(dtype) * 3
    target = torch.randint(0, shape[-1], shape[:-1])
    target.view(-1)[1] = -100
    kw = options(form, shape)
    if form == "all":
        kw |= {"softcap": 20.0, "reduction": "none"}
    tiles = {**TILED, **({"cross_entropy_sums": Config((64,))} if "weight" in kw else {})}
    with override(**tiles if tiled else {}):
        check(
            lambda x: ops.cross_entropy(x, target, **kw),
            lambda x: baseline(x, target, kw),
            lambda x: reference.cross_entropy(x, target, **kw),
            [x],
            draws=6,
        )


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
def test_special_values_behave_as_in_pytorch(tiled):
    inf = float("inf")
    x = torch.full((6, 70), -2.0)
    x[0, :40] = -inf  # whole tiles masked out
    x[1] = -inf
    x[2, 3], x[3, 4] = inf, float("nan")
    x[4] = torch.linspace(1e4, 3e4, 70)
    target = torch.tensor([60, 0, 1, 2, 69, 69])
    results = []
    for f in (ops.cross_entropy, F.cross_entropy):
        y = x.clone().requires_grad_()
        with override(**TILED if tiled else {}):
            loss = f(y, target, reduction="none")
            results.append((loss, torch.autograd.grad(loss.sum(), y)[0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_tokens_that_do_not_count():
    x, target = torch.randn(3, 40, requires_grad=True), torch.full((3,), -100)
    loss = ops.cross_entropy(x, target)
    loss.backward()
    assert loss.isnan() and torch.equal(x.grad, torch.zeros_like(x))
    assert ops.cross_entropy(x, target, reduction="sum") == 0
    empty = torch.randn(0, 40, requires_grad=True)
    ops.cross_entropy(empty, target[:0], reduction="sum").backward()
    assert empty.grad.shape == (0, 40)
    one = torch.randn(2, 1, requires_grad=True)
    assert ops.cross_entropy(one, torch.zeros(2, dtype=torch.int64)) == 0


def test_a_target_that_is_no_class():
    x = torch.randn(2, 40)
    with pytest.raises(
        IndexError, match=r"in \[0, 40\) or ignore_index -100, got 40 at position 1"
    ):
        ops.cross_entropy(x, torch.tensor([0, 40]))
    made, grad = torch.ops.fastlm.cross_entropy.triton(
        x, torch.tensor([0, 40]), None, None, -100, 0.0, 0.0, 0.0, 0, True
    )
    assert made.isnan().tolist() == [False, True]
    assert grad.isnan().any(1).tolist() == [False, True]


def test_a_loss_that_is_scaled_and_differentiated_again():
    x, target = torch.randn(3, 40, requires_grad=True), torch.tensor([1, 2, 3])
    (plain,) = torch.autograd.grad(ops.cross_entropy(x, target), x)
    loss = ops.cross_entropy(x, target)
    (kept,) = torch.autograd.grad(3 * loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(3 * loss, x)
    assert torch.equal(kept, 3 * plain) and torch.equal(again, kept)
    before = x.detach().clone()
    assert torch.equal(x, before)


def test_strided_logits_and_bad_input():
    x, target = torch.randn(4, 6, 40), torch.randint(0, 40, (4, 6))
    expected = ops.cross_entropy(x, target, reduction="none")
    views = x.transpose(0, 1).contiguous().transpose(0, 1), torch.cat((x, x), -1)[..., :40]
    for view in views:
        assert torch.equal(ops.cross_entropy(view, target, reduction="none"), expected)
    for bad in ({"target": target[:3]}, {"target": target, "token_weight": torch.ones(3)}):
        name = list(bad)[-1]
        with pytest.raises(ValueError, match=f"cross_entropy: {name} must be"):
            ops.cross_entropy(x, **bad)


def test_fp16_gradients_of_many_tokens():
    """Divided by their number, a logit's share lies below the smallest fp16 until it is scaled."""
    x, target = torch.randn(2048, 64).half(), torch.randint(0, 64, (2048,))

    def scaled(f):
        return lambda x: f(x, target) * 2.0**14  # as a loss scale does

    check(
        scaled(ops.cross_entropy),
        scaled(lambda x, t: F.cross_entropy(x.float(), t)),
        scaled(reference.cross_entropy),
        [x],
        draws=1,
    )
