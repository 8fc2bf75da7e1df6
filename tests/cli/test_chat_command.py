"""fastlm chat."""

from __future__ import annotations

import builtins
import json
import signal

import pytest
from click.testing import CliRunner

from fastlm.cli import chat as chat_command
from fastlm.cli import main
from fastlm.hf import tokenizer
from fastlm.models import Decoder
from fastlm.models.chat import Chat

pytest.importorskip("jinja2")  # of the chat template


def run(*args: str, **options):
    return CliRunner().invoke(main, ["chat", *args], **options)


@pytest.fixture
def chat(byte_model) -> Chat:
    model, text = Decoder.from_pretrained(byte_model), tokenizer.load(byte_model)
    return Chat(model, text, max_new_tokens=9, vocab_limit=90)


def test_every_line_is_a_message(byte_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = "Hello\n\n/system Be kind.\n//slash\n/save a.jsonl\n/reset\nHello\n/quit\nnever\n"
    done = run(str(byte_model), "-n", "9", input=said)
    assert done.exit_code == 0, done.output
    saved = json.loads((tmp_path / "a.jsonl").read_text())["messages"]
    assert [m["role"] for m in saved] == ["system", *["user", "assistant"] * 2]
    assert [m["content"] for m in saved[::2]] == [
        "Be kind.",
        saved[2]["content"],
        saved[4]["content"],
    ]
    assert saved[1]["content"] == "Hello" and saved[3]["content"] == "/slash"
    assert "(system message: Be kind.)" in done.stderr and "never" not in done.output
    answers = [m["content"] for m in saved if m["role"] == "assistant"]
    assert done.stdout.startswith("".join(f"{answer}\n" for answer in answers))


def test_a_text_that_recurs_can_be_guessed(byte_model):
    plain = run(str(byte_model), "-n", "30", input="Hello\nHello\n")
    guessed = run(str(byte_model), "-n", "30", "--lookup", "4", input="Hello\nHello\n")
    assert plain.exit_code == 0 and plain.stdout == guessed.stdout


def test_errors_are_one_line(byte_model, stories, tmp_path):
    path = str(byte_model)
    (tmp_path / "t.jinja").write_text("{% if %}")
    for args, said, text in [
        ([str(stories)], "x\n", "has no chat template: give one with --template FILE, or"),
        ([path, "--template", "none.jinja"], "x\n", "none.jinja: cannot be read"),
        ([path, "--template", str(tmp_path / "t.jinja")], "x\n", "Error: template: "),
        ([path, "--stop", ""], "x\n", "stop must be strings of text"),
        ([path, "-t", "-1"], "x\n", "temperature must be 0 or more"),
        ([path, "-n", "0"], "x\n", "max_new_tokens must be 1 or more"),
        ([path], "x" * 200 + "\n", "the message must fit 100 tokens"),
        ([path], "/nothing\n", "/nothing is no command; /help lists them"),
        ([path], "/save\n", "/save needs the name of a file"),
        ([path], "/save /nowhere/at/all\n", "/nowhere/at/all: cannot be written"),
        ([path], b"\xff\n", "line 1: not UTF-8"),
    ]:
        done = run(*args, input=said)
        assert done.exit_code == 1 and text in done.stderr, (args, done.output)
        assert "Traceback" not in done.stderr


def test_plain_conversations(stories):
    done = run(str(stories), "--template", "plain", "-n", "12", input="Hello\n")
    assert done.exit_code == 0 and len(done.stdout) > 10


def type_in(monkeypatch, lines):
    """What input() gives; an exception is raised."""
    given = iter(lines)

    def typed(prompt):
        line = next(given, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", typed)


def test_in_a_terminal_errors_do_not_end_it(chat, monkeypatch, capsys):
    type_in(monkeypatch, ["x" * 300, "/what", KeyboardInterrupt, "/help", "Hello"])
    chat_command.talk(chat, terminal=True)
    said = capsys.readouterr()
    assert "Error: chat: the message must fit" in said.err and "Error: /what is no" in said.err
    assert "/quit or Ctrl-D ends" in said.err and "/save FILE" in said.err
    assert said.out == chat.messages[-1]["content"] + "\n"


def test_dropped_turns_are_announced(chat, monkeypatch, capsys):
    type_in(monkeypatch, [f"question number {i}, somewhat long" for i in range(6)])
    chat_command.talk(chat, terminal=True)
    assert "(2 of the oldest messages no longer fit and were dropped)" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_not_the_program(chat, monkeypatch, capsys):
    pieces = []

    def write(piece):
        pieces.append(piece)
        if len(pieces) == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat_command, "write", write)
    type_in(monkeypatch, ["Hello", "Go on"])
    before = signal.getsignal(signal.SIGINT)
    chat_command.talk(chat, terminal=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert "(stopped)" in capsys.readouterr().err
    first, second = (m["content"] for m in chat.messages if m["role"] == "assistant")
    assert first == "".join(pieces[:4]) and len(first) == 4 and len(second) == 9
