"""One variant in a process of its own, doing one task at a time when asked.

    python -m benchmarks.models.worker VARIANT DTYPE FOLDER

Tasks come as JSON lines on standard input, answers go as JSON lines to standard output. A process
per variant makes its peak memory its own; as only one of them works at a time, the variants can
take turns and so share the machine's better and worse moments.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..machine import ROOT


class Worker:
    """The parent's end of a worker process."""

    def __init__(self, variant: str, dtype: str, folder: Path) -> None:
        self.variant = variant
        command = [sys.executable, "-m", f"{__package__}.worker", variant, dtype, str(folder)]
        checkout = [] if __package__.startswith("fastlm.") else [str(ROOT)]
        paths = [*checkout, os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )

    def ready(self) -> None:
        """Waits until the model is loaded."""
        self._answer()

    def ask(self, task: str, **arguments: Any) -> Any:
        """Runs a task and returns its answer; RuntimeError with what the worker said if it died."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        _, said = self.process.communicate()
        code = self.process.returncode
        why = "killed, most likely for want of memory" if code == -9 else f"exit status {code}"
        raise RuntimeError(f"the {self.variant} model's process ended ({why}):\n{said[-2000:]}")

    def close(self) -> None:
        """Ends the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def peak_memory(reset: bool = False) -> int:
    """The largest resident size of this process so far, in bytes; on Linux since the last reset."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return 0
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size if sys.platform == "darwin" else size * 1024


def _serve(variant: str, dtype: str, folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed must not mix with the answers

    import torch

    from ..case import DTYPES
    from ..timing import raised
    from . import variants

    def answer(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    made = variants.load(variant, Path(folder), DTYPES[dtype])
    peak_memory(reset=True)
    answer("ready")
    for line in sys.stdin:
        task = json.loads(line)
        with raised(task.get("realtime", False)):
            if task["task"] == "generate":
                result: object = made.generate(task["prompt"], task["count"])
            elif task["task"] == "start_training":
                result = made.start_training()
            elif task["task"] == "train":
                result = made.train(torch.tensor(task["tokens"]))
            else:
                result = peak_memory()
        answer(result)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
