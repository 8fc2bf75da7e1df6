"""fastlm prepare: files of text to token shards."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import click

from fastlm.cli._progress import Progress
from fastlm.cli._sources import reads_text, split_options


def _threshold(_: click.Context, __: click.Parameter, value: str) -> float | None:
    if value == "off":
        return None
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"expected off or a number in (0, 1], got {value!r}") from None


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path())
@click.option("--out", "-o", required=True, type=click.Path(), help="The folder to make.")
@click.option(
    "--tokenizer",
    "-t",
    required=True,
    help="A folder, tokenizer.json, .gguf, byte, char, or a name on the Hugging Face Hub.",
)
@reads_text
@click.option("--min-chars", default=1, show_default=True, help="Drop shorter documents.")
@click.option("--max-chars", type=int, help="Drop longer documents.")
@click.option("--min-letters", default=0.0, show_default=True, help="Least share of letters.")
@click.option(
    "--max-repeated-lines", default=1.0, show_default=True, help="Greatest share of such lines."
)
@click.option("--max-word", type=int, help="Drop documents with a longer run without space.")
@click.option("--exact-dedup/--no-exact-dedup", "exact", default=True, show_default=True)
@click.option(
    "--near-dedup",
    "near",
    default="0.7",
    show_default=True,
    callback=_threshold,
    help="Drop documents this similar to an earlier one; off does not look.",
)
@click.option("--near-words", default=3, show_default=True, help="Words in a compared run.")
@click.option("--validation", default=0.1, show_default=True, help="The share held back.")
@click.option(
    "--split",
    type=click.Choice(["auto", "documents", "tail"]),
    default="auto",
    show_default=True,
    help="Whole documents, or the end of the text (auto: of a single document).",
)
@click.option("--seed", default=0, show_default=True, help="Of the documents held back.")
@click.option("--eos/--no-eos", default=True, show_default=True, help="End token after each.")
@click.option("--bos", is_flag=True, help="Begin token before each document.")
@click.option("--overwrite", is_flag=True, help="Replace the folder once the new one is complete.")
def command(
    sources: tuple[str, ...],
    out: str,
    tokenizer: str,
    eos: bool,
    bos: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Read SOURCES (.txt, .jsonl, .zip, folders), clean, de-duplicate, split and tokenise them.

    One document is a file, a line of JSON, or what stands between separators. What was dropped
    and why is in manifest.json of the new folder, which appears complete or not at all.

    \b
    Example:
      fastlm prepare shakespeare.txt --out data/shakespeare --tokenizer char --no-eos
      fastlm prepare stories.txt --separator '<|endoftext|>' --out data/stories -t ./tokenizer
      fastlm prepare web.jsonl more/ --min-chars 200 --min-letters 0.6 -o data/web -t ./smollm2
    """
    from fastlm.data import DataError
    from fastlm.data.clean import Cleaning
    from fastlm.data.prepare import Selection, prepare
    from fastlm.data.sources import Reading

    reading, options = split_options(options)
    chosen = {name: options.pop(name) for name in Selection.__dataclass_fields__ if name in options}
    try:
        with Progress() as progress:
            manifest = prepare(
                sources,
                out,
                tokenizer,
                reading=Reading(**reading),
                cleaning=Cleaning(**options),
                selection=Selection(**chosen),
                eos=eos,
                bos=bos,
                overwrite=overwrite,
                command=shlex.join(["fastlm", *sys.argv[1:]]),
                progress=progress,
            )
    except DataError as error:
        raise click.ClickException(str(error)) from error
    click.echo(summary(manifest))
    for note in manifest["notes"]:
        click.echo(f"note: {note}", err=True)
    click.echo(out)


def summary(manifest: dict[str, Any]) -> str:
    """What was made, as a few lines."""
    documents = manifest["documents"]
    lines = [f"documents:   {documents['read']:,} read, {documents['kept']:,} kept"]
    for reason, entry in documents["dropped"].items():
        example = entry["examples"][0]
        lines.append(
            f"  dropped:   {entry['documents']:,} by {reason}, such as {example['source']}: "
            f"{example['why']}"
        )
    for split, facts in manifest["splits"].items():
        ratio = facts["bytes"] / facts["tokens"] if facts["tokens"] else 0
        lines.append(
            f"{split + ':':<12} {facts['documents']:,} documents, {facts['tokens']:,} tokens "
            f"({ratio:.2f} bytes each)"
        )
    lines.append(f"vocabulary:  {manifest['vocab']:,} ({manifest['dtype']})")
    return "\n".join(lines)
