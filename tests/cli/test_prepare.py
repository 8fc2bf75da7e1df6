"""fastlm prepare."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from fastlm.cli import main
from fastlm.data.shards import TokenDataset, read_manifest


def run(*args: object):
    return CliRunner().invoke(main, ["prepare", *map(str, args)])


@pytest.fixture
def stories(tmp_path):
    file = tmp_path / "stories.txt"
    texts = [f"Story {i}: " + " ".join(f"w{i * j % 97}" for j in range(40)) for i in range(30)]
    file.write_text("\n<|endoftext|>\n".join(texts))
    return file


def test_text_to_shards(stories, tmp_path):
    out = tmp_path / "out"
    done = run(stories, "--separator", "<|endoftext|>", "-o", out, "-t", "char")
    assert done.exit_code == 0, done.output
    assert "documents:   30 read, 30 kept" in done.stdout
    assert done.stdout.splitlines()[-1] == str(out)
    assert done.stderr == "", "nothing is drawn where no terminal is"
    assert (len(TokenDataset(out, "train")), len(TokenDataset(out, "validation"))) == (27, 3)
    assert read_manifest(out)["command"].startswith("fastlm")
    again = run(stories, "-o", out, "-t", "byte")
    assert again.exit_code == 1
    assert f"Error: {out}: the folder exists; --overwrite replaces it" in again.stderr
    assert len(TokenDataset(out, "train")) == 27
    assert run(stories, "-o", out, "-t", "byte", "--overwrite").exit_code == 0
    assert len(TokenDataset(out, "train")) == 1


def test_every_option_arrives(tmp_path):
    rows = ["A B c d e f", "a\u0301 12", "x" * 30 + " y", "n\nn\nn\nn m", "A B c d e f", "zzz yyy"]
    file = tmp_path / "rows.ndjson"
    file.write_text("".join(json.dumps({"body": row}) + "\n" for row in rows * 2))
    options = [
        "--text-field", "body", "--normalize", "nfkc", "--lowercase", "--min-chars", "2",
        "--max-chars", "40", "--min-letters", "0.5", "--max-repeated-lines", "0.4",
        "--max-word", "20", "--near-dedup", "off", "--no-exact-dedup", "--validation", "0.3",
        "--split", "tail", "--seed", "3", "--near-words", "2", "--encoding", "utf-8",
        "--errors", "replace", "--no-eos", "--include", "*.x",
    ]  # fmt: skip
    done = run(file, "-o", tmp_path / "o", "-t", "byte", *options)
    assert done.exit_code == 0, done.output
    manifest = read_manifest(tmp_path / "o")
    assert manifest["options"] == {
        "separator": None, "text_field": "body", "include": ["*.x"], "encoding": "utf-8",
        "errors": "replace", "normalize": "nfkc", "lowercase": True, "min_chars": 2,
        "max_chars": 40, "min_letters": 0.5, "max_repeated_lines": 0.4, "max_word": 20,
        "exact": False, "near": None, "near_words": 2, "validation": 0.3, "split": "tail",
        "seed": 3, "bos": False, "tokenizer": "byte",
    }  # fmt: skip
    assert manifest["eos"] is None
    assert manifest["documents"]["kept"] == 6
    assert {k: v["documents"] for k, v in manifest["documents"]["dropped"].items()} == {
        "min_letters": 2, "max_word": 2, "max_repeated_lines": 2,
    }  # fmt: skip
    assert "2 by min_letters, such as" in done.stdout and "letters 0.33, less than" in done.stdout


def test_separators_are_spelled_with_backslashes(tmp_path):
    (tmp_path / "a.txt").write_text("one\tx\n\ntwo\n\nthree")
    run(tmp_path, "-o", tmp_path / "o", "-t", "byte", "--separator", r"\n\n")
    manifest = read_manifest(tmp_path / "o")
    assert manifest["documents"]["read"] == 3


def test_notes_go_to_standard_error(tmp_path):
    (tmp_path / "a.txt").write_text("one <|endoftext|> two")
    (tmp_path / "b.log").write_text("x")
    done = run(tmp_path, "-o", tmp_path / "o", "-t", "byte")
    assert "note: files passed over for their names: 1 (--include chooses)" in done.stderr
    assert "note: documents in which <|endoftext|> stands as text: 1;" in done.stderr


def test_errors_are_one_line(stories, tmp_path):
    (tmp_path / "junk.txt").write_bytes(b"ok \xff")
    for args, text in [
        ([tmp_path / "no.txt", "-t", "byte"], "no.txt: No such file or directory"),
        ([tmp_path / "junk.txt", "-t", "byte"], "junk.txt: byte 3 is not utf-8 (ff: invalid st"),
        ([stories, "-t", tmp_path / "no"], "no: no such file or folder"),
        ([stories, "-t", tmp_path], "expected tokenizer.json, or vocab.json and merges.txt"),
        ([stories, "-t", "byte", "--bos"], "it has no bos_token; leave out --bos"),
        ([stories, "-t", "byte", "--near-dedup", "lots"], "expected off or a number in (0, 1]"),
        ([stories, "-t", "byte", "--near-dedup", "7"], "threshold must be in (0, 1], got 7.0"),
        ([stories, "-t", "byte", "--validation", "1"], "validation must be in [0, 1), got 1.0"),
        ([stories, "-t", "byte", "--separator", ""], "the separator must not be empty"),
        ([stories, "-t", "byte", "--min-chars", "9999"], "no text to keep; dropped: 1 min_chars"),
        ([stories], "Missing option '--tokenizer'"),
        (["-t", "byte"], "Missing argument 'SOURCES...'"),
    ]:
        done = run(*args, "-o", tmp_path / "out")
        assert done.exit_code != 0 and text in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
