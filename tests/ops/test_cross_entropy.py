"""cross_entropy: every implementation against float64, forward and gradients, every option."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "class_weight": {"weight": True},
    "token_weight": {"token_weight": True},
    "all": {
        "weight": True,
        "token_weight": True,
        "label_smoothing": 0.2,
        "z_loss": 1e-2,
        "reduction": "sum",
    },
}


def options(form, shape):
    kw = dict(OPTIONS[form])
    if kw.pop("weight", False):
        kw["weight"] = torch.rand(shape[-1]) + 0.5
    if kw.pop("token_weight", False):
        kw["token_weight"] = torch.rand(shape[:-1])
    return kw


def baseline(x, target, kw):
    """PyTorch's kernels in x's dtype; what F.cross_entropy lacks is the reference's, in fp32."""
    if set(kw) <= {"reduction", "label_smoothing", "weight"}:
        kw = {k: v.to(x.dtype) if k == "weight" else v for k, v in kw.items()}
        loss = F.cross_entropy(x.reshape(-1, x.shape[-1]), target.reshape(-1), **kw)
        return loss.reshape(target.shape) if kw.get("reduction") == "none" else loss
    return reference.cross_entropy(x, target, **kw)


@pytest.mark.parametrize("backend", ops.implementations("cross_entropy"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 3), (33, 7), (2, 3, 101), (3, 9001)], ids=str)
@pytest.mark.parametrize("form", OPTIONS)
def test_matches_float64(backend, dtype, shape, form):
    x = torch.randn(shape, dtype=dtype) * 3
    target = torch.randint(0, shape[-1], shape[:-1])
    if target.numel() > 1:
        target.view(-1)[1] = -100
    kw = options(form, shape)
    with ops.use_backend(backend):
        check(
            lambda x: ops.cross_entropy(x, target, **kw),
            lambda x: baseline(x, target, kw),
            lambda x: reference.cross_entropy(x, target, **kw),
            [x],
        )


@pytest.mark.parametrize("size", [1.0, 4.0, 16.0])
def test_gradients_at_the_bound_of_a_soft_cap(size):
    """Where tanh is all but one, its slope is lost if it is taken from a rounded tanh."""
    x, target = size * torch.randn(64, 101), torch.randint(0, 101, (64,))
    kw = {"softcap": 1.3, "reduction": "none"}
    check(
        lambda x: ops.cross_entropy(x, target, **kw),
        lambda x: reference.cross_entropy(x, target, **kw),
        lambda x: reference.cross_entropy(x, target, **kw),
        [x],
    )


@pytest.mark.parametrize("form", OPTIONS)
def test_a_row_alone_equals_itself_among_others(form):
    x, target = torch.randn(5, 4999) * 3, torch.randint(0, 4999, (5,))
    kw = {**options(form, x.shape), "reduction": "sum"}
    alone = {**kw, **({"token_weight": kw["token_weight"][3:4]} if "token_weight" in kw else {})}
    whole, row = x.requires_grad_(), x[3:4].detach().requires_grad_()
    ops.cross_entropy(whole, target, **kw).backward()
    ops.cross_entropy(row, target[3:4], **alone).backward()
    assert torch.equal(row.grad, whole.grad[3:4])


