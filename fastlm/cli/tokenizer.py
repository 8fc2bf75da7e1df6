"""fastlm tokenizer: make, take over and look at tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from fastlm.cli._progress import Progress
from fastlm.cli._sources import reads_text, split_options

if TYPE_CHECKING:
    from fastlm.hf.tokenizer import Text


@click.group()
def command() -> None:
    """Make, take over and look at tokenizers: tokenizer.json, which transformers opens too.

    \b
    Example:
      fastlm tokenizer train stories.txt --vocab-size 4096 --out ./tokenizer
      fastlm tokenizer show ./tokenizer --text "Once upon a time"
    """


_out = click.option("--out", "-o", required=True, type=click.Path(), help="The folder to make.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace the folder.")
_special = click.option(
    "--special",
    multiple=True,
    default=["<|endoftext|>"],
    show_default=True,
    help="A special token, repeatable; the first ends documents.",
)


@command.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path())
@_out
@click.option("--vocab-size", "-n", required=True, type=int, help="Tokens, special ones included.")
@click.option("--min-frequency", default=2, show_default=True, help="Of a pair that is merged.")
@click.option(
    "--words",
    "split",
    type=click.Choice(["gpt2", "gpt4"]),
    default="gpt2",
    show_default=True,
    help="How text is cut into words first; gpt4 cuts numbers in threes.",
)
@_special
@_overwrite
@reads_text
def train(
    sources: tuple[str, ...],
    out: str,
    vocab_size: int,
    min_frequency: int,
    split: str,
    special: tuple[str, ...],
    overwrite: bool,
    **options: Any,
) -> None:
    """Learn a byte-level BPE from SOURCES (.txt, .jsonl, .zip, folders).

    \b
    Example:
      fastlm tokenizer train shakespeare.txt --vocab-size 2048 --out ./tokenizer
      fastlm tokenizer train web.jsonl -n 32000 --special '<|endoftext|>' --special '<|im_end|>' \\
        --out ./tokenizer
    """
    from fastlm.data.tokenizer import train_bpe

    def make() -> Text:
        with Progress() as progress:
            return train_bpe(
                _texts(sources, options, progress),
                vocab_size,
                special=special,
                min_frequency=min_frequency,
                split=split,
            )

    text = _write(make, out, overwrite)
    if text.vocab < vocab_size:
        click.echo(
            f"note: {text.vocab} tokens, not {vocab_size}: no more pairs were seen "
            f"{min_frequency} times",
            err=True,
        )


@command.command()
@_out
@_special
@_overwrite
def byte(out: str, special: tuple[str, ...], overwrite: bool) -> None:
    """One token for each byte.

    \b
    Example:
      fastlm tokenizer byte --out ./tokenizer
    """
    from fastlm.data.tokenizer import byte_level

    _write(lambda: byte_level(special), out, overwrite)


@command.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path())
@_out
@_special
@_overwrite
@reads_text
def char(
    sources: tuple[str, ...], out: str, special: tuple[str, ...], overwrite: bool, **options: Any
) -> None:
    """One token for each character that occurs in SOURCES.

    \b
    Example:
      fastlm tokenizer char shakespeare.txt --out ./tokenizer
    """
    from fastlm.data.tokenizer import char_level

    def make() -> Text:
        seen: set[str] = set()
        with Progress() as progress:
            for text in _texts(sources, options, progress):
                seen.update(text)
        return char_level(seen, special)

    _write(make, out, overwrite)


@command.command("import")
@click.argument("path")
@_out
@_overwrite
def import_(path: str, out: str, overwrite: bool) -> None:
    """Take over the tokenizer in PATH.

    PATH is a folder with tokenizer.json, or with GPT-2's vocab.json and merges.txt; a .gguf file;
    or a name on the Hugging Face Hub.

    \b
    Example:
      fastlm tokenizer import ./gpt2 --out ./tokenizer
      fastlm tokenizer import smollm2.gguf --out ./tokenizer
    """
    from fastlm.data.tokenizer import open_tokenizer

    _write(lambda: open_tokenizer(path), out, overwrite)


@command.command()
@click.argument("path")
@click.option("--text", "-p", required=True, help="What to tokenise.")
def show(path: str, text: str) -> None:
    """What the tokenizer in PATH makes of a text, token by token.

    \b
    Example:
      fastlm tokenizer show ./tokenizer --text "Once upon a time"
    """
    from fastlm.data import DataError
    from fastlm.data.tokenizer import open_tokenizer

    try:
        opened = open_tokenizer(path)
    except DataError as error:
        raise click.ClickException(str(error)) from error
    tokens = opened.encode(text)
    for token in tokens:
        click.echo(f"{token:>8}  {opened.tokenizer.decode([token], skip_special_tokens=False)!r}")
    same = opened.decode(opened.encode(text, special=False)) == text
    click.echo(
        f"{len(tokens)} tokens for {len(text)} characters, {len(text.encode())} bytes; decoded "
        f"again it is {'the same' if same else 'not the same'}"
    )


def _texts(sources: tuple[str, ...], options: dict[str, Any], progress: Progress) -> Iterator[str]:
    from fastlm.data.clean import Cleaning
    from fastlm.data.sources import Reading, Sources

    reading, options = split_options(options)
    cleaning = Cleaning(**options)
    found = Sources(sources, Reading(**reading))
    empty = True
    for document in found.documents():
        text = cleaning.clean(document.text)
        empty = empty and not text.strip()
        yield text
        progress("reading", found.read, found.size)
    if empty:
        raise click.ClickException(f"{', '.join(sources)}: there is no text in it")


def _write(make: Callable[[], Text], out: str, overwrite: bool) -> Text:
    from fastlm.data import DataError
    from fastlm.data.folder import complete_folder
    from fastlm.data.tokenizer import save

    try:
        with complete_folder(out, "tokenizer.json", overwrite) as folder:
            text = make()
            save(text, folder)
    except DataError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        where = error.filename or out
        raise click.ClickException(f"{where}: {error.strerror or error}") from error
    click.echo(f"{text.vocab:,} tokens in {out}")
    return text
