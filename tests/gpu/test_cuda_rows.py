"""The CUDA kernels' bindings on a GPU: streams, graphs, odd memory, wrong devices, same bits."""

from __future__ import annotations

import pytest
import torch

from fastlm import ops

ROWS = ("rms_norm", "layer_norm", "rope", "activation", "cross_entropy")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available()
    or any("cuda" not in ops.implementations(row, "cuda") for row in ROWS),
    reason="needs a GPU and fastlm/_cuda.so",
)


def calls(device: str, shift: int = 0) -> dict:
    """Per row a function of one tensor [64, 1024 + shift] and a second one of the same shape."""
    width = 1024 + shift
    weight = torch.linspace(0.5, 1.5, width, device=device)
    angle = torch.arange(64, device=device)[:, None] * torch.linspace(0.1, 1.0, 32, device=device)
    target = torch.arange(64, device=device) * 7 % width
    return {
        "rms_norm": lambda x, r: ops.rms_norm(x, weight, residual=r),
        "layer_norm": lambda x, r: ops.layer_norm(x, weight, weight - 1, residual=r),
        "rope": lambda x, r: ops.rope(
            x[:, :1024].reshape(1, 64, 16, 64).transpose(1, 2),
            r[:, :128].reshape(1, 64, 2, 64).transpose(1, 2),
            angle.cos(),
            angle.sin(),
        ),
        "activation": lambda x, r: (ops.gated_activation(x, r, "silu"),),
        "cross_entropy": lambda x, r: (ops.cross_entropy(x, target, label_smoothing=0.1),),
    }


def inputs(shift: int = 0) -> list:
    return [torch.randn(64, 1024 + shift, device="cuda", requires_grad=True) for _ in "xr"]


def results(call, leaves) -> list:
    with ops.use_backend("cuda"):
        outputs = call(*leaves)
        total = sum((out * out).sum() for out in outputs)
        grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [*outputs, *grads]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("shift", [0, 1, 4])
def test_same_bits_every_time_and_on_another_stream(row, shift):
    call, leaves = calls("cuda", shift)[row], inputs(shift)
    first = results(call, leaves)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = results(call, leaves)
    stream.synchronize()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


@pytest.mark.parametrize("row", ROWS)
def test_forward_in_a_graph_follows_its_inputs(row):
    call = calls("cuda")[row]
    x, r = (t.detach() for t in inputs())
    with ops.use_backend("cuda"), torch.no_grad():
        call(x, r)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(x, r)
        x.copy_(torch.randn_like(x))
        graph.replay()
        for a, b in zip(captured, call(x, r), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("row", ROWS)
def test_tensors_of_two_devices_are_refused(row):
    x, r = (t.detach() for t in inputs())
    with pytest.raises((ValueError, RuntimeError), match=r"must be on|on the device|on cuda"):
        if row == "activation":
            ops.gated_activation(x, r.cpu(), "silu")
        else:
            calls("cpu")[row](x, r)


def test_a_target_out_of_range_gives_nan_and_reads_nothing_else():
    x = torch.randn(3, 40, device="cuda")
    target = torch.tensor([1, 10**9, -5], device="cuda")
    with ops.use_backend("cuda"):
        loss = ops.cross_entropy(x, target, reduction="none")
    assert loss.isnan().tolist() == [False, True, True]
