"""fastlm inspect: how likely each token of a text is to a model, and what its heads attend to."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from typing import Any

import click

from fastlm.cli._files import read_stdin, write, written
from fastlm.cli._model import model_options, open_model


@click.command()
@click.argument("path", type=click.Path(exists=True))
@click.option("--text", "given", help="The text; by default read from standard input.")
@click.option("--top", default=3, show_default=True, help="Alternatives to name at each place.")
@click.option("--layers", help="Those whose attention to keep, as 0,2,5; all by default.")
@click.option("--attention/--no-attention", default=True, help="Keep attention maps.")
@click.option("--json", "json_to", type=click.Path(dir_okay=False), help="Write all figures there.")
@click.option("--png", type=click.Path(dir_okay=False), help="Draw text and attention maps there.")
@model_options
def command(
    path: str,
    given: str | None,
    top: int,
    layers: str | None,
    attention: bool,
    json_to: str | None,
    png: str | None,
    **how: Any,
) -> None:
    """What the model in PATH makes of a text, token by token.

    Prints for each token its log-probability (natural), the entropy of the distribution it came
    from, and what was likeliest there.

    \b
    Example:
      fastlm inspect ./stories --text "Once upon a time there was a dog." --png dog.png
      fastlm inspect ./stories --text "One, two, three" --layers 0,4 --json one.json
    """
    from fastlm.models.inspect import inspect

    if png is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("--png needs the package matplotlib: pip install 'fastlm[demo]'")
    try:
        chosen = [int(n) for n in layers.split(",")] if layers else None
    except ValueError as error:
        raise click.UsageError(f"--layers must be numbers as 0,2,5, got {layers!r}") from error
    given = read_stdin() if given is None else given
    if not given:
        raise click.UsageError("the text is empty")
    try:
        model, text = open_model(path, **how)
        kept = chosen if attention and (json_to or png) else ()
        found = inspect(
            model,
            text.encode(given),
            top=top,
            layers=kept,
            limit=min(text.vocab, model.config.vocab),
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise click.ClickException(str(error)) from error
    texts = text.texts(found.tokens)
    first = found.tokens[:1]
    named = {t: text.texts([t], first)[0] for best in found.likeliest for t, _ in best}
    if json_to is not None:
        content = found.to_dict(texts)
        for best in (*(row["likeliest"] for row in content["tokens"]), content["next"]):
            for entry in best:
                entry["text"] = named[entry["token"]]
        with written(json_to) as file:
            json.dump(content, file, ensure_ascii=False)
    if png is not None:
        from fastlm.models.inspect_plot import draw

        with written(png, binary=True) as file:
            draw(found, texts, file, title=path)
    _table(found, texts, named)


def _table(found: Any, texts: list[str], named: dict[int, str]) -> None:
    from fastlm.models.inspect_plot import visible

    def best(pairs: list[tuple[int, float]]) -> str:
        return "  ".join(f"{visible(named[t])} {math.exp(p):.0%}" for t, p in pairs)

    write(f"{'token':<16} {'logprob':>8} {'entropy':>8}  likeliest\n")
    for text, p, h, pairs in zip(
        texts, found.logprobs, found.entropy, found.likeliest[:-1], strict=True
    ):
        figures = f"{'':>8} {'':>8}" if p is None else f"{p:8.3f} {h:8.3f}"
        write(f"{visible(text):<16} {figures}  {best(pairs)}\n")
    write(f"{'(next)':<16} {'':>8} {'':>8}  {best(found.likeliest[-1])}\n")
    if not math.isnan(found.loss):
        note = f"mean log-probability {-found.loss:.4f}, perplexity {math.exp(found.loss):.3f}\n"
        click.echo(note, err=True, nl=False)
        sys.stderr.flush()
