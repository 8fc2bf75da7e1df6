"""What a run says: a JSONL file, a line on the terminal, a small curve."""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from fastlm import ops
from fastlm.train.checkpoint import write_text

Record = dict[str, Any]
Callback = Callable[[Record], None]
_BARS = "▁▂▃▄▅▆▇█"


class RunLog:
    """Writes a run's records as lines of JSON and shows them.

    Args:
        path: of the JSONL file, None for none. A resumed run's file loses what it says of steps
            after `step`, which are made again.
        step: where the run stands.
        show: whether to write to standard error: one line that is overwritten on a terminal, else a
            line for every record.
        callbacks: called with every record.
    """

    def __init__(
        self,
        path: Path | None,
        step: int = 0,
        *,
        show: bool = True,
        callbacks: Sequence[Callback] = (),
        stream: IO[str] | None = None,
    ) -> None:
        self._stream = stream or sys.stderr
        self._show, self._callbacks = show, callbacks
        self._live = show and self._stream.isatty()
        self._file: IO[str] | None = None
        self.records: list[Record] = []
        if path is not None:
            if step and path.exists():
                self.records = [r for r in read_log(path) if r["step"] <= step]
            write_text(path, "".join(json.dumps(r) + "\n" for r in self.records))
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def add(self, record: Record) -> None:
        """One record; a NaN becomes null, which JSON knows."""
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self.records.append(clean)
        if self._file is not None:
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        if self._show:
            self._line(clean)
        for callback in self._callbacks:
            callback(clean)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._show:
            print(f"\r\033[K{text}" if self._live else text, file=self._stream, flush=True)

    def end(self, picture: Path | None) -> None:
        """The curve, and the picture where a path is given and matplotlib is there."""
        curve = self.curve()
        if curve:
            self.say(f"loss\n{curve}")
        if picture is None:
            return
        try:
            from fastlm.train.log_plot import plot

            plot(self.records, picture)
        except ModuleNotFoundError as error:
            self.say(f"no plot: {error.name} is not installed (pip install 'fastlm[demo]')")
        except Exception as error:  # a picture is not worth a run
            self.say(f"no plot: {error}")

    def close(self) -> None:
        """After the last record."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def curve(self, key: str = "loss", width: int = 60, height: int = 8) -> str:
        """The records' losses as a picture of characters; empty below two of them."""
        points = [(r["step"], r[key]) for r in self.records if r.get(key) is not None]
        if len(points) < 2:
            return ""
        values = _bins([v for _, v in points], width)
        low, high = min(values), max(values)
        levels = [_level(v, low, high, height * 8) for v in values]
        lines = []
        for row in reversed(range(height)):
            cells = "".join(_cell(level - 8 * row) for level in levels)
            label = {height - 1: high, 0: low}.get(row)
            lines.append(f"{'' if label is None else format(label, '.3f'):>8} ┤{cells}")
        first, last = str(points[0][0]), str(points[-1][0])
        lines.append(f"{'':>8} └{'─' * len(values)}")
        lines.append(f"{'':>10}{first} {last:>{max(len(values) - len(first) - 1, 0)}} steps")
        return "\n".join(lines)

    def _line(self, record: Record) -> None:
        if "validation" in record:
            best = ", the best so far" if record.get("best") else ""
            self.say(f"step {record['step']}: validation loss {_shown(record['validation'])}{best}")
            return
        parts = [f"step {record['step']}/{record['steps']}", f"loss {_shown(record['loss'])}"]
        parts.append(f"lr {record['lr']:.2e}")
        if record.get("grad_norm") is not None:
            parts.append(f"norm {record['grad_norm']:.2f}")
        parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
        if record.get("peak_share") is not None:
            parts.append(f"{record['peak_share']:.0%} of peak")
        parts.append(f"{duration(record['left_s'])} left")
        text = "  ".join(parts)
        if not self._live:
            print(text, file=self._stream, flush=True)
            return
        room = shutil.get_terminal_size().columns - 1
        recent = [r["loss"] for r in self.records if r.get("loss") is not None]
        bars = sparkline(recent, min(24, max(0, room - len(text) - 2)))
        print(f"\r\033[K{(text + '  ' + bars)[:room]}", end="", file=self._stream, flush=True)


def read_log(path: Path) -> list[Record]:
    """The records of a log; a last line that a killed process left half written is passed over."""
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is no JSON: {line[:60]!r}") from error
    return records


def sparkline(values: Sequence[float], width: int) -> str:
    """The newest values as bars."""
    if width <= 0 or not values:
        return ""
    shown = _bins(values, width)
    low, high = min(shown), max(shown)
    return "".join(_BARS[_level(v, low, high, 8) - 1] for v in shown)


def duration(seconds: float) -> str:
    """Like 1h02m, 3m20s, 7s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 60}m{whole % 60:02}s" if whole >= 60 else f"{whole}s"


def flops_per_token(model: torch.nn.Module, block: int) -> float | None:
    """Arithmetic of a training step per token of a Decoder; None where the shape is not known.

    Two operations per weight of a matrix forward and two for the gradient of its input, two more
    where it is trained itself; attention to half of `block` keys on average.
    """
    c = getattr(model, "config", None)
    if c is None or not hasattr(c, "layers"):
        return None
    total = 0.0
    for name, parameter in model.named_parameters():
        looked_up = name == "positions.weight" or (name == "embed.weight" and not c.tied_head)
        if parameter.dim() == 2 and not looked_up:
            total += (6.0 if parameter.requires_grad else 4.0) * parameter.numel()
    keys = min(block, c.window or block) / 2
    return total + 3 * 4.0 * c.layers * c.heads * c.head_dim * keys


@functools.cache
def machine_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this machine's matrix products, fastlm's and PyTorch's, at their best moment.

    Takes some 0.2 s.
    """
    side = 1024 if device.type == "cpu" else 8192
    if device.type == "cpu" and dtype == torch.float16:  # no processor's favourite
        side = 256
    x = torch.ones(side, side, dtype=dtype, device=device)
    times: list[float] = []
    with torch.no_grad():
        ops.linear(x, x)
        while sum(times) < 0.2:
            start = time.perf_counter()
            ops.linear(x, x) if len(times) % 2 else x @ x
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    best = min(times)
    return 2.0 * side**3 / best


def _bins(values: Sequence[float], width: int) -> list[float]:
    """At most `width` means of neighbours."""
    if len(values) <= width:
        return list(values)
    edges = [len(values) * i // width for i in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges) if b > a]


def _level(value: float, low: float, high: float, levels: int) -> int:
    """1 to `levels`."""
    return 1 + round((value - low) / (high - low) * (levels - 1)) if high > low else 1


def _cell(level: int) -> str:
    return " " if level <= 0 else _BARS[min(level, 8) - 1]


def _shown(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4f}"
