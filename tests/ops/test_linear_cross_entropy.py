"""linear_cross_entropy: every implementation against float64, forward and gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check

BACKENDS = ops.implementations("linear_cross_entropy")
NATIVE = pytest.mark.skipif("cpu" not in BACKENDS, reason="no native kernels")
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "class_weight": {"class_weight": True},
    "token_weight": {"token_weight": True},
    "mix": {"class_weight": True, "token_weight": True, "softcap": 5.0, "label_smoothing": 0.2},
    "mix_none": {"token_weight": True, "z_loss": 1e-2, "reduction": "none"},
}


def inputs(dtype, rows=70, width=40, classes=90):
    x = torch.randn(rows, width, dtype=dtype)
    weight = torch.randn(classes, width, dtype=dtype) * 0.3
    target = torch.randint(0, classes, (rows,))
    target[1] = -100
    return x, weight, torch.randn(classes, dtype=dtype), target


def options(form, rows, classes):
    kw = dict(OPTIONS[form])
    if kw.pop("class_weight", False):
        kw["class_weight"] = torch.rand(classes) + 0.5
    if kw.pop("token_weight", False):
        kw["token_weight"] = torch.rand(rows)
    return kw


def baseline(target, kw):
    """PyTorch's kernels in the dtype; what F.cross_entropy lacks is the reference's, in fp32."""

    def f(x, w, b):
        logits = F.linear(x, w, b)
        if set(kw) <= {"reduction", "label_smoothing"}:
            return F.cross_entropy(logits, target, **kw)
        return reference.linear_cross_entropy(x, w, target, bias=b, **kw)

    return f


def compare(x, weight, bias, target, kw):
    check(
        lambda x, w, b: ops.linear_cross_entropy(x, w, target, bias=b, **kw),
        baseline(target, kw),
        lambda x, w, b: reference.linear_cross_entropy(x, w, target, bias=b, **kw),
        [x, weight, bias],
    )


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small products, for which forking costs more; threads have their own test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks, the last one shorter, at sizes a test can afford."""
    module = sys.modules["fastlm.ops.linear_cross_entropy"]
    monkeypatch.setattr(module, "_CHUNK_ROWS", 32)
    monkeypatch.setattr(sys.modules["fastlm.reference.linear_cross_entropy"], "CHUNK_BYTES", 9000)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", OPTIONS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
def test_matches_float64(backend, dtype, form, with_bias):
    x, weight, bias, target = inputs(dtype)
    kw = options(form, 70, 90)
    with ops.use_backend(backend):
        compare(x, weight, bias if with_bias else None, target, kw)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["plain", "mix", "mix_none"])
def test_many_chunks_match_float64(backend, dtype, form, small_chunks):
    x, weight, bias, target = inputs(dtype, rows=130, width=37, classes=101)
    with ops.use_backend(backend):
        compare(x, weight, bias, target, options(form, 130, 101))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(300, 33, 7), (17, 600, 31), (64, 16, 1), (300, 9, 64)], ids=str)
def test_awkward_shapes_match_float64(dtype, shape):
    x, weight, bias, target = inputs(dtype, *shape)
    compare(x, weight, bias, target, {"z_loss": 0.1, "reduction": "sum"})


