"""The options of every command that reads text: how files become documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

_OPTIONS = [
    click.option("--separator", help=r"Between documents of a text file, as '\n\n' or a mark."),
    click.option("--text-field", default="text", show_default=True, help="Of JSON lines."),
    click.option("--include", multiple=True, help="File names in folders and .zip, as '*.txt'."),
    click.option("--encoding", default="utf-8", show_default=True, help="Of the files."),
    click.option(
        "--errors",
        type=click.Choice(["strict", "replace"]),
        default="strict",
        show_default=True,
        help="Refuse bytes that are not text, or replace them.",
    ),
    click.option(
        "--normalize",
        type=click.Choice(["nfc", "nfkc", "none"]),
        default="nfc",
        show_default=True,
        help="Unicode normal form.",
    ),
    click.option("--lowercase", is_flag=True, help="Turn capitals into small letters."),
]
READING = ("separator", "text_field", "include", "encoding", "errors")


def reads_text(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of reading and cleaning to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options for `Reading` and the others; \\n and \\t in a separator become characters."""
    reading = {name: options.pop(name) for name in READING}
    if reading["separator"] is not None:
        for letters, character in (("\\n", "\n"), ("\\t", "\t")):
            reading["separator"] = reading["separator"].replace(letters, character)
    return reading, options
