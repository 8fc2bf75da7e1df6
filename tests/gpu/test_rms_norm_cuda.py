"""rms_norm's CUDA kernels on a GPU: errors against float64, streams, graph capture, same bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or "cuda" not in ops.implementations("rms_norm", "cuda"),
    reason="needs a GPU and fastlm/_cuda.so",
)
DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16]
# one shape for each layout of csrc/cuda/rms_norm.cu, aligned and not
SHAPES = [
    (5, 8),
    (3, 63),
    (1000, 128),
    (64, 768),
    (33, 4096),
    (9, 8192),
    (4, 16384),
    (2, 40000),
    (7, 4099),
]


def randn(*shape, dtype):
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "residual", "no_weight", "fp32_weight"])
def test_matches_float64(dtype, shape, form):
    x, residual = randn(*shape, dtype=dtype), None
    weight = None if form == "no_weight" else randn(shape[-1], dtype=dtype)
    if form == "fp32_weight":
        weight = weight.float()
    if form == "residual":
        residual = randn(*shape, dtype=dtype)

    def theirs(x, weight, residual):
        summed = x if residual is None else x + residual
        y = F.rms_norm(summed, x.shape[-1:], None if weight is None else weight.to(x.dtype), 1e-6)
        return y if residual is None else (y, summed)

    with ops.use_backend("cuda"):
        check(
            lambda x, w, r: ops.rms_norm(x, w, residual=r),
            theirs,
            lambda x, w, r: reference.rms_norm(x, w, residual=r),
            [x, weight, residual],
        )


def test_runs_on_the_current_stream():
    x = randn(4096, 4096, dtype=torch.float32)
    expected = ops.rms_norm(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late += x  # a kernel on another stream would read the zeros
        y = ops.rms_norm(late)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_graph_capture():
    x, weight = randn(64, 768, dtype=torch.bfloat16), randn(768, dtype=torch.bfloat16)
    ops.rms_norm(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.rms_norm(x, weight)
    x.copy_(randn(64, 768, dtype=torch.bfloat16))
    graph.replay()
    assert torch.equal(y, ops.rms_norm(x, weight))


def test_same_bits_every_time():
    x, weight = randn(3000, 1024, dtype=torch.bfloat16), randn(1024, dtype=torch.bfloat16)
    x.requires_grad_()
    weight.requires_grad_()

    def results():
        y = ops.rms_norm(x, weight)
        return y, *torch.autograd.grad(y.float().square().sum(), (x, weight))

    first = results()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)], ids=str)
def test_empty(shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    weight = torch.ones(shape[-1], device=DEVICE, requires_grad=True)
    ops.rms_norm(x, weight).sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
