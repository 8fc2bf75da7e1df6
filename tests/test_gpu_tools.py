"""`make gpu` without a GPU: stages, time limits, results that are whole at any moment, tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_cases, gpu_report, results_file
from benchmarks.case import OPS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools import gpu as tool  # noqa: E402
from tools import gpu_report as report_tool  # noqa: E402

# ---- tools/gpu.py ------------------------------------------------------------------------------


def test_stages_are_parsed_in_their_order():
    parse = tool.parse_stages
    assert parse("bench:rms_norm+rope,build") == [("build", []), ("bench", ["rms_norm", "rope"])]
    assert parse("test:attention,test:rope") == [("test", ["attention", "rope"])]
    assert parse(",".join(tool.STAGES)) == [(name, []) for name in tool.STAGES]


@pytest.mark.parametrize(
    "text, words",
    [
        ("tests", "expected build, test, sanitize, decode, bench, got 'tests'"),
        ("build:x", "build takes no selection"),
        ("", "expected some of build"),
    ],
)
def test_wrong_stages_are_refused(text, words):
    with pytest.raises(tool.Refused, match=words) as refused:
        tool.parse_stages(text)
    assert refused.value.status == 2


def test_a_selection_that_matches_no_file_is_refused():
    assert [f.stem for f in tool.test_files(["rms_norm"])]
    with pytest.raises(tool.Refused, match=r"no file matches nothing; there are .*rms_norm"):
        tool.test_files(["nothing"])


def test_sanitizers_run_beside_the_tests():
    stages = tool.parse_stages(",".join(tool.STAGES))
    names = [[name for name, _ in group] for group in tool.together(stages)]
    assert names == [["build"], ["test", "sanitize"], ["decode"], ["bench"]]
    assert tool.together([("build", []), ("sanitize", [])]) == [[("build", [])], [("sanitize", [])]]


def test_only_the_architecture_that_is_here_is_built():
    found = [tool.architecture(c) for c in ("8.0", "8.9", "9.0", "10.0", "12.0")]
    assert found == ["8.0", "8.9", "9.0a", "10.0a", "12.0"]


def test_a_fault_in_a_stage_costs_that_stage_alone(tmp_path, monkeypatch, capsys):
    def broken(session, only):
        raise OSError("the disk is full")

    monkeypatch.setitem(tool.STAGE, "decode", broken)
    session = tool.Session(tmp_path, 10)
    step = tool.run_stage(session, "decode", [])
    assert (step.status, step.note) == ("failed", "OSError: the disk is full")
    kept = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [stage["name"] for stage in kept] == ["decode"]
    assert "in broken" in capsys.readouterr().out


# What a machine for `make gpu` need not have; an import of it fails.
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""
ABSENT = "setuptools safetensors tokenizers click numpy psutil xdist transformers"


def test_the_gpu_tools_need_no_more_than_they_say(tmp_path):
    """torch, triton, pybind11, ninja and pytest; the machine has no package index."""
    names = f"NAMES = {set(ABSENT.split())!r}"
    (tmp_path / "sitecustomize.py").write_text(names + BLOCKED)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    code = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("bootstrap", "scripts/bootstrap.py")
bootstrap = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bootstrap)
assert bootstrap.has_everything(sys.executable, ["gpu"])
assert not bootstrap.has_everything(sys.executable, [])
sys.path[:0] = ["build_support"]
import native, tools.gpu, tools.gpu_pytest, benchmarks.models.gpu_decode
import benchmarks.gpu as gpu
arguments = ["--device", "cpu", "--small", "--seconds", "0.01", "--commit", "abc", "--op", "sample"]
sys.exit(gpu.main([*arguments, "--out", sys.argv[1]]))
"""
    command = [sys.executable, "-c", code, tmp_path / "bench.json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "pytest", "-q", "--co", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 5), done.stdout + done.stderr  # 5: all skipped, no GPU


def run_tool(tmp_path: Path, nvidia_smi: str | None, *more: str) -> subprocess.CompletedProcess:
    """tools/gpu.py with a PATH that holds a made-up nvidia-smi, or none."""
    programs = tmp_path / "bin"
    programs.mkdir()
    if nvidia_smi is not None:
        (programs / "nvidia-smi").write_text("#!/bin/sh\n" + nvidia_smi)
        (programs / "nvidia-smi").chmod(0o755)
    return subprocess.run(
        [sys.executable, ROOT / "tools/gpu.py", "--results", tmp_path / "out", *more],
        env={**os.environ, "PATH": f"{programs}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "nvidia_smi, words",
    [
        ("echo 'NVIDIA-SMI has failed: no driver'; exit 9", "nvidia-smi says: NVIDIA-SMI has"),
        ("exit 0", "no GPU: nvidia-smi says"),
    ],
)
def test_no_gpu_is_said_clearly(tmp_path, nvidia_smi, words):
    done = run_tool(tmp_path, nvidia_smi)
    assert done.returncode == tool.NO_GPU
    assert words in done.stderr and "needs a machine with an NVIDIA GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_gpu_is_asked_for_its_architecture(tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0'\n")
    (programs / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert tool.find_gpu() == ("NVIDIA H200", "9.0")


def test_a_process_is_ended_at_its_limit_with_a_traceback(tmp_path):
    session = tool.Session(tmp_path, 60)
    code = "import faulthandler, time; faulthandler.enable(); print('begun'); time.sleep(60)"
    step, said = session.run("sleeper", [sys.executable, "-c", code], 2.5, echo=False)
    assert step.status == "timeout" and step.seconds < 20
    assert "begun" in said and "most recent call first" in said
    kept = (tmp_path / "log.txt").read_text()
    assert kept.startswith("== sleeper: timeout, ") and said in kept
    assert not (tmp_path / "sleeper.log").exists()
    session.until = 0
    step, _ = session.run("late", [sys.executable, "-c", "1"], 10)
    assert (step.status, step.note) == ("skipped", "no time was left")


@pytest.mark.parametrize("cores", [2, 6])  # a process a file, and with two workers each
def test_every_file_of_tests_is_counted(tmp_path, monkeypatch, capsys, cores):
    if cores == 6:
        pytest.importorskip("xdist")
    monkeypatch.setattr(tool, "CORES", cores)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # of the run this test is part of
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_mixed.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no')\ndef test_c(): pass\n"
    )
    (folder / "test_good.py").write_text("def test_a(): pass\n")
    (folder / "test_dies.py").write_text(
        "import os\ndef test_a(): pass\ndef test_b(): os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setattr(tool, "test_files", lambda only: sorted(folder.glob("*.py")))
    stage = tool.test(tool.Session(tmp_path / "out", 60), [])
    notes = {step.name: (step.status, step.note) for step in stage.steps}
    assert stage.status == "failed" and "test-mixed" in stage.note
    assert notes["test-good"] == ("passed", "1 passed")
    died = "1 passed, exit status -9" if cores == 2 else "1 passed, 1 failed, exit status 1"
    assert notes["test-dies"] == ("failed", died)
    assert notes["test-mixed"][1].startswith("1 passed, 1 failed, 1 skipped")
    table = report_tool.tests(tmp_path / "out")
    assert "test_mixed.py | 1 | 1 | 1 |" in table and "assert 1 == 2" in table


# ---- benchmarks/gpu.py -------------------------------------------------------------------------


def test_every_operator_has_cases_with_names_of_their_own():
    loaded = gpu_cases.load()
    assert {case.case.op for case in loaded} == set(OPS)
    assert len({case.id for case in loaded}) == len(loaded)
    assert [case.case.op for case in loaded[: len(OPS)]] == list(OPS)  # a first one of each


@pytest.mark.parametrize("case", gpu_cases.load(), ids=lambda case: case.id)
def test_inputs_are_made_on_the_device_that_is_asked_for(case):
    if case.case.op == "quantized_linear":
        pytest.skip("a weight is quantized by its values")
    assert {x.device.type for x in gpu.build(case.case, "meta").inputs} == {"meta"}


def run_cpu(tmp_path: Path, *more: str) -> int:
    out = str(tmp_path / "bench.json")
    arguments = ["--device", "cpu", "--small", "--seconds", "0.01", "--commit", "abc", "--out", out]
    return gpu.main([*arguments, *more])


def test_a_run_records_times_and_becomes_a_table(tmp_path, capsys):
    assert run_cpu(tmp_path, "--op", "rms_norm", "--filter", "16x4096+residual") == 0
    content = results_file.read(tmp_path / "bench.json")
    (case,) = content["cases"]
    assert case["status"] == "timed" and case["host_us"]["ours"] > 0
    assert {"ours", "eager"} <= set(case["times_us"]) and content["current"] is None
    table = gpu_report.render(content)
    assert "16x4096+residual" in table and "| against eager |" in table
    (best,) = gpu_report.fastest(content)
    assert set(best["order"]) == {"cpu", "torch", "eager"}
    assert report_tool.main([str(tmp_path)]) == 0 and "## Figures" in capsys.readouterr().out


def test_a_run_that_is_cut_off_leaves_a_whole_file_and_can_go_on(tmp_path, monkeypatch):
    real, seen = gpu.run_case, []

    def cut(case, *args):
        seen.append(case.id)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(case, *args)

    monkeypatch.setattr(gpu, "run_case", cut)
    chosen = ["--op", "rms_norm", "--filter", "+residual/bf16/fwd"]
    with pytest.raises(KeyboardInterrupt):
        run_cpu(tmp_path, *chosen)
    content = results_file.read(tmp_path / "bench.json")
    assert [c["id"] for c in content["cases"]] == seen[:1] and content["current"] == seen[1]

    monkeypatch.setattr(gpu, "run_case", real)
    assert run_cpu(tmp_path, *chosen) == 1  # a case that died is a failure
    again = results_file.read(tmp_path / "bench.json")
    assert again["cases"][0] == content["cases"][0]
    assert again["cases"][1]["status"] == "died" and again["cases"][2]["status"] == "timed"
    assert "died" in gpu_report.render(again)


def test_a_case_in_its_second_round_keeps_its_figures_when_the_peers_fail(tmp_path, monkeypatch):
    def no_compiler(*args, **kw):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(gpu.torch, "compile", no_compiler)
    assert run_cpu(tmp_path, "--op", "rms_norm", "--filter", "8192x4096/bf16/fwd") == 0
    first = results_file.read(tmp_path / "bench.json")["cases"][0]
    assert first["status"] == "timed" and "no compiler here" in first["slow_note"]


def test_no_gpu_and_no_case_are_exit_statuses(tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--filter", "nothing like it"]) == 2
    if not gpu.torch.cuda.is_available():
        assert gpu.main(["--out", str(tmp_path / "x.json")]) == 3
        assert "sees no GPU" in capsys.readouterr().err


def test_once_runs_small_cases_on_one_backend(capsys):
    assert gpu.main(["--device", "cpu", "--once", "cpu", "--op", "rms_norm"]) == 0
    assert capsys.readouterr().out.count("ran rms_norm") == 10


def test_report_of_an_empty_folder_is_an_error(tmp_path, capsys):
    assert report_tool.main([str(tmp_path)]) == 1
    assert report_tool.main([str(tmp_path), "--fastest"]) == 1
    assert "make gpu STAGES=bench" in capsys.readouterr().err


def test_summary_is_json(tmp_path):
    session = tool.Session(tmp_path, 10)
    session.stages.append(tool.Step("build", "passed", 1.0))
    session.write()
    assert json.loads((tmp_path / "summary.json").read_text())["stages"][0]["name"] == "build"
    assert "build: passed" in report_tool.stages(tmp_path)
