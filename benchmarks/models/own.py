"""A user's own model: as it is, patched, and in fastlm's decoder where that opens it."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import machine
from . import compare
from .variants import NAMES, TITLES


def measure(path: Path, dtypes: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Prefill, decoding, a training step and memory; the content of a result of kind "demo".

    Args:
        path: a Hugging Face directory or a .gguf file, which is unpacked for transformers.
        dtypes: "fp32", "bf16" or both.
        say: gets lines of progress.

    Raises:
        ValueError, OSError: a checkpoint that transformers or, for .gguf, fastlm cannot open.
        RuntimeError: a variant that failed; the message is what its process said.
    """
    import transformers

    clock, plan = compare.Clock(), compare.Plan()
    with tempfile.TemporaryDirectory() as temporary:
        folder = path
        if path.is_file():
            from fastlm.hf.weights import convert_gguf

            say(f"{clock} unpacking {path.name}")
            folder = Path(temporary) / path.stem
            convert_gguf(path, folder, dtype=torch.float32)
        names = [name for name in NAMES if name != "decoder" or _opens(folder, say)]
        figures = {
            dtype: compare.measure(folder, dtype, plan, lambda text: say(f"{clock} {text}"), names)
            for dtype in dtypes
        }
    titled = {
        dtype: {TITLES[name]: f for name, f in by_variant.items()}
        for dtype, by_variant in figures.items()
    }
    return {
        "kind": "demo",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "model": path.stem if path.is_file() else path.name,
        "machine": machine.machine(),
        "versions": machine.versions() | {"transformers": transformers.__version__},
        "settings": {
            "threads": torch.get_num_threads(),
            "allocator": machine.use_allocator(keep=False),
        },
        "variants": [TITLES[name] for name in names],
        "measures": compare.measures(titled, plan),
    }


def _opens(folder: Path, say: Callable[[str], None]) -> bool:
    """Whether fastlm's decoder opens the checkpoint; says why not."""
    from fastlm.models import Decoder

    try:
        Decoder.from_pretrained(folder)
    except ValueError as error:
        say(f"without fastlm's decoder: {error}")
        return False
    return True
