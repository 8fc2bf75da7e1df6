"""fastlm eval."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from fastlm.cli import main
from fastlm.models import Config, Decoder
from fastlm.train import lora


def run(*args: object):
    return CliRunner().invoke(main, ["eval", *map(str, args)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of bytes, with its tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate([*letters, "</s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("model")
    config = Config(257, 16, 1, 2, max_positions=256, eos_ids=(256,))
    Decoder(config).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return path


def test_texts_and_tasks_in_one_run(folder, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one|two\n|")
    questions = tmp_path / "q.jsonl"
    row = {"query": "So", "choices": ["a", "b"], "gold": 0}
    questions.write_text(
        "".join(json.dumps({**row, "query": f"So {i}", "gold": i % 2}) + "\n" for i in range(9))
    )
    out = tmp_path / "out.json"
    done = run(folder, "--text", text, "--separator", "|", "--task", questions, "--limit", 4,
               "--out", out, "--samples")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.stdout and "acc_norm" in done.stdout and "±" in done.stdout
    first, second = json.loads(out.read_text())["results"]
    assert first["documents"] == 2 and first["tokens"] == first["bytes"] == 6
    assert second["rows"] == len(second["samples"]) == 4 and "acc_stderr" in second["scores"]
    again = tmp_path / "again.json"
    run(folder, "--task", questions, "--limit", 4, "--batch-size", 1, "--out", again)
    assert json.loads(again.read_text())["results"][0]["scores"] == second["scores"]


def test_a_named_task_on_raw_rows_and_both_sides_of_the_split(folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"text": f"film {i}", "label": ["negative", "positive"][i % 2]} for i in range(40)]
    data.write_text("\n".join(map(json.dumps, rows)))
    sizes = []
    for side in ("train", "validation", "all"):
        out = tmp_path / f"{side}.json"
        args = ("--task", "sentiment", "--data", data, "--split", side, "--validation", 0.25)
        done = run(folder, *args, "--out", out)
        assert done.exit_code == 0, done.output
        sizes.append(json.loads(out.read_text())["results"][0]["rows"])
    assert sizes[0] + sizes[1] == sizes[2] == 40 and 3 < sizes[1] < 20


def test_an_adapter_is_merged_first(folder, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("hello")
    adapter = lora.apply(Decoder.from_pretrained(folder), 2)
    for parameter in adapter.parameters():
        parameter.data.fill_(0.5)
    adapter.save(tmp_path / "adapter")
    plain = run(folder, "--text", text)
    tuned = run(folder, "--text", text, "--adapter", tmp_path / "adapter")
    assert tuned.exit_code == 0, tuned.output
    assert tuned.stdout != plain.stdout


def test_lists_tasks():
    done = run("--list")
    assert done.exit_code == 0 and "sentiment" in done.stdout and "translation" in done.stdout


def test_errors_are_one_line(folder, tmp_path):
    empty, junk, rows = (tmp_path / n for n in ("empty.txt", "junk.txt", "rows.jsonl"))
    empty.write_text("")
    junk.write_bytes(b"abc\xff")
    rows.write_text('{"colour": 1}\n')
    for args, message in [
        ((folder,), "give --text or --task"),
        ((folder, "--text", empty), f"{empty}: the file is empty"),
        ((folder, "--text", junk), f"{junk}: not UTF-8 text at byte 3"),
        ((folder, "--text", junk, "--stride", "0"), "0 is not in the range"),
        ((folder, "--text", rows, "--out", tmp_path / "no" / "a.json"), "its folder is not there"),
        ((folder, "--task", "poetry"), "task must be one of arc_easy"),
        ((folder, "--task", "copa"), "task copa: give its rows with --data"),
        ((folder, "--task", rows), f"{rows}: expected the columns query"),
        ((folder, "--task", tmp_path / "no.jsonl"), "no.jsonl: no such file"),
        ((folder, "--task", "copa", "--data", rows), "no list in the column 'choices'"),
        ((folder, "--task", "sentiment", "--data", rows, "--chat"), "no chat template"),
    ]:
        done = run(*args)
        assert done.exit_code != 0 and message in done.stderr, (args, done.stderr)
        assert "Traceback" not in done.stderr


def test_a_missing_package_is_told_before_the_work(folder, tmp_path, monkeypatch):
    import sys

    table = tmp_path / "a.tsv"
    table.write_text("Go.\tVa !\n")
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setattr(Decoder, "stream", None)  # nothing is generated
    done = run(folder, "--task", "translation", "--data", table)
    assert done.exit_code == 1 and "pip install 'fastlm[metrics]'" in done.stderr
