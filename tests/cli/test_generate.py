"""fastlm generate."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from fastlm.cli import main
from fastlm.models import Decoder

OPENING = "Once upon a time"


def run(*args: str, **options):
    return CliRunner().invoke(main, ["generate", *args], **options)


@pytest.fixture
def stories(data) -> str:
    path = data / "models" / "stories260K" / "hf"
    if not path.is_dir():
        pytest.skip(f"no {path}")
    return str(path)


def test_continues_the_prompt(stories):
    done = run(stories, "--prompt", OPENING, "-n", "30", "--stats")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{OPENING}, there was a little girl named Lily. She")
    assert "4 tokens read, 30 written" in done.stderr
    piped = run(stories, "-n", "30", input=OPENING + "\n")
    assert piped.stdout == done.stdout


def test_a_seed_repeats_a_drawn_text(stories):
    args = [stories, "-p", OPENING, "-n", "20", "-t", "1", "--top-p", "0.9", "--top-k", "100"]
    first, again, other = (run(*args, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert first == again != other


def test_errors_are_one_line(stories, tmp_path):
    for args, text in [
        ([str(tmp_path), "-p", "x"], f"Error: {tmp_path}/config.json: the file is missing"),
        ([stories, "-p", "x", "--chat"], "Error: chat: this checkpoint has no chat template"),
        ([stories, "-p", "x", "--top-p", "2"], "Error: generate: top_p must be in (0, 1], got 2.0"),
        ([stories, "-p", ""], "Error: the prompt is empty"),
        ([stories, "-p", "x", "--system", "y"], "Error: --system needs --chat"),
        ([stories, "-p", "x", "--dtype", "int3"], "Error: dtype: expected a floating-point dtype"),
    ]:
        done = run(*args)
        assert done.exit_code != 0 and text in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_a_model_without_a_tokenizer_is_named(tmp_path):
    from fastlm.models import Config

    Decoder(Config(vocab=8, hidden=8, layers=1, heads=1)).save_pretrained(tmp_path / "m")
    done = run(str(tmp_path / "m"), "-p", "x")
    assert "tokenizer.json: the file is missing" in done.stderr
