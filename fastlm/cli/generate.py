"""fastlm generate: continue a text, or answer it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fastlm.hf.tokenizer import Text


@click.command()
@click.argument("path", type=click.Path(exists=True))
@click.option("--prompt", "-p", help="The text; by default read from standard input.")
@click.option("--chat", is_flag=True, help="Send the prompt as a user's message (chat models).")
@click.option("--system", help="System message, with --chat.")
@click.option("--max-new-tokens", "-n", default=128, show_default=True)
@click.option("--temperature", "-t", default=0.0, show_default=True, help="0: the likeliest token.")
@click.option("--top-k", type=click.IntRange(min=1), help="Draw among the k likeliest tokens.")
@click.option("--top-p", type=float, help="Draw among the likeliest that reach this probability.")
@click.option("--min-p", type=float, help="Draw among tokens this near the likeliest, 0 to 1.")
@click.option("--seed", default=0, show_default=True, help="Of the random numbers.")
@click.option("--dtype", help="float32 or bfloat16; by default as stored.")
@click.option("--stats", is_flag=True, help="Print the speed to standard error.")
def command(
    path: str,
    prompt: str | None,
    chat: bool,
    system: str | None,
    dtype: str | None,
    stats: bool,
    **options: Any,
) -> None:
    """Continue a text with the model in PATH, a Hugging Face directory or a .gguf file.

    \b
    Example:
      fastlm generate ./smollm2 --chat --prompt "What is the capital of France?"
      echo "Once upon a time" | fastlm generate ./stories -t 0.8 --top-p 0.95 --seed 1
    """
    from fastlm.hf import tokenizer
    from fastlm.models import Decoder

    if system is not None and not chat:
        raise click.UsageError("--system needs --chat")
    if prompt is None:
        prompt = sys.stdin.read().rstrip("\n")
    if not prompt:
        raise click.UsageError("the prompt is empty")
    try:
        model = Decoder.from_pretrained(path, dtype)
        text = tokenizer.load(model.source or path)
        if chat:
            messages = [{"role": "user", "content": prompt}]
            if system is not None:
                messages.insert(0, {"role": "system", "content": system})
            tokens = text.chat(messages)
        else:
            tokens = text.encode(prompt)
            write(prompt)
        start = time.perf_counter()
        count = 0
        for piece in pieces(text, model.stream(tokens, vocab_limit=text.vocab, **options)):
            write(piece)
            count += 1
        seconds = time.perf_counter() - start
    except (ValueError, ImportError, OSError) as error:
        raise click.ClickException(str(error)) from error
    write("\n")
    if stats:
        rate = count / seconds
        note = f"{len(tokens)} tokens read, {count} written in {seconds:.2f} s ({rate:.1f}/s)"
        click.echo(note, err=True)


def pieces(text: Text, tokens: Iterator[int]) -> Iterator[str]:
    """The text of each token as it comes; empty while a character is not whole."""
    decode = text.streamer()
    for token in tokens:
        yield decode(token)


def write(text: str) -> None:
    """Prints without a line end, whatever the terminal's encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(text.encode(encoding, "replace").decode(encoding), nl=False)
    sys.stdout.flush()
