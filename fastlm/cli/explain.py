"""fastlm explain: the implementations of an operator, and why some are absent."""

from __future__ import annotations

import click


@click.command()
@click.argument("operator", required=False)
def command(operator: str | None) -> None:
    """The implementations of OPERATOR (default: of all) per device, and why some are absent.

    \b
    Example:
      fastlm explain attention
    """
    from fastlm.explain import explain
    from fastlm.ops import _registry

    try:
        for stem in [operator] if operator else _registry.stems():
            click.echo(explain(stem))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
