"""From the results of `make gpu` to the chooser: report, table, choice, explanation. Times and
GPU are made up."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import gpu, results_file
from fastlm import _ext, explain, ops
from fastlm.ops import _measured, _registry

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools import gpu_report  # noqa: E402

HERE = _measured.for_gpu("NVIDIA H100 Made-Up", "9.0")
FACTS, SIZES = "bfloat16, weight=bfloat16", "4097-8192 x 4096"


def case(times: dict[str, float], **more: object) -> dict:
    known = {"facts": FACTS, "sizes": SIZES, "able": ["cuda", "triton", "torch"]}
    made = {"op": "rms_norm", "shape": "8192x4096", "status": "timed", "class": known, **more}
    return {**made, "times_us": {name: {"median": us} for name, us in times.items()}}


TIMES = {"ours": 50.0, "eager": 90.0, "cuda": 50.0, "triton": 40.0, "torch": 60.0, "liger": 45.0}
RESULTS = {
    "kind": "gpu",
    "date": "2026-12-01T10:00:00+00:00",
    "commit": "abc1234",
    "machine": {"cpu": "Any", "gpu": "NVIDIA H100 Made-Up", "capability": "9.0"},
    "versions": {"torch": "2.11.0+cu130", "cuda": "13.0", "triton": "3.6.0"},
    "backends": {"rms_norm": ["cuda", "triton", "torch"]},
    "cases": [
        case(TIMES),
        case({**TIMES, "triton": 41.0}, shape="8192x4096+residual"),  # of the same class
        case({"ours": 7.0, "eager": 9.0}, op="sample", **{"class": None}),
        case({"ours": 7.0}, **{"class": {"facts": "x", "sizes": "y", "able": ["cuda"]}}),
        case({}, status="died"),
    ],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the package's tables lie, on a machine with the made-up GPU and CUDA kernels."""
    made = tmp_path / "gpus"
    monkeypatch.setattr(_measured, "SHIPPED", made)
    monkeypatch.setattr(_measured, "gpu", lambda: HERE)
    monkeypatch.setattr(_ext, "cuda_loaded", True)
    monkeypatch.setattr(_ext, "triton_error", lambda: None)
    monkeypatch.setenv("FASTLM_TUNE_FILE", str(tmp_path / "tuned.json"))
    _measured.reload()
    _registry.forget()
    yield made
    monkeypatch.undo()
    _measured.reload()
    _registry.forget()


def report(tmp_path: Path, results: dict) -> int:
    out = tmp_path / "out"
    results_file.write(out / "bench.json", results)
    return gpu_report.main([str(out), "--table", "--into", str(tmp_path / "gpus")])


def call(rows: int = 8192) -> torch.Tensor:
    with FakeTensorMode():
        x = torch.empty(rows, 4096, dtype=torch.bfloat16, device="cuda")
        return ops.rms_norm(x, torch.empty(4096, dtype=torch.bfloat16, device="cuda"))


def again() -> None:
    _measured.reload()
    _registry.forget()


def test_a_measured_winner_is_chosen_and_explained(folder, tmp_path, capsys):
    assert explain(call).splitlines()[0].endswith(": cuda")  # the order of the list
    assert report(tmp_path, RESULTS) == 0
    file = folder / "nvidia-h100-made-up.json"
    assert f"written: {file}" in capsys.readouterr().out
    (section,) = _measured.load(file)
    assert section["for"] == HERE
    assert section["note"] == (
        "measured on NVIDIA H100 Made-Up with torch 2.11.0+cu130, cuda 13.0, triton 3.6.0, "
        "commit abc1234"
    )
    assert section["verdicts"] == {
        "rms_norm": {
            FACTS: {
                SIZES: {
                    "winner": "triton",
                    "us": {"cuda": 50.0, "triton": 40.5, "torch": 60.0},
                    "shape": "8192x4096, 8192x4096+residual",
                    "date": "2026-12-01",
                }
            }
        }
    }
    again()
    said = explain(call).splitlines()
    assert said[0] == "rms_norm on cuda, bfloat16, weight=bfloat16: triton"
    times = "cuda 50.0 us, triton 40.5 us, torch 60.0 us"
    assert said[-1] == f"  {section['note']} 2026-12-01: {times} for {SIZES}"
    assert explain(lambda: call(16)).splitlines()[0].endswith(": cuda")  # another class


