"""fastlm generate."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from fastlm.cli import main
from fastlm.models import Decoder

OPENING = "Once upon a time"


def run(*args: str, **options):
    return CliRunner().invoke(main, ["generate", *args], **options)


def test_continues_the_prompt(stories):
    done = run(str(stories), "--prompt", OPENING, "-n", "30", "--stats")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{OPENING}, there was a little girl named Lily. She")
    assert "4 tokens read, 30 written" in done.stderr
    piped = run(str(stories), "-n", "30", input=OPENING + "\n")
    assert piped.stdout == done.stdout


def test_a_seed_repeats_a_drawn_text(stories):
    args = [str(stories), "-p", OPENING, "-n", "20", "-t", "1", "--top-p", "0.9", "--top-k", "100"]
    first, again, other = (run(*args, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert first == again != other


def test_errors_are_one_line(stories, tmp_path):
    for args, text in [
        ([str(tmp_path), "-p", "x"], f"Error: {tmp_path}/config.json: the file is missing"),
        ([str(stories), "-p", "x", "--chat"], "Error: chat: this checkpoint has no chat template"),
        (
            [str(stories), "-p", "x", "--top-p", "2"],
            "Error: generate: top_p must be in (0, 1], got 2.0",
        ),
        ([str(stories), "-p", ""], "Error: the prompt is empty"),
        ([str(stories), "-p", "x", "--system", "y"], "Error: --system needs --chat"),
        (
            [str(stories), "-p", "x", "--dtype", "int3"],
            "Error: dtype: expected a floating-point dtype",
        ),
    ]:
        done = run(*args)
        assert done.exit_code != 0 and text in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_a_model_without_a_tokenizer_is_named(tmp_path):
    from fastlm.models import Config

    Decoder(Config(vocab=8, hidden=8, layers=1, heads=1)).save_pretrained(tmp_path / "m")
    done = run(str(tmp_path / "m"), "-p", "x")
    assert "tokenizer.json: the file is missing" in done.stderr


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("Once upon a time\nThe\nThere was a little dog named Max. He was\n")
    return file


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("draw", [[], ["-t", "0.9", "--top-p", "0.9", "--min-p", "0.02"]])
def test_prompts_of_a_file_give_the_texts_of_each_alone(stories, prompts, tmp_path, draw):
    target = tmp_path / "out.jsonl"
    args = ["--prompts", str(prompts), "-n", "25", *draw]
    done = run(str(stories), *args, "-o", str(target), "--batch-size", "2")
    assert done.exit_code == 0, done.output
    rows = lines(target.read_text())
    assert rows == lines(run(str(stories), *args).stdout)
    for i, (row, prompt) in enumerate(zip(rows, prompts.read_text().splitlines(), strict=True)):
        alone = run(str(stories), "-p", prompt, "-n", "25", *draw, "--seed", str(i))
        assert alone.stdout == f"{row['prompt']}{row['text']}\n"
        assert (row["tokens"], row["finish"], row["prompt"]) == (25, "length", prompt)


def test_rows_of_json_keep_their_other_keys(byte_model, tmp_path):
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "hi"}]
    given = [{"prompt": "ab", "id": 7}, {"messages": chat, "name": "ü"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    found = lines(run(str(byte_model), "--prompts", str(file), "-n", "5").stdout)
    for row, made in zip(given, found, strict=True):
        assert made.items() >= row.items() and {"text", "tokens", "finish"} <= made.keys()
    alone = run(str(byte_model), "--chat", "-p", "hi", "-n", "5").stdout
    assert alone == found[1]["text"] + "\n"


def test_an_error_leaves_the_old_output(stories, prompts, tmp_path, monkeypatch):
    target = tmp_path / "out.jsonl"
    target.write_text("old")
    monkeypatch.setattr(
        "fastlm.models.text.StopStrings.feed", lambda *_: (_ for _ in ()).throw(ValueError("late"))
    )
    done = run(str(stories), "--prompts", str(prompts), "-n", "3", "-o", str(target))
    assert done.exit_code == 1 and "Error: late" in done.stderr
    assert target.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]


def test_a_stop_string_is_not_printed(stories):
    whole = run(str(stories), "-p", OPENING, "-n", "60").stdout
    stop = "named Lily"  # several tokens
    ended = run(str(stories), "-p", OPENING, "-n", "60", "--stop", stop, "--stop", "zzz")
    assert ended.stdout == whole[: whole.index(stop)] + "\n"


def test_guessing_ahead_changes_nothing(stories, byte_model):
    for path, how in ((stories, ["--dtype", "bfloat16"]), (byte_model, ["--quantize", "int8"])):
        base = [str(path), "-p", OPENING, "-n", "50", *how]
        plain = run(*base, "--stats")
        assert "50 written" in plain.stderr
        for args in (["--lookup", "5"], ["--draft", str(path), "--draft-tokens", "3"]):
            done = run(*base, *args, "--stats")
            assert done.stdout == plain.stdout and "guesses right" in done.stderr


def test_quantized_text_is_that_of_the_quantized_model(byte_model):
    from fastlm.hf import tokenizer
    from fastlm.models.text import complete

    model, text = Decoder.from_pretrained(byte_model), tokenizer.load(byte_model)
    model.quantize(4)
    expected = complete(model, text, [text.encode("abc")], 20)[0].text
    found = run(str(byte_model), "-p", "abc", "-n", "20", "--quantize", "int4")
    assert found.stdout == f"abc{expected}\n"


def test_integers_as_they_are_stored(byte_model, tmp_path):
    model = Decoder.from_pretrained(byte_model).quantize(4)
    model.save_pretrained(tmp_path / "small")
    asked = [str(tmp_path / "small"), "-p", "abc", "-n", "20"]
    expected = run(str(byte_model), *asked[1:], "--quantize", "int4").stdout
    assert run(*asked).stdout == run(*asked, "--quantize", "stored").stdout == expected
    for path, kind, text in (
        (tmp_path / "small", "int8", "the model is held in integers already"),
        (byte_model, "stored", "no weight is of Q8_0, Q4_0, Q4_1 or saved quantized"),
    ):
        done = run(str(path), "-p", "abc", "--quantize", kind)
        assert done.exit_code == 1 and text in done.stderr


def test_more_errors_are_one_line(stories, byte_model, tmp_path):
    path, draft = str(stories), str(byte_model)
    file, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    file.write_text("one\n\nthree\n")
    rows.write_text('{"prompt": "x"}\n{"text": "y"}\n')
    (tmp_path / "long.txt").write_text("x\n" + "word " * 700 + "\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "junk.txt").write_bytes(b"ab\xff\xfe")
    many = [path, "--prompts"]
    for args, text in [
        ([*many, str(file)], "a.txt, line 2: empty; a prompt was expected"),
        ([*many, str(rows)], 'a.jsonl, line 2: expected an object with "prompt"'),
        ([*many, str(tmp_path / "long.txt")], "long.txt, line 2: the prompt must fit max_pos"),
        ([*many, str(tmp_path / "empty.txt")], "empty.txt: no prompts in it"),
        ([*many, str(tmp_path / "junk.txt")], "junk.txt: not UTF-8 at byte 2"),
        ([*many, str(tmp_path / "none.txt")], "does not exist"),
        ([*many, str(file), "-p", "x"], "--prompt and --prompts exclude each other"),
        ([*many, str(file), "--lookup", "3"], "--lookup and --draft take one prompt"),
        ([path, "-p", "x", "-o", "y"], "--output needs --prompts"),
        ([path, "-p", "word " * 700], "the prompt must fit max_positions = 512, got"),
        ([path, "-p", "x", "--stop", ""], "stop must be strings of text, got ''"),
        ([path, "-p", "x", "-t", "-1"], "temperature must be 0 or more, got -1.0"),
        ([path, "-p", "x", "--repetition-penalty", "0"], "repetition_penalty must be above 0"),
        ([path, "-p", "x", "--device", "gpu"], "--device: expected cpu, cuda or cuda:N, got"),
        ([path, "-p", "x", "--lookup", "16"], "PromptLookup: count must be 1 to 15, got 16"),
        ([path, "-p", "x", "--draft", draft], "the vocabulary of the other, 512 tokens, got 272"),
        ([str(tmp_path / "no"), "-p", "x"], "does not exist"),
    ]:
        done = run(*args)
        assert done.exit_code != 0 and text in done.stderr, (args, done.stderr)
        assert "Traceback" not in done.stderr
    if not torch.cuda.is_available():
        done = run(path, "-p", "x", "--device", "cuda")
        assert "--device: cuda is not there, 0 GPUs are" in done.stderr
    done = run(path, input=b"\xff\xfe")
    assert "standard input: not UTF-8 at byte 0" in done.stderr


def test_a_task_fills_its_template(byte_model, stories, tmp_path):
    from fastlm import tasks

    summary = tasks.load("summary")
    done = run(str(byte_model), "--task", "summary", "-p", "A text.", "-n", "6")
    prompt = summary.fill_prompt({"text": "A text."})
    assert done.exit_code == 0, done.output
    assert done.stdout == run(str(byte_model), "--chat", "-p", prompt, "-n", "6").stdout
    asked = ["--set", "question=Who?", "--set", "context=Max ran.", "-n", "3"]
    prompt = tasks.load("question_answering").fill_prompt(
        {"question": "Who?", "context": "Max ran."}
    )
    done = run(str(stories), "--task", "question_answering", *asked)
    assert (
        f"{prompt}{done.stdout}"
        == run(str(stories), "-p", prompt, "-n", "3", "--stop", "\n").stdout
    )
    file = tmp_path / "rows.jsonl"
    file.write_text('{"article": "Max ran."}\n')
    row = lines(
        run(str(byte_model), "--task", "summary", "--prompts", str(file), "-n", "2").stdout
    )[0]
    assert row["article"] == "Max ran." and row["prompt"] == summary.fill_prompt(
        {"text": "Max ran."}
    )


def test_an_adapter_is_put_onto_the_model(byte_model, tmp_path):
    from fastlm.train import lora

    model = Decoder.from_pretrained(byte_model)
    adapter = lora.apply(model, rank=2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    adapter.save(tmp_path / "adapter")
    adapter.merge().save_pretrained(tmp_path / "merged")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "merged" / file).write_bytes((byte_model / file).read_bytes())
    args = ["-p", OPENING, "-n", "20"]
    found = run(str(byte_model), *args, "--adapter", str(tmp_path / "adapter")).stdout
    assert found == run(str(tmp_path / "merged"), *args).stdout
    assert found != run(str(byte_model), *args).stdout


def test_a_tasks_settings_are_defaults(stories):
    story = ["--task", "story", "-p", OPENING, "--stats"]
    drawn = run(str(stories), *story, "-n", "30").stdout
    assert drawn != run(str(stories), *story, "-n", "30", "-t", "0").stdout
    like = ["-t", "0.8", "--top-p", "0.95", "-n", "30", "-p", OPENING]
    assert OPENING + drawn == run(str(stories), *like).stdout


def test_wrong_tasks_are_named(stories, byte_model):
    for args, text in [
        (["--task", "none", "-p", "x"], "task must be one of"),
        (["--task", "question_answering", "-p", "x"], "names the columns context, question, got"),
        (["--task", "summary", "--set", "x"], "--set must be NAME=VALUE, got 'x'"),
        (["--set", "a=b"], "--set needs --task"),
    ]:
        done = run(str(stories), *args, input="")
        assert done.exit_code != 0 and text in done.stderr, (args, done.output)
