"""What the figures were measured on, and how fast that can be at most."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import fastlm
from fastlm import _ext, memory

from .timing import raised

ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, object]:
    """The processor, as the operating system describes it, and the instruction set in use."""
    info = _cpuinfo()
    model = info.get("model name") or platform.processor() or platform.machine()
    version = f"{info.get('cpu family', '?')}/{info.get('model', '?')}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model.strip(),
        "family": version,
        "cores": cores,
        "l2": cache_size(2),
        "l3": cache_size(3),
        "memory_gib": round(_memory() / 2**30, 1),
        "isa": _ext.native.cpu_isa() if _ext.native else None,
    }


def slug(facts: dict[str, object]) -> str:
    """A folder name for a machine: amd-epyc-25-17-2c."""
    text = f"{facts['cpu']} {facts['family']} {facts['cores']}c".lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text)).strip("-")


def versions() -> dict[str, str]:
    """What was compared."""
    return {
        "fastlm": fastlm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def commit() -> str:
    """The commit's short hash, with "-dirty" where sources differ; "unknown" outside of git."""
    if not (ROOT / "pyproject.toml").is_file():
        return "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        made = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results", ":!*.md")
        return made + ("-dirty" if changed else "")
    return "unknown"


def use_allocator(keep: bool) -> str:
    """Names the allocator in use, after telling glibc to keep freed memory if asked.

    It is the process's setting, so it is the same for all that is timed in it.
    """
    return memory.keep_freed_memory() if keep else memory.allocator()


def cache_size(level: int) -> int:
    """Bytes of a cache of the given level (of one core, or of the group that shares it)."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with contextlib.suppress(OSError, ValueError):
            if int((index / "level").read_text()) == level:
                text = (index / "size").read_text().strip()
                return int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]]
    return {2: 2**20, 3: 32 * 2**20}[level]


@dataclass(frozen=True)
class Limits:
    """The floors: what PyTorch's best streaming and matrix kernels reached in this run."""

    bandwidth: list[tuple[str, int, float]]  # level, the largest working set in bytes, GB/s
    gflops: dict[str, float]  # by dtype

    def floor_us(self, dtype: str, nbytes: int, flops: int, cold: bool) -> float:
        """Microseconds that moving the bytes or doing the arithmetic takes at least."""
        speeds = [gbs for _, limit, gbs in self.bandwidth if nbytes <= limit and not cold]
        gbs = speeds[0] if speeds else self.bandwidth[-1][2]
        return max(nbytes / gbs, flops / self.gflops[dtype]) * 1e-3


def probe(realtime: bool = False) -> Limits:
    """Measures bandwidth per cache level and the matrix peak per dtype, in about two seconds.

    Cache bandwidth is the time difference between two working sets, so that the cost of the calls
    themselves falls out. A figure is the best of many tries.
    """
    with raised(realtime):
        return _probe()


def _probe() -> Limits:
    l2 = cache_size(2) * torch.get_num_threads()
    l3 = max(cache_size(3), 2 * l2)
    levels = [
        ("L2", l2, _marginal(l2 // 4, l2 * 3 // 4)),
        ("L3", l3, _marginal(l3 // 4, l3 // 2)),
        ("memory", 2**62, _stream(min(max(8 * l3, 2**28), 2**29))),
    ]
    for i in (1, 0):  # a nearer level is never slower
        if not levels[i][2] > levels[i + 1][2]:
            levels[i] = (*levels[i][:2], levels[i + 1][2])
    return Limits(levels, {"fp32": _matmul(torch.float32), "bf16": _matmul(torch.bfloat16)})


def _best(call: Callable[[], object], times: int) -> float:
    call()
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _calls(nbytes: int) -> list[tuple[Callable[[], object], float]]:
    """Streaming calls over a working set, with the bytes each moves."""
    x = torch.zeros(nbytes // 4)
    source, target = torch.zeros(nbytes // 8), torch.zeros(nbytes // 8)
    return [
        (lambda: torch.dot(x, x), nbytes),
        (x.sum, nbytes),
        (lambda: target.copy_(source), nbytes),
    ]


def _stream(nbytes: int) -> float:
    return max(moved / _best(call, 6) for call, moved in _calls(nbytes)) * 1e-9


def _marginal(small: int, large: int) -> float:
    speeds = []
    for (call, few), (more_call, many) in zip(_calls(small), _calls(large), strict=True):
        less, more = (_best(f, 200 if large < 2**22 else 40) for f in (call, more_call))
        if more > less:
            speeds.append((many - few) / (more - less))
    return max(speeds, default=0.0) * 1e-9


def _matmul(dtype: torch.dtype) -> float:
    """The fastest of the products PyTorch offers, in GFLOP/s."""
    n = 1024
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    calls: list[Callable[[], object]] = [
        lambda: a @ b,
        lambda: torch.nn.functional.linear(a, b),
        lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""),
    ]
    best = float("inf")
    for call in calls:
        with contextlib.suppress(RuntimeError, AttributeError, NotImplementedError):
            best = min(best, _best(call, 12))
    return 2 * n**3 / best * 1e-9


def _cpuinfo() -> dict[str, str]:
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
        return {key.strip(): value.strip() for key, value in pairs}
    return {}


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _git(*args: str) -> str:
    run = subprocess.run(
        ["git", *args], cwd=ROOT, check=True, capture_output=True, text=True, timeout=20
    )
    return run.stdout.strip()