def test_what_was_measured_here_counts_more(folder, tmp_path):
    report(tmp_path, RESULTS)
    again()
    with _registry.unmeasured() as open_:
        call()
    assert [(v.stem, v.sizes) for v in open_] == [("rms_norm", SIZES)]  # `fastlm tune` asks
    own = _measured.Entry("torch", {"cuda": 5.0, "triton": 4.0, "torch": 3.0}, "8192x4096")
    _measured.add("cuda", "rms_norm", FACTS, SIZES, own)
    _measured.save()
    assert "made-up" not in (tmp_path / "tuned.json").read_text().lower()
    again()
    assert explain(call).splitlines()[0].endswith(": torch")
    assert "  tuned " in explain(call)


@pytest.mark.parametrize(
    "other, words",
    [
        (_measured.for_gpu("NVIDIA A100", "8.0"), "GPU NVIDIA H100 Made-Up, here NVIDIA A100"),
        (_measured.for_gpu("NVIDIA H100 Made-Up", "9.1"), "capability 9.0, here 9.1"),
        (None, "GPU NVIDIA H100 Made-Up, here None"),
    ],
)
def test_a_table_of_another_gpu_is_not_used(folder, tmp_path, monkeypatch, other, words):
    report(tmp_path, RESULTS)
    again()
    monkeypatch.setattr(_measured, "gpu", lambda: other)
    said = explain(call)
    assert said.splitlines()[0].endswith(": cuda")
    assert "a table of the package is not used: made with " in said and words in said


def test_none_reads_no_table(folder, tmp_path, monkeypatch):
    report(tmp_path, RESULTS)
    monkeypatch.setenv("FASTLM_TUNE_FILE", "none")
    again()
    assert explain(call).splitlines()[0].endswith(": cuda")


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not a table of measured winners"),
        ('{"kind": "fastlm measured winners", "format": 9}', "expected format 1, got 9"),
        ('{"kind": "fastlm measured winners", "format": 1, "sections": [{}]}', "damaged"),
        (
            '{"kind": "fastlm measured winners", "format": 1, "sections": '
            '[{"for": {}, "verdicts": {}}]}',
            "does not say how it was made",
        ),
    ],
)
def test_a_damaged_table_is_named_and_ignored(folder, text, words):
    folder.mkdir()
    (folder / "broken.json").write_text(text)
    again()
    with pytest.warns(UserWarning, match=words) as said:
        call()
    assert "broken.json" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain(call).splitlines()[0].endswith(": cuda")


def without(*path: str) -> dict:
    made = copy.deepcopy(RESULTS)
    part = made
    for name in path[:-1]:
        part = part[name]
    del part[path[-1]]
    return made


@pytest.mark.parametrize(
    "results, words",
    [
        (without("machine", "gpu"), "not measured on a GPU"),
        (without("machine", "capability"), "not measured on a GPU"),
        (without("cases"), "damaged: KeyError: 'cases'"),
        (without("commit"), "damaged: KeyError: 'commit'"),
        ({**RESULTS, "machine": 3}, "damaged"),
        ({**RESULTS, "cases": RESULTS["cases"][2:]}, "no class of calls"),
    ],
)
def test_results_that_make_no_table_are_refused(folder, tmp_path, capsys, results, words):
    assert report(tmp_path, results) == 1
    assert words in capsys.readouterr().err
    assert not folder.exists()


def test_the_benchmarks_record_the_class_the_chooser_asks_for(tmp_path):
    """On the CPU, with small cases: the same names as a call of the operator has."""
    if "cpu" not in ops.implementations("rms_norm"):
        pytest.skip("no native kernels")
    out = tmp_path / "bench.json"
    chosen = ["--op", "rms_norm", "--filter", "8192x4096", "--op", "sample"]
    arguments = ["--device", "cpu", "--small", "--seconds", "0.01", "--commit", "abc"]
    assert gpu.main([*arguments, "--out", str(out), *chosen]) == 0
    found = {c["id"]: c.get("class") for c in json.loads(out.read_text())["cases"]}
    assert found["rms_norm/8192x4096/bf16/fwd"] == {
        "facts": FACTS,
        "sizes": "17-32 x 4096",
        "able": ["cpu", "torch", "reference"],
    }
    assert found["rms_norm/8192x4096/bf16/fwd+bwd"]["sizes"] == "17-32 x 4096, with gradients"
