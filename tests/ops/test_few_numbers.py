"""Few numbers with gradients on a CPU: PyTorch's kernels where a gradient in Python is slower."""

from __future__ import annotations

import pytest
import torch

from fastlm import _ext, ops, reference
from fastlm.ops import _registry

pytestmark = pytest.mark.skipif(
    _ext.native is None or _registry.forced() is not None, reason="needs the chooser and kernels"
)
DTYPES = (torch.float32, torch.bfloat16)


def chosen(call) -> str:
    """The backend that ran a call."""
    with _registry.recording() as verdicts:
        call()
    return verdicts[-1].chosen


def gated(x: torch.Tensor) -> torch.Tensor:
    return ops.gated_activation(x, x, "silu")


CALLS = {
    "silu": (lambda x: ops.activation(x, "silu"), DTYPES),
    "relu": (lambda x: ops.activation(x, "relu"), DTYPES),
    "gelu": (lambda x: ops.activation(x, "gelu"), (torch.bfloat16,)),
    "gated": (gated, (torch.float32,)),
    "layer_norm": (ops.layer_norm, DTYPES),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_one_row_with_gradients(name, dtype):
    call, quick = CALLS[name]
    x = torch.randn(1, 768, dtype=dtype)
    wants = x.clone().requires_grad_()
    assert chosen(lambda: call(x)) == "cpu"
    assert chosen(lambda: call(wants)) == ("torch" if dtype in quick else "cpu")
    with _registry.use_backend("cpu"):
        assert chosen(lambda: call(wants)) == "cpu"


@pytest.mark.parametrize("name", CALLS)
def test_many_numbers_keep_the_kernel(name):
    x = torch.randn(128, 768, requires_grad=True)
    assert chosen(lambda: CALLS[name][0](x)) == "cpu"


def test_verdicts_do_not_leak_between_sizes():
    few, many = (torch.randn(n, 768, requires_grad=True) for n in (1, 128))
    for x, backend in ((few, "torch"), (many, "cpu"), (few, "torch"), (few.detach(), "cpu")):
        y = ops.activation(x, "silu")
        node = "SiluBackward0" if backend == "torch" else "_ActivationBackward"
        assert type(y.grad_fn).__name__ == (node if x.requires_grad else "NoneType")


def test_layer_norm_keeps_the_kernel_for_types_that_pytorch_refuses():
    x = torch.randn(1, 768, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(768)
    y = ops.layer_norm(x, weight, weight)
    torch.testing.assert_close(y, reference.layer_norm(x, weight, weight))
    assert chosen(lambda: ops.layer_norm(x, weight, weight)) == "cpu"


def test_layer_norm_of_few_rows_keeps_the_bits_of_any_number_of_threads():
    x = torch.randn(64, 256, requires_grad=True)
    weight = torch.ones(256, requires_grad=True)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(torch.autograd.grad(ops.layer_norm(x, weight).square().sum(), weight)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_what_does_not_fit_is_named():
    gate = torch.randn(1, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"gated_activation: up must be \[1, 8\], got \[8\]"):
        ops.gated_activation(gate, torch.randn(8), "silu")
    with pytest.raises(ValueError, match="activation: kind must be one of"):
        ops.activation(gate, "swish")
    with pytest.raises(ValueError, match=r"layer_norm: weight must be \[8\], got \[7\]"):
        ops.layer_norm(gate, torch.ones(7))
    with pytest.raises(ValueError, match="layer_norm: x must be of rank 1 or more"):
        ops.layer_norm(torch.tensor(1.0, requires_grad=True))
