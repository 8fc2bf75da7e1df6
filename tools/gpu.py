"""`make gpu`: builds for the GPU that is here, tests it, and measures it, in under ten minutes.

    python3 tools/gpu.py --results DIR --stages build,test,sanitize,decode,bench
    python3 tools/gpu.py --stages build,test:attention,bench:rms_norm+rope

Needs an NVIDIA GPU, and no network where `python3` has everything (scripts/bootstrap.py). A stage
has a time limit of its own, so that one hang does not eat the run; output goes to the terminal and
to DIR/log.txt (what still runs: to a file of its own), where every JSON file (summary, tests,
decode-*, bench) is whole at any moment.
Standard library only: it runs before anything is built. Exit status: 0 all passed, 1 something
failed, 2 a wrong argument, 3 no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests/gpu"
STAGES = {
    "build": 240,
    "test": 210,
    "sanitize": 80,
    "decode": 100,
    "bench": 420,
}  # name -> seconds at most
FORM = "build,test[:WORD+..],sanitize[:OP+..],decode[:bf16+int4],bench[:OP+..]"
TEST_FILE = 150  # seconds one test file may take
CORES = os.cpu_count() or 4
TOGETHER = max(2, min(8, CORES // 2))  # test files at a time
DECODED = ("bf16", "int4")  # weights of the 7B-shaped decoder
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
NO_GPU = 3


class Refused(Exception):
    """A run that cannot start; the text says why, `status` is the exit status."""

    def __init__(self, text: str, status: int = 2) -> None:
        super().__init__(text)
        self.status = status


@dataclass
class Step:
    """What became of one stage, or of one process in it."""

    name: str
    status: str  # "passed", "failed", "timeout" or "skipped"
    seconds: float = 0.0
    note: str = ""
    steps: list[Step] = field(default_factory=list)


def parse_stages(text: str) -> list[tuple[str, list[str]]]:
    """[("test", ["attention"])] of "test:attention"; in the order of the stages."""
    wanted: dict[str, list[str]] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, only = item.partition(":")
        if name not in STAGES:
            raise Refused(f"stages: expected {', '.join(STAGES)}, got {name!r}")
        if only and name == "build":
            raise Refused(f"stages: build takes no selection, got {item!r}")
        before = wanted.setdefault(name, [])
        before += [word for word in only.split("+") if word]
    if not wanted:
        raise Refused(f"stages: expected some of {', '.join(STAGES)}, got {text!r}")
    return [(name, wanted[name]) for name in STAGES if name in wanted]


def find_gpu() -> tuple[str, str]:
    """(name, compute capability such as "9.0") of the first GPU; raises Refused without one."""
    why = "nvidia-smi is not on the PATH"
    program = shutil.which("nvidia-smi")
    if program:
        command = [program, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            raise Refused("no GPU: nvidia-smi does not answer", NO_GPU) from None
        rows = [row.split(",") for row in said.stdout.splitlines() if row.count(",") == 1]
        if said.returncode == 0 and rows:
            return rows[0][0].strip(), rows[0][1].strip()
        why = f"nvidia-smi says: {(said.stdout + said.stderr).strip()[:200]}"
    raise Refused(
        f"no GPU: {why}.\n`make gpu` needs a machine with an NVIDIA GPU and its driver; what can "
        "be checked without one (compilation, emulated kernels) is part of `make test`.",
        NO_GPU,
    )


def architecture(capability: str) -> str:
    """The one architecture to build for: "9.0a" for 9.0, whose special instructions are used."""
    return capability + ("a" if int(capability.split(".")[0]) in (9, 10) else "")


class Session:
    """One run: a folder of results, a deadline, an environment for the processes."""

    def __init__(self, results: Path, limit: float, device: str = "cuda", commit: str = "") -> None:
        self.results = results.absolute()
        self.until = time.monotonic() + limit
        self.device, self.commit = device, commit
        self.python = sys.executable
        self.environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
        self.environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.gpu = ""
        self.stages: list[Step] = []
        self._speak = threading.Lock()
        self.results.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        with self._speak:
            print(text, flush=True)

    def keep(self, step: Step, log: Path) -> str:
        """Moves what a process said to the end of log.txt: a folder of few files; returns it."""
        said = log.read_text()
        with self._speak, (self.results / "log.txt").open("a") as file:
            note = f"{step.status}, {step.seconds} s {step.note}".rstrip()
            file.write(f"== {step.name}: {note}\n{said}\n")
        log.unlink()
        return said

    def left(self, limit: float) -> float:
        """Seconds a process may take: its own limit, or what the run has left."""
        return max(0.0, min(limit, self.until - time.monotonic()))

    def write(self) -> None:
        """Replaces summary.json."""
        content = {"gpu": self.gpu, "commit": self.commit, "python": self.python}
        content["stages"] = [asdict(step) for step in self.stages]
        fresh = self.results / ".summary.json.new"
        fresh.write_text(json.dumps(content, indent=1) + "\n")
        fresh.replace(self.results / "summary.json")

    def run(
        self, name: str, command: Sequence[str], limit: float, *, echo: bool = True, **more: str
    ) -> tuple[Step, str]:
        """Runs a process into DIR/log.txt and, with `echo`, onto the terminal.

        At its limit it is asked for a traceback (SIGABRT), then killed with all it started.
        """
        started, limit = time.monotonic(), self.left(limit)
        log = self.results / f"{name}.log"
        if limit < 1:
            return Step(name, "skipped", note="no time was left"), ""
        with log.open("w") as file:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env={**self.environment, **more},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            timer = threading.Timer(limit, _end, (process,))
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    if echo:
                        self.say(line.rstrip("\n"))
                process.wait()
            finally:
                timer.cancel()
                _kill(process)
        seconds = round(time.monotonic() - started, 1)
        status = "passed" if process.returncode == 0 else "failed"
        note = "" if process.returncode == 0 else f"exit status {process.returncode}"
        if seconds >= limit and process.returncode != 0:
            status, note = "timeout", f"took more than {limit:.0f} s"
        step = Step(name, status, seconds, note)
        return step, self.keep(step, log)


def _end(process: subprocess.Popen) -> None:
    """Asks for a traceback, then ends a process and everything it started."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGABRT)
        process.wait(5)
    _kill(process)


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


