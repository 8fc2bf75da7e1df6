"""Times several functions against each other on a machine that others may use too.

Functions take turns, so that a slow minute falls on all of them; a sample is one burst of calls;
the figure is the median of the samples. On Linux a sample is dropped during which the process's
threads waited for a processor for more than 4 % of the time, or a virtual machine's host took one
away.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Thunk = Callable[[], object]

BURST = 0.004  # seconds a sample lasts at least
WAITED = 0.04  # share of a sample spent waiting that spoils it
LEAST = 5  # clean samples wanted of each function
FEW = 2  # samples of one whose call takes longer than SLOW: PyTorch's emulated bf16 takes minutes
SLOW = 2.0  # seconds
LONG = 0.05  # seconds of one call from which on the pool's threads need no call to wake them
ALONE = 0  # calls of a burst that is one long call


@dataclass(frozen=True)
class Times:
    """Microseconds per call."""

    median: float
    p25: float
    p75: float
    least: float
    samples: int
    disturbed: int  # further samples, dropped because others had the processor

    @property
    def spread(self) -> float:
        """Half of the distance between the quartiles, as a share of the median."""
        return (self.p75 - self.p25) / 2 / self.median

    @staticmethod
    def of(samples: Sequence[float], disturbed: int = 0) -> Times:
        """From seconds per call."""
        us = sorted(1e6 * s for s in samples)
        p25, median, p75 = statistics.quantiles(us, n=4) if len(us) > 1 else us * 3
        return Times(median, p25, p75, us[0], len(us), disturbed)


def interleave(
    variants: Mapping[str, Sequence[Thunk]],
    seconds: float,
    *,
    realtime: bool = False,
    within: Callable[[str], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> dict[str, Times]:
    """Times each variant; the thunks of a variant are called in rotation.

    Runs for about `seconds`, up to twice that while too many samples are disturbed.
    `realtime` raises the threads' priority during a sample (needs the right to do so). `within`
    makes the context that a variant, by its name, is called in.
    """
    turns = {name: itertools.cycle(thunks) for name, thunks in variants.items()}
    calls, least = {}, {}
    for name in variants:
        with within(name):
            calls[name], least[name] = _calibrate(turns[name], len(variants[name]), realtime)
    clean: dict[str, list[float]] = {name: [] for name in variants}
    spoilt: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    names = list(variants)
    start = time.perf_counter()
    with _no_collection():
        for turn in itertools.count():
            for name in names if turn % 2 == 0 else reversed(names):
                if least[name] == FEW <= turn:
                    continue
                with within(name):
                    wall, waited = _sample(turns[name], calls[name], realtime)
                each = wall / max(calls[name], 1)
                if waited > WAITED * wall:
                    spoilt[name].append((waited / wall, each))
                else:
                    clean[name].append(each)
            spent = time.perf_counter() - start
            enough = all(len(clean[name]) >= least[name] for name in names if least[name] != FEW)
            if (spent > seconds and enough) or (spent > 2 * seconds and turn + 1 >= LEAST):
                break
    return {name: _times(clean[name], spoilt[name], least[name]) for name in names}


def _times(clean: list[float], spoilt: list[tuple[float, float]], least: int) -> Times:
    if len(clean) < least:  # the least disturbed of the others fill up
        clean = clean + [s for _, s in sorted(spoilt)[: least - len(clean)]]
    return Times.of(clean, len(spoilt))


def _calibrate(turn: Iterator[Thunk], rotation: int, realtime: bool) -> tuple[int, int]:
    """How many calls fill a burst, or ALONE, and how many bursts are wanted.

    Every thunk has run once when it returns.
    """
    for thunk in itertools.islice(turn, rotation):
        start = time.perf_counter()
        thunk()
    if time.perf_counter() - start > SLOW:
        return ALONE, FEW
    start = time.perf_counter()
    next(turn)()
    if time.perf_counter() - start > LONG:
        return ALONE, LEAST
    calls = 1
    while True:
        spent, _ = _sample(turn, calls, realtime)
        if spent >= BURST / 2:
            return max(1, round(calls * BURST / spent)), LEAST
        calls *= 2


def _sample(turn: Iterator[Thunk], calls: int, realtime: bool) -> tuple[float, float]:
    """(seconds, seconds of it spent waiting for a processor) of some calls."""
    wake, *burst = itertools.islice(turn, 1 + calls) if calls != ALONE else (None, next(turn))
    with raised(realtime):
        if wake is not None:
            wake()  # the threads of the pool
        before, start = _waited() + _stolen(), time.perf_counter()
        for thunk in burst:
            thunk()
        wall = time.perf_counter() - start
        return wall, _waited() + _stolen() - before


@contextlib.contextmanager
def raised(realtime: bool) -> Iterator[None]:
    """Lets the process's threads run before others' inside the block, then makes room for those."""
    if not realtime:
        yield
        return
    time.sleep(0.001)
    start = time.perf_counter()
    _priority(os.SCHED_RR)
    try:
        yield
    finally:
        _priority(os.SCHED_OTHER)
        time.sleep(min(0.5, 0.6 * (time.perf_counter() - start)))


def _waited() -> float:
    """Seconds that this process's threads were runnable but not running, so far."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError):
            total += int(task.read_text().split()[1])
    return total * 1e-9


def _stolen() -> float:
    """Seconds, in steps of 10 ms, for which the host ran something else on our processors."""
    with contextlib.suppress(OSError, IndexError, ValueError), open("/proc/stat") as file:
        return int(file.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _priority(policy: int) -> None:
    level = os.sched_param(int(policy == os.SCHED_RR))
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setscheduler(int(task), policy, level)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
