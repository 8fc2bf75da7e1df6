"""What commands read and write: errors name the line, files appear whole or not at all."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click


@contextmanager
def written(path: str | os.PathLike[str], binary: bool = False) -> Iterator[IO[Any]]:
    """A file that takes its name when all is written; after an error the old one stays."""
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise click.ClickException(f"{target}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb" if binary else "w", **({} if binary else _UTF8)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        os.chmod(name, mode)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


_UTF8: dict[str, Any] = {"encoding": "utf-8", "newline": "\n"}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_text(path: str | os.PathLike[str]) -> str:
    """A file's text; an error names it."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise click.ClickException(f"{path}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise click.ClickException(f"{path}: cannot be read: {error.strerror}") from error


def read_stdin() -> str:
    """The standard input without the line end."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise click.ClickException(f"standard input: not UTF-8 at byte {error.start}") from error


def read_prompts(path: str, any_columns: bool = False) -> list[dict[str, Any]]:
    """One row a line: {"prompt": line} of a text file, the objects of a .jsonl file.

    The objects must have a "prompt" or "messages", or with `any_columns` may have any.
    """
    lines = read_text(path).split("\n")
    if lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise click.ClickException(f"{path}: no prompts in it")
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        line = line.removesuffix("\r")
        if not line.strip():
            raise click.ClickException(f"{where}: empty; a prompt was expected")
        objects = path.endswith((".jsonl", ".ndjson"))
        rows.append(_row(where, line, any_columns) if objects else {"prompt": line})
    return rows


def _row(where: str, line: str, any_columns: bool) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise click.ClickException(f"{where}: not JSON: {error.msg}") from error
    if any_columns and isinstance(row, dict):
        return row
    kinds = [("prompt", str), ("messages", list)]
    given = [key for key, kind in kinds if isinstance(row, dict) and isinstance(row.get(key), kind)]
    if len(given) != 1 or not row[given[0]]:
        raise click.ClickException(
            f'{where}: expected an object with "prompt" (text) or "messages" (a list)'
        )
    return dict(row)


def write(text: str) -> None:
    """Prints without a line end, whatever the terminal's encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(text.encode(encoding, "replace").decode(encoding), nl=False)
    sys.stdout.flush()