# ---- stages ------------------------------------------------------------------------------------


def build(session: Session, only: list[str]) -> Step:
    """Finds the Python to use and brings the native libraries up to date in place."""
    if session.device == "cpu":
        return Step("build", "skipped", note="tried out on a CPU")
    command = [sys.executable, ROOT / "scripts/bootstrap.py", "gpu"]
    step, said = session.run("build", command, STAGES["build"])
    if step.status == "passed":
        session.python = said.splitlines()[-1].strip()
        code = "import torch, fastlm, sys; from fastlm import _ext;"
        code += "print('torch', torch.__version__, 'CUDA', torch.version.cuda, 'GPUs', "
        code += "torch.cuda.device_count()); sys.exit(_ext.cuda_error or _ext.native_error or "
        code += "(0 if torch.cuda.is_available() else 'this PyTorch sees no GPU'))"
        loaded, said = session.run("load", [session.python, "-c", code], 120)
        step.steps.append(loaded)
        if loaded.status != "passed":
            step.status, step.note = "failed", said.strip().splitlines()[-1]
    return step


def test_files(only: Sequence[str], folder: Path = TESTS) -> list[Path]:
    """The test files whose names hold one of the words, or all; raises Refused for none."""
    files = sorted(folder.glob("test_*.py"))
    chosen = [f for f in files if not only or any(word in f.stem for word in only)]
    if not chosen:
        names = ", ".join(f.stem.removeprefix("test_") for f in files)
        raise Refused(f"test: no file matches {'+'.join(only)}; there are {names}")
    return chosen


