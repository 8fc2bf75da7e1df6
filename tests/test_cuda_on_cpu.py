"""CUDA kernels checked on the CPU: compiled as C++ and run by an emulator of blocks and warps.

The operator's own tests run in a copy of the package whose CPU kernels are the emulated CUDA ones.
This shows that indexing, tails and sums are right, not that a GPU runs them.
"""

from __future__ import annotations

import shutil

import pytest
from cuda_emulator.harness import Tester

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="module")
def tester(tmp_path_factory):
    made = Tester(tmp_path_factory.mktemp("emulated"))
    yield made
    made.close()


NORMS = """
import torch
from fastlm import ops, reference, _ext
from fastlm.testing import check
from tests_of_operator import baseline
assert _ext.native.cpu_isa() == "emulated CUDA"
torch.manual_seed(0)
name = "STEM"
ours, oracle = getattr(ops, name), getattr(reference, name)
arguments = 2 if name == "layer_norm" else 1
# Widths in vectors of 16 bytes: a row of 8, 32, 128 and 512 threads, rows read again. Odd widths,
# and a shifted weight without 16-byte alignment, take the path of single elements.
SHAPES = [(0, 37, 5), (0, 9, 128), (0, 5, 512), (0, 3, 600), (0, 2, 2052), (1, 3, 96), (0, 40, 96)]
SHAPES += [(0, 5, CUT := 0)]  # rows in pieces that blocks share, the last of 40 columns; two runs
for dtype in (torch.float32, torch.bfloat16):
    for shift, rows, vectors in SHAPES:
        cols = vectors * 16 // dtype.itemsize + (shift and 3)
        cols = 32 * 1024 + 40 if vectors == CUT else cols
        slow = vectors == CUT or vectors > 2000  # each form once
        for form in ("plain", "residual", "fp32_weight", "no_weight"):
            if form in ("fp32_weight", "no_weight") and vectors > 128:
                continue
            if slow and (form == "residual") != (dtype == torch.float32):
                continue
            if vectors == CUT and form == ("plain" if arguments == 2 else "fp32_weight"):
                continue  # one of them in each operator's turn: the pieces are the same code
            x = torch.randn(rows, cols, dtype=dtype) + (3 if form == "plain" else 0)
            like = torch.float32 if form == "fp32_weight" else dtype
            w = [torch.randn(cols + shift, dtype=like) for _ in range(arguments)]
            if form == "no_weight":
                w = [None] * arguments
            r = torch.randn(rows, cols, dtype=dtype) if form == "residual" else None
            cut = lambda v: [t if t is None else t[shift:] for t in v]
            check(
                lambda x, r, *w: ours(x, *cut(w), residual=r),
                lambda x, r, *w: baseline(x, *cut(w), r),
                lambda x, r, *w: oracle(x, *cut(w), residual=r),
                [x, r, *w],
                draws=1 if slow else 2,
            )
"""


@pytest.mark.parametrize("stem", ["rms_norm", "layer_norm"])
def test_norms(tester, tmp_path, stem):
    which = "empty or strided or names_the_argument or far_above"
    tester.own_tests(stem, tmp_path, which, NORMS.replace("STEM", stem))


def test_activation(tester, tmp_path):
    tester.own_tests(
        "activation",
        tmp_path,
        "matches or tails or empty or strides or names_the_argument",
        half=False,
    )


def test_rope(tester, tmp_path):
    each = "((per_token or per_sequence) and float32) or ((shared or fp32_tables) and bfloat16)"
    which = f"(matches and ({each})) or order_of_memory"
    which += " or rest_is_copied or empty or in_a_batch or overwrites"
    tester.own_tests("rope", tmp_path, f"{which} or names_the_argument", half=False)


