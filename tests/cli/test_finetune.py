"""fastlm finetune."""

from __future__ import annotations

import json

import pytest
import torch
from byte_text import byte_text
from click.testing import CliRunner

from fastlm.cli import main
from fastlm.data.template import CHATML
from fastlm.hf import tokenizer
from fastlm.hf.weights import write_json
from fastlm.models import Config, Decoder
from fastlm.train import lora

WORDS = ("one", "two", "six", "ten")


def run(*args: object):
    return CliRunner().invoke(main, ["finetune", *map(str, args)])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of bytes and a chat template, which knows nothing yet."""
    path = tmp_path_factory.mktemp("base")
    text = byte_text()
    torch.manual_seed(0)
    config = Config(text.vocab, 32, 2, 4, kv_heads=2, max_positions=128, eos_ids=(text.vocab - 1,))
    Decoder(config).save_pretrained(path)
    text.tokenizer.save(str(path / "tokenizer.json"))
    write_json(path / "tokenizer_config.json", {"eos_token": "</s>", "chat_template": CHATML})
    write_json(path / "generation_config.json", {"eos_token_id": text.vocab - 1})
    return path


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    made = [{"prompt": word, "completion": word.upper()} for word in WORDS]
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


def answer(path, word: str) -> str:
    model, text = Decoder.from_pretrained(path), tokenizer.load(path)
    tokens = text.chat([{"role": "user", "content": word}])
    return text.decode(model.generate(tokens, 8))


def test_all_weights_learn_the_answers_and_where_they_end(base, rows, tmp_path):
    out = tmp_path / "out"
    done = run(base, rows, "-o", out, "--validation", 0, "--steps", 80, "--lr", 0.02)
    assert done.exit_code == 0, done.output
    assert "finished after 80 steps" in done.stdout and f"written to {out}" in done.stdout
    assert [answer(out, word) for word in WORDS] == ["ONE", "TWO", "SIX", "TEN"]
    # <|im_end|> ends an answer from now on, beside the old end token
    end = tokenizer.load(out).tokenizer.token_to_id("<|im_end|>")
    assert end in Decoder.from_pretrained(out).config.eos_ids
    record = json.loads((out / "finetune.json").read_text())
    assert record["counts"]["conversations"] == 4 and record["steps"] == 80


def test_a_lora_is_written_apart_and_merged(base, rows, tmp_path):
    """Merged or loaded apart, and in transformers: one model."""
    out = tmp_path / "out"
    before = (base / "model.safetensors").read_bytes()
    args = ("--steps", 30, "--lr", 0.03, "--lora-rank", 4, "--validation", 0)
    done = run(base, rows, "-o", out, *args)
    assert done.exit_code == 0, done.output
    assert (base / "model.safetensors").read_bytes() == before
    tokens = torch.arange(3, 30)[None]
    merged = Decoder.from_pretrained(out)(tokens).detach()
    plain = Decoder.from_pretrained(base)
    assert (plain(tokens) - merged).abs().max() > 0.1
    adapter = lora.load(Decoder.from_pretrained(base), out / "adapter")
    assert torch.equal(adapter.merge()(tokens), merged)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    wide = Decoder.from_pretrained(out, "float64")(tokens)
    errors = [(x.double() - wide).square().mean().sqrt() for x in (merged, theirs(tokens).logits)]
    assert errors[0] <= 2 * errors[1]
    only = tmp_path / "only"
    assert run(base, rows, "-o", only, *args, "--no-merge").exit_code == 0
    assert not (only / "config.json").exists()
    assert (only / "adapter" / lora.WEIGHTS).read_bytes() == (
        out / "adapter" / lora.WEIGHTS
    ).read_bytes()


def test_validation_keeps_the_best_and_ends_early(base, rows, tmp_path):
    """Answers that contradict the rows: the more is learnt, the worse they are predicted."""
    watched = tmp_path / "watched.jsonl"
    watched.write_text('{"prompt": "one", "completion": "ZZZZZZ"}\n')
    out = tmp_path / "out"
    done = run(base, rows, "-o", out, "--validation", watched, "--steps", 60, "--lr", 0.03,
               "--validate-every", 3, "--patience", 2)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "early stop after" in done.stdout
    record = json.loads((out / "finetune.json").read_text())
    assert record["steps"] == record["best_step"] + 6 < 60
    best = Decoder.from_pretrained(out / "run" / "best")
    kept = Decoder.from_pretrained(out)
    assert torch.equal(best.embed.weight, kept.embed.weight)


def test_a_resumed_lora_is_that_of_an_undisturbed_run(base, rows, tmp_path):
    args = ("-r", 2, "--lora-dropout", 0.2, "--schedule", "constant", "--validation", 0, "-b", 1)
    args += ("--max-length", 40)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(base, rows, "-o", whole, *args, "--steps", 6).exit_code == 0
    assert run(base, rows, "-o", parts, *args, "--steps", 2).exit_code == 0
    done = run(base, rows, "-o", parts, *args, "--steps", 6, "--resume")
    assert done.exit_code == 0, done.output
    weights = [path / "adapter" / lora.WEIGHTS for path in (whole, parts)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_task_turns_raw_rows_into_answers(base, tmp_path):
    table = tmp_path / "pairs.tsv"
    table.write_text("Go.\tVa !\nRun!\tCours !\n")
    out = tmp_path / "out"
    args = ("--task", "translation", "--template", "plain", "--validation", 0, "--steps", 2)
    done = run(base, table, "-o", out, *args)
    assert done.exit_code == 0, done.output
    record = json.loads((out / "finetune.json").read_text())
    assert record["task"] == "translation"
    # " Va !</s>" and " Cours !</s>" in bytes, less the spaces that stand for themselves
    text = tokenizer.load(base)
    assert record["counts"]["tokens_of_answers"] == sum(
        len(text.encode(answer)) for answer in (" Va !</s>", " Cours !</s>")
    )


def test_bad_rows_are_named_or_left_out(base, rows, tmp_path):
    with open(rows, "a") as file:
        file.write(json.dumps({"prompt": "x" * 200, "completion": "y"}) + "\n")
    out = tmp_path / "out"
    done = run(base, rows, "-o", out, "--validation", 0)
    assert (
        done.exit_code != 0 and f"{rows}:5: cut to 128 tokens nothing of the answer" in done.stderr
    )
    assert not out.exists()
    done = run(base, rows, "-o", out, "--validation", 0, "--steps", 1, "--drop-bad-rows")
    assert done.exit_code == 0 and f"left out: {rows}:5" in done.stderr


def test_errors_are_one_line(base, rows, tmp_path):
    empty, bare = tmp_path / "empty.jsonl", tmp_path / "bare.jsonl"
    empty.write_text("")
    bare.write_text('{"text": "no answer"}\n')
    out = tmp_path / "out"
    for args, message in [
        ((base, empty), f"{empty}: holds no rows"),
        ((base, bare, "--validation", 0), f"{bare}:1: expected the columns messages"),
        ((base, rows, "--validation", 0.001), "4 rows leave none for validation"),
        ((base, rows, "--validation", 1.5), "share must be at least 0 and below 1"),
        ((base, rows, "--validation", "no.jsonl"), "no.jsonl: no such file"),
        ((base, rows, "--template", "no.jinja"), "--template must be chatml, plain or a file"),
        ((base, rows, "--task", "poetry"), "task must be one of"),
        ((base, rows, "--validation", 0, "-r", 2, "--lora-targets", "q"), "targets must be among"),
        ((base, rows, "--lr", -1), "lr must be a number above 0"),
        ((base, rows, "--validation", 0, "--out", base), "needs a directory of its own"),
    ]:
        done = run(*args, *(() if "--out" in args else ("--out", out)))
        assert done.exit_code != 0 and message in done.stderr, (args, done.stderr)
        assert "Traceback" not in done.stderr and not (out / "config.json").exists()
    # a second run into the same folder would mix two, and another model is not overwritten
    assert run(base, rows, "-o", out, "--validation", 0, "--steps", 1).exit_code == 0
    again = run(base, rows, "-o", out, "--validation", 0, "--steps", 1)
    assert again.exit_code != 0 and f"{out}: holds a model already" in again.stderr