def outcomes(lines: Path, file: Path) -> dict[str, int]:
    """How many tests of a file passed, failed and were skipped so far."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for line in lines.read_text().splitlines() if lines.exists() else ():
        try:
            fact = json.loads(line)
        except ValueError:  # the line a kill cut off
            continue
        if fact["id"].split("::")[0].endswith(file.name):
            counts[fact["outcome"]] += 1
    return counts


def workers(session: Session, files: int) -> list[str]:
    """pytest's arguments for the cores that are left: most of a test is compiling its kernels."""
    each = min(8, CORES // files)
    command = [session.python, "-c", "import xdist"]
    if each < 2 or subprocess.run(command, capture_output=True).returncode != 0:
        return []
    return ["-n", str(each)]


def test(session: Session, only: list[str]) -> Step:
    """Every file in a process of its own: a kernel that breaks the GPU breaks one file."""
    stage = Step("test", "passed")
    files = test_files(only)
    more = workers(session, len(files))
    lines = session.results / "tests.jsonl"
    lines.unlink(missing_ok=True)

    def one(file: Path) -> Step:
        command = [session.python, "-m", "pytest", "-p", "tools.gpu_pytest", "-q", "--tb=short"]
        command += ["-p", "no:cacheprovider", *more, str(file)]
        step, said = session.run(
            f"test-{file.stem.removeprefix('test_')}",
            command,
            TEST_FILE,
            echo=False,
            FASTLM_TEST_LINES=str(lines),
        )
        counts = outcomes(lines, file)
        if step.status == "passed" and not counts["passed"]:
            step.status = "skipped"
        told = [f"{n} {outcome}" for outcome, n in counts.items() if n]
        step.note = ", ".join([*told, *filter(None, [step.note])])
        if step.status in ("failed", "timeout"):
            session.say("\n".join(said.splitlines()[-60:]))
        session.say(f"{step.status:8} {step.name:32} {step.seconds:6.1f} s  {step.note}")
        stage.steps.append(step)
        session.write()
        return step

    session.stages.append(stage)
    until = session.until
    session.until = min(until, time.monotonic() + STAGES["test"])
    with ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(one, files))
    session.until = until
    session.stages.remove(stage)
    bad = [step.name for step in stage.steps if step.status in ("failed", "timeout")]
    if bad:
        stage.status, stage.note = "failed", f"not passed: {', '.join(bad)}"
    return stage


def sanitize(session: Session, only: list[str]) -> Step:
    """compute-sanitizer over small cases of the CUDA kernels."""
    program = shutil.which("compute-sanitizer")
    if program is None and Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        program = "/usr/local/cuda/bin/compute-sanitizer"
    if program is None:
        return Step("sanitize", "skipped", note="compute-sanitizer is not installed")
    stage = Step("sanitize", "passed")
    run = [session.python, "-m", "benchmarks.gpu", "--once", "cuda", *_ops(only)]

    def one(tool: str) -> Step:
        command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        command += ["--kernel-name", "kernel_substring=fastlm", *run]
        more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool in ("memcheck", "initcheck") else {}
        step, said = session.run(
            f"sanitize-{tool}", command, STAGES["sanitize"], echo=False, **more
        )
        for words in ("Device not supported", "not supported on this", "Unable to find"):
            if step.status == "failed" and words in said:
                step.status, step.note = "skipped", f"compute-sanitizer says: {words}"
        if step.status == "failed":
            session.say("\n".join(said.splitlines()[-40:]))
        session.say(f"{step.status:8} {step.name:32} {step.seconds:6.1f} s  {step.note}")
        return step

    with ThreadPoolExecutor(len(SANITIZERS)) as pool:
        stage.steps = list(pool.map(one, SANITIZERS))
    for status in ("skipped", "timeout", "failed"):
        hit = [step for step in stage.steps if step.status == status]
        if hit and (status != "skipped" or len(hit) == len(stage.steps)):
            stage.status, stage.note = status, hit[0].note
    return stage


def decode(session: Session, only: list[str]) -> Step:
    """A decoder of 7B, a token at a time: a process and a file of results per weight type."""
    if session.device == "cpu":
        return Step("decode", "skipped", note="tried out on a CPU")
    stage = Step("decode", "passed")
    kinds = [kind for kind in DECODED if not only or kind in only]
    if not kinds:
        raise Refused(f"decode: expected {' or '.join(DECODED)}, got {'+'.join(only)}")
    end = time.monotonic() + session.left(STAGES["decode"])
    for number, kind in enumerate(kinds):
        command = [session.python, "-m", "benchmarks.models.gpu_decode", "--size", "7B"]
        command += ["--dtype", kind, "--peer", "launched", "--new", "96", "--rounds", "2"]
        command += ["--out", session.results / f"decode-{kind}.json"]
        left = (end - time.monotonic()) / (len(kinds) - number)
        step, _ = session.run(f"decode-{kind}", command, left)
        stage.steps.append(step)
        if step.status != "passed":
            stage.status, stage.note = step.status, f"{step.name}: {step.note}"
    return stage


