"""Applications as data: each .json file here is a task, a template and its metrics.

{
  "description": "...",
  "kind": "choice",                    "choice", "generate", "loss" or "last_word"
  "prompt": "Review: {{ text }}\\nSentiment:",        Jinja over a row's columns
  "completion": "{{ label }}",         what the model is to say
  "references": "{{ answers | tojson }}",             all that counts as right (optional)
  "choices": ["negative", "positive"], templates, or the name of a column that holds a list
  "gold": "{{ label }}",               the right choice: its number or its text
  "separator": " ",                    between prompt and completion without a chat template
  "metrics": ["exact_match", "f1"],    see fastlm.train.evaluate_metrics
  "max_new_tokens": 32, "stop": ["\\n"],              for "generate"
  "data": {"format": ..., "columns": [...], "labels": {...}}   see fastlm.data.rows.read
}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from fastlm.data import rows as data_rows
from fastlm.data.rows import Row
from fastlm.data.template import fill

KINDS = ("choice", "generate", "loss", "last_word")


class TaskError(ValueError):
    """A task that is not known or not well-formed."""


@dataclass(frozen=True)
class Task:
    """A template and a metric; the fields are the keys of its file, see the module."""

    name: str
    kind: str
    prompt: str = ""
    completion: str = ""
    description: str = ""
    references: str | None = None
    choices: Sequence[str] | str = ()
    gold: str = ""
    separator: str = " "
    metrics: Sequence[str] = ()
    max_new_tokens: int = 128
    stop: Sequence[str] = ()
    chat: bool = True  # False: never through a chat template
    options: Mapping[str, Any] = field(default_factory=dict)  # of `fastlm generate`
    data: Mapping[str, Any] = field(default_factory=dict)

    def read(self, path: str | Path) -> Iterator[Row]:
        """The (where, row) pairs of a file of raw data; JSONL and JSON need no description."""
        options = dict(self.data)
        plain = Path(path).suffix.lower() in (".jsonl", ".ndjson", ".json")
        kind = None if plain else options.pop("format", None)
        options.pop("format", None)
        return data_rows.read(path, kind, **options)

    def fill_prompt(self, row: Mapping[str, Any]) -> str:
        """The prompt for a row."""
        return fill(self.prompt, row)

    def example(self, row: Mapping[str, Any], *, plain: bool) -> dict[str, str]:
        """The row {"prompt", "completion"} to learn from (`fastlm.data.chat`).

        Args:
            row: of the raw data.
            plain: whether prompt and completion are joined without a chat template.
        """
        completion = fill(self.completion, row)
        return {
            "prompt": self.fill_prompt(row),
            "completion": self.separator + completion if plain else completion,
        }

    def options_of(self, row: Mapping[str, Any]) -> list[str]:
        """The texts to choose from."""
        if isinstance(self.choices, str):
            values = row.get(self.choices)
            if isinstance(values, Mapping):  # as in ARC: {"text": [...], "label": [...]}
                values = values.get("text")
            if not isinstance(values, list) or not values:
                raise TaskError(f"task {self.name}: no list in the column {self.choices!r}")
            return [str(value) for value in values]
        return [fill(choice, row) for choice in self.choices]

    def right(self, row: Mapping[str, Any]) -> int:
        """The number of the right choice."""
        gold, choices = fill(self.gold, row).strip(), self.options_of(row)
        if gold in choices:
            return choices.index(gold)
        if gold.isdecimal() and int(gold) < len(choices):
            return int(gold)
        raise TaskError(
            f"task {self.name}: gold must be one of {', '.join(choices)} or a number below"
            f" {len(choices)}, got {gold!r}"
        )

    def right_texts(self, row: Mapping[str, Any]) -> list[str]:
        """All that counts as a right answer."""
        if self.references is None:
            return [fill(self.completion, row)]
        values = json.loads(fill(self.references, row))
        return [str(value) for value in values]


def names() -> list[str]:
    """The tasks that come with the package."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def load(name: str | Path) -> Task:
    """A task by name, or from a .json file.

    Raises:
        TaskError: no such task, an unknown key, a value that is not what it must be.
    """
    if str(name).endswith(".json"):
        source: Any = Path(name)
        if not source.is_file():
            raise TaskError(f"{name}: no such task file")
    else:
        if name not in names():
            raise TaskError(f"task must be one of {', '.join(names())}, or a file; got {name!r}")
        source = resources.files(__name__) / f"{name}.json"
    try:
        values = json.loads(source.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise TaskError(f"{name}: not a JSON object: {error}") from error
    known = {f.name for f in fields(Task)} - {"name"}
    if unknown := sorted(set(values) - known):
        raise TaskError(f"{name}: unknown keys {', '.join(unknown)}; known are {sorted(known)}")
    if values.get("kind") not in KINDS:
        raise TaskError(f"{name}: kind must be one of {', '.join(KINDS)}, got {values.get('kind')}")
    from fastlm.train.evaluate_metrics import METRICS

    if bad := [m for m in values.get("metrics", ()) if m not in METRICS]:
        raise TaskError(f"{name}: metrics must be among {', '.join(METRICS)}, got {bad[0]!r}")
    return Task(name=Path(name).stem, **values)


def for_rows(row: Mapping[str, Any], path: str | Path) -> Task:
    """The task that a file of ready questions is for, by its columns."""
    if {"sentence_good", "sentence_bad"} <= set(row):
        return load("blimp")
    if "choices" in row:
        return load("choice")
    if "text" in row:
        return load("last_word")
    columns = ", ".join(row)
    raise TaskError(
        f"{path}: expected the columns query, choices and gold, or sentence_good and sentence_bad,"
        f" or text; got {columns}"
    )
