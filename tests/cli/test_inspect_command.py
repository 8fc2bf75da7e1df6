"""fastlm inspect."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
from click.testing import CliRunner

from fastlm.cli import main

TEXT = "Once upon a time, there was a little dog named Max."


def run(*args: str, **options):
    return CliRunner().invoke(main, ["inspect", *args], **options)


def test_a_table_figures_and_a_picture(stories, tmp_path):
    pytest.importorskip("matplotlib")
    figures, picture = tmp_path / "a.json", tmp_path / "a.png"
    args = [str(stories), "--text", TEXT, "--layers", "0,3"]
    done = run(*args, "--json", str(figures), "--png", str(picture))
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(figures.read_text())
    assert "".join(row["text"] for row in found["tokens"]) == TEXT
    known = [row["logprob"] for row in found["tokens"][1:]]
    assert found["loss"] == pytest.approx(-sum(known) / len(known), abs=1e-4)
    assert 0 < found["loss"] < 1.5  # it tells such stories
    assert found["tokens"][0]["logprob"] is None
    for row in found["tokens"][1:]:
        assert all({"token", "logprob", "text"} == entry.keys() for entry in row["likeliest"])
    count = len(found["tokens"])
    assert [layer["layer"] for layer in found["attention"]] == [0, 3]
    for layer in found["attention"]:
        assert len(layer["heads"]) == 8
        for head in layer["heads"]:
            assert len(head) == count
            assert all(math.isclose(sum(row), 1, abs_tol=count * 1e-5) for row in head)
    table = done.stdout.splitlines()
    assert len(table) == count + 2 and table[2].startswith("·upon")
    assert f"mean log-probability {-found['loss']:.4f}, perplexity " in done.stderr
    piped = run(str(stories), "--layers", "0,3", input=TEXT + "\n")
    assert piped.stdout == done.stdout


def test_without_attention(byte_model, tmp_path):
    figures = tmp_path / "a.json"
    done = run(str(byte_model), "--text", "é!", "--no-attention", "--json", str(figures))
    assert done.exit_code == 0, done.output
    assert "attention" not in json.loads(figures.read_text())


def test_errors_are_one_line(stories, tmp_path, monkeypatch):
    path = str(stories)
    for args, text in [
        ([path, "--text", ""], "the text is empty"),
        ([path, "--text", "word " * 700], "the text must have 1 to 512 tokens"),
        ([path, "--text", "x", "--layers", "a"], "--layers must be numbers as 0,2,5, got 'a'"),
        ([path, "--text", "x", "--layers", "9", "--json", "y"], "layers must be in [0, 5), got 9"),
        ([path, "--text", "x", "--top", "0"], "top must be 1 to 512, got 0"),
        ([path, "--text", "x", "--json", "/nowhere/x"], "/nowhere/x: cannot be written"),
        ([str(tmp_path), "--text", "x"], "config.json: the file is missing"),
    ]:
        done = run(*args)
        assert done.exit_code != 0 and text in done.stderr, (args, done.output)
        assert "Traceback" not in done.stderr
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = run(path, "--text", "x", "--png", "y.png")
    assert "--png needs the package matplotlib: pip install 'fastlm[demo]'" in done.stderr
