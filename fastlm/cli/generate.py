"""fastlm generate: continue texts, or answer them."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from fastlm.cli._files import read_prompts, read_stdin, write, written
from fastlm.cli._model import (
    drafter_options,
    model_options,
    open_drafter,
    open_model,
    sampling_options,
)
from fastlm.cli._tasks import columns, defaults, fill

if TYPE_CHECKING:
    from fastlm.hf.tokenizer import Text
    from fastlm.models import Decoder
    from fastlm.models.text import Completion


@click.command()
@click.argument("path", type=click.Path(exists=True))
@click.option("--prompt", "-p", help="The text; by default read from standard input.")
@click.option(
    "--prompts",
    "file",
    type=click.Path(exists=True, dir_okay=False),
    help='Many texts: one a line, or .jsonl with "prompt" or "messages". Gives JSONL.',
)
@click.option("--output", "-o", type=click.Path(dir_okay=False), help="The JSONL, with --prompts.")
@click.option("--task", help="A task's template and settings: see fastlm eval --help.")
@click.option("--set", "given", multiple=True, help="NAME=VALUE: a column that the task names.")
@click.option("--batch-size", default=8, show_default=True, help="Of --prompts.")
@click.option("--chat", is_flag=True, help="Send a prompt as a user's message (chat models).")
@click.option("--system", help="System message, with --chat.")
@click.option("--max-new-tokens", "-n", default=128, show_default=True)
@click.option("--stop", multiple=True, help="End before this text (repeatable).")
@sampling_options
@drafter_options
@model_options
@click.option("--stats", is_flag=True, help="Print the speed to standard error.")
def command(
    path: str,
    prompt: str | None,
    file: str | None,
    output: str | None,
    task: str | None,
    given: tuple[str, ...],
    batch_size: int,
    chat: bool,
    system: str | None,
    stop: tuple[str, ...],
    lookup: int | None,
    draft: str | None,
    draft_tokens: int,
    dtype: str | None,
    quantize: str | None,
    device: str,
    adapter: str | None,
    stats: bool,
    **options: Any,
) -> None:
    """Continue a text with the model in PATH, a Hugging Face directory or a .gguf file.

    Prompt i of --prompts (counted from 0) draws with the seed --seed + i.

    \b
    Example:
      fastlm generate ./smollm2 --chat --prompt "What is the capital of France?"
      echo "Once upon a time" | fastlm generate ./stories -t 0.8 --top-p 0.95 --seed 1
      fastlm generate ./stories --prompts prompts.txt -o stories.jsonl --stop "The end"
      fastlm generate ./smollm2 --task summary --prompt "A long text ..."
    """
    if system is not None and not chat and task is None:
        raise click.UsageError("--system needs --chat")
    if file is not None and prompt is not None:
        raise click.UsageError("--prompt and --prompts exclude each other")
    if output is not None and file is None:
        raise click.UsageError("--output needs --prompts; redirect standard output otherwise")
    if file is not None and (lookup is not None or draft is not None):
        raise click.UsageError("--lookup and --draft take one prompt, not --prompts")
    extra = columns(given)
    if given and task is None:
        raise click.UsageError("--set needs --task")
    if file is not None:
        rows = [row | extra for row in read_prompts(file, any_columns=task is not None)]
    else:
        if prompt is None and not given:
            prompt = read_stdin()
        if not prompt and not given:
            raise click.UsageError("the prompt is empty")
        rows = [({"prompt": prompt} if prompt else {}) | extra]
    where = [f"{file}, line {i}: " if file else "" for i in range(1, len(rows) + 1)]
    try:
        model, text = open_model(path, dtype, quantize, device, adapter)
        if task is not None:
            from fastlm import tasks

            what = tasks.load(task)
            rows = [
                row | {"prompt": fill(what, row, place)}
                for row, place in zip(rows, where, strict=True)
            ]
            options = defaults(what, options)
            stop = (*stop, *what.stop)
            chat = chat or (what.chat and text.template is not None)
        prompts = [
            _tokens(model, text, row, chat, system, place)
            for row, place in zip(rows, where, strict=True)
        ]
        options |= {"stop": stop}
        if file is not None:
            _many(model, text, rows, prompts, output, stats, batch_size=batch_size, **options)
            return
        drafter = open_drafter(model, text, lookup, draft, draft_tokens, dtype, quantize, device)
        if not chat and task is None:
            write(str(rows[0]["prompt"]))
        _one(model, text, prompts[0], drafter, stats, options)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _tokens(
    model: Decoder, text: Text, row: dict[str, Any], chat: bool, system: str | None, where: str
) -> list[int]:
    if "messages" in row or chat:
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        if system is not None and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": system}, *messages]
        tokens = text.chat(messages)
    else:
        tokens = text.encode(row["prompt"])
    if not tokens:
        raise ValueError(f"{where}the prompt has no tokens")
    if len(tokens) > model.config.max_positions:
        raise ValueError(
            f"{where}the prompt must fit max_positions = {model.config.max_positions}, got"
            f" {len(tokens)} tokens"
        )
    return tokens


def _one(
    model: Decoder,
    text: Text,
    tokens: list[int],
    drafter: Any,
    stats: bool,
    options: dict[str, Any],
) -> None:
    from fastlm.models.text import Answer, stream_text

    start = time.perf_counter()
    answer = Answer(text, tokens, model.config.eos_ids, options.pop("stop"))
    for piece in stream_text(model, text, tokens, answer=answer, drafter=drafter, **options):
        write(piece)
    count = len(answer.tokens)
    seconds = time.perf_counter() - start
    write("\n")
    if stats:
        note = f"{len(tokens)} tokens read, {count} written in {seconds:.2f} s"
        if drafter is not None:
            note += f", {drafter.accepted} of {drafter.offered} guesses right"
        click.echo(f"{note} ({count / seconds:.1f}/s)", err=True)


def _many(
    model: Decoder,
    text: Text,
    rows: list[dict[str, Any]],
    prompts: list[list[int]],
    output: str | None,
    stats: bool,
    **options: Any,
) -> None:
    from fastlm.models.text import complete

    start = time.perf_counter()
    count = 0
    target: Any = nullcontext(None) if output is None else written(output)
    with target as to:

        def keep(i: int, made: Completion) -> None:
            nonlocal count
            count += len(made.tokens)
            row = rows[i] | {
                "text": made.text,
                "tokens": len(made.tokens),
                "finish": made.finish,
            }
            line = json.dumps(row, ensure_ascii=False) + "\n"
            write(line) if to is None else to.write(line)
            if output is not None and sys.stderr.isatty():
                click.echo(f"\r{i + 1} of {len(rows)} prompts", err=True, nl=False)

        complete(model, text, prompts, callback=keep, **options)
    seconds = time.perf_counter() - start
    if output is not None and sys.stderr.isatty():
        click.echo(err=True)
    if stats:
        read = sum(map(len, prompts))
        click.echo(
            f"{read} tokens read, {count} written in {seconds:.2f} s ({count / seconds:.1f}/s)",
            err=True,
        )