# Places that do not exist: what a CPU refuses, and only the kernel of a GPU sees.
BAD_PLACES = """
import torch
from fastlm import ops, reference
torch.manual_seed(0)
q, k, v = torch.randn(4, 6, 1, 64), torch.randn(4, 2, 1, 64), torch.randn(4, 2, 1, 64)
angle = torch.randn(20, 32)
form = (angle.cos(), angle.sin())
caches = [torch.zeros(4, 2, 16, 64) for _ in "kv"]
own = torch.ops.fastlm.rope_append.default
rest = (None, None, 64, False, 1e-6, 0.0)
lengths = torch.tensor([0, 16, 17, -3])
y = own(q, k, v, *form, *caches, lengths, 0, None, *rest)
assert not y[[0, 2, 3]].any() and not any(c[[0, 2, 3]].any() for c in caches)
expected = [torch.zeros(1, 2, 16, 64) for _ in "kv"]
one = (x[1:2] for x in (q, k, v))
torch.testing.assert_close(y[1:2], reference.rope_append(*one, *form, *expected, 16))
torch.testing.assert_close([c[1:2] for c in caches], expected)
pages = [torch.zeros(3, 2, 8, 64) for _ in "kv"]
table = torch.tensor([[0, 1], [1, 7], [2, -1], [2, 0]], dtype=torch.int32)
y = own(q, k, v, *form, *pages, torch.tensor([3, 9, 16, 17]), 0, table, *rest)
assert y[0].any() and not y[1:].any()
assert all(c[0, :, 2].any() and c.count_nonzero() == 2 * 64 for c in pages)
"""


def test_rope_append(tester, tmp_path):
    each = "(plain and float32) or (norms and float16) or (pages and bfloat16)"
    which = f"(matches and ({each})) or only_the_new or (any_strides and bfloat16) or nothing_new"
    tester.own_tests("rope_append", tmp_path, which, BAD_PLACES)


# What only the device sees: lengths beyond the cache, pages that do not exist. And a token alone
# against one in a batch, pieces of more keys than 128, heads of 256 on tensor cores.
DECODING = """
import torch
from fastlm import ops, reference
from fastlm.testing import check
torch.manual_seed(0)
own = torch.ops.fastlm.decode_attention.default
none = (None, None, 0.0)
for dtype in (torch.float32, torch.bfloat16):
    q = torch.randn(3, 4, 1, 64, dtype=dtype)
    k, v = (torch.randn(3, 2, 40, 64, dtype=dtype) for _ in "kv")
    lengths = torch.tensor([41, -5, 2**40])
    y = own(q, k, v, lengths, 0, 0.125, 0, *none, None, None, None, None)
    expected = own(q, k, v, torch.tensor([40, 0, 40]), 0, 0.125, 0, *none, None, None, None, None)
    assert torch.equal(y, expected) and not y[1].any()
    pages, table = torch.randn(3, 2, 16, 64, dtype=dtype), torch.tensor([[0, 1], [2, 3], [-1, 2]])
    more = (0, 0.125, 0, *none, table, None, None, None)
    y = own(q, pages, pages, torch.tensor([20, 16, 3]), *more)
    assert y[:2].isfinite().all() and y[2].isnan().all()
    assert own(q, pages, pages, torch.tensor([20, 17, 0]), *more)[1].isnan().all()
SHAPES = [(torch.float32, (1, 3, 1, 2, 8300, 20)), (torch.float16, (1, 1, 1, 1, 8300, 64)),
          (torch.bfloat16, (2, 20, 1, 1, 150, 192)), (torch.bfloat16, (1, 2, 1, 2, 300, 256))]
for dtype, shape in SHAPES:
    batch, heads, kv_heads, queries, keys, size = shape
    lengths = torch.tensor([keys, 17])[:batch]
    q = torch.randn(batch, heads, queries, size, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, keys, size, dtype=dtype) for _ in "kv")
    last = lengths[:, None] - queries + torch.arange(queries)
    seen = (torch.arange(keys) <= last[..., None])[:, None]
    theirs = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, enable_gqa=True)
    check(lambda *x: ops.decode_attention(*x, lengths), theirs,
          lambda *x: reference.decode_attention(*x, lengths), [q, k, v], gradients=False)
"""


