"""Measures the variants of one checkpoint in turns: prefill, decoding, training step, memory."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .variants import NAMES
from .worker import Worker


@dataclass(frozen=True)
class Plan:
    """How much is measured of each variant and dtype."""

    prompt: int = 256  # tokens read before the first new one
    new: int = 48  # tokens generated after them
    rounds: int = 4
    batch: tuple[int, int] = (2, 128)  # sequences x tokens of a training step
    steps: int = 3  # 0: no training
    seconds: float = 50.0  # of a dtype; a slow machine ends with fewer rounds, two and one at least
    realtime: bool = False


WARM = 1, 16  # the first step's batch: a full one can take a minute where bf16 is emulated
QUICK = Plan(prompt=64, new=16, rounds=2, batch=(1, 32), steps=1)


@dataclass
class Figures:
    """What was measured of one variant in one dtype."""

    first: list[float] = field(default_factory=list)  # seconds to the first new token
    between: list[float] = field(default_factory=list)  # seconds between new tokens
    steps: list[float] = field(default_factory=list)  # seconds of a training step
    losses: list[float] = field(default_factory=list)
    peak_generating: int = 0  # bytes
    peak_training: int = 0


def measure(
    folder: Path,
    dtype: str,
    plan: Plan,
    say: Callable[[str], None],
    variants: Sequence[str] = NAMES,
) -> dict[str, Figures]:
    """Runs the plan; `say` gets a line of progress after each round.

    The first round of each kind warms up and is not counted. Peak memory is the resident size of
    the variant's own process, the interpreter and PyTorch included, after loading.
    """
    figures = {name: Figures() for name in variants}
    generator = torch.Generator().manual_seed(0)

    def tokens(*shape: int) -> list:
        return torch.randint(1000, 10000, shape, generator=generator).tolist()

    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(name, dtype, folder)) for name in variants]
        for worker in workers:
            worker.ready()
        start = time.perf_counter()
        for number in range(plan.rounds + 1):
            if number > 2 and time.perf_counter() - start > plan.seconds / 2:
                break
            prompt = tokens(plan.prompt)
            for worker in _turn(workers, number):
                first, between = worker.ask(
                    "generate",
                    prompt=prompt,
                    count=plan.new if number else 4,
                    realtime=plan.realtime,
                )
                if number:
                    figures[worker.variant].first.append(first)
                    figures[worker.variant].between += between
            if number:
                say(f"{dtype} generation {number}/{plan.rounds}: " + _speeds(figures))
        for worker in workers:
            figures[worker.variant].peak_generating = worker.ask("peak")
        if plan.steps:
            for worker in workers:
                worker.ask("start_training")
        for number in range(plan.steps + 1 if plan.steps else 0):
            if number > 1 and time.perf_counter() - start > plan.seconds:
                break
            batch = tokens(*(plan.batch if number else WARM))
            for worker in _turn(workers, number):
                seconds, loss = worker.ask("train", tokens=batch, realtime=plan.realtime)
                figures[worker.variant].losses.append(loss)
                if number:
                    figures[worker.variant].steps.append(seconds)
            if number:
                latest = (f"{name} {f.steps[-1] * 1e3:.0f} ms" for name, f in figures.items())
                say(f"{dtype} training {number}/{plan.steps}: " + ", ".join(latest))
        if plan.steps:
            for worker in workers:
                figures[worker.variant].peak_training = worker.ask("peak")
    return figures


def measures(figures: dict[str, dict[str, Figures]], plan: Plan) -> list[dict]:
    """The table's rows, from figures by dtype and variant."""

    def rows(of: Callable[[Figures], float | None]) -> dict:
        return {
            dtype: {name: of(f) for name, f in by_variant.items()}
            for dtype, by_variant in figures.items()
        }

    sequences, length = plan.batch
    found = [
        {
            "name": f"prefill, {plan.prompt} tokens",
            "unit": "tokens/s",
            "more_is_better": True,
            "values": rows(lambda f: plan.prompt / statistics.median(f.first)),
        },
        {
            "name": f"decoding, {plan.new} tokens",
            "unit": "tokens/s",
            "more_is_better": True,
            "values": rows(lambda f: 1 / statistics.median(f.between)),
        },
        {
            "name": "peak memory, generating",
            "unit": "MiB",
            "more_is_better": False,
            "values": rows(lambda f: f.peak_generating / 2**20),
        },
    ]
    if plan.steps:
        found.insert(
            2,
            {
                "name": f"training step, {sequences}x{length} tokens",
                "unit": "ms",
                "more_is_better": False,
                "values": rows(lambda f: statistics.median(f.steps) * 1e3),
            },
        )
        found.append(
            {
                "name": "peak memory, training",
                "unit": "MiB",
                "more_is_better": False,
                "values": rows(lambda f: f.peak_training / 2**20),
            }
        )
    return found


def _turn(workers: Sequence[Worker], number: int) -> Sequence[Worker]:
    return workers if number % 2 else workers[::-1]


def _speeds(figures: dict[str, Figures]) -> str:
    return ", ".join(
        f"{name} {1 / statistics.median(f.between):.1f} tokens/s" for name, f in figures.items()
    )


class Clock:
    """Seconds since the start, for progress lines."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __str__(self) -> str:
        return f"[{time.perf_counter() - self.start:5.1f} s]"
