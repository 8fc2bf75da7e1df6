"""fastlm verify."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner

from fastlm.cli import main
from fastlm.testing import Error


@pytest.fixture
def stories(data) -> str:
    path = data / "models" / "stories260K" / "hf"
    if not path.is_dir():
        pytest.skip(f"no {path}")
    return str(path)


def run(*args: str):
    return CliRunner().invoke(main, ["verify", *args])


def test_a_real_model_is_verified(stories, tmp_path):
    target = tmp_path / "report.json"
    done = run(stories, "--prompt", "Once upon a time", "--json", str(target))
    assert done.exit_code == 0, done.output
    assert "attention, rope" in done.stdout and "verified" in done.stdout
    assert "greedy text of 16 tokens: the same" in done.stdout
    written = json.loads(target.read_text())
    assert written["ok"] and written["greedy_same"] and written["model"] == "LlamaForCausalLM"
    assert {"logits", "loss"} <= {e["name"] for e in written["errors"]}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_an_error_over_its_budget_is_code_1(stories, monkeypatch):
    module = sys.modules["fastlm.hf.verify"]  # the package names the function so
    monkeypatch.setattr(module._Squares, "error", lambda *x: Error(x[1], 1.0, 0.1, 0.2))
    done = run(stories, "--no-gradients", "-n", "0")
    assert done.exit_code == 1 and "NOT verified" in done.stdout


@pytest.mark.parametrize(
    "args, text",
    [
        (["missing"], "does not exist"),
        ([".", "--dtype", "int8"], "--dtype must be float32, bfloat16 or float16, got int8"),
        (["."], "cannot be opened"),
    ],
    ids=str,
)
def test_bad_input_is_said(args, text):
    done = run(*args)
    assert done.exit_code != 0 and text in done.output


def test_explain_a_folder(stories, tmp_path):
    done = CliRunner().invoke(main, ["explain", stories, "--prompt", "Once upon a time"])
    assert done.exit_code == 0, done.output
    assert "model.layers.{0-4}.self_attn" in done.stdout and "\ncoverage: " in done.stdout
    done = CliRunner().invoke(main, ["explain", str(tmp_path)])
    assert done.exit_code == 1 and f"{tmp_path} cannot be opened" in done.output
    done = CliRunner().invoke(main, ["explain", "attention", "--dtype", "float32"])
    assert done.exit_code == 2 and "no folder 'attention'" in done.output
