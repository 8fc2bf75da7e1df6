"""The result files: one JSON per run, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

FORMAT = 1
FOLDER = Path(__file__).resolve().parent / "results"


def write(path: Path, content: Mapping[str, object]) -> None:
    """Writes a result, whole or not at all."""
    write_text(path, json.dumps({"format": FORMAT, **content}, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text, whole or not at all."""
    write_with(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file written beside the target, then renames: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path) -> dict:
    """Reads a result file; raises ValueError for one that is no such file or of another format."""
    try:
        content = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: expected a result file of format {FORMAT}, got {found!r}")
    return content
