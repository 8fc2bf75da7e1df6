"""Times functions on a GPU: what the device takes, with a cold L2, and what the host takes.

Before each sample the L2 cache is overwritten and the device kept busy for longer than the host
needs to queue the call, so that the events around it see kernels and the gaps between them alone.
The host's time is taken apart from it, with nothing to wait for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.timing import Thunk, Times
from fastlm.ops import use_backend

SAMPLES = 3  # of one variant before the next has its turn
LEAST = 6  # samples of each variant
MOST = 120


@dataclass(frozen=True)
class Variant:
    """One implementation: a call ready to be timed, and the backend to force, if any."""

    call: Thunk
    backend: str | None = None


class GpuClock:
    """Events on the current stream."""

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(4 * size, 2**26), dtype=torch.int8, device="cuda")
        self._cycles = 1e9  # per second
        self._cycles = 1e7 / self.elapsed([lambda: torch.cuda._sleep(10_000_000)] * 3, 0.0)[-1]

    def synchronize(self) -> None:
        """Waits for the device; raises what a kernel did wrong."""
        torch.cuda.synchronize()

    def elapsed(self, calls: list[Thunk], lead: float) -> list[float]:
        """Seconds on the device of each call; `lead`: seconds the host needs to queue one."""
        pairs = []
        for call in calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            torch.cuda._sleep(int(lead * self._cycles))
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in pairs]


class HostClock:
    """The same on a CPU, to try the benchmarks out without a GPU."""

    def synchronize(self) -> None:
        """Nothing runs on."""

    def elapsed(self, calls: list[Thunk], lead: float) -> list[float]:
        """Seconds of each call."""
        seconds = []
        for call in calls:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds


Clock = GpuClock | HostClock


def clock_of(device: str) -> Clock:
    """The clock of "cuda" or "cpu"."""
    return GpuClock() if device == "cuda" else HostClock()


def interleave(
    clock: Clock, variants: Mapping[str, Variant], seconds: float
) -> tuple[dict[str, Times], dict[str, float]]:
    """(device times, host microseconds of a call) of each variant, timed in turns for `seconds`."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    host = {}
    for name, variant in variants.items():
        with _forced(variant):
            host[name] = _host(clock, variant.call)
    start = time.perf_counter()
    names = list(variants)
    for turn in range(MOST // SAMPLES):
        for name in names if turn % 2 == 0 else reversed(names):
            call, lead = variants[name].call, min(2 * host[name] + 50e-6, 0.02)
            with _forced(variants[name]):
                call()  # the chooser's verdict, and the device awake
                samples[name] += clock.elapsed([call] * SAMPLES, lead)
        if time.perf_counter() - start > seconds and len(samples[names[0]]) >= LEAST:
            break
    return {n: Times.of(s) for n, s in samples.items()}, {n: 1e6 * s for n, s in host.items()}


def _forced(variant: Variant) -> contextlib.AbstractContextManager[None]:
    return use_backend(variant.backend) if variant.backend else contextlib.nullcontext()


def _host(clock: Clock, call: Thunk, bursts: int = 3, calls: int = 8) -> float:
    """Seconds until a call returns, its kernels queued; the least of some bursts."""
    call()
    clock.synchronize()
    start = time.perf_counter()
    call()
    clock.synchronize()
    if time.perf_counter() - start > 0.02:  # the queue would fill, or the budget
        bursts, calls = 1, 2
    best = float("inf")
    for _ in range(bursts):
        clock.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    clock.synchronize()
    return best