def test_decode_attention(tester, tmp_path):
    forms = "(masks and (rows or added)) or int8_cache or sees_nothing or any_strides or alone"
    forms += (
        " or of_each_sequence or empty or (beyond and not float32) or (options and not float32)"
    )
    forms += " or (matches and window and int64 and not 1100 and not 1300)"
    forms += " or (matches and all_keys and full and (1100 or 300) and bfloat16) or (paged and 7)"
    tester.own_tests(
        "decode_attention", tmp_path, f"not torch- and not -torch and ({forms})", DECODING
    )


# Rows of whole vectors: all in registers, and with a rest that is read again.
ALIGNED_LOSSES = """
import torch
from fastlm import ops, reference
from fastlm.testing import check
from tests_of_operator import OPTIONS, baseline, options
torch.manual_seed(0)
CASES = [(torch.float32, (2, 8400), ("plain", "all")), (torch.bfloat16, (2, 16800), OPTIONS),
         (torch.bfloat16, (3, 104), OPTIONS)]
for dtype, shape, forms in CASES:
    for form in forms:
        x, target = torch.randn(shape, dtype=dtype) * 3, torch.randint(0, shape[1], shape[:1])
        kw = options(form, shape)
        check(
            lambda x: ops.cross_entropy(x, target, **kw),
            lambda x: baseline(x, target, kw),
            lambda x: reference.cross_entropy(x, target, **kw),
            [x],
            draws=2 if shape[1] > 1000 else 16,
        )
"""


def test_cross_entropy(tester, tmp_path):
    which = "(matches and ((101 and float32) or (9001 and bfloat16)))"
    which += " or alone or single_class or stay or growing or extreme"
    which += (
        " or undefined or ignored or empty or strided or (names_the_argument and not IndexError)"
    )
    tester.own_tests("cross_entropy", tmp_path, which, ALIGNED_LOSSES, half=False)


# The weight lies by rows, which the facade does not keep on a CPU: the operator is called itself.
QUANTIZED = """
import torch
import torch.nn.functional as F
from fastlm import ops, reference
from fastlm.testing import check
torch.manual_seed(0)
own = torch.ops.fastlm.quantized_linear.default
FORMS = [dict(bits=8), dict(bits=4), dict(bits=4, symmetric=False), dict(bits=8, group_size=128),
         dict(bits=4, group_size=64, symmetric=False), dict(bits=4, group_size=128)]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for number, form in enumerate(FORMS):
        shapes = [((1,), 1280, 13), ((2, 3), 384, 9), ((16,), 128, 1)]
        if dtype.itemsize == 2:  # tensor cores; all warps, the last 64 bytes of a row not whole
            shapes[1:] = [((3, 3), 1120 if number < 3 else 2176, 45), ((16,), 128, 1)]
        for rows, width, outputs in shapes:
            q = ops.quantize_weight(torch.randn(outputs, width), **form).unpack()
            w, w64 = q.dequantize(dtype), q.dequantize(torch.float64)
            x = torch.randn(*rows, width, dtype=dtype)
            bias = torch.randn(outputs, dtype=dtype) if number % 2 else None
            check(
                lambda x, b: own(x, q.values, q.scale, q.minimum, b, outputs, False),
                lambda x, b: F.linear(x, w, b),
                lambda x, b: F.linear(x, w64, b),
                [x, bias],
                gradients=False,
                draws=8,
            )
q = ops.quantize_weight(torch.randn(10, 256), 4).unpack()
call = lambda x, q=q: own(x, q.values, q.scale, None, None, q.shape[0], False)
x = torch.randn(5, 260)
for view in (x[:, :256], x[:, 1:257], x[:, 4:260], torch.randn(256, 5).t()):  # odd places
    assert torch.equal(call(view), call(view.clone(memory_format=torch.contiguous_format)))
# Tensor cores: every integer as it is, at every place; a row's bits are those it has among others.
for dtype in (torch.bfloat16, torch.float16):
    for bits, low, high in ((8, -128, 128), (4, -8, 8)):
        numbers = torch.randint(low, high, (40, 128))
        numbers[:2] = torch.arange(256).view(2, 128) % (high - low) + low
        halves = (numbers + 8).view(40, 4, 2, 16).to(torch.uint8)
        packed = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)
        values = numbers.to(torch.int8) if bits == 8 else packed
        steps = 2.0 ** torch.arange(4).expand(40, 4).half()
        ones = torch.eye(128, dtype=dtype)
        for first in range(0, 128, 16):
            y = own(ones[first : first + 16], values, steps, None, None, 40, False)
            wanted = (numbers * steps.repeat_interleave(32, 1)).T[first : first + 16]
            assert torch.equal(y, wanted.to(dtype)), (dtype, bits, first)
    x = torch.randn(16, 256).to(dtype)
    assert all(torch.equal(call(x[:n]), call(x)[:n]) for n in (2, 5, 8))
x = torch.randn(5, 260)
moved = torch.empty(q.values.numel() + 1, dtype=torch.uint8)[1:].view_as(q.values)
moved.copy_(q.values)
assert torch.equal(call(x[:, :256], q._replace(values=moved)), call(x[:, :256]))
assert call(torch.empty(2, 0, 256)).shape == (2, 0, 10)
empty = reference.quantize_weight(torch.randn(3, 0))
bias = torch.randn(3)
y = own(torch.empty(2, 0), empty.values, empty.scale, None, bias, 3, False)
assert torch.equal(y, bias.expand(2, 3))
assert call(torch.empty(2, 64), reference.quantize_weight(torch.randn(0, 64), 4)).shape == (2, 0)
for wrong in (torch.randn(17, 256), torch.randn(2, 128)):
    try:
        call(wrong)
    except RuntimeError as error:
        assert "quantized_linear" in str(error)
    else:
        raise AssertionError("taken")
"""


