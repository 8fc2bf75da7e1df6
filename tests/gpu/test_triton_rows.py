"""The rows that have Triton kernels, on a GPU: every implementation, races, big tensors."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = ("rms_norm", "layer_norm", "rope", "activation", "cross_entropy", "linear_cross_entropy")
MORE = ("feed_forward", "quantized_linear", "attention", "decode_attention", "rope_append")
CASES = [(stem, backend) for stem in ROWS for backend in ops.implementations(stem, "cuda")]
# PyTorch's own takes no tables of another type, and no neighbours
ROPES = [backend for backend in ops.implementations("rope", "cuda") if backend != "torch"]
SHAPES = [(5, 8), (3, 63), (64, 768), (9, 2, 4099), (33, 8192), (4, 16384), (3, 40000)]


@contextlib.contextmanager
def on(backend):
    """Forces a backend; one that is not Triton's may lack a type."""
    try:
        with ops.use_backend(backend):
            yield
    except RuntimeError as error:
        if backend != "triton" and f"{backend!r} is forced but cannot run: takes " in str(error):
            pytest.skip(str(error))
        raise


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def targets(*shape, classes):
    t = torch.randint(0, classes, shape, device=DEVICE)
    t.view(-1)[0] = -100
    return t


def norm_theirs(norm):
    def theirs(x, weight, bias, residual):
        summed = x + residual
        if norm == "rms_norm":
            return F.rms_norm(summed, x.shape[-1:], weight, 1e-6), summed
        return F.layer_norm(summed, x.shape[-1:], weight, bias), summed

    return theirs


def norm_by(where, norm):
    def run(x, weight, bias, residual):
        if norm == "rms_norm":
            return where.rms_norm(x, weight, residual=residual)
        return where.layer_norm(x, weight, bias, residual=residual)

    return run


