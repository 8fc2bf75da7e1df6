"""What tests/gpu asks of Triton's kernels, asked here of small shapes: so that it can be asked.

No GPU has run those tests; a name that is wrong in them would be found by the first one.
"""

from __future__ import annotations

import pytest
import torch

from fastlm import ops
from fastlm.triton._configs import override
from tests.gpu import test_triton_attention as attention
from tests.gpu import test_triton_rows as rows
from tests.triton.test_attention import TILES

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    for module in (attention, rows):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    with override(**TILES):
        yield


def test_the_grids_have_every_type():
    types = {torch.float32, BF16, FP16}
    assert set(rows.DTYPES) == types and set(attention.DTYPES) == types


CALLS = {
    "rms_norm": lambda: rows.test_norms_match_float64("rms_norm", "triton", FP16, (3, 63)),
    "layer_norm": lambda: rows.test_norms_match_float64("layer_norm", "triton", FP16, (3, 63)),
    "rope": lambda: rows.test_rope_matches_float64("triton", FP16, True, 10, 5, 5),
    "rope in place": lambda: rows.test_rope_in_place_gives_the_bits_of_rope(
        "triton", FP16, False, 10, 5, 3, rows=5
    ),
    "feed_forward": lambda: rows.test_feed_forward_matches_float64(
        "triton", FP16, (1, 32, 48), "relu2 gated biased"
    ),
    "cross_entropy": lambda: rows.test_cross_entropy_matches_float64(
        "triton", FP16, 7, rows.OPTIONS[2]
    ),
    "linear_cross_entropy": lambda: rows.test_linear_cross_entropy_matches_float64(
        "triton", FP16, 5, rows.OPTIONS[3]
    ),
    "quantized_linear": lambda: rows.test_quantized_linear_matches_float64(
        "triton", FP16, (4, 64, False), (3, 256, 77)
    ),
    "quantized row": lambda: rows.test_quantized_linear_matches_float64(
        "triton", BF16, (8, 128, True), (1, 256, 77)
    ),
    "a large weight": lambda: rows.test_a_quantized_weight_of_more_than_2_to_the_31_bytes(
        3, 4, outputs=100
    ),
    "attention": lambda: attention.test_matches_float64(
        "triton", FP16, (1, 4, 1, 11, 20, 16, 9), {"causal": True, "window": 7}
    ),
    "options": lambda: attention.test_options_match_float64(
        FP16, "causal padding all", queries=3, keys=20, draws=4
    ),
    "learnt": lambda: attention.test_gradients_of_slopes_and_masks(
        FP16, "hidden", queries=3, keys=20, draws=4
    ),
    "decode": lambda: attention.test_decode(FP16, (2, 4, 2, 2, 20, 16)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_grid(name):
    CALLS[name]()


@pytest.mark.parametrize("stem", rows.ROWS)
def test_forward_and_backward_of_a_row(stem):
    y, *gradients, _ = rows.everything(stem, 16, 256)
    assert all(x.isfinite().all() and x.any() for x in (y, *gradients))


@pytest.mark.parametrize("stem", [*rows.ROWS, *rows.MORE])
def test_what_graphs_capture(stem):
    x = torch.randn(4, 1024, dtype=BF16)
    call = rows.captured(x)[stem]
    first = call()
    x.copy_(torch.randn(4, 1024))
    assert not torch.equal(first, call()), "a replay that did nothing would be seen"


def test_every_implementation_but_tritons_may_lack_a_type():
    x = torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="not float64"), rows.on("triton"):
        ops.rms_norm(x)
    with pytest.raises(pytest.skip.Exception, match="not float64"), rows.on("cpu"):
        ops.rms_norm(x)
