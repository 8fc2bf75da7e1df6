"""fastlm chat: a conversation in the terminal."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastlm.cli._files import read_text, write, written
from fastlm.cli._model import (
    drafter_options,
    model_options,
    open_drafter,
    open_model,
    sampling_options,
)

if TYPE_CHECKING:
    from fastlm.models.chat import Chat

COMMANDS = """\
/reset        begin a new conversation (the system message stays)
/system TEXT  set the system message; without TEXT show it
/save FILE    write the conversation as one line of JSON, as `fastlm finetune` reads it
/help         this list
/quit         end; so does the end of the input (Ctrl-D)
Ctrl-C stops an answer. A message that begins with a slash is written with two."""


@click.command(epilog="In the conversation: /help, /reset, /system TEXT, /save FILE, /quit.")
@click.argument("path", type=click.Path(exists=True))
@click.option("--system", help="System message.")
@click.option("--template", help="A file with a Jinja chat template; chatml; or plain.")
@click.option("--max-new-tokens", "-n", default=256, show_default=True, help="Of one answer.")
@click.option("--stop", multiple=True, help="End an answer before this text (repeatable).")
@sampling_options
@drafter_options
@model_options
def command(
    path: str,
    system: str | None,
    template: str | None,
    lookup: int | None,
    draft: str | None,
    draft_tokens: int,
    dtype: str | None,
    quantize: str | None,
    device: str,
    adapter: str | None,
    **options: Any,
) -> None:
    """Talk with the chat model in PATH, a Hugging Face directory or a .gguf file.

    Only new tokens are read each turn. When the conversation outgrows the model's positions, its
    oldest turns are dropped. Without a terminal every line of the input is a message.

    \b
    Example:
      fastlm chat ./smollm2 --system "Answer briefly." -t 0.7 --top-p 0.9
      printf 'Hello\\nWhat did I say?\\n' | fastlm chat ./smollm2
    """
    from fastlm.data.template import CHATML
    from fastlm.models.chat import Chat

    try:
        model, text = open_model(path, dtype, quantize, device, adapter)
        if template == "chatml":
            text = replace(text, template=CHATML)
        elif template not in (None, "plain"):
            text = replace(text, template=read_text(template))
        elif template is None and text.template is None:
            raise ValueError(
                f"{path} has no chat template: give one with --template FILE, or --template plain"
            )
        drafter = open_drafter(model, text, lookup, draft, draft_tokens, dtype, quantize, device)
        chat = Chat(
            model,
            text,
            system=system,
            plain=template == "plain",
            drafter=drafter,
            **options,
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise click.ClickException(str(error)) from error
    talk(chat, sys.stdin.isatty())


def talk(chat: Chat, terminal: bool) -> None:
    """Asks until the input ends or /quit; what goes wrong in a terminal does not end it."""
    if terminal:
        click.echo("/help lists the commands.", err=True)
    for line in messages(terminal):
        if not line.strip():
            continue
        try:
            if line.startswith("/") and not line.startswith("//"):
                if not obey(chat, line.strip()):
                    return
            else:
                answer(chat, line.removeprefix("/") if line.startswith("//") else line)
        except (ValueError, click.ClickException) as error:
            said = error.message if isinstance(error, click.ClickException) else str(error)
            if not terminal:
                raise click.ClickException(said) from error
            click.echo(f"Error: {said}", err=True)


def messages(terminal: bool) -> Iterator[str]:
    """The lines of the input."""
    if not terminal:
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                yield line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise click.ClickException(f"line {number}: not UTF-8") from error
        return
    with suppress(ImportError):
        import readline  # noqa: F401  editing and history in input()
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            click.echo("\n(/quit or Ctrl-D ends)", err=True)
        except EOFError:
            click.echo(err=True)
            return


def answer(chat: Chat, message: str) -> None:
    """Prints the answer as it comes; Ctrl-C ends it."""
    pieces = chat.ask(message)
    if chat.dropped:
        note = f"({chat.dropped} of the oldest messages no longer fit and were dropped)"
        click.echo(note, err=True)
    with interruptible() as interrupted:
        for piece in pieces:
            write(piece)
            if interrupted.is_set():
                break
        pieces.close()  # type: ignore[attr-defined]
    write("\n")
    if interrupted.is_set():
        click.echo("(stopped)", err=True)


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a token is never left half-read; a second one raises."""
    pressed = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    if threading.current_thread() is not threading.main_thread():
        yield pressed  # signals are the main thread's
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def obey(chat: Chat, line: str) -> bool:
    """Carries out a command; False: the conversation ends."""
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word == "/quit":
        return False
    if word == "/help":
        click.echo(COMMANDS, err=True)
    elif word == "/reset":
        chat.reset()
        click.echo("(a new conversation)", err=True)
    elif word == "/system":
        if rest:
            chat.system = rest
        click.echo(f"(system message: {chat.system or 'none'})", err=True)
    elif word == "/save":
        if not rest:
            raise ValueError("/save needs the name of a file")
        with written(Path(rest).expanduser()) as file:
            file.write(json.dumps({"messages": chat.messages}, ensure_ascii=False) + "\n")
        click.echo(f"(saved to {rest})", err=True)
    else:
        raise ValueError(f"{word} is no command; /help lists them")
    return True
