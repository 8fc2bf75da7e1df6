"""`python -m benchmarks.gpu --out FILE`: every operator on this machine's GPU, against its peers.

The file is written anew after every case, so that a run cut off at any moment leaves a whole one;
a run on the same file goes on where the last one stopped. A case that killed the process or took
too long is recorded as such and passed over.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import importlib.util
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks import case as cases
from benchmarks import driver, gpu_cases, machine, results_file
from benchmarks.case import Case, Work
from benchmarks.driver import Outcome
from benchmarks.gpu_cases import GpuCase
from benchmarks.gpu_timing import Clock, Variant, clock_of, interleave
from benchmarks.machine import Limits
from benchmarks.session import line
from fastlm import ops
from fastlm.ops import _registry

LONGEST = 75  # seconds a case may take before it is given up


@dataclass
class Plan:
    """How to run the cases."""

    device: str = "cuda"
    small: bool = False
    seconds: float = 0.4  # of timing per case
    until: float = float("inf")  # time.monotonic() after which no case is started


@dataclass
class Run:
    """A result file that grows."""

    path: Path
    facts: dict
    records: dict[str, dict] = field(default_factory=dict)
    current: str | None = None

    def write(self) -> None:
        """Replaces the file."""
        content = {**self.facts, "current": self.current, "cases": list(self.records.values())}
        results_file.write(self.path, content)

    def begin(self, key: str) -> None:
        """Notes what is about to run, for whoever finds the file of a process that died."""
        self.current = key
        self.write()

    def end(self, key: str, record: dict) -> None:
        """Keeps a case's record."""
        self.records[key], self.current = record, None
        self.write()


def resume(path: Path, facts: dict) -> Run:
    """The run of an earlier process on the same commit, else a new one."""
    run = Run(path, facts)
    with contextlib.suppress(OSError, ValueError):
        before = results_file.read(path)
        if (before["commit"], before["machine"]) == (facts["commit"], facts["machine"]):
            run.facts = {k: v for k, v in before.items() if k not in ("format", "cases", "current")}
            run.records = {record["id"]: record for record in before["cases"]}
            if before["current"]:
                key, slow = before["current"].removesuffix(SLOW), before["current"].endswith(SLOW)
                died = {"id": key, "op": key.split("/")[0], "status": "died"}
                died["note"] = f"killed the process, or took more than {LONGEST} s"
                record = {**run.records[key], "slow_note": died["note"]} if slow else died
                run.end(key, record)
    return run


SLOW = " again"  # second round: with peers that have to be compiled


def run_case(case: GpuCase, clock: Clock, limits: Limits | None, plan: Plan, slow: bool) -> dict:
    """Checks the small sibling, times the case, returns its record."""
    chosen = case.small if plan.small else case.case
    try:
        little = build(case.small, plan.device)
        backend = driver.backends(case.small, little)
        if backend == "reference":
            note = "no kernel of its own here"
            return _record(case, Outcome(chosen, "reference", note, backend))
        wrong = "" if slow else _wrong(case.small, little, plan.device)
        if wrong:
            return _record(case, Outcome(chosen, "wrong", wrong, backend))
        del little
        work = build(chosen, plan.device)
        variants, failed = _variants(case, chosen, work, clock, plan, slow)
        with torch.set_grad_enabled(chosen.backward):
            known = _class(chosen.op, variants["ours"])
            times, host = interleave(clock, variants, plan.seconds)
    except Exception as error:
        _give_up_if_broken(clock, error)
        return _record(case, Outcome(chosen, "error", f"{type(error).__name__}: {_head(error)}"))
    floor = limits.floor_us(chosen.dtype, chosen.bytes, chosen.flops, True) if limits else 0.0
    record = _record(case, Outcome(chosen, "timed", "", backend, times, floor))
    record["host_us"] = {name: float(f"{us:.4g}") for name, us in host.items()}
    if known:
        record["class"] = known
    if failed:
        record["failed"] = failed
    return record


def _class(op: str, ours: Variant) -> dict | None:
    """Under which names the chooser's table knows this call, and who can run it in its order."""
    with _registry.unmeasured(again=True) as met:
        ours.call()
    for verdict in met:  # an operator may ask others
        if verdict.stem == op:
            facts = _registry.fact_text(verdict.dtype, verdict.facts)
            return {"facts": facts, "sizes": verdict.sizes, "able": list(verdict.able)}
    return None


