"""One line on the terminal that says how far long work has come."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType


class Progress:
    """Called as progress(stage, done, total); removes its line at the end.

    Where standard error is no terminal it prints a plain line each half minute instead.
    """

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._pause = 0.2 if self._terminal else 30.0
        self._stage, self._start, self._next = "", 0.0, 0.0
        self._drawn = False

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._start = stage, now
            self._next = now + (0 if self._terminal else self._pause)
        if now < self._next:
            return
        self._next = now + self._pause
        share = min(done / total, 1.0) if total else 1.0
        spent = now - self._start
        left = f", {spent / share - spent:.0f} s left" if share > 0 and spent > 2 else ""
        line = f"{stage}: {share:4.0%}{left}"
        if not self._terminal:
            return print(line, file=sys.stderr, flush=True)
        width = shutil.get_terminal_size().columns
        print(f"\r{line[: width - 1]:<{min(width - 1, 60)}}", end="", file=sys.stderr, flush=True)
        self._drawn = True

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
