"""fastlm info: what is built and what this machine has."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(as_json: bool) -> None:
    """What is built, which instruction set and GPU, which backends each operator has.

    \b
    Example:
      fastlm info
      fastlm info --json | jq '."instruction set"'
    """
    from fastlm.info import info

    facts = info()
    click.echo(json.dumps(facts, indent=2) if as_json else str(facts))
