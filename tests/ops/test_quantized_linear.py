"""quantized_linear and quantize_weight: rounding, products, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import _ext, ops, reference
from fastlm.ops import QuantizedWeight
from fastlm.testing import check

FORMS = [
    {"bits": 8},
    {"bits": 4},
    {"bits": 4, "symmetric": False},
    {"bits": 8, "group_size": 16},
    {"bits": 4, "group_size": 64},
    {"bits": 4, "group_size": 96, "symmetric": False},
]
PACKED = [form for form in FORMS if form.get("group_size") != 16]
GGUF = {"Q8_0": FORMS[0], "Q4_0": FORMS[1], "Q4_1": FORMS[2]}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ids = {"ids": lambda value: ",".join(f"{k}={v}" for k, v in value.items())}


@pytest.mark.parametrize("form", FORMS, **ids)
def test_rounds_to_the_nearest_step(form):
    w = torch.randn(40, 192) * torch.logspace(-3, 3, 40)[:, None]
    q = ops.quantize_weight(w, **form).unpack()
    assert tuple(q.shape) == (40, 192)
    step = q.scale.float().abs().repeat_interleave(q.group_size, 1)
    # half a step, and what rounding the scale (and minimum) to fp16 shifts at the far end
    slack = (2 ** (q.bits - 1) + 1) * (2**-11 * step + 2**-24)
    if q.minimum is not None:
        slack = slack + 2**-11 * q.minimum.float().abs().repeat_interleave(q.group_size, 1) + slack
    elif q.bits == 4:
        slack = slack + step / 2  # the far end of the other sign is cut off: -8 ... 7
    assert ((q.dequantize() - w).abs() <= step / 2 + slack).all()


@pytest.mark.parametrize("form", FORMS, **ids)
def test_a_quantized_weight_survives_a_second_time(form):
    w = ops.quantize_weight(torch.randn(6, 192), **form).dequantize()
    if form.get("symmetric", True):
        torch.testing.assert_close(
            ops.quantize_weight(w, **form).dequantize(), w, rtol=1e-3, atol=0
        )


def test_four_bit_values_lie_as_in_gguf():
    w = torch.arange(-8.0, 8.0).repeat(1, 2)  # one group of 32: -8 ... 7, -8 ... 7
    q = ops.quantize_weight(w, bits=4).unpack()
    assert q.scale.item() == 1.0
    assert torch.equal(q.values[0], torch.arange(16, dtype=torch.uint8) * 17)
    assert torch.equal(q.dequantize(), w)


@pytest.mark.parametrize("form", FORMS, **ids)
def test_zeros_and_constants(form):
    w = torch.zeros(2, 192)
    w[1] = 127 / 32  # its scales are exact in fp16
    assert torch.equal(ops.quantize_weight(w, **form).dequantize(), w)


@pytest.mark.parametrize("kind", GGUF)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 300.0])
def test_blocks_of_gguf_bit_for_bit(kind, size):
    gguf = pytest.importorskip("gguf")
    w = torch.randn(50, 96) * size
    w[0], w[1], w[2] = 0, size, torch.randint(-2, 3, (96,)) * size  # ties
    raw = gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType[kind])
    q = QuantizedWeight.from_gguf(torch.from_numpy(raw), kind)
    its = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))
    assert torch.equal(q.dequantize(), its)
    assert same(q, ops.quantize_weight(w, **GGUF[kind]).unpack())


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    pairs = zip(a[:3], b[:3], strict=True)
    return a[3:] == b[3:] and all(
        x is y is None or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs
    )


@pytest.mark.parametrize("form", PACKED, **ids)
@pytest.mark.parametrize("shape", [(16, 192), (40, 192), (1, 384), (0, 192)], ids=str)
def test_packing_keeps_every_integer(form, shape):
    by_rows = reference.quantize_weight(torch.randn(shape), **{"group_size": 32, **form})
    packed = by_rows.pack()
    assert packed.packed and tuple(packed.shape) == shape == tuple(by_rows.shape)
    assert packed.values.shape[0] == -(-shape[0] // 16)
    assert same(packed.unpack(), by_rows) and packed.pack() is packed
    assert torch.equal(packed.dequantize(), by_rows.dequantize())
    assert same(packed.to("cpu"), packed) and same(by_rows.to("cpu"), packed)
    assert packed.to("meta").unpack().values.shape == by_rows.values.shape


@pytest.mark.parametrize("form", PACKED, **ids)
def test_the_layout_is_as_documented(form):
    w = torch.randn(40, 384)
    by_rows = reference.quantize_weight(w, **{"group_size": 32, **form})
    packed, q = by_rows.pack(), by_rows.integers().flatten(1)
    n, k = 37, 221
    group = (n // 16, k // by_rows.group_size, n % 16)
    assert packed.scale[group] == by_rows.scale[n, k // by_rows.group_size]
    if form["bits"] == 8:
        value = packed.values[n // 16, k // 4, n % 16, k % 4]
    else:
        value = packed.values[n // 16, k // 8, n % 16, k % 4]
        value = value >> 4 if k % 8 > 3 else value & 15
    assert value == q[n, k]


def can(backend, form):
    return backend != "cpu" or form in PACKED


@pytest.mark.parametrize("backend", ops.implementations("quantized_linear"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, **ids)
@pytest.mark.parametrize("rows", [(1,), (2, 3), (40,)], ids=str)
def test_matches_float64(backend, dtype, form, rows):
    if not can(backend, form):
        pytest.skip("groups the kernel does not take")
    x, bias = torch.randn(*rows, 192, dtype=dtype), torch.randn(70, dtype=dtype)
    q = ops.quantize_weight(torch.randn(70, 192), **form)
    w, w64 = q.dequantize(dtype), q.dequantize(torch.float64)
    with ops.use_backend(backend):
        check(
            lambda x, bias: ops.quantized_linear(x, q, bias),
            lambda x, bias: F.linear(x, w, bias),
            lambda x, bias: F.linear(x, w64, bias),
            [x, bias],
        )


@pytest.mark.parametrize("backend", ops.implementations("quantized_linear"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", [1, 17])
def test_large_and_small_neighbours(backend, dtype, outputs):
    """Activations as models have them: a few channels a thousand times the others."""
    x = torch.randn(3, 256)
    x[:, ::50] *= 1000
    q = ops.quantize_weight(torch.randn(outputs, 256))
    w, w64 = q.dequantize(dtype), q.dequantize(torch.float64)
    with ops.use_backend(backend):
        check(
            lambda x: ops.quantized_linear(x, q),
            lambda x: F.linear(x, w),
            lambda x: F.linear(x, w64),
            [x.to(dtype)],
        )


@pytest.mark.parametrize("backend", ops.implementations("quantized_linear"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", PACKED, **ids)
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_int8_activations(backend, dtype, form, rows):
    """What 8 bits hold is exact; the gradient is that of the exact product."""
    x = torch.randint(-126, 127, (rows, 192))
    x[:, ::32] = 127 * torch.randint(0, 2, x[:, ::32].shape) * 2 - 127
    x = x * torch.logspace(-6, 6, rows * 6, base=2.0).round().view(rows, 6).repeat_interleave(32, 1)
    q = ops.quantize_weight(torch.randn(70, 192), **form)
    with ops.use_backend(backend):
        check(
            lambda x: ops.quantized_linear(x, q, activations="int8"),
            lambda x: F.linear(x, q.dequantize(x.dtype)),
            lambda x: reference.quantized_linear(x, q),
            [x.to(dtype)],
            draws=1,  # other values need rounding
        )


@pytest.mark.parametrize("backend", ops.implementations("quantized_linear"))
@pytest.mark.parametrize("form", PACKED, **ids)
def test_int8_activations_cost_as_much_as_documented(backend, form):
    x, q = torch.randn(64, 768), ops.quantize_weight(torch.randn(256, 768), **form)
    exact = reference.quantized_linear(x.double(), q)
    with ops.use_backend(backend):
        error = ops.quantized_linear(x, q, activations="int8") - exact
    assert 0.004 < error.norm() / exact.norm() < 0.0065


@pytest.mark.parametrize("backend", ops.implementations("quantized_linear"))
@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_special_values(backend, activations):
    q = ops.quantize_weight(torch.randn(20, 64))
    x = torch.zeros(5, 64)
    x[1] = 1e-42
    x[2, 7], x[3, 40] = float("nan"), float("inf")
    x[4] = 1e34
    with ops.use_backend(backend):
        y = ops.quantized_linear(x, q, activations=activations)
    assert (y[0] == 0).all() and (y[1].abs() < 1e-38).all()
    assert y[2].isnan().all() and not y[3].isfinite().any()
    exact = reference.quantized_linear(x[4].double(), q)
    assert (y[4] - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("form", PACKED, **ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_same_bits_for_any_number_of_threads(form, dtype, rows):
    x = torch.randn(rows, 192, dtype=dtype)
    q = ops.quantize_weight(torch.randn(999, 192), **form)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.quantized_linear(x, q))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("form", PACKED, **ids)
def test_opcheck(form, activations):
    if "quantized_linear" not in _ext.native_stems:
        pytest.skip("no native kernels")
    q = ops.quantize_weight(torch.randn(20, 192), **form)
    for dtype, bias in ((torch.float32, torch.randn(20)), (torch.bfloat16, None)):
        x = torch.randn(2, 3, 192, dtype=dtype)
        arguments = (x, q.values, q.scale, q.minimum, bias, 20, activations)
        torch.library.opcheck(torch.ops.fastlm.quantized_linear.default, arguments)
        arguments = (q.values, q.scale, q.minimum, 20, dtype)
        torch.library.opcheck(torch.ops.fastlm.dequantize.default, arguments)
        assert torch.equal(torch.ops.fastlm.dequantize(*arguments), q.dequantize(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype):
    x, q = torch.randn(21, 192, dtype=dtype), ops.quantize_weight(torch.randn(300, 192))
    rows = torch.stack([ops.quantized_linear(row, q) for row in x])
    assert torch.equal(ops.quantized_linear(x, q), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_take_turns_in_the_scratch_memory(dtype):
    x, q = torch.randn(3000, 320, dtype=dtype), ops.quantize_weight(torch.randn(40, 320))
    y = ops.quantized_linear(x, q)
    assert torch.equal(y[2900:], ops.quantized_linear(x[2900:], q))


def test_explains_what_the_kernel_cannot_take():
    if "cpu" not in ops.implementations("quantized_linear"):
        pytest.skip("no native kernels")
    x, q = torch.randn(2, 64), ops.quantize_weight(torch.randn(20, 64))
    with ops.use_backend("cpu"):
        with pytest.raises(RuntimeError, match="the weight is not packed"):
            ops.quantized_linear(x, q.unpack())
        with pytest.raises(RuntimeError, match="groups of a multiple of 32, not of 16"):
            ops.quantized_linear(x, ops.quantize_weight(torch.randn(20, 64), group_size=16))
    assert torch.allclose(ops.quantized_linear(x, q.unpack()), ops.quantized_linear(x, q))


def test_strided_and_empty_input():
    q = ops.quantize_weight(torch.randn(5, 32))
    x = torch.randn(32, 7).t()
    torch.testing.assert_close(ops.quantized_linear(x, q), ops.quantized_linear(x.clone(), q))
    assert ops.quantized_linear(torch.empty(2, 0, 32), q).shape == (2, 0, 5)
    for shape in ((0, 64), (3, 0)):
        q = ops.quantize_weight(torch.randn(shape))
        assert torch.equal(
            ops.quantized_linear(torch.ones(2, shape[1]), q), torch.zeros(2, shape[0])
        )


def test_autocast():
    q = ops.quantize_weight(torch.randn(5, 32))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.quantized_linear(torch.randn(3, 32), q, torch.randn(5)).dtype == torch.bfloat16


def test_fullgraph_compile_forward_and_backward():
    q = ops.quantize_weight(torch.randn(50, 64), bits=4)
    x = torch.randn(4, 64, requires_grad=True)
    ops.quantized_linear(x, q)
    y = torch.compile(lambda x: ops.quantized_linear(x, q), fullgraph=True)(x)
    torch.testing.assert_close(y, ops.quantized_linear(x, q))
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, q.dequantize().sum(0).expand(4, 64))


W = torch.ones(4, 64)


@pytest.mark.parametrize(
    "args, kwargs, error, text",
    [
        (("w",), {}, TypeError, "quantize_weight: w must be a tensor, got str"),
        ((W[0],), {}, ValueError, "quantize_weight: w must be of rank 2"),
        ((W, 3), {}, ValueError, "quantize_weight: bits must be 8 or 4, got 3"),
        ((W, 8, 48), {}, ValueError, "group_size must be a divisor of 64, got 48"),
        ((W, 8, 0), {}, ValueError, "group_size must be a divisor of 64, got 0"),
        ((W, 4, 1), {}, ValueError, "group_size must be even for 4 bits, got 1"),
        ((W, 8), {"symmetric": False}, ValueError, "symmetric must be True for 8 bits"),
        ((W * 1e9,), {}, ValueError, "w must be finite and within the range of an fp16 scale"),
        ((W * float("nan"),), {}, ValueError, "w must be finite"),
    ],
)
def test_bad_weights_are_refused(args, kwargs, error, text):
    with pytest.raises(error, match=text):
        ops.quantize_weight(*args, **kwargs)


@pytest.mark.parametrize(
    "x, q, bias, error, text",
    [
        (W, W, None, TypeError, "qweight must be a QuantizedWeight .* got Tensor"),
        ("x", None, None, TypeError, "quantized_linear: x must be a tensor, got str"),
        (W[:, :32], None, None, ValueError, r"quantized_linear: x must be \[..., 64\]"),
        (W, None, torch.ones(3), ValueError, r"quantized_linear: bias must be \[4\], got \[3\]"),
        (W, None, torch.ones(4).half(), ValueError, "bias must be torch.float32"),
        (W.int(), None, None, TypeError, "x must be a floating-point tensor, got torch.int32"),
        (W.to("meta"), None, None, ValueError, "qweight must be on meta, got cpu"),
    ],
)
def test_bad_input_names_the_argument(x, q, bias, error, text):
    with pytest.raises(error, match=text):
        ops.quantized_linear(x, ops.quantize_weight(W) if q is None else q, bias)


def test_bad_activations_and_blocks_are_refused():
    q = ops.quantize_weight(torch.randn(4, 48), group_size=16)
    with pytest.raises(ValueError, match="activations must be 'exact' or 'int8', got 'int4'"):
        ops.quantized_linear(torch.ones(1, 48), q, activations="int4")
    with pytest.raises(ValueError, match="activations must be 'exact' for K = 48, got 'int8'"):
        ops.quantized_linear(torch.ones(1, 48), q, activations="int8")
    with pytest.raises(ValueError, match="kind must be one of Q8_0, Q4_0, Q4_1, got 'Q5_K'"):
        QuantizedWeight.from_gguf(torch.zeros(2, 34, dtype=torch.uint8), "Q5_K")
    with pytest.raises(ValueError, match=r"blocks must be uint8 \[N, a multiple of 34\]"):
        QuantizedWeight.from_gguf(torch.zeros(2, 33, dtype=torch.uint8), "Q8_0")
