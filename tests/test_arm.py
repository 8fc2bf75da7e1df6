"""The CPU kernels on ARM: cross-compiled, and run where qemu is there to run them.

Every kernel file is compiled for aarch64 with the build's own flags, linked with a driver
(tests/arm/driver.cpp) that calls the kernels as the bindings do, and judged like any kernel: its
error against float64 within twice PyTorch's own, here on this machine. The bindings, which need
PyTorch's headers and library, are compiled but not run. On an ARM machine all this is the build
and the rest of the test suite.

Needs `apt-get install g++-aarch64-linux-gnu qemu-user`.
"""

from __future__ import annotations

import fcntl
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastlm import reference
from fastlm.testing import FEWEST, Pool

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_support"))
import native  # noqa: E402

COMPILER = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no aarch64-linux-gnu-g++ here")
ARM = ROOT / "tests/arm"
# all but the module, which includes this machine's Python.h and holds no kernel
BINDINGS = [f for f in sorted((ROOT / "csrc/torch").glob("*.cpp")) if f.stem != "module"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def plan() -> native.Ninja:
    """The build for aarch64, in a folder that keeps what was compiled from run to run."""
    folder = ROOT / "build/aarch64"
    folder.mkdir(parents=True, exist_ok=True)
    ninja = native.Ninja(folder)
    ccache = shutil.which("ccache")
    ninja.lines += [f"cxx = {f'{ccache} ' if ccache else ''}{COMPILER}"]
    ninja.lines += [f"flags = {native.compile_flags(x86=False)} -I{ARM} -Werror"]
    ninja.rule("cxx", "$cxx -MMD -MF $out.d $flags $extra -c $in -o $out")
    ninja.rule("link", "$cxx -static $in -o $out $libs", depfile=False)
    objects = [ninja.build("cxx", ROOT / "csrc/cpu/isa.cpp", "isa.o")]
    objects.append(ninja.build("cxx", ARM / "driver.cpp", "driver.o"))
    for stem in (*native.kernel_stems(), "convert"):
        objects.append(native.kernel_object(ninja, stem, "baseline"))
    ninja.link(folder / "driver", objects, "")
    torch_flags = native.compile_flags(False, native.find_torch())
    for binding in BINDINGS:
        ninja.build("cxx", binding, f"{binding.stem}.binding.o", extra=torch_flags)
    ninja.write()
    return ninja


def build(plan: native.Ninja, targets: list[str]) -> None:
    """One process at a time: another's tests run what is built here."""
    with (plan.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        plan.run(targets)


@pytest.fixture(scope="module")
def driver(plan) -> Path:
    """Every kernel compiled for aarch64 and linked into one program."""
    program = plan.folder / "driver"
    build(plan, [str(program)])
    return program


@pytest.fixture
def run(driver):
    """Runs a case of the driver: its numbers and tensors in, tensors of the given types out."""
    if QEMU is None:
        pytest.skip("no qemu-aarch64 here: compiled and linked only")

    def call(name: str, *values, out: list[torch.dtype]) -> list[torch.Tensor]:
        request = [encode(name.encode())]
        for value in values:
            if value is None:
                request.append(encode(b""))
            elif isinstance(value, torch.Tensor):
                raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                request.append(encode(raw))
            elif isinstance(value, torch.dtype):
                request.append(struct.pack("<q", DTYPES.index(value)))
            else:
                request.append(struct.pack("<d" if isinstance(value, float) else "<q", value))
        done = subprocess.run([QEMU, str(driver)], input=b"".join(request), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        tensors, left = [], done.stdout
        for dtype in out:
            (count,) = struct.unpack("<q", left[:8])
            tensors.append(torch.frombuffer(bytearray(left[8 : 8 + count]), dtype=dtype))
            left = left[8 + count :]
        assert not left, f"{name}: {len(left)} bytes too many"
        return tensors

    return call


def encode(raw: bytes) -> bytes:
    return struct.pack("<q", len(raw)) + raw


def judge(made, baseline, oracle, inputs, cotangent=None):
    """Outputs and gradients of `inputs` against float64, with PyTorch's error for a budget."""
    judge_draws([compared(made, baseline, oracle, inputs, cotangent)])


def judge_draws(draws):
    """Several draws of the same tensors, judged together."""
    pool = Pool()
    for draw in draws:
        pool.add(*draw)
    for verdict in pool.errors():
        assert verdict.ok, str(verdict)


def compared(made, baseline, oracle, inputs, cotangent=None):
    """Tensors by name: made, PyTorch's, exact."""
    results = []
    for function, dtype in ((baseline, None), (oracle, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        y = function(*leaves)
        tensors = [y.detach()]
        if cotangent is not None:
            tensors += torch.autograd.grad(y, leaves, cotangent.to(y.dtype))
        results.append(tensors)
    made = [x.view(exact.shape) for x, exact in zip(made, results[1], strict=True)]
    return [{f"tensor {i}": x for i, x in enumerate(tensors)} for tensors in (made, *results)]


def test_every_row_is_in_the_driver(driver):
    names = (ARM / "driver.cpp").read_text()
    missing = [stem for stem in native.kernel_stems() if f'{{"{stem}", ' not in names]
    assert not missing
    machine = driver.read_bytes()[18:20]
    assert struct.unpack("<H", machine) == (183,)  # ELF's number of aarch64


def test_bindings_compile(plan):
    assert len(BINDINGS) >= len(native.kernel_stems())
    build(plan, [str(plan.folder / f"{binding.stem}.binding.o") for binding in BINDINGS])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("step", [4, 3, 1])
def test_conversions_have_the_bits_of_pytorch(run, dtype, step):
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    (wide,) = run("convert", dtype, 1, step, halves, out=[torch.float32])
    assert torch.equal(wide.isnan(), halves.isnan())
    assert torch.equal(wide.nan_to_num(), halves.float().nan_to_num())
    # every value, its neighbours' midpoints and what lies beside them, both signs
    finite = halves[halves.isfinite()].float().unique()
    middle = (finite[1:].double() + finite[:-1].double()).div(2).float()
    around = torch.cat([middle, middle.nextafter(finite[1:]), middle.nextafter(finite[:-1])])
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65520.0, 65519.99, 1e30, 1e-45])
    x = torch.cat([finite, around, special])
    (narrow,) = run("convert", dtype, 0, step, x, out=[dtype])
    assert torch.equal(narrow.view(torch.int16), x.to(dtype).view(torch.int16))
    (nan,) = run("convert", dtype, 0, step, torch.full((4,), float("nan")), out=[dtype])
    assert nan.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_norms(run, name, dtype):
    rows, cols, centred = 9, 77, name == "layer_norm"
    x, residual, grad = (torch.randn(rows, cols).to(dtype) for _ in range(3))
    inputs = [torch.randn(cols).to(dtype) for _ in range(1 + centred)]
    bias = inputs[1] if centred else None
    types = [dtype, dtype, torch.float32, *[torch.float32] * centred]
    made = run(
        name, dtype, rows, cols, 1e-6, x, residual, inputs[0], bias, grad, out=types
    )  # fmt: skip
    function = getattr(reference, name)

    def baseline(x, *vectors):
        if centred:
            return F.layer_norm(x, (cols,), *vectors, 1e-6)
        return F.rms_norm(x, (cols,), *vectors, 1e-6)

    def oracle(x, *vectors):
        return function(x, *vectors, eps=1e-6)

    judge(made, baseline, oracle, [x + residual, *inputs], grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(run, interleaved, dtype):
    heads, tokens, size = 3, 7, 40
    x, grad = (torch.randn(1, heads, tokens, size).to(dtype) for _ in range(2))
    angle = torch.randn(tokens, size // 2)
    cos, sin = angle.cos(), angle.sin()
    shape = dtype, heads, tokens, size, int(interleaved)
    made = run("rope", *shape, 0, x, cos, sin, out=[dtype])
    made += run("rope", *shape, 1, grad, cos, sin, out=[dtype])

    def rotate(x):
        tables = cos.to(x.dtype), sin.to(x.dtype)
        if interleaved:
            left, right, (c, s) = x[..., ::2], x[..., 1::2], tables
            return torch.stack((left * c - right * s, right * c + left * s), -1).flatten(-2)
        left, right, (c, s) = *x.chunk(2, -1), tables
        return torch.cat((left * c - right * s, right * c + left * s), -1)

    judge(made, rotate, rotate, [x], grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_append(run, dtype):
    heads, kv_heads, tokens, size, capacity, length = 4, 2, 3, 40, 20, 11
    q, k, v = (torch.randn(1, h, tokens, size).to(dtype) for h in (heads, kv_heads, kv_heads))
    caches = [torch.randn(1, kv_heads, capacity, size).to(dtype) for _ in "kv"]
    angle, weight = torch.randn(capacity, size // 2), torch.randn(size).to(dtype)
    cos, sin = angle.cos(), angle.sin()
    shape = heads, kv_heads, tokens, size, capacity, length
    made = run("rope_append", dtype, *shape, q, k, v, cos, sin, *caches, weight, out=[dtype] * 3)

    def appended(*inputs):
        q, k, v, w, *caches = (x.clone() for x in inputs)
        tables = cos.to(q.dtype), sin.to(q.dtype)
        y = reference.rope_append(
            q, k, v, *tables, *caches, length, q_weight=w, k_weight=w, eps=1e-6
        )
        return torch.cat([x.flatten() for x in (y, *caches)])

    judge([torch.cat(made)], appended, appended, [q, k, v, weight, *caches])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "number, kind", [*enumerate(("silu", "gelu", "gelu_tanh", "relu", "relu2"))]
)
@pytest.mark.parametrize("gated", [False, True])
def test_activation(run, number, kind, gated, dtype):
    inputs = [torch.randn(777).to(dtype) * 2 for _ in range(1 + gated)]
    grad = torch.randn(777).to(dtype)
    up = inputs[1] if gated else None
    out = [dtype] * (3 if gated else 2)
    made = run("activation", dtype, number, 777, inputs[0], up, grad, out=out)

    def function(x, up=None):
        y = reference.activation(x, kind)
        return y if up is None else y * up

    judge(made, function, function, inputs, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, transposed", [(1, 0), (3, 0), (16, 0), (3, 1)])
def test_linear(run, rows, transposed, dtype):
    def draw():
        x, w, bias = torch.randn(rows, 77), torch.randn(213, 77), torch.randn(213)
        x, w, bias = x.to(dtype), w.to(dtype), bias.to(dtype)
        weight = w.t() if transposed else w
        made = run("linear", dtype, rows, 77, 213, transposed, x, weight, bias, out=[dtype])
        return compared(made, F.linear, F.linear, [x, w, bias])

    judge_draws(draw() for _ in range(FEWEST))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [5, 33])
def test_feed_forward(run, rows, dtype):
    width, hidden = 77, 131
    x, grad = torch.randn(rows, width).to(dtype), torch.randn(rows, hidden).to(dtype)
    w_in, w_gate = ((torch.randn(hidden, width) / 9).to(dtype) for _ in range(2))
    shape = 0, rows, width, hidden
    made = run("feed_forward", dtype, *shape, x, w_in, w_gate, grad, out=[dtype] * 6)

    def activated(up, gate):
        return F.silu(gate) * up

    def function(x, w_in, w_gate):
        return activated(F.linear(x, w_in), F.linear(x, w_gate))

    judge(made[:1], function, function, [x, w_in, w_gate])
    judge(made[1:2], F.linear, F.linear, [x, w_in])
    judge(made[2:3], F.linear, F.linear, [x, w_gate])
    # what follows is made of the projections as they were stored
    judge(made[3:], activated, activated, [t.view(rows, hidden) for t in made[1:3]], grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "smoothing", "softcap"])
def test_cross_entropy(run, form, dtype):
    rows, classes = 9, 1037
    options = {"smoothing": {"label_smoothing": 0.1, "z_loss": 1e-3}, "softcap": {"softcap": 5.0}}
    kw = options.get(form, {})
    logits, target = (torch.randn(rows, classes) * 3).to(dtype), torch.randint(classes, (rows,))
    numbers = [kw.get(k, 0.0) for k in ("label_smoothing", "z_loss", "softcap")]
    made = run(
        "cross_entropy", dtype, rows, classes, *numbers, logits, target, out=[torch.float32, dtype]
    )

    def function(x):
        return reference.cross_entropy(x, target, reduction="none", **kw)

    judge(made, function, function, [logits], torch.ones(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sums", [0, 1])
@pytest.mark.parametrize("a_along, b_along", [(1, 1), (1, 0), (0, 0)])
def test_product_of_many_rows(run, a_along, b_along, sums, dtype):
    k, m, n = 300, 45, 83
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    given = a if a_along else a.t(), b if b_along else b.t()
    out = torch.float32 if sums else dtype
    made = run("product", dtype, k, m, n, a_along, b_along, sums, *given, out=[out])
    judge(made, F.linear, F.linear, [a, b])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_attention(run, softcap, dtype):
    heads, kv_heads, tq, tk, size = 4, 2, 70, 90, 40
    q, grad = (torch.randn(1, heads, tq, size).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, kv_heads, tk, size).to(dtype) for _ in range(2))
    shape = heads, kv_heads, tq, tk, size, 1
    made = run("attention", dtype, *shape, softcap, q, k, v, grad, out=[dtype] * 4)
    cap = softcap or None

    def oracle(*a):
        return reference.attention(*a, causal=True, softcap=cap)

    def baseline(q, k, v):
        if softcap:
            return oracle(q, k, v)
        seen = torch.ones(tq, tk, dtype=torch.bool).tril(tk - tq)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    judge(made, baseline, oracle, [q, k, v], grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_attention(run, dtype):
    heads, kv_heads, size, capacity, length = 4, 2, 40, 300, 283
    q = torch.randn(1, heads, 2, size).to(dtype)
    k, v = (torch.randn(1, kv_heads, capacity, size).to(dtype) for _ in range(2))
    shape = heads, kv_heads, 2, size, capacity, length
    made = run("decode_attention", dtype, *shape, q, k, v, out=[dtype])

    def baseline(q, k, v):
        seen = torch.ones(2, length, dtype=torch.bool).tril(length - 2)
        k, v = k[:, :, :length], v[:, :, :length]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    judge(made, baseline, lambda *a: reference.decode_attention(*a, length), [q, k, v])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form, bits", [(0, 8), (1, 4), (2, 4)])
def test_quantized_linear(run, form, bits, dtype):
    rows, width, out = 3, 128, 45
    x = torch.randn(rows, width).to(dtype)
    plain = reference.quantize_weight(torch.randn(out, width), bits, 32, symmetric=form != 2).pack()
    digits = 4 if dtype == torch.float32 else 3
    made = run(
        "quantized_linear", dtype, form, rows, width, out, 32, digits, x, plain.values, plain.scale,
        plain.minimum, out=[dtype, torch.float32],
    )  # fmt: skip
    w = plain.dequantize(torch.float64)
    judge(made[:1], lambda x: F.linear(x, w.to(x.dtype)), lambda x: F.linear(x, w), [x])
    assert torch.equal(made[1].view(out, width), plain.dequantize())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numbers", [(0, 0.8, 1.0, 0.0), (5, 1.0, 1.0, 0.0), (0, 1.0, 0.9, 0.05)])
def test_sample(run, numbers, dtype):
    top_k, temperature, top_p, min_p = numbers
    logits = (torch.randn(64, 500) * 3).to(dtype)
    uniform = torch.rand(64, dtype=torch.float64)
    cut = top_k or 500, temperature, top_p, min_p
    (token,) = run("sample", dtype, 64, 500, *cut, logits, uniform, out=[torch.int64])
    expected = reference.sample(
        logits, uniform, temperature=temperature, top_k=top_k or None, top_p=top_p, min_p=min_p
    )
    assert torch.equal(token, expected)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_decode_plan(run, dtype):
    x, weight = torch.randn(4, 77), torch.randn(77).to(dtype)
    made = run("decode_plan", dtype, 4, 77, 1e-6, x, weight, out=[dtype])

    def baseline(x, w):
        return F.rms_norm(x, (77,), w.to(x.dtype), 1e-6).to(dtype)

    judge(made, baseline, lambda *a: reference.rms_norm(*a, 1e-6), [x, weight])
