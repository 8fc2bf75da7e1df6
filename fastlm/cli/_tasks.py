"""--task of `fastlm generate`: a task's template around the prompt, its settings as defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fastlm.tasks import Task


def columns(given: Sequence[str]) -> dict[str, str]:
    """{"NAME": "VALUE"} of NAME=VALUE."""
    pairs = [entry.partition("=") for entry in given]
    if bad := [name for name, equals, _ in pairs if not equals or not name]:
        raise click.UsageError(f"--set must be NAME=VALUE, got {bad[0]!r}")
    return {name: value for name, _, value in pairs}


def fill(task: Task, row: Mapping[str, Any], where: str) -> str:
    """The prompt of a row; a text without columns is called both text and prompt.

    Raises:
        ValueError: a row with none of the columns that the task's template names.
    """
    from jinja2 import Environment, meta

    values = {"text": row["prompt"], **row} if set(row) == {"prompt"} else dict(row)
    named = meta.find_undeclared_variables(Environment().parse(task.prompt))
    if named and not named & values.keys():
        raise ValueError(
            f"{where}task {task.name} names the columns {', '.join(sorted(named))}, got"
            f" {', '.join(sorted(values))} (give them with --set or in a .jsonl file)"
        )
    return task.fill_prompt(values)


def defaults(task: Task, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with the task's settings where the command line gave none."""
    context = click.get_current_context()
    settings = {"max_new_tokens": task.max_new_tokens, **task.options}
    unset = click.core.ParameterSource.DEFAULT
    return options | {
        name: value
        for name, value in settings.items()
        if name in options and context.get_parameter_source(name) == unset
    }
