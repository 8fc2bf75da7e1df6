"""fastlm eval: how well a model knows a text, or does a task."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastlm._version import __version__
from fastlm.cli._files import written
from fastlm.cli._model import model_options, open_model

if TYPE_CHECKING:
    from fastlm.hf.tokenizer import Text
    from fastlm.models.decoder import Decoder


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="Text file: loss, perplexity and bits per byte. May be given again.",
)
@click.option("--separator", help="What stands between a text's documents, e.g. '<|endoftext|>'.")
@click.option("--window", type=click.IntRange(min=1), help="Tokens read at once.")
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    help="Tokens that a window predicts; by default the whole window.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    help="A task's name, its .json file, or questions as .jsonl. May be given again.",
)
@click.option("--data", type=click.Path(exists=True), help="Raw rows for the tasks.")
@click.option(
    "--split",
    type=click.Choice(["all", "train", "validation"]),
    default="all",
    show_default=True,
    help="Which of the rows: those `fastlm finetune` learns or keeps.",
)
@click.option("--validation", default=0.1, show_default=True, help="Share of --split validation.")
@click.option("--limit", type=click.IntRange(min=1), help="So many rows, drawn by --seed.")
@click.option("--seed", default=0, show_default=True, help="Of --split and --limit.")
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Ask through the chat template; by default where there is one.",
)
@click.option("--batch-size", "-b", type=click.IntRange(min=1), default=8, show_default=True)
@model_options
@click.option("--out", "-o", type=click.Path(dir_okay=False), help="Write all figures as JSON.")
@click.option("--samples", is_flag=True, help="With --out: also each question and its answer.")
@click.option(
    "--list",
    "listed",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, _, value: _list(ctx, value),
    help="List the tasks and exit.",
)
def command(
    model: str,
    texts: tuple[str, ...],
    tasks: tuple[str, ...],
    dtype: str | None,
    quantize: str | None,
    device: str,
    adapter: str | None,
    out: str | None,
    samples: bool,
    **options: Any,
) -> None:
    """Evaluate MODEL, a Hugging Face directory or a .gguf file, on texts and tasks.

    \b
    Example:
      fastlm eval ./stories --text stories.txt --separator '<|endoftext|>'
      fastlm eval ./smollm2 --task copa.jsonl --limit 50 --out copa.json
      fastlm eval ./smollm2 --task sentiment --data sentence_polarity.zip --limit 200
      fastlm eval --list
    """
    if not texts and not tasks:
        raise click.UsageError("give --text or --task (or --list)")
    if out and not os.access(Path(out).absolute().parent, os.W_OK):
        raise click.ClickException(f"{out}: its folder is not there or cannot be written")
    try:
        decoder, text = open_model(model, dtype, quantize, device, adapter)
        results = [_text(decoder, text, path, options) for path in texts]
        results += [_task(decoder, text, name, options) for name in tasks]
    except (ValueError, ImportError, OSError) as error:
        raise click.ClickException(_hint(error)) from error
    _table(results)
    if out:
        kept = [r if samples else {k: v for k, v in r.items() if k != "samples"} for r in results]
        how = {"model": model, "adapter": adapter, "dtype": dtype, "quantize": quantize}
        with written(out) as file:
            content = {"fastlm": __version__, **how, "results": kept}
            file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _text(model: Decoder, text: Text, path: str, options: dict[str, Any]) -> dict[str, Any]:
    from fastlm.train.evaluate import text_loss

    try:
        content = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from error
    documents = [content]
    if options["separator"]:
        documents = [d.strip() for d in content.split(options["separator"])]
        documents = [d for d in documents if d]
    if not any(documents):
        raise ValueError(f"{path}: the file is empty")
    start = time.perf_counter()
    with _Bar(f"{Path(path).name}", None) as bar:
        came = text_loss(
            model,
            text,
            documents,
            window=options["window"],
            stride=options["stride"],
            batch_size=options["batch_size"],
            progress=bar.add,
        )
    if not came.lossless:
        note = "the tokenizer does not give this text back: bits per byte are of what it keeps"
        click.echo(f"{path}: {note}", err=True)
    return {
        "name": Path(path).name,
        "kind": "text",
        "file": path,
        "documents": len(documents),
        "tokens": came.tokens,
        "bytes": came.bytes,
        "lossless": came.lossless,
        "scores": {
            "loss": came.loss,
            "perplexity": came.perplexity,
            "bits_per_byte": came.bits_per_byte,
        },
        "seconds": time.perf_counter() - start,
    }


def _task(model: Decoder, text: Text, name: str, options: dict[str, Any]) -> dict[str, Any]:
    from fastlm import tasks
    from fastlm.data import rows as data_rows
    from fastlm.train.evaluate_tasks import evaluate

    data = options["data"]
    if name.endswith((".jsonl", ".ndjson")):
        data = name
        rows = list(data_rows.read(name))
        task = tasks.for_rows(rows[0][1], name)
    else:
        task = tasks.load(name)
        if data is None:
            raise ValueError(f"task {name}: give its rows with --data")
        rows = list(task.read(data))
    if options["split"] != "all":
        sides = data_rows.split(rows, options["validation"], seed=options["seed"])
        rows = sides[options["split"] == "validation"]
    rows = data_rows.sample(rows, options["limit"], seed=options["seed"])
    start = time.perf_counter()
    count = len(rows)
    if task.kind == "choice":
        count = sum(len(task.options_of(row)) for _, row in rows)
    label = Path(name).stem
    with _Bar(label, count) as bar:
        came = evaluate(
            model,
            text,
            task,
            rows,
            batch_size=options["batch_size"],
            chat=options["chat"],
            progress=bar.add,
        )
    return {
        "name": label,
        "kind": task.kind,
        "task": task.name,
        "file": data,
        "rows": came.rows,
        "split": options["split"],
        "seed": options["seed"],
        "scores": came.scores,
        "seconds": time.perf_counter() - start,
        "samples": came.samples,
    }


class _Bar:
    """Progress on standard error where that is a terminal."""

    def __init__(self, label: str, total: int | None) -> None:
        self.label, self.total, self.done = label, total, 0
        self.shown = sys.stderr.isatty()

    def __enter__(self) -> _Bar:
        return self

    def add(self, count: int) -> None:
        self.done += count
        if self.shown:
            of = "" if self.total is None else f" of {self.total}"
            click.echo(f"\r{self.label}: {self.done}{of}", err=True, nl=False)

    def __exit__(self, *error: object) -> None:
        if self.shown:
            click.echo("\r\033[K", err=True, nl=False)


def _table(results: list[dict[str, Any]]) -> None:
    """One line for each score."""
    width = max(len(result["name"]) for result in results)
    for result in results:
        size = f"{result['rows']} rows" if "rows" in result else f"{result['tokens']} tokens"
        for name, value in result["scores"].items():
            if name.endswith("_stderr"):
                continue
            spread = result["scores"].get(f"{name}_stderr")
            error = "" if spread is None else f" ± {spread:.4f}"
            click.echo(f"{result['name']:<{width}}  {size:>13}  {name:<16} {value:.4f}{error}")


def _hint(error: Exception) -> str:
    """The message, with the extra that brings a missing package."""
    if isinstance(error, ModuleNotFoundError):
        from fastlm.cli import _EXTRAS

        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra:
            return f"this needs the package {error.name}: pip install 'fastlm[{extra}]'"
    return str(error)


def _list(ctx: click.Context, wanted: bool) -> None:
    if not wanted:
        return
    from fastlm import tasks

    for name in tasks.names():
        click.echo(f"{name:<20} {tasks.load(name).description}")
    ctx.exit()