def build(case: Case, device: str) -> Work:
    """The case's inputs and functions on a device."""
    with torch.device(device):
        return driver.build(case, 0)


def _record(case: GpuCase, outcome: Outcome) -> dict:
    return {**outcome.record(), "id": case.id, "line": line(outcome)}


def _backends(op: str, device: str) -> list[str]:
    return [name for name in ops.implementations(op, device) if name != "reference"]


def _wrong(case: Case, work: Work, device: str) -> str:
    """The errors over their budget of every backend that can run the case."""
    found = []
    for name in _backends(case.op, device):
        with ops.use_backend(name):
            try:
                problems = driver.problems(case, work)
            except RuntimeError as error:
                if "is forced but cannot run" in str(error):
                    continue
                raise
        if problems:
            found.append(f"{name}: {problems}")
    return "; ".join(found)


def _variants(
    case: GpuCase, chosen: Case, work: Work, clock: Clock, plan: Plan, slow: bool
) -> tuple[dict[str, Variant], dict[str, str]]:
    """What is timed, and why the others are not."""
    calls = {"ours": (work.ours, None), "eager": (work.eager, None)}
    others = _backends(case.case.op, plan.device)
    calls |= {name: (work.ours, name) for name in others if len(others) > 1}
    peers = dict(work.peers)
    if plan.device == "cuda":
        peers |= case.peers(work)
    if slow and case.slow_peers is not None:
        torch._dynamo.reset()
        peers |= case.slow_peers(work) if plan.device == "cuda" else {}
        peers["compile"] = torch.compile(work.eager, dynamic=False)
    calls |= {name: (peer, None) for name, peer in peers.items()}
    variants, failed = {}, {}
    for name, (call, backend) in calls.items():
        own = work  # Liger writes over its arguments
        if name == "liger":
            own = Work(tuple(x.clone() for x in work.inputs), work.ours, work.eager, work.oracle)
        variant = Variant(driver.thunk(chosen, own, call), backend)
        try:
            with ops.use_backend(backend) if backend else contextlib.nullcontext():
                with torch.set_grad_enabled(chosen.backward):
                    variant.call()
                clock.synchronize()
        except Exception as error:
            if name in ("ours", "eager"):
                raise
            _give_up_if_broken(clock, error)
            failed[name] = f"{type(error).__name__}: {_head(error)}"
        else:
            variants[name] = variant
    return variants, failed


def _give_up_if_broken(clock: Clock, error: Exception) -> None:
    """After an illegal access a process can do nothing more on its GPU: a new one goes on."""
    try:
        clock.synchronize()
    except Exception:
        print(f"the GPU refuses further work after: {_head(error)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        signal.raise_signal(signal.SIGKILL)


def _head(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def probe(clock: Clock, device: str) -> Limits:
    """Copy bandwidth, bytes read and written, and the matrix peaks: the best of many tries."""
    big = 2**28 if device == "cuda" else 2**22
    source, target = (torch.ones(big, device=device) for _ in range(2))
    seconds = min(clock.elapsed([lambda: target.copy_(source)] * 12, 1e-4)[2:])
    bandwidth = 2 * source.numel() * source.element_size() / seconds * 1e-9
    gflops = {}
    for name, dtype, size in (("fp32", torch.float32, 4096), ("bf16", torch.bfloat16, 8192)):
        n = size if device == "cuda" else 256
        x, y = (torch.randn(n, n, device=device).to(dtype) for _ in "xy")
        best = min(clock.elapsed([lambda x=x, y=y: x @ y] * 12, 1e-4)[2:])
        gflops[name] = 2 * n**3 / best * 1e-9
    return Limits([("memory", 2**62, bandwidth)], gflops)


def facts(device: str, commit: str | None) -> dict:
    """What the figures were measured on and with."""
    described = machine.machine()
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        described |= {
            "gpu": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
            "gpu_l2": gpu.L2_cache_size,
        }
    versions = machine.versions() | {
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()) if device == "cuda" else "",
    }
    for package in ("triton", "liger_kernel"):
        if importlib.util.find_spec(package):
            versions[package] = importlib.metadata.version(package)
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "kind": "gpu",
        "date": now.isoformat(timespec="seconds"),
        "commit": commit or machine.commit(),
        "machine": described,
        "versions": versions,
        "backends": {stem: _backends(stem, device) for stem in cases.OPS},
    }


