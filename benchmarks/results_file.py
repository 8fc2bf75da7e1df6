"""The result files: one JSON per run, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

FORMAT = 1
FOLDER = Path(__file__).resolve().parent / "results"


def write(path: Path, content: Mapping[str, object]) -> None:
    """Writes a result, whole or not at all."""
    write_text(path, json.dumps({"format": FORMAT, **content}, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes beside the target, then renames: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
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
