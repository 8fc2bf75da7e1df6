"""rope's Triton kernels against float64, forward and gradients."""

from __future__ import annotations

import pytest
import torch

from fastlm import ops, reference
from fastlm.testing import check
from tests.ops import test_rope as row
from tests.ops.test_rope import baseline, tables

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# head size, width of the tables, rotary_dim
WIDTHS = [(16, 16, None), (16, 8, None), (20, 8, None), (20, 4, 8), (10, 5, None), (6, 6, 6)]


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("width", WIDTHS, ids=str)
@pytest.mark.parametrize("form", ["per_token", "shared", "per_sequence", "fp32_tables"])
def test_matches_float64(interleaved, width, form):
    head, w, rotary_dim = width
    # every dtype with the first form, one dtype with the others
    for dtype in DTYPES if form == "per_token" else DTYPES[1:2]:
        q = torch.randn(2, 3, 3, head, dtype=dtype).transpose(1, 2)  # as a projection leaves it
        k = torch.randn(2, 2, 3, head, dtype=dtype)
        rows = {"shared": (1, 3), "per_sequence": (2, 3)}.get(form, (3,))
        cos, sin = tables(*rows, w, dtype=torch.float32 if form == "fp32_tables" else dtype)
        options = {"interleaved": interleaved, "rotary_dim": rotary_dim}
        wide = cos.double(), sin.double()
        check(
            lambda q, k: ops.rope(q, k, cos, sin, **options),  # noqa: B023
            lambda q, k: baseline(q, k, cos, sin, **options),  # noqa: B023
            lambda q, k: reference.rope(q, k, *wide, **options),  # noqa: B023
            [q, k],
            draws=2,
        )


def test_any_strides_and_the_order_of_memory_is_kept():
    cos, sin = tables(2, 5, 16)
    plain, k = torch.randn(2, 9, 5, 16), torch.randn(2, 2, 5, 16)
    expected, _ = ops.rope(plain, k, cos, sin)
    by_token = plain.transpose(1, 2).contiguous().transpose(1, 2)
    packed = torch.randn(2, 5, 9, 48)[..., 16:32].transpose(1, 2).copy_(plain)
    scattered = torch.randn(2, 9, 16, 5).transpose(2, 3).copy_(plain)
    for q in (by_token, packed, scattered):
        y, z = ops.rope(q, k, cos, sin)
        assert torch.equal(y, expected)
        assert torch.equal(ops.rope(q, None, cos, sin)[0], expected)
        assert z.is_contiguous()
    assert ops.rope(packed, None, cos, sin)[0].transpose(1, 2).is_contiguous()
    wide = torch.stack((cos, sin), -1)
    assert torch.equal(ops.rope(plain, None, wide[..., 0], wide[..., 1])[0], expected)


def test_empty_and_bad_input():
    cos, sin = tables(0, 8)
    assert ops.rope(torch.empty(2, 3, 0, 8), torch.empty(2, 1, 0, 8), cos, sin)[0].numel() == 0
    cos, sin = tables(4, 8)
    q = torch.randn(1, 2, 4, 8)
    for k, tables_, name in (
        (q[:, :, :3], (cos, sin), "k"),
        (q.half(), (cos, sin), "k"),
        (q, (cos[:3], sin[:3]), "cos"),
        (q, (cos, sin[:3]), "sin"),
    ):
        with pytest.raises(ValueError, match=f"rope: {name} must be"):
            ops.rope(q, k, *tables_)


@pytest.mark.parametrize("width", WIDTHS[1:4], ids=str)
def test_in_place(width):
    for dtype, interleaved in zip(DTYPES, (False, True, False), strict=True):
        row.test_overwrites_q_and_k_with_the_bits_of_rope("triton", dtype, interleaved, width)


def test_in_place_refusals_and_opcheck():
    row.test_in_place_refuses_before_it_writes("triton")
    row.test_overwrites_parts_of_one_tensor_and_says_so_to_autograd()
    q, k = torch.randn(2, 3, 4, 8).transpose(1, 2), torch.randn(2, 1, 3, 8)
    cos, sin = tables(3, 4)
    checks, own = ["test_schema", "test_faketensor"], torch.ops.fastlm
    torch.library.opcheck(own.rope_.triton, (q, k, cos, sin, 8, True), test_utils=checks)
    torch.library.opcheck(own.rope_single_.triton, (q, cos, sin, 8, False), test_utils=checks)
    for wrong in (q[:1].expand(2, 4, 3, 8), q.mT.contiguous().mT):
        with pytest.raises(RuntimeError, match="rope_: x is expanded, or its last dimension"):
            own.rope_single_.triton(wrong, cos, sin, 8, False)
