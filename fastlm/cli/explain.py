"""fastlm explain: who runs an operator, or each module of a model, and why others do not."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("what", required=False, metavar="[OPERATOR | PATH]")
@click.option("--dtype", help="Of the model: float32, bfloat16 or float16; by default as stored.")
@click.option("--prompt", "-p", help="Text to run the model on; by default random tokens.")
def command(what: str | None, dtype: str | None, prompt: str | None) -> None:
    """Who runs OPERATOR (default: each) per device; or the Hugging Face model in the folder PATH.

    Of a model: what was replaced and why the rest was not, which kernel each call of a forward pass
    takes and why not another, and how much of the modules and of the time that covers.

    \b
    Example:
      fastlm explain attention
      fastlm explain ./smollm2 --dtype bfloat16
    """
    from fastlm.explain import explain
    from fastlm.ops import _registry

    if what is not None and Path(what).is_dir():
        from fastlm.cli.verify import open_model
        from fastlm.hf import explain_model

        click.echo(explain_model(*open_model(what, dtype, prompt)))
        return
    if dtype is not None or prompt is not None:
        raise click.UsageError(f"--dtype and --prompt belong to a model; no folder {what!r}")
    try:
        for stem in [what] if what else _registry.stems():
            click.echo(explain(stem))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