def test_a_single_class_costs_nothing():
    x = torch.randn(3, 1, requires_grad=True)
    loss = ops.cross_entropy(x, torch.zeros(3, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_without_gradient_the_logits_stay_as_they_are():
    x, target = torch.randn(3, 5000), torch.randint(0, 5000, (3,))
    before = x.clone()
    ops.cross_entropy(x, target)
    assert torch.equal(x, before)


def test_a_growing_maximum_rescales_what_came_before():
    """Blocks of a row whose largest logits grow from masked out to far apart."""
    x = torch.linspace(-80, 80, 5 * 4096).repeat(2, 1)
    x[:, :4096] = float("-inf")
    target = torch.tensor([5000, 5 * 4096 - 1])
    check(
        lambda x: ops.cross_entropy(x, target),
        lambda x: F.cross_entropy(x, target),
        lambda x: reference.cross_entropy(x, target),
        [x],
    )


def test_streamed_gradient_equals_the_stored_one():
    """Beyond 24 MiB the gradient bypasses the caches; a slice of the rows does not."""
    x, target = torch.randn(210, 32000), torch.randint(0, 32000, (210,))
    whole = x.clone().requires_grad_()
    ops.cross_entropy(whole, target, reduction="sum").backward()
    part = x[100:110].clone().requires_grad_()
    ops.cross_entropy(part, target[100:110], reduction="sum").backward()
    assert torch.equal(whole.grad[100:110], part.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits_behave_as_in_pytorch(dtype):
    x = torch.tensor(
        [[1e4, -1e4, 0.0], [float("-inf"), 1.0, 2.0], [-1e4, -1e4, -1e4], [3e4, 3e4, 3e4]],
        dtype=dtype,
    ).requires_grad_()
    target = torch.tensor([1, 2, 0, 1])
    ours = ops.cross_entropy(x, target, reduction="none")
    (grad,) = torch.autograd.grad(ours.sum(), x)
    theirs = F.cross_entropy(x.float(), target, reduction="none")
    (expected,) = torch.autograd.grad(theirs.sum(), x)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("row", [[float("-inf")] * 3, [float("nan"), 0, 0], [float("inf"), 0, 0]])
def test_undefined_rows_give_nan(row):
    x = torch.tensor([row])
    assert ops.cross_entropy(x, torch.tensor([0])).isnan()
    assert F.cross_entropy(x, torch.tensor([0])).isnan()


def test_all_tokens_ignored():
    x = torch.randn(3, 7, requires_grad=True)
    target = torch.full((3,), -100)
    assert ops.cross_entropy(x, target).isnan()  # as F.cross_entropy
    total = ops.cross_entropy(x, target, reduction="sum")
    assert total == 0
    total.backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_empty_batch():
    x = torch.empty(0, 5, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64)
    assert ops.cross_entropy(x, target, reduction="none").shape == (0,)
    ops.cross_entropy(x, target, reduction="sum").backward()
    assert x.grad.shape == x.shape


def test_strided_logits_equal_contiguous_ones():
    x, target = torch.randn(2, 9, 40), torch.randint(0, 40, (2, 8))
    shifted = x[:, :-1]
    expected = ops.cross_entropy(shifted.contiguous(), target)
    assert torch.equal(ops.cross_entropy(shifted, target), expected)


def test_same_bits_for_any_number_of_threads():
    x, target = torch.randn(64, 5000, requires_grad=True), torch.randint(0, 5000, (64,))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = ops.cross_entropy(x, target)
            results.append((loss, *torch.autograd.grad(loss, x)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fullgraph_compile_forward_and_backward(reduction):
    def f(x, target):
        loss = ops.cross_entropy(x, target, label_smoothing=0.1, reduction=reduction)
        return (loss * 3.0).sum()

    x, target = torch.randn(4, 32, requires_grad=True), torch.randint(0, 32, (4,))
    (grad,) = torch.autograd.grad(torch.compile(f, fullgraph=True)(x, target), x)
    torch.testing.assert_close(grad, torch.autograd.grad(f(x, target), x)[0])


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_kept_graph_gives_the_same_gradient_again(factor):
    """The gradient is made in the forward pass; what the caller does with it stays his."""
    x, target = torch.randn(4, 32, requires_grad=True), torch.randint(0, 32, (4,))
    (expected,) = torch.autograd.grad(F.cross_entropy(x, target) * factor, x)
    loss = ops.cross_entropy(x, target) * factor
    for keep in (True, True, False):
        (grad,) = torch.autograd.grad(loss, x, retain_graph=keep)
        torch.testing.assert_close(grad, expected)
        grad.fill_(7.0)


def test_a_used_graph_is_gone_and_a_leaf_owns_its_gradient():
    x, target = torch.randn(4, 32, requires_grad=True), torch.randint(0, 32, (4,))
    for times in (1, 2):
        loss = ops.cross_entropy(x, target)
        loss.backward()
        expected = torch.autograd.grad(F.cross_entropy(x, target), x)[0] * times
        torch.testing.assert_close(x.grad, expected)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused_not_wrong(reduction):
    x, target = torch.randn(4, 32, requires_grad=True), torch.randint(0, 32, (4,))
    loss = ops.cross_entropy(x, target, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(grad, reference_gradient(x, target, reduction))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def reference_gradient(x, target, reduction):
    loss = F.cross_entropy(x, target, reduction=reduction).sum()
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.skipif("cpu" not in ops.implementations("cross_entropy"), reason="no native kernels")
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(reduction):
    x, target = torch.randn(3, 16), torch.tensor([1, -100, 4])
    op = torch.ops.fastlm.cross_entropy.default
    for gradient in (False, True):
        args = (x, target, None, None, -100, 0.1, 0.0, 5.0, reduction, gradient)
        torch.library.opcheck(op, args)


X, T = torch.randn(2, 5), torch.tensor([0, 1])


@pytest.mark.parametrize(
    "args, kwargs, error, text",
    [
        ((X, torch.tensor([0, 5])), {}, IndexError, r"\[0, 5\).*got 5 at position 1"),
        ((X, torch.tensor([-1, 0])), {}, IndexError, "got -1 at position 0"),
        ((X, T[:1]), {}, ValueError, r"target must be \[2\], got \[1\]"),
        ((X, T.int()), {}, TypeError, "target must be torch.int64, got torch.int32"),
        ((X.long(), T), {}, TypeError, "logits must be a floating-point tensor"),
        ((X[:, :0], T), {}, ValueError, r"logits must be \[..., V\] with V > 0"),
        ((X, T), {"weight": torch.ones(4)}, ValueError, r"weight must be \[5\], got \[4\]"),
        ((X, T), {"weight": torch.ones(1, 5)}, ValueError, r"weight must be \[5\], got \[1, 5\]"),
        ((X, T), {"token_weight": torch.ones(1, 2)}, ValueError, r"must be \[2\], got \[1, 2\]"),
        ((X, T), {"softcap": float("inf")}, ValueError, "softcap must be positive and finite"),
        ((X, T), {"label_smoothing": 2.0}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        ((X, T), {"softcap": -1.0}, ValueError, "softcap must be positive"),
        ((X, T), {"reduction": "avg"}, ValueError, "reduction must be one of none, mean, sum"),
    ],
)
def test_bad_input_names_the_argument(args, kwargs, error, text):
    with pytest.raises(error, match="cross_entropy: .*" + text):
        ops.cross_entropy(*args, **kwargs)