def test_quantized_linear(tester, tmp_path):
    tester.own_tests("quantized_linear", tmp_path, script=QUANTIZED)


# Logits that stay in registers and, few but wide apart or many and alike, ones that do not.
SAMPLES = """
import math
import torch
from fastlm import ops, reference
from tests_of_operator import OPTIONS
torch.manual_seed(0)
SHAPES = [(0.1, 65), (0.0, 5000), (5.0, 20000), (0.1, 20000)]
SOME = {torch.float32: SHAPES[2:], torch.bfloat16: SHAPES[1:3], torch.float16: SHAPES[:1]}
for dtype, shapes in SOME.items():
    for spread, vocab in shapes:
        logits = (torch.randn(1, vocab) * spread).to(dtype)
        uniform = torch.rand(1, dtype=torch.float64)
        for options in [*OPTIONS, {"top_k": 700}]:
            drawn = ops.sample(logits, uniform, **options)
            if options.get("temperature") == 0:
                assert torch.equal(drawn, reference.sample(logits, uniform, temperature=0.0))
                continue
            p = reference.probabilities(logits.double(), **options)[0]
            high = p[: drawn + 1].sum()
            assert high - p[drawn] - 2e-5 <= uniform <= high + 2e-5, (dtype, spread, vocab, options)
logits = torch.full((2, 70), -math.inf)
logits[:, [3, 66]] = torch.tensor([0.0, 0.5])
edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
for options in OPTIONS:
    drawn = ops.sample(logits, edges, **options).tolist()
    assert set(drawn) <= {3, 66} and (options or drawn == [3, 66])
wrong = torch.zeros(4, 100)
wrong[0, 98], wrong[1, 5], wrong[2] = math.nan, math.inf, -math.inf
assert (ops.sample(wrong, torch.zeros(4, dtype=torch.float64)) == -1).tolist() == [1, 1, 1, 0]
zeros = torch.tensor([[-0.0, 0.0, -1.0]])  # equal logits, one of them drawn by the largest uniform
assert ops.sample(zeros, edges[1:], top_k=1).tolist() == [1]
wide = torch.randn(3, 2, 500)
uniform = torch.rand(3, dtype=torch.float64)
for view in (wide[:, 0, :400], wide[:, 0, 1:401], wide[:, 0, ::2], wide.transpose(0, 2)[:3, 0]):
    expected = ops.sample(view.contiguous(), uniform, top_p=0.8)
    assert torch.equal(ops.sample(view, uniform, top_p=0.8), expected)
"""


def test_sample(tester, tmp_path):
    tester.own_tests("sample", tmp_path, "temperatures or names_the_argument", SAMPLES)