@pytest.mark.parametrize("stem, backend", [c for c in CASES if c[0].endswith("norm")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_match_float64(stem, backend, dtype, shape):
    x, residual = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    weight, bias = randn(shape[-1], dtype=dtype), randn(shape[-1], dtype=dtype)
    inputs = [x, weight, bias if stem == "layer_norm" else None, residual]
    with on(backend):
        check(norm_by(ops, stem), norm_theirs(stem), norm_by(reference, stem), inputs)


@pytest.mark.parametrize("backend", ROPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head, width", [(128, 128), (128, 64), (80, 32), (10, 5)])
def test_rope_matches_float64(backend, dtype, interleaved, head, width, rows=70):
    q = randn(2, rows, 9, head, dtype=dtype).transpose(1, 2)
    k = randn(2, 3, rows, head, dtype=dtype)
    angle = randn(2, rows, width) * 3
    cos, sin = angle.cos(), angle.sin()

    def by(where, *tables):
        return lambda q, k: where.rope(q, k, *tables, interleaved=interleaved)

    with on(backend):
        wide = cos.double(), sin.double()
        check(by(ops, cos, sin), by(reference, cos, sin), by(reference, *wide), [q, k])


@pytest.mark.parametrize("backend", ops.implementations("activation", "cuda"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_activations_match_float64(backend, dtype, kind):
    x, up = (randn(65, 2100, dtype=dtype) * 3 for _ in range(2))

    def by(where):
        return lambda x, up: (
            where.activation(x, kind),
            where.gated_activation(x, up, kind),
            where.gated_activation(x, None, kind),
            where.gated_activation(*x.chunk(2, -1), kind),
        )

    with on(backend):
        check(by(ops), by(reference), by(reference), [x, up])


# rows, hidden size, intermediate size: of decoding, of odd sizes, of training
BLOCKS = [(1, 256, 704), (16, 256, 704), (65, 96, 250), (500, 512, 1408)]


@pytest.mark.parametrize("backend", ops.implementations("feed_forward", "cuda"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BLOCKS, ids=str)
@pytest.mark.parametrize("form", ["gelu", "silu gated", "gelu_tanh biased", "relu2 gated biased"])
def test_feed_forward_matches_float64(backend, dtype, shape, form):
    rows, size, hidden = shape
    kind, gated, biased = form.split()[0], "gated" in form, "biased" in form
    inputs = [
        randn(rows, size, dtype=dtype),
        randn(hidden, size, dtype=dtype) / size**0.5,
        randn(size, hidden, dtype=dtype) / hidden**0.5,
        randn(hidden, size, dtype=dtype) / size**0.5 if gated else None,
        *(randn(n, dtype=dtype) if biased else None for n in (hidden, size)),
        randn(hidden, dtype=dtype) if gated and biased else None,
    ]

    def by(where):
        def run(x, w_in, w_out, w_gate, b_in, b_out, b_gate):
            biases = {"b_in": b_in, "b_out": b_out, "b_gate": b_gate}
            return where.feed_forward(x, w_in, w_out, w_gate=w_gate, activation=kind, **biases)

        return run

    def theirs(x, w_in, w_out, w_gate, b_in, b_out, b_gate):
        act = lambda v: reference.activation(v, kind)  # noqa: E731
        h = F.linear(x, w_in, b_in)
        h = act(h) if w_gate is None else act(F.linear(x, w_gate, b_gate)) * h
        return F.linear(h, w_out, b_out)

    with on(backend):
        check(by(ops), theirs, by(reference), inputs)


@pytest.mark.parametrize("backend", ROPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "head, width, heads", [(128, 64, 32), (80, 32, 5), (10, 5, 3), (256, 128, 1)]
)
def test_rope_in_place_gives_the_bits_of_rope(
    backend, dtype, interleaved, head, width, heads, rows=700
):
    qkv, angle = randn(2, rows, heads + 2, head, dtype=dtype), randn(rows, width)
    q, k = qkv[:, :, :heads].transpose(1, 2), qkv[:, :, heads : heads + 1].transpose(1, 2)
    cos, sin = angle.cos(), angle.sin()
    with on(backend):
        expected = ops.rope(q, k, cos, sin, interleaved=interleaved)
        for _ in range(5):  # threads that raced would not do so every time
            some = qkv.clone()
            q, k = some[:, :, :heads].transpose(1, 2), some[:, :, heads : heads + 1].transpose(1, 2)
            ops.rope_(q, k, cos, sin, interleaved=interleaved)
            assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])
            assert torch.equal(some[:, :, -1], qkv[:, :, -1])


@pytest.mark.parametrize("backend", ops.implementations("rope_append", "cuda"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pages", [False, True], ids=["contiguous", "pages"])
@pytest.mark.parametrize("head, width, norms", [(128, 64, False), (128, 64, True), (80, 32, True)])
def test_rope_append_matches_float64(backend, dtype, interleaved, pages, head, width, norms):
    batch, keys, page = 33, 512, 64
    q = randn(batch, 2, 8, head, dtype=dtype).transpose(1, 2)
    k, v = (randn(batch, 2, 2, head, dtype=dtype).transpose(1, 2) for _ in range(2))
    weights = [randn(head, dtype=dtype) if norms else None for _ in range(2)]
    angle = randn(keys, width) * 3
    lengths = torch.randint(2, keys + 1, (batch,), device=DEVICE)
    table, shape = None, (batch, 2, keys, head)
    if pages:
        table = torch.randperm(batch * keys // page, device=DEVICE).view(batch, -1).int()
        shape = (table.numel(), 2, page, head)

    def by(where):
        def run(q, k, v, q_weight, k_weight):
            # float64 shows exactly what the tables hold
            cos, sin = (t.to(torch.promote_types(q.dtype, torch.float32)) for t in tables)
            caches = [q.new_zeros(shape) for _ in range(2)]
            y = where.rope_append(
                q, k, v, cos, sin, *caches, lengths, block_table=table, interleaved=interleaved,
                q_weight=q_weight, k_weight=k_weight,
            )  # fmt: skip
            return y, *caches

        return run

    tables = angle.cos(), angle.sin()
    with on(backend):
        baseline = by(reference)
        check(by(ops), baseline, baseline, [q, k, v, *weights], gradients=False, draws=2)


OPTIONS = [
    {},
    {"reduction": "none"},
    {"label_smoothing": 0.1, "z_loss": 1e-3},
    {"softcap": 20.0, "reduction": "sum"},
]


@pytest.mark.parametrize("backend", ops.implementations("cross_entropy", "cuda"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [7, 1000, 32000, 128256])
@pytest.mark.parametrize("kw", OPTIONS, ids=str)
def test_cross_entropy_matches_float64(backend, dtype, classes, kw):
    x, target = randn(13, classes, dtype=dtype) * 3, targets(13, classes=classes)

    def theirs(x):
        if set(kw) <= {"reduction"}:
            return F.cross_entropy(x, target, **kw)
        return reference.cross_entropy(x, target, **kw)

    with on(backend):
        check(
            lambda x: ops.cross_entropy(x, target, **kw),
            theirs,
            lambda x: reference.cross_entropy(x, target, **kw),
            [x],
        )


@pytest.mark.parametrize("backend", ops.implementations("linear_cross_entropy", "cuda"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [33, 9000])
@pytest.mark.parametrize("kw", OPTIONS, ids=str)
def test_linear_cross_entropy_matches_float64(backend, dtype, rows, kw):
    x, weight = randn(rows, 64, dtype=dtype), randn(1003, 64, dtype=dtype)
    target = targets(rows, classes=1003)
    bias = randn(1003, dtype=dtype)
    with on(backend):
        check(
            lambda x, w, b: ops.linear_cross_entropy(x, w, target, bias=b, **kw),
            lambda x, w, b: reference.cross_entropy(F.linear(x, w, b), target, **kw),
            lambda x, w, b: reference.linear_cross_entropy(x, w, target, bias=b, **kw),
            [x, weight, bias],
        )


# bits, size of a group, symmetric
FORMS = [(8, 32, True), (8, 128, True), (4, 32, True), (4, 64, False)]
# rows, width, outputs: one row, tails, few rows, several tiles of them
PRODUCTS = [(1, 4096, 1000), (3, 256, 77), (16, 1408, 130), (130, 1024, 512)]
QUANTIZED = [b for b in ops.implementations("quantized_linear", "cuda") if b != "cuda"]


@pytest.mark.parametrize("backend", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_quantized_linear_matches_float64(backend, dtype, form, shape):
    (bits, group, symmetric), (rows, width, outputs) = form, shape
    w = randn(outputs, width)
    qweight = reference.quantize_weight(w, bits, group, symmetric)
    inputs = [randn(rows, width, dtype=dtype), randn(outputs, dtype=dtype)]
    with on(backend):
        check(
            lambda x, b: ops.quantized_linear(x, qweight, b),
            lambda x, b: F.linear(x, qweight.dequantize(x.dtype), b),
            lambda x, b: reference.quantized_linear(x, qweight, b),
            inputs,
        )


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_weight_of_more_than_2_to_the_31_bytes(rows, bits, outputs=2**20 + 16):
    """Its last outputs, among the others and alone."""
    if "triton" not in ops.implementations("quantized_linear", "cuda"):
        pytest.skip("no Triton")
    width = 2304 * 8 // bits
    values = torch.empty(outputs, 2304, device=DEVICE, dtype=torch.uint8).random_()
    values = values.view(torch.int8) if bits == 8 else values
    scale = (randn(outputs, width // 32) * 1e-2).half()
    x = randn(rows, width, dtype=torch.bfloat16)

    def first_and_last(*which):
        made = ops.QuantizedWeight(values[which], scale[which], None, bits, 32)
        return ops.quantized_linear(x, made)

    with ops.use_backend("triton"):
        last = slice(-64, None)
        assert torch.equal(first_and_last(slice(None))[:, last], first_and_last(last))


def everything(stem, rows=3000, cols=1024):
    """One call of a row, forward and backward: outputs and gradients."""
    x = randn(rows, cols, dtype=torch.bfloat16).requires_grad_()
    w = randn(cols, dtype=torch.bfloat16).requires_grad_()
    t = torch.arange(rows, device=DEVICE) % cols
    heads = x.view(1, rows, cols // 128, 128).transpose(1, 2)
    angle = torch.linspace(0, 9, rows, device=DEVICE)[:, None].expand(rows, 64)
    calls = {
        "rms_norm": lambda: (ops.rms_norm(x, w), (x, w)),
        "layer_norm": lambda: (ops.layer_norm(x, w, w), (x, w)),
        "activation": lambda: (ops.gated_activation(x, None, "silu"), (x,)),
        "rope": lambda: (ops.rope(heads, None, angle.cos(), angle.sin())[0], (x,)),
        "cross_entropy": lambda: (ops.cross_entropy(x, t), (x,)),
        # not its own row as a token's target: whose logit leaves no loss to speak of
        "linear_cross_entropy": lambda: (
            ops.linear_cross_entropy(x, x[:512], (t + 1) % min(rows, 512)),
            (x,),
        ),
    }
    y, inputs = calls[stem]()
    cotangent = torch.ones_like(y) if y.dim() == 0 else x.detach().reshape(-1)[: y.numel()]
    return y.detach(), *torch.autograd.grad(y, inputs, cotangent.reshape(y.shape)), x


@pytest.mark.parametrize("stem, backend", [c for c in CASES if c[1] in ("triton", "cuda")])
def test_same_bits_every_time(stem, backend):
    with ops.use_backend(backend):
        runs = []
        for _ in range(5):
            torch.manual_seed(1)
            runs.append(everything(stem)[:-1])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("stem", MORE)
def test_same_bits_every_time_without_gradients(stem):
    if "triton" not in ops.implementations(stem, "cuda"):
        pytest.skip("no Triton")
    with ops.use_backend("triton"):
        call = captured(randn(64, 1024, dtype=torch.bfloat16))[stem]
        first = call()
        assert all(torch.equal(first, call()) for _ in range(20))


@pytest.mark.parametrize("stem", [s for s in ROWS if s != "linear_cross_entropy"])
def test_more_than_2_to_the_31_elements(stem):
    """The last rows of a tensor of 2.4e9 elements, computed among the others and alone."""
    if "triton" not in ops.implementations(stem, "cuda"):
        pytest.skip("no Triton")
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GiB")
    with ops.use_backend("triton"):
        y, dx, *_, x = everything(stem, 2**20 + 16, 2304)
        tail = x.detach()[-64:].clone()
        if stem == "rms_norm":
            assert torch.isfinite(y[-64:]).all()
        elif stem == "activation":
            assert torch.equal(y[-64:], ops.gated_activation(tail, None, "silu"))
        assert torch.isfinite(dx[-64:]).all()
        assert dx[-64:].abs().amax() > 0


def captured(x):
    """Per row a call of one tensor [rows, 1024] without gradients."""
    rows, keys = x.shape[0], 4 * x.shape[0] + 44
    w, matrix = randn(1024, dtype=x.dtype), randn(512, 1024, dtype=x.dtype) / 32
    t = torch.arange(rows, device=DEVICE)
    heads, angle = x.view(1, rows, 8, 128).transpose(1, 2), randn(rows, 64)
    qweight = reference.quantize_weight(randn(96, 1024), 4, 32, True)
    new = x.view(rows, 8, 1, 128)
    caches = [randn(rows, 8, keys, 128, dtype=x.dtype) for _ in "kv"]
    table, lengths = randn(keys, 64), t + 1
    return {
        "rms_norm": lambda: ops.rms_norm(x, w),
        "layer_norm": lambda: ops.layer_norm(x, w, w),
        "activation": lambda: ops.activation(x, "silu"),
        "rope": lambda: ops.rope(heads, None, angle, angle)[0],
        "cross_entropy": lambda: ops.cross_entropy(x, t),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(x, x, (t + 1) % rows),
        "feed_forward": lambda: ops.feed_forward(x, matrix, matrix.mT, activation="silu"),
        "quantized_linear": lambda: ops.quantized_linear(x, qweight),
        "attention": lambda: ops.attention(heads, heads, heads, causal=True),
        "decode_attention": lambda: ops.decode_attention(new, *caches, lengths),
        "rope_append": lambda: ops.rope_append(new, new, new, table, table, *caches, lengths),
    }


@pytest.mark.parametrize("stem", [*ROWS, *MORE])
def test_graph_capture(stem):
    if "triton" not in ops.implementations(stem, "cuda"):
        pytest.skip("no Triton")
    x = randn(64, 1024, dtype=torch.bfloat16)
    call = captured(x)[stem]
    with ops.use_backend("triton"):
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        x.copy_(randn(64, 1024, dtype=torch.bfloat16))
        graph.replay()
        assert torch.equal(y, call())


def test_runs_on_the_current_stream():
    x = randn(4096, 4096)
    with ops.use_backend("triton"):
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_the_tensors():
    x = torch.randn(8, 64, device="cuda:1")
    with ops.use_backend("triton"):
        assert torch.equal(ops.rms_norm(x).cpu(), ops.rms_norm(x.to("cuda:0")).cpu())
