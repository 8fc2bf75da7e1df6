"""rope_append's Triton kernel: the row's own tests, and places that only the device knows."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastlm import ops, reference
from fastlm.testing import check
from tests.ops import test_rope_append as row

row.check = partial(check, draws=2)  # the interpreter is slow

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# every shape in one form, one shape in every form
SHAPES = [row.SHAPES[n] for n in (1, 3, 4, 6)]
CASES = [(shape, "own_type", True) for shape in SHAPES]
CASES += [(shape, "pages", False) for shape in SHAPES[1:3]]
CASES += [(SHAPES[1], form, False) for form in ("plain", "norms")]


@pytest.mark.parametrize("shape, form, interleaved", CASES, ids=str)
def test_matches_float64(shape, form, interleaved):
    for dtype in DTYPES if form == "norms" else DTYPES[1:2]:
        row.test_matches_float64("triton", dtype, shape, interleaved, form)


@pytest.mark.parametrize(
    "test",
    [
        row.test_only_the_new_rows_are_written,
        row.test_attention_reads_what_was_appended,
        lambda backend: row.test_any_strides(backend, torch.float32),
        lambda backend: row.test_nothing_new_changes_nothing(backend, (0, 4, 2, 1, 8, 8)),
        lambda backend: row.test_nothing_new_changes_nothing(backend, (2, 4, 2, 0, 8, 8)),
    ],
)
def test_of_the_row(test):
    test("triton")


def test_a_place_that_is_none_is_left_alone():
    """Lengths and pages that no one on the host has seen: no write, and zeros come back."""
    q, k, v = row.inputs(row.SHAPES[1], torch.float32)
    cos, sin = row.tables(32)
    run = torch.ops.fastlm.rope_append.triton
    form = (None, None, 64, False, 1e-6, 0.0)
    stored = row.caches(row.SHAPES[1], torch.float32)
    expected = row.caches(row.SHAPES[1], torch.float32)
    y = run(q, k, v, cos, sin, *stored, torch.tensor([41, 2]), 0, None, *form)
    z = run(q, k, v, cos[:39], sin[:39], *expected, torch.tensor([40, 3]), 0, None, *form)
    assert y[0, :, -1].eq(0).all() and y[0, :, :-1].ne(0).any()  # beyond the cache
    assert y[1, :, 0].eq(0).all() and y[1, :, 1:].ne(0).any()  # before its start
    assert z[0, :, -1].eq(0).all()  # beyond the tables
    written = stored[0].any(-1).all(1)
    assert written.nonzero().tolist() == [[0, 38], [0, 39], [1, 0], [1, 1]]
    assert expected[1].any(-1).all(1)[0].nonzero().flatten().tolist() == [37, 38]
    pages = tuple(torch.zeros(2, 4, 8, 64) for _ in range(2))
    table = torch.tensor([[1, 2], [-1, 0]], dtype=torch.int32)
    run(q, k, v, cos, sin, *pages, torch.tensor([9, 9]), 0, table, *form)
    assert pages[1].any(-1).all(1).nonzero().tolist() == [[0, 0], [1, 6], [1, 7]]


def test_same_bits_as_rope():
    q, k, v = row.inputs(row.SHAPES[1], torch.bfloat16)
    (cos, sin), stored = row.tables(32), row.caches(row.SHAPES[1], torch.bfloat16)
    y = ops.rope_append(q, k, v, cos, sin, *stored, 9)
    z, w = ops.rope(q, k, cos[6:9], sin[6:9])
    assert torch.equal(y, z) and torch.equal(stored[0][:, :, 6:9], w)
    assert torch.equal(stored[1][:, :, 6:9], v)


def test_refusals_and_opcheck():
    q, k, v = row.inputs((2, 4, 2, 3, 16, 8), torch.float32)
    op, (cos, sin) = torch.ops.fastlm.rope_append.triton, row.tables(8)
    stored, weight = row.caches((2, 4, 2, 3, 16, 8), q.dtype), torch.rand(16)
    form, lengths = (16, False, 1e-6, 0.0), torch.tensor([30, 4])
    checks = ["test_schema", "test_faketensor"]
    args = (q, k, v, cos, sin, *stored, lengths, 0, None, weight, weight, *form)
    torch.library.opcheck(op, args, test_utils=checks)
    for at, wrong in ((1, k[:1]), (3, cos[:, :3]), (5, stored[0].bfloat16()), (10, weight[:7])):
        with pytest.raises(RuntimeError, match="rope_append: the arguments do not fit"):
            op(*(wrong if n == at else x for n, x in enumerate(args)))
    with pytest.raises(ValueError, match="rope_append: lengths must be between 3"):
        ops.rope_append(q, k, v, cos, sin, *stored, 2)


def test_a_head_of_odd_size_with_norm_and_no_rotation():
    q, k, v = (torch.randn(1, 2, 2, 13) for _ in range(3))

    def run(where):
        def call(q, k, v, w):
            stored = [torch.zeros(1, 2, 5, 13, dtype=q.dtype) for _ in range(2)]
            places = (None, None, *stored, 4)
            return (where.rope_append(q, k, v, *places, q_weight=w, k_weight=w), *stored)

        return call

    theirs = run(reference)
    check(run(ops), theirs, theirs, [q, k, v, torch.rand(13)], gradients=False)
