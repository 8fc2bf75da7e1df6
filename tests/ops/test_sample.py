"""sample: every implementation against the probabilities in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastlm import ops, reference

BACKENDS = ops.implementations("sample")
LOGITS = torch.tensor([[math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]])
CUTS = [
    ({}, [0.1, 0.4, 0.2, 0.3]),
    ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
    ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
    ({"top_p": 0.39}, [0, 1, 0, 0]),
    ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
    ({"top_p": 0.95}, [0.1, 0.4, 0.2, 0.3]),
    ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
    ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
    ({"min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
    ({"min_p": 1.0}, [0, 1, 0, 0]),
    ({"top_p": 0.95, "min_p": 0.4}, [0, 4 / 9, 2 / 9, 3 / 9]),
]
OPTIONS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 50},
    {"top_p": 0.9},
    {"top_p": 0.3, "top_k": 40},
    {"min_p": 0.05},
    {"top_p": 0.99, "min_p": 0.1, "top_k": 900, "temperature": 1.5},
]


def grid(n):
    """n numbers spread evenly over [0, 1)."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("options, expected", CUTS, ids=str)
def test_probabilities(options, expected):
    found = reference.probabilities(LOGITS.double(), **options)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options, expected", CUTS, ids=str)
def test_the_grid_is_drawn_in_proportion(backend, options, expected):
    n = 1260
    with ops.use_backend(backend):
        drawn = ops.sample(LOGITS.expand(n, 4), grid(n), **options)
    counts = drawn.bincount(minlength=4)
    assert (counts - torch.tensor(expected) * n).abs().max() <= 1, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [0.1, 5.0])
@pytest.mark.parametrize("vocab", [1, 3, 63, 64, 65, 1000, 5003])
def test_matches_float64(dtype, spread, vocab):
    """A token may differ only where `uniform` lies within rounding of a boundary."""
    logits = (torch.randn(32, vocab) * spread).to(dtype)
    uniform = torch.rand(32, dtype=torch.float64)
    for options in OPTIONS:
        drawn = ops.sample(logits, uniform, **options)
        if options.get("temperature") == 0:
            assert torch.equal(drawn, reference.sample(logits, uniform, temperature=0.0))
            continue
        p = reference.probabilities(logits.double(), **options)
        high = p.cumsum(-1).gather(-1, drawn[:, None])[:, 0]
        low = high - p.gather(-1, drawn[:, None])[:, 0]
        assert ((low - 2e-5 <= uniform) & (uniform <= high + 2e-5)).all(), options


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_stay_or_go_together(backend):
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 0.0]]).expand(100, 6)
    with ops.use_backend(backend):
        assert ops.sample(logits, grid(100), top_k=3).unique().tolist() == [0, 1, 2, 3, 4]
        assert ops.sample(logits, grid(100), top_k=1).unique().tolist() == [1, 3]
        assert ops.sample(logits, grid(100), top_p=0.4).unique().tolist() == [1, 3]
        assert ops.sample(logits, grid(100), temperature=0.0).unique().tolist() == [1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_excluded_token_is_never_drawn(backend, options):
    logits = torch.full((200, 70), -math.inf)
    logits[:, [3, 66]] = torch.tensor([0.0, 0.5])
    with ops.use_backend(backend):
        assert set(ops.sample(logits, grid(200), **options).tolist()) <= {3, 66}
        low, high = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        edges = torch.cat([low, high - 2**-53])
        assert set(ops.sample(logits[:2], edges, **options).tolist()) <= {3, 66}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_kernel_refuses_what_has_no_distribution(value):
    if "cpu" not in BACKENDS:
        pytest.skip("no native kernels")
    logits = torch.zeros(3, 100)
    logits[1, 98] = value
    with pytest.raises(RuntimeError, match="row 1"):
        ops.sample(logits, grid(3))
    with pytest.raises(RuntimeError, match="row 0"):
        ops.sample(torch.full((1, 5), -math.inf), grid(1))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_temperatures_of_any_size(scale):
    logits = torch.tensor([[0.0, 1.0, -1.0, 1.0]]).expand(50, 4)
    drawn = ops.sample(logits, grid(50), temperature=scale).unique().tolist()
    assert drawn == ([1, 3] if scale < 1 else [0, 1, 2, 3])


def test_strides_threads_and_zero_rows():
    wide = torch.randn(6, 2, 500)
    uniform = torch.rand(6, dtype=torch.float64)
    for logits in (wide[:, 0, :400], wide[:, 0, ::2], wide.transpose(0, 2)[:6, 0]):
        expected = ops.sample(logits.contiguous(), uniform, top_p=0.8)
        assert torch.equal(ops.sample(logits, uniform, top_p=0.8), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.sample(wide[:, 0], uniform)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, ops.sample(wide[:, 0], uniform))
    assert ops.sample(torch.empty(0, 4), uniform[:0]).shape == (0,)


@pytest.mark.parametrize(
    "logits, uniform, options, error, text",
    [
        ([1.0], grid(1), {}, TypeError, "logits must be a tensor, got list"),
        (torch.zeros(4), grid(4), {}, ValueError, "logits must be of rank 2"),
        (torch.zeros(1, 0), grid(1), {}, ValueError, "logits must be .* with V > 0"),
        (torch.zeros(1, 4, dtype=torch.int64), grid(1), {}, TypeError, "floating-point"),
        (torch.zeros(2, 4), grid(1), {}, ValueError, r"uniform must be \[2\], got \[1\]"),
        (torch.zeros(1, 4), grid(1).float(), {}, TypeError, "uniform must be of torch.float64"),
        (torch.zeros(1, 4), grid(1), {"temperature": -1}, ValueError, "temperature must be 0"),
        (torch.zeros(1, 4), grid(1), {"temperature": math.nan}, ValueError, "temperature"),
        (torch.zeros(1, 4), grid(1), {"top_k": 0}, ValueError, "top_k must be 1 or more, got 0"),
        (torch.zeros(1, 4), grid(1), {"top_p": 0.0}, ValueError, "top_p must be in"),
        (torch.zeros(1, 4), grid(1), {"min_p": 1.5}, ValueError, "min_p must be in"),
    ],
    ids=str,
)
def test_bad_input_names_the_argument(logits, uniform, options, error, text):
    with pytest.raises(error, match=f"sample: {text}" if error is ValueError else text):
        ops.sample(logits, uniform, **options)


def test_opcheck_and_compile():
    if "cpu" not in BACKENDS:
        pytest.skip("no native kernels")
    logits, uniform = torch.randn(3, 100), torch.rand(3, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fastlm.sample.default, (logits, uniform, 1.0, 5, 0.9, 0.0))
    compiled = torch.compile(lambda x, u: ops.sample(x * 2, u, top_p=0.9), fullgraph=True)
    assert torch.equal(compiled(logits, uniform), ops.sample(logits * 2, uniform, top_p=0.9))
