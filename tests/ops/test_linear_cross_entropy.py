"""linear_cross_entropy: every implementation against float64, forward and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check

BACKENDS = ops.implementations("linear_cross_entropy")
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
}


def inputs(dtype, rows=7, width=24, classes=50):
    x = torch.randn(rows, width, dtype=dtype)
    weight = torch.randn(classes, width, dtype=dtype) * 0.3
    target = torch.randint(0, classes, (rows,))
    target[1] = -100
    return x, weight, torch.randn(classes, dtype=dtype), target


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
def test_matches_float64(backend, dtype, options, with_bias):
    x, weight, bias, target = inputs(dtype)
    with ops.use_backend(backend):
        check(
            lambda x, w, b: ops.linear_cross_entropy(x, w, target, bias=b, **options),
            lambda x, w, b: F.cross_entropy(F.linear(x, w, b), target, **options),
            lambda x, w, b: reference.linear_cross_entropy(x, w, target, bias=b, **options),
            [x, weight, bias if with_bias else None],
        )


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 3.0, "z_loss": 1e-2},
        {"class_weight": torch.linspace(0.5, 2, 50)},
        {"token_weight": torch.linspace(0, 1, 7), "reduction": "sum"},
        {"ignore_index": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_are_those_of_cross_entropy(options):
    x, weight, bias, target = inputs(torch.float64)
    target[1] = 3
    ours = ops.linear_cross_entropy(x, weight, target, bias=bias, **options)
    as_there = {"weight" if k == "class_weight" else k: v for k, v in options.items()}
    expected = ops.cross_entropy(F.linear(x, weight, bias), target, **as_there)
    torch.testing.assert_close(ours, expected)


def test_batches_of_sequences_and_empty_batches():
    x, weight, _, target = inputs(torch.float32, rows=6)
    flat = ops.linear_cross_entropy(x, weight, target, reduction="none")
    shaped = ops.linear_cross_entropy(x.view(2, 3, -1), weight, target.view(2, 3), reduction="none")
    assert torch.equal(shaped, flat.view(2, 3))
    none = ops.linear_cross_entropy(x[:0], weight, target[:0], reduction="none")
    assert none.shape == (0,)


def test_fullgraph_compile_forward_and_backward():
    x, weight, _, target = inputs(torch.float32)
    x.requires_grad_()

    def loss(x):
        return ops.linear_cross_entropy(x, weight, target)

    (grad,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(grad, expected)


def test_target_beyond_the_classes_is_refused():
    x, weight, _, _ = inputs(torch.float32)
    with pytest.raises(IndexError, match="50"):
        ops.linear_cross_entropy(x, weight, torch.full((7,), 50))


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x must be of rank 1 or more, got a scalar"),
        ({"weight": torch.ones(50, 3)}, ValueError, r"weight must be \[V, 24\] with V > 0"),
        ({"weight": torch.ones(50, 24).bfloat16()}, ValueError, r"weight must be torch\.float32"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must be \[50\], got \[3\]"),
        ({"target": torch.zeros(6, dtype=torch.int64)}, ValueError, r"target must be \[7\]"),
        ({"reduction": "max"}, ValueError, "reduction must be"),
        ({"class_weight": torch.ones(3)}, ValueError, r"class_weight must be \[50\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_names_the_argument(change, error, text):
    x, weight, bias, target = inputs(torch.float32)
    arguments = {"x": x, "weight": weight, "target": target, "bias": bias, **change}
    with pytest.raises(error, match=f"linear_cross_entropy: {text}"):
        ops.linear_cross_entropy(**arguments)
