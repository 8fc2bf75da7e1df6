"""Directories that are written whole or not at all, and JSON files in them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# What weight files are called: those of a model in integers otherwise than those that transformers
# would open, for it would take unknown names for missing weights and fill them with random numbers.
FLOATS, INTEGERS = "model", "quantized"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: the message names the file and what is wrong with it."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write into a fresh directory and moves what it wrote to `path`.

    When `fill` raises, `path` is as it was.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: exists and is no directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        fill(fresh)
        mask = os.umask(0)
        os.umask(mask)
        fresh.chmod(0o777 & ~mask)
        for file in fresh.iterdir():  # safetensors writes for the owner only
            file.chmod(0o666 & ~mask)
        if not path.exists() or not any(path.iterdir()):
            os.replace(fresh, path)
            return
        written = {p.name for p in fresh.iterdir()}
        for name in sorted(written, key=lambda name: (name == "config.json", name)):
            os.replace(fresh / name, path / name)
        # weights of an earlier save under other names would be read in their place
        for stem in (FLOATS, INTEGERS):
            for old in [
                *path.glob(f"{stem}*.safetensors"),
                path / f"{stem}.safetensors.index.json",
            ]:
                if old.name not in written:
                    old.unlink(missing_ok=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
