"""fastlm tokenizer."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from fastlm.cli import main
from fastlm.data.tokenizer import open_tokenizer


def run(*args: object):
    return CliRunner().invoke(main, ["tokenizer", *map(str, args)])


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("The cat sat on the mat. The cat sat. Über 12 mats!\n" * 5)
    return file


@pytest.mark.parametrize("command", ["train", "byte", "char", "show", "import"])
def test_every_command_helps_with_an_example(command):
    done = run(command, "--help")
    assert done.exit_code == 0 and f"fastlm tokenizer {command}" in done.output


def test_train_and_show(corpus, tmp_path):
    out = tmp_path / "out"
    done = run("train", corpus, "-n", 270, "-o", out, "--special", "<|end|>", "--special", "<|u|>")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"270 tokens in {out}\n" and done.stderr == ""
    assert open_tokenizer(out).special == {"eos_token": "<|end|>"}
    assert open_tokenizer(out).encode("<|end|><|u|>") == [0, 1]
    shown = run("show", out, "--text", "The cat é")
    assert "' cat'" in shown.stdout
    assert "characters, 10 bytes; decoded again it is the same" in shown.stdout
    again = run("train", corpus, "-n", 275, "-o", out)
    assert f"Error: {out}: the folder exists; --overwrite replaces it" in again.stderr
    assert run("train", corpus, "-n", 275, "-o", out, "--overwrite").exit_code == 0
    assert open_tokenizer(out).vocab == 275


def test_a_small_corpus_is_told(corpus, tmp_path):
    done = run("train", corpus, "-n", 5000, "-o", tmp_path / "o", "--words", "gpt4")
    assert done.exit_code == 0
    assert "tokens, not 5000: no more pairs were seen 2 times" in done.stderr


def test_byte_and_char(corpus, tmp_path):
    assert run("byte", "-o", tmp_path / "b").stdout == f"257 tokens in {tmp_path}/b\n"
    assert run("char", corpus, "-o", tmp_path / "c", "--lowercase").exit_code == 0
    known = set(corpus.read_text().lower())
    assert open_tokenizer(tmp_path / "c").vocab == len(known) + 2


def test_import(data, tmp_path):
    done = run("import", data / "tokenizers" / "gpt2", "-o", tmp_path / "g")
    assert done.stdout == f"50,257 tokens in {tmp_path}/g\n"
    assert run("import", tmp_path / "g" / "tokenizer.json", "-o", tmp_path / "h").exit_code == 0
    texts = [(tmp_path / name / "tokenizer.json").read_text() for name in "gh"]
    assert texts[0] == texts[1]


def test_errors_are_one_line(corpus, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    for args, text in [
        (["train", corpus, "-n", 10], "vocab size must be at least 257, 256 bytes and 1 special"),
        (
            ["train", corpus, "-n", 10**12],
            "vocab size must be at most 16,777,216, got 1000",
        ),
        (["train", tmp_path / "no.txt", "-n", 300], "no.txt: No such file"),
        (["train", tmp_path / "empty.txt", "-n", 300], "empty.txt: there is no text in it"),
        (["char", tmp_path / "empty.txt"], "empty.txt: there is no text in it"),
        (["import", tmp_path / "no"], "no: no such file or folder"),
        (["import", tmp_path], "expected tokenizer.json, or vocab.json and merges.txt"),
    ]:
        done = run(*args, "-o", tmp_path / "out")
        assert done.exit_code == 1 and text in done.stderr, (done.stderr, done.exception)
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
    assert "no: no such file" in run("show", tmp_path / "no", "--text", "a").stderr