def bench(session: Session, only: list[str]) -> Step:
    """The benchmarks, started again after a case that killed their process."""
    out = session.results / "bench.json"
    stage = Step("bench", "passed")
    end = time.monotonic() + session.left(STAGES["bench"])
    for attempt in range(12):
        left = end - time.monotonic()
        command = [session.python, "-m", "benchmarks.gpu", "--out", out, *_ops(only)]
        command += ["--limit", str(max(1, int(left - 15)))]
        if session.commit:
            command += ["--commit", session.commit]
        if session.device == "cpu":
            command += ["--device", "cpu", "--small", "--seconds", "0.02"]
        step, _ = session.run(f"bench-{attempt}" if attempt else "bench", command, left)
        stage.steps.append(step)
        killed = step.note.startswith("exit status -")
        if not killed or step.seconds < 3:
            break
        session.say("benchmarks: going on after a case that killed the process")
    stage.status, stage.note = step.status, step.note
    if any(s.note.startswith("exit status -") for s in stage.steps):
        stage.status, stage.note = "failed", "a case killed the process"
    return stage


def _ops(only: Sequence[str]) -> list[str]:
    return [word for op in only for word in ("--op", op)]


STAGE: dict[str, Callable[[Session, list[str]], Step]] = {
    "build": build,
    "test": test,
    "sanitize": sanitize,
    "decode": decode,
    "bench": bench,
}


def together(stages: list[tuple[str, list[str]]]) -> list[list[tuple[str, list[str]]]]:
    """The stages in groups that run side by side: the sanitizers beside the tests, untimed both."""
    groups: list[list[tuple[str, list[str]]]] = []
    for stage in stages:
        if stage[0] == "sanitize" and groups and groups[-1][0][0] == "test":
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def run_stage(session: Session, name: str, only: list[str]) -> Step:
    """One stage; a selection that names nothing is its failure."""
    session.say(f"\n== {name} " + "=" * 60)
    started = time.monotonic()
    try:
        step = STAGE[name](session, only)
    except Refused as refused:
        step = Step(name, "failed", note=str(refused))
    except Exception as error:  # a fault of this file costs one stage, not those after it
        session.say(traceback.format_exc())
        step = Step(name, "failed", note=f"{type(error).__name__}: {error}")
    step.seconds = round(time.monotonic() - started, 1)
    session.stages.append(step)
    session.write()
    return step


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages asked for; returns the exit status."""
    args = _arguments(argv)
    try:
        stages = parse_stages(args.stages)
        for name, only in stages:
            if name == "test":
                test_files(only)
        gpu, capability = ("none", "") if args.device == "cpu" else find_gpu()
    except Refused as refused:
        print(f"make gpu: {refused}", file=sys.stderr)
        return refused.status
    session = Session(args.results, args.limit, args.device, args.commit)
    session.gpu = gpu
    if capability:
        session.environment.setdefault("TORCH_CUDA_ARCH_LIST", architecture(capability))
        session.environment.setdefault("FASTLM_CUDA", "1")
        session.say(f"{gpu}, building for {session.environment['TORCH_CUDA_ARCH_LIST']}")
    if stages[0][0] != "build":  # without a change it takes a second, and it names the Python
        stages.insert(0, ("build", []))
    (session.results / "log.txt").unlink(missing_ok=True)
    for group in together(stages):
        with ThreadPoolExecutor(len(group)) as pool:
            made = list(pool.map(lambda stage: run_stage(session, *stage), group))
        if made[0].name == "build" and made[0].status in ("failed", "timeout"):
            break
    session.say("\n== summary " + "=" * 60)
    for step in session.stages:
        session.say(f"{step.status:8} {step.name:10} {step.note}")
    session.say(f"results: {session.results} (tools/gpu_report.py makes tables of them)")
    return 1 if any(s.status in ("failed", "timeout") for s in session.stages) else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--results", type=Path, default=ROOT / "gpu-results", help="folder of the results")
    add(
        "--stages",
        default=",".join(STAGES),
        help=FORM,
    )
    add("--limit", type=float, default=580, help="seconds the whole run may take (default 580)")
    add("--commit", default="", help="what to record where this is no git checkout")
    add("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
