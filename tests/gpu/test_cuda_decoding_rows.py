"""quantized_linear, sample and rope_append on a GPU: errors, draws, streams, graphs, devices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check

ROWS = ("quantized_linear", "sample", "rope_append")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available()
    or any("cuda" not in ops.implementations(row, "cuda") for row in ROWS),
    reason="needs a GPU and fastlm/_cuda.so",
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [
    {"bits": 8},
    {"bits": 4},
    {"bits": 4, "symmetric": False},
    {"bits": 8, "group_size": 128},
    {"bits": 4, "group_size": 128},
]


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rows, width, outputs", [(1, 4096, 1000), (3, 256, 77), (16, 1408, 130)])
def test_quantized_linear_matches_float64(dtype, form, rows, width, outputs):
    q = ops.quantize_weight(randn(outputs, width), **form)
    w, w64 = q.dequantize(dtype), q.dequantize(torch.float64)
    with ops.use_backend("cuda"):
        check(
            lambda x, b: ops.quantized_linear(x, q, b),
            lambda x, b: F.linear(x, w, b),
            lambda x, b: F.linear(x, w64, b),
            [randn(rows, width, dtype=dtype), randn(outputs, dtype=dtype)],
        )


def test_more_rows_are_another_kernels():
    q = ops.quantize_weight(randn(32, 64))
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match="takes at most 16 rows"):
        ops.quantized_linear(randn(17, 64), q)
    with ops._registry.recording() as verdicts:
        y = ops.quantized_linear(randn(17, 64), q)
    assert verdicts[0].chosen != "cuda" and y.shape == (17, 32)


OPTIONS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 50},
    {"top_k": 700, "top_p": 0.9},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_p": 0.99, "min_p": 0.1, "top_k": 900, "temperature": 1.5},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.1, 4.0])
@pytest.mark.parametrize("vocab", [3, 1001, 32000, 262144])
def test_sample_matches_float64(dtype, spread, vocab):
    """A token may differ only where `uniform` lies within rounding of a boundary."""
    logits = randn(16, vocab, dtype=dtype) * spread
    uniform = torch.rand(16, dtype=torch.float64, device="cuda")
    for options in OPTIONS:
        with ops.use_backend("cuda"):
            drawn = ops.sample(logits, uniform, **options)
        if options.get("temperature") == 0:
            assert torch.equal(drawn, reference.sample(logits.cpu(), None, temperature=0.0).cuda())
            continue
        p = reference.probabilities(logits.double(), **options)
        high = p.cumsum(-1).gather(-1, drawn[:, None])[:, 0]
        low = high - p.gather(-1, drawn[:, None])[:, 0]
        assert ((low - 2e-5 <= uniform) & (uniform <= high + 2e-5)).all(), options


def test_a_row_without_a_distribution_is_drawn_as_minus_one():
    logits = torch.zeros(4, 100, device="cuda")
    logits[0, 98], logits[1, 5], logits[2] = torch.nan, torch.inf, -torch.inf
    with ops.use_backend("cuda"):
        drawn = ops.sample(logits, torch.zeros(4, dtype=torch.float64, device="cuda"))
    assert (drawn == -1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch, heads, kv, tokens, head, width", [
    (1, 32, 32, 1, 128, 64), (5, 32, 8, 1, 128, 128), (3, 6, 2, 3, 80, 32), (2, 2, 1, 2, 10, 5),
])  # fmt: skip
def test_rope_append_matches_float64(
    dtype, norms, interleaved, batch, heads, kv, tokens, head, width
):
    q, k, v = (randn(batch, tokens, n, head, dtype=dtype).transpose(1, 2) for n in (heads, kv, kv))
    angle = randn(50, width)
    weights = [1 + randn(head) / 4 for _ in "qk"] if norms else [None, None]
    lengths = torch.randint(tokens, 41, (batch,), device="cuda")

    def by(where):
        def run(q, k, v, q_weight, k_weight):
            wide = q.dtype == torch.float64
            tables = (t.double() if wide else t for t in (angle.cos(), angle.sin()))
            caches = [q.new_zeros(batch, kv, 40, head) for _ in "kv"]
            options = {"interleaved": interleaved, "q_weight": q_weight, "k_weight": k_weight}
            return (where.rope_append(q, k, v, *tables, *caches, lengths, **options), *caches)

        return run

    with ops.use_backend("cuda"):
        inputs = [q, k, v, *weights]
        check(by(ops), by(reference), by(reference), inputs, gradients=False)


def test_rope_append_writes_nothing_outside():
    caches = [torch.zeros(3, 2, 16, 64, device="cuda") for _ in "kv"]
    q, k, v = (randn(3, n, 1, 64) for n in (4, 2, 2))
    angle, lengths = randn(20, 32), torch.tensor([0, 17, 16], device="cuda")
    with ops.use_backend("cuda"):
        y = ops.rope_append(q, k, v, angle.cos(), angle.sin(), *caches, lengths)
    assert not y[:2].any() and not any(c[:2].any() for c in caches)
    assert all(c[2, :, 15].any() for c in caches)


def calls() -> dict:
    """Per row a function of one tensor [4, 4096]."""
    q = ops.quantize_weight(randn(512, 4096), bits=4)
    uniform = torch.rand(4, dtype=torch.float64, device="cuda")
    angle, lengths = randn(64, 64), torch.tensor([3, 64, 9, 30], device="cuda")

    def append(x):
        caches = [x.new_zeros(4, 8, 64, 128) for _ in "kv"]
        heads = x.view(4, 32, 1, 128)
        new = (heads, heads[:, :8], heads[:, 8:16])
        return ops.rope_append(*new, angle.cos(), angle.sin(), *caches, lengths), *caches

    return {
        "quantized_linear": lambda x: (ops.quantized_linear(x, q),),
        "sample": lambda x: (ops.sample(x, uniform, top_k=50, top_p=0.9),),
        "rope_append": append,
    }


@pytest.mark.parametrize("row", ROWS)
@torch.no_grad()
def test_same_bits_every_time_on_another_stream_and_in_a_graph(row):
    call, x = calls()[row], randn(4, 4096, dtype=torch.bfloat16)
    with ops.use_backend("cuda"):
        first = call(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            second = call(x)
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, call(x), strict=True))


def test_tensors_of_two_devices_are_refused_before_a_launch():
    x, here = randn(4, 4096), torch.ops.fastlm
    q = ops.quantize_weight(randn(512, 4096))
    heads, cache = x.view(4, 32, 1, 128), torch.zeros(4, 32, 8, 128)
    wrong = [
        lambda: here.quantized_linear(x.cpu(), q.values, q.scale, None, None, 512, False),
        lambda: here.sample(x, torch.rand(4, dtype=torch.float64), 1.0, 5, 0.9, 0.0),
        lambda: here.rope_append(
            heads, heads, heads, None, None, cache, cache, None, 1, None, None, None, 0, False,
            1e-6, 0.0,
        ),
        lambda: ops.quantized_linear(x.cpu(), q),
        lambda: ops.sample(x, torch.rand(4, dtype=torch.float64)),
        lambda: ops.rope_append(heads, heads, heads, None, None, cache, cache, 1),
    ]  # fmt: skip
    for call in wrong:
        with pytest.raises((ValueError, RuntimeError), match=r"on the device|one device|must be"):
            call()
    torch.cuda.synchronize()