@NATIVE
@pytest.mark.parametrize("own", [True, False], ids=["own", "library"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_either_product_matches_float64(own, dtype, small_chunks, monkeypatch):
    module = sys.modules["fastlm.ops.linear_cross_entropy"]
    monkeypatch.setattr(module, "_product", lambda *args: "cpu" if own else "torch")
    x, weight, bias, target = inputs(dtype, rows=100, width=70, classes=111)
    compare(x, weight, bias, target, {})


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_few_rows_and_many_classes_match_float64(rows):
    """The gradient of x is a sum over all classes; the target's has nearly all the weight."""
    draws = []
    for seed in range(4):
        torch.manual_seed(seed)
        x, weight = torch.randn(rows, 96), torch.randn(24000, 96) * 0.05
        target = torch.randint(0, 24000, (rows,))

        def gradient(loss, dtype, x=x, weight=weight, target=target):
            leaf = x.to(dtype).requires_grad_()
            return torch.autograd.grad(loss(leaf, weight.to(dtype), target), leaf)[0].double()

        exact = gradient(lambda a, b, t: F.cross_entropy(a @ b.T, t), torch.float64)
        theirs = gradient(lambda a, b, t: F.cross_entropy(a @ b.T, t), torch.float32)
        ours = gradient(ops.linear_cross_entropy, torch.float32)
        draws.append([(made - exact).square().mean() for made in (ours, theirs)])
    ours, theirs = torch.tensor(draws).mean(0).sqrt()
    assert ours <= 2 * theirs, (float(ours), float(theirs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("answers", [0, 1, 5])
def test_tokens_without_loss(backend, reduction, answers):
    """A mask that leaves few tokens: the others' gradients are zero, theirs as without the rest."""
    x, weight, _, target = inputs(torch.float32)
    target[:] = 3
    target[answers:] = 7
    x.requires_grad_()
    weight.requires_grad_()
    kw = {"ignore_index": 7, "reduction": reduction}
    with ops.use_backend(backend):
        loss = ops.linear_cross_entropy(x, weight, target, **kw)
    expected = F.cross_entropy(F.linear(x, weight), target, **kw)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    for ours, theirs in zip(
        torch.autograd.grad(loss.sum(), (x, weight)),
        torch.autograd.grad(expected.sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_each_gradient_alone_equals_itself_among_all(wanted):
    x, weight, bias, target = inputs(torch.float32)
    tensors = {"x": x, "weight": weight, "bias": bias}

    def gradient(names):
        leaves = {n: t.clone().requires_grad_(n in names) for n, t in tensors.items()}
        loss = ops.linear_cross_entropy(leaves["x"], leaves["weight"], target, bias=leaves["bias"])
        return torch.autograd.grad(loss, leaves[wanted])[0]

    assert torch.equal(gradient([wanted]), gradient(list(tensors)))


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 3.0, "z_loss": 1e-2},
        {"class_weight": torch.linspace(0.5, 2, 90)},
        {"token_weight": torch.linspace(0, 1, 70), "reduction": "sum"},
        {"ignore_index": 3},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_other_types_go_chunk_by_chunk_through_pytorch(dtype, options, small_chunks):
    x, weight, bias, target = inputs(dtype)
    target[1] = 3
    ours = ops.linear_cross_entropy(x, weight, target, bias=bias, **options)
    as_there = {"weight" if k == "class_weight" else k: v for k, v in options.items()}
    expected = ops.cross_entropy(F.linear(x, weight, bias), target, **as_there)
    torch.testing.assert_close(ours, expected)


def test_batches_of_sequences_empty_batches_and_odd_layouts():
    x, weight, _, target = inputs(torch.float32, rows=6)
    flat = ops.linear_cross_entropy(x, weight, target, reduction="none")
    shaped = ops.linear_cross_entropy(x.view(2, 3, -1), weight, target.view(2, 3), reduction="none")
    assert torch.equal(shaped, flat.view(2, 3))
    strided = ops.linear_cross_entropy(
        x.t().contiguous().t(), weight.t().contiguous().t(), target, reduction="none"
    )
    assert torch.equal(strided, flat)
    apart = target.repeat_interleave(2)[::2]
    assert torch.equal(ops.linear_cross_entropy(x, weight, apart, reduction="none"), flat)
    one = ops.linear_cross_entropy(x[0], weight, target[0], reduction="none")
    assert one.shape == ()
    x, weight = x[:0].requires_grad_(), weight.requires_grad_()
    none = ops.linear_cross_entropy(x, weight, target[:0], reduction="none")
    assert none.shape == (0,)
    total = ops.linear_cross_entropy(x, weight, target[:0], reduction="sum")
    dx, dweight = torch.autograd.grad(total, (x, weight))
    assert total == 0 and dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_kept_graph_gives_the_same_gradients_again(factor):
    x, weight, _, target = inputs(torch.float32)
    leaves = x.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(F.linear(*leaves), target) * factor, leaves)
    loss = ops.linear_cross_entropy(*leaves, target) * factor
    for keep in (True, True, False):
        made = torch.autograd.grad(loss, leaves, retain_graph=keep)
        for ours, theirs in zip(made, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
            ours.fill_(7.0)


@NATIVE
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused_not_wrong(reduction):
    x, weight, _, target = inputs(torch.float32)
    x.requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, target, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_autocast_casts_the_arguments():
    x, weight, bias, target = inputs(torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(x, weight, target, bias=bias.bfloat16())
    expected = ops.linear_cross_entropy(
        x.bfloat16(), weight.bfloat16(), target, bias=bias.bfloat16()
    )
    assert torch.equal(loss, expected)
    loss.backward()
    assert weight.grad.dtype == torch.float32


def test_same_bits_for_any_number_of_threads(small_chunks):
    x, weight, bias, target = inputs(torch.float32, rows=100, width=80, classes=1000)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    results, before = [], torch.get_num_threads()
    try:
        with ops.use_backend("cpu"):  # the own products: PyTorch's library may differ
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                loss = ops.linear_cross_entropy(x, weight, target, bias=bias)
                results.append((loss, *torch.autograd.grad(loss, leaves)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("form", ["bfloat16", "none", "float16"])
def test_fullgraph_compile_forward_and_backward(form):
    dtype = torch.float32 if form == "none" else getattr(torch, form)
    reduction = "none" if form == "none" else "mean"
    x, weight, bias, target = inputs(dtype)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def loss(x, weight, bias):
        made = ops.linear_cross_entropy(x, weight, target, bias=bias, reduction=reduction)
        return (made * 3.0).sum()

    made = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for ours, eager in zip(made, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(ours, eager)


@NATIVE
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(reduction):
    x, weight, bias, target = inputs(torch.float32)
    op = torch.ops.fastlm.linear_cross_entropy.default
    for wanted in ((True, True, True), (False, True, False), (False, False, False)):
        args = (x, weight, target, bias, None, torch.rand(70), -100, 0.1, 0.0, 5.0, reduction)
        torch.library.opcheck(op, (*args, *wanted, 32, False))


MEMORY = """
import resource, torch
from fastlm import ops
x = torch.randn(1024, 32, dtype=torch.{dtype}, requires_grad=True)
w = torch.randn(49152, 32, dtype=torch.{dtype}, requires_grad=True)
target = torch.randint(49152, (1024,))
with ops.use_backend("{backend}"):
    ops.linear_cross_entropy(x[:8], w, target[:8]).backward()  # what is loaded once
    ops.linear(x, w[:64])
    x.grad = w.grad = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss = ops.linear_cross_entropy(x, w, target, reduction="{reduction}")
    loss.sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize(
    "backend, dtype, reduction",
    [
        ("cpu", "float32", "mean"),
        ("cpu", "bfloat16", "mean"),
        ("cpu", "float32", "none"),
        ("torch", "float32", "mean"),
    ],
)
def test_never_holds_all_logits(backend, dtype, reduction):
    """All logits would be 192 MiB in fp32 and as much again in the backward pass."""
    if backend not in BACKENDS:
        pytest.skip("no native kernels")
    script = MEMORY.format(backend=backend, dtype=dtype, reduction=reduction)
    # freed memory goes back at once: the process then holds what the program does
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="1000000")
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    grown = int(run.stdout)
    assert grown < 80, f"{grown} MiB"


def test_target_beyond_the_classes_is_refused():
    x, weight, _, _ = inputs(torch.float32)
    with pytest.raises(IndexError, match=r"\[0, 90\).*got 90 at position 0"):
        ops.linear_cross_entropy(x, weight, torch.full((70,), 90))


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x must be of rank 1 or more, got a scalar"),
        ({"weight": torch.ones(90, 3)}, ValueError, r"weight must be \[V, 40\] with V > 0"),
        ({"weight": torch.ones(90, 40).bfloat16()}, ValueError, r"weight must be torch\.float32"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must be \[90\], got \[3\]"),
        ({"target": torch.zeros(6, dtype=torch.int64)}, ValueError, r"target must be \[70\]"),
        ({"reduction": "max"}, ValueError, "reduction must be"),
        ({"class_weight": torch.ones(3)}, ValueError, r"class_weight must be \[90\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_names_the_argument(change, error, text):
    x, weight, bias, target = inputs(torch.float32)
    arguments = {"x": x, "weight": weight, "target": target, "bias": bias, **change}
    with pytest.raises(error, match=f"linear_cross_entropy: {text}"):
        ops.linear_cross_entropy(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("leading", [(0,), (0, 1), (2, 0)], ids=str)
def test_no_tokens_have_gradients_too(backend, reduction, leading):
    x = torch.randn(*leading, 5, requires_grad=True)
    weight = torch.randn(7, 5, requires_grad=True)
    target = torch.zeros(leading, dtype=torch.int64)
    with ops.use_backend(backend):
        loss = ops.linear_cross_entropy(x, weight, target, reduction=reduction)
    loss.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.nan_to_num().any()
