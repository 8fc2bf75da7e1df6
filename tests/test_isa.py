"""Every instruction set this machine offers, forced in its own process, on every operator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm import _ext, ops, reference
from fastlm.testing import check

pytestmark = pytest.mark.skipif(_ext.native is None, reason="no native kernels")
ALL = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
SUPPORTED = _ext.native.supported_isas() if _ext.native else []


TARGET = torch.arange(5)
LENGTHS = torch.tensor([50, 33])
ANGLES = torch.linspace(-3, 3, 100).view(5, 20)
SEEN = torch.ones(19, 37, dtype=torch.bool).tril(37 - 19)


def rotate(x):
    cos, sin = ANGLES.cos().to(x), ANGLES.sin().to(x)
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def decode(q, k, v):
    seen = torch.arange(k.shape[2]) < LENGTHS[:, None, None, None]
    return sdpa(q, k, v, attn_mask=seen)


def sdpa(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def append(o, q, k, weight):
    caches = [torch.zeros(2, 1, 9, 40).to(k) for _ in "kv"]
    tables = ANGLES.cos().to(q), ANGLES.sin().to(q)
    y = o.rope_append(q, k, 2 * k, *tables, *caches, 5, q_weight=weight)
    return y, *caches


# name -> (ours or the reference's, PyTorch's own, shapes of the inputs): ragged widths, few rows;
# rows of 77 are also cut to 3, and to 1
CASES = {
    "rms_norm": (
        lambda o, *a: o.rms_norm(*a),
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
        [(5, 77), (77,)],
    ),
    "layer_norm": (
        lambda o, *a: o.layer_norm(*a),
        lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        [(5, 77), (77,), (77,)],
    ),
    "rope": (
        lambda o, q, k: o.rope(q, k, ANGLES.cos().to(q), ANGLES.sin().to(q)),
        lambda q, k: (rotate(q), rotate(k)),
        [(2, 3, 5, 40), (2, 1, 5, 40)],
    ),
    "rope_append": (
        append,
        lambda q, k, w: (
            rotate(F.rms_norm(q, w.shape, w, 1e-6)),
            *(F.pad(x, (0, 0, 0, 4)) for x in (rotate(k), 2 * k)),
        ),
        [(2, 3, 5, 40), (2, 1, 5, 40), (40,)],
    ),
    "activation": (lambda o, x: o.activation(x, "gelu"), F.gelu, [(5, 77)]),
    "gated_activation": (
        lambda o, *a: o.gated_activation(*a, "silu"),
        lambda gate, up: F.silu(gate) * up,
        [(5, 77), (5, 77)],
    ),
    "attention": (
        lambda o, *a: o.attention(*a, causal=True),
        lambda *a: sdpa(*a, attn_mask=SEEN),
        [(1, 2, 19, 40), (1, 1, 37, 40), (1, 1, 37, 40)],
    ),
    "decode_attention": (
        lambda o, *a: o.decode_attention(*a, LENGTHS),
        decode,
        [(2, 4, 1, 40), (2, 2, 50, 40), (2, 2, 50, 40)],
    ),
    "linear": (lambda o, *a: o.linear(*a), F.linear, [(3, 77), (45, 77), (45,)]),
    "feed_forward": (
        lambda o, *a: o.feed_forward(*a, activation="gelu_tanh"),
        lambda x, up, down: F.linear(F.gelu(F.linear(x, up), approximate="tanh"), down),
        [(3, 40), (77, 40), (40, 77)],
    ),
    "cross_entropy": (
        lambda o, x: o.cross_entropy(x, TARGET),
        lambda x: F.cross_entropy(x, TARGET),
        [(5, 77)],
    ),
}


def cases():
    for name, (call, baseline, shapes) in CASES.items():
        yield name, (call, baseline, shapes)
        if all(shape[-1] == 77 for shape in shapes) and name != "cross_entropy":
            for width in (3, 1):
                yield name, (call, baseline, [(*shape[:-1], width) for shape in shapes])


def every_half() -> None:
    """Every fp16 value is read, and a product of two rounded, as PyTorch does."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    gate = values[values.isfinite()]
    up = gate[torch.randperm(len(gate))]
    right = (gate.relu().float() * up.float()).half()  # exact, then one rounding
    assert right.isinf().any() and ((right != 0) & (right.abs() < 6e-5)).any()
    assert torch.equal(ops.gated_activation(gate, up, "relu"), right)
    assert ops.activation(torch.full((9,), torch.nan).half(), "relu").isnan().all()


def self_check(isa: str) -> None:
    """Runs in the forced process: the kernels of this set against float64."""
    assert _ext.native.cpu_isa() == isa
    torch.manual_seed(0)
    every_half()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, (call, baseline, shapes) in cases():
            try:
                check(
                    lambda *a, call=call: call(ops, *a),
                    baseline,
                    lambda *a, call=call: call(reference, *a),
                    [torch.randn(shape, dtype=dtype) for shape in shapes],
                    gradients=name not in ("decode_attention", "rope_append"),
                )
            except AssertionError as error:
                raise AssertionError(f"{name}, {dtype}, {isa}: {error}") from None
    print("checked", isa)


def forced(isa: str, code: str) -> subprocess.CompletedProcess:
    folders = [Path(__file__).parent, Path(fastlm.__file__).parents[1]]
    environment = {
        **os.environ,
        "FASTLM_CPU_ISA": isa,
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("isa", SUPPORTED)
def test_every_operator_on_a_forced_set(isa):
    done = forced(isa, f"import test_isa; test_isa.self_check({isa!r})")
    assert done.stdout.strip() == f"checked {isa}", done.stderr


def test_best_set_is_the_default():
    code = "from fastlm import _ext; print(_ext.native.cpu_isa())"
    assert forced("", code).stdout.strip() == SUPPORTED[-1]


@pytest.mark.parametrize("isa", ["sse9", *(i for i in ALL if i not in SUPPORTED)])
def test_impossible_set_is_refused(isa):
    done = forced(isa, "import fastlm")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    if isa == "sse9":
        expected = "expected baseline, avx2, avx512, avx512bf16 or amx, got sse9"
    else:
        expected = f"this processor or build has no {isa}"
    assert last == f"RuntimeError: FASTLM_CPU_ISA: {expected}"
