"""The benchmark of decoding on a GPU, as far as a machine without one can run it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models import gpu_decode
from fastlm.models import graph

TINY = {"vocab": 128, "hidden": 128, "layers": 2, "heads": 4, "intermediate": 256}


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_step_is_judged_before_it_is_timed(kind, tied):
    gpu_decode.check("", kind, "cpu", **TINY, tied_head=tied)


def test_variants_take_turns_and_a_failing_peer_is_named(monkeypatch):
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    monkeypatch.setattr(gpu_decode, "transformers", lambda model: 1 / 0)
    model = gpu_decode.make("", "bf16", "cpu", **TINY)
    found = gpu_decode.measure(model, ["graph", "launched", "transformers"], 2, 10)
    assert found["graph"]["intervals"] == found["launched"]["intervals"] == 2 * 7
    assert found["graph"]["tokens_per_second"] > 0
    assert found["transformers"] == {"failed": "ZeroDivisionError: division by zero"}


def test_what_a_token_reads():
    model = gpu_decode.make("", "bf16", "cpu", **TINY, tied_head=False)
    matrices = 2 * (3 * 128 * 128 + 128 * 128 + 3 * 128 * 256) + 128 * 128 + 5 * 128
    assert gpu_decode.bytes_read(model, 10) == 2 * (matrices + 2 * 2 * 128 * 10)
    assert gpu_decode.bandwidth("cpu", 2**16) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_decode.main(["--size", "7B"]) == gpu_decode.NO_GPU
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
