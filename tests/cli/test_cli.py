"""The command line: every command helps with an example, and fails with words."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

import fastlm
from fastlm.cli import main

COMMANDS = main.list_commands(None)


def run(*arguments: str):
    return CliRunner().invoke(main, arguments)


def test_help_lists_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0, result.output
    assert f"fastlm {command}" in result.output, "no example in the help text"
    assert result.output.count("\n") > 5


def every_command():
    for name in COMMANDS:
        command = main.get_command(None, name)
        yield name, command
        for part, sub in getattr(command, "commands", {}).items():
            yield f"{name} {part}", sub


@pytest.mark.parametrize(
    "name, command", list(every_command()), ids=lambda x: x if type(x) is str else ""
)
def test_examples_stand_line_by_line(name, command):
    """Click keeps the lines of a paragraph that a backspace begins; in a raw string it is none."""
    assert "\b" in command.help and "\\b" not in command.help
    shown = CliRunner().invoke(main, [*name.split(), "--help"]).output.splitlines()
    examples = [line.strip() for line in shown if line.strip().startswith(f"fastlm {name} ")]
    assert examples


def test_unknown_command_is_refused():
    result = run("fly")
    assert result.exit_code == 2
    assert "No such command 'fly'" in result.output


def test_missing_extra_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

    monkeypatch.setattr("importlib.import_module", missing)
    result = run("info")
    assert result.exit_code == 1
    assert "needs the package gguf: pip install 'fastlm[gguf]'" in result.output


def test_info_as_table_and_json():
    table = run("info")
    assert table.exit_code == 0
    assert f"version:              {fastlm.__version__}" in table.output
    facts = json.loads(run("info", "--json").output)
    assert facts["version"] == fastlm.__version__
    assert facts["CPU backends"]["rms_norm"][-1] == "reference"


def test_explain():
    result = run("explain", "rms_norm")
    assert result.exit_code == 0
    assert "rms_norm on cuda tensors" in result.output
    result = run("explain", "norm")
    assert result.exit_code == 2
    assert "no operator 'norm'" in result.output


def test_python_m_fastlm():
    done = subprocess.run(
        [sys.executable, "-m", "fastlm", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"fastlm, version {fastlm.__version__}"