def once(chosen: Sequence[GpuCase], plan: Plan, backend: str) -> int:
    """Runs small cases a single time on one backend, untimed: for compute-sanitizer."""
    for case in chosen:
        if backend not in _backends(case.case.op, plan.device):
            continue
        work = build(case.small, plan.device)
        try:
            with ops.use_backend(backend), torch.set_grad_enabled(case.small.backward):
                driver.thunk(case.small, work, work.ours)()
        except RuntimeError as error:
            if "is forced but cannot run" not in str(error):
                raise
            print(f"{case.small.id}: {_head(error)}", flush=True)
            continue
        if plan.device == "cuda":
            torch.cuda.synchronize()
        print(f"ran {case.small.id} on {backend}", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases in two rounds, the second with the peers that have to be compiled."""
    args = _arguments(argv)
    plan = Plan(args.device, args.small, args.seconds)
    if args.limit:
        plan.until = time.monotonic() + args.limit
    if plan.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: PyTorch sees no GPU here", file=sys.stderr)
        return 3
    chosen = [c for c in gpu_cases.load(args.op or cases.OPS) if args.filter in c.id]
    if not chosen:
        print(f"benchmarks.gpu: no case matches {args.filter!r}", file=sys.stderr)
        return 2
    if args.once:
        return once(chosen, plan, args.once)
    clock = clock_of(plan.device)
    run = resume(args.out, facts(plan.device, args.commit))
    if "limits" not in run.facts:
        run.facts["limits"] = asdict(probe(clock, plan.device))
    limits = Limits(**run.facts["limits"])
    run.write()
    name, _, gbs = limits.bandwidth[0]
    peaks = ", ".join(f"{dtype} {peak / 1e3:.1f} TFLOP/s" for dtype, peak in limits.gflops.items())
    print(f"reached by PyTorch here: {name} {gbs:.0f} GB/s; {peaks}", flush=True)
    for slow in (False, True):
        for case in chosen:
            _turn(case, run, clock, limits, plan, slow)
    left = sum(case.id not in run.records for case in chosen)
    if left:
        print(f"{left} cases were not reached in time")
    bad = [r for r in run.records.values() if r["status"] in ("wrong", "error", "died")]
    return 1 if bad else 0


def _turn(case: GpuCase, run: Run, clock: Clock, limits: Limits, plan: Plan, slow: bool) -> None:
    record = run.records.get(case.id)
    if slow and (case.slow_peers is None or not record or record["status"] != "timed"):
        return
    key = case.id + (SLOW if slow else "")
    if (record if not slow else "slow_note" in (record or {})) or time.monotonic() > plan.until:
        return
    run.begin(key)
    if hasattr(signal, "alarm"):
        signal.alarm(LONGEST)  # ends the process even where a kernel hangs; another goes on
    made = run_case(case, clock, limits, plan, slow)
    if hasattr(signal, "alarm"):
        signal.alarm(0)
    if slow and made["status"] != "timed":  # the first round's figures stand
        made = {**(record or {}), "slow_note": f"{made['status']}: {made.get('note', '')}"}
    elif slow:
        made["slow_note"] = ""
    run.end(case.id, made)
    print(made["line"], flush=True)
    for name, why in made.get("failed", {}).items():
        print(f"    {name} cannot: {why[:160]}", flush=True)
    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu-results/bench.json"), help="the result file")
    add("--op", action="append", choices=cases.OPS, help="only this operator (repeatable)")
    add("--filter", default="", help="only cases whose id contains this text")
    add("--seconds", type=float, default=0.4, help="timing per case (default 0.4)")
    add("--limit", type=float, help="start no case after this many seconds")
    add("--small", action="store_true", help="the small siblings of the cases")
    add("--once", metavar="BACKEND", help="run the small cases once on this backend, untimed")
    add("--commit", help="what to record where this is no git checkout")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this file out")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
