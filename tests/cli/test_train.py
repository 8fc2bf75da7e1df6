"""fastlm train, from a folder of tokens to a model that transformers opens."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from fastlm.cli import main
from fastlm.data.shards import SplitWriter, write_manifest

LETTERS = "abcdefghijklmnopqrstuvwxyz ."
SMALL = ["--shape", "hidden=32,layers=1,heads=2", "--block", "16", "--batch", "4"]
SMALL += ["--products", "own", "--threads", "1", "--device", "cpu"]


def tokens_folder(folder, letters=LETTERS, documents=40):
    """What `fastlm prepare` writes, of a text of letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {letter: i for i, letter in enumerate([*letters, "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    splits = {}
    for split, count in (("train", documents), ("validation", documents // 4)):
        writer = SplitWriter(folder, split, len(vocab))
        for i in range(count):
            text = f"the cat {'sat and ' * (i % 5)}ran to the mat. "
            writer.append([vocab[c] for c in text if c in vocab])
        splits[split] = writer.close()
    write_manifest(folder, splits=splits, vocab=len(vocab), eos=None)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tokens_folder(tmp_path_factory.mktemp("tokens"))


def train(*arguments):
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def records(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_from_tokens_to_a_model(tokens, tmp_path):
    run = tmp_path / "run"
    result = train(tokens, "--out", run, *SMALL, "--steps", 40, "--lr", 1e-2)
    assert result.exit_code == 0, result.output
    assert "finished at step 40" in result.output and "best validation" in result.output
    found = records(run)
    losses = [r["loss"] for r in found if "loss" in r]
    assert losses[-1] < losses[0] / 1.5
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_s", "peak_share"} <= set(found[1])
    assert found[-1]["validation"] == min(r["validation"] for r in found if "validation" in r)
    if importlib.util.find_spec("matplotlib"):
        assert (run / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert (run / "best" / "tokenizer.json").is_file()
    text = CliRunner().invoke(main, ["generate", str(run / "best"), "-p", "the cat ", "-n", "8"])
    assert text.exit_code == 0 and len(text.output) > 12

    # no --block: the run's 16, not 256
    more = train(tokens, "--out", tmp_path / "more", "--init", run, *SMALL[4:], "--steps", 2,
                 "--lr", "1e-4")  # fmt: skip
    assert more.exit_code == 0, more.output
    assert records(tmp_path / "more")[1]["loss"] < losses[0] / 1.5


def test_a_run_goes_on_by_its_folder_alone(tokens, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = [*SMALL, "--steps", 12, "--schedule", "constant", "--save-every", 4]
    assert train(tokens, "--out", whole, *settings).exit_code == 0
    first = train(tokens, "--out", parts, *settings, "--steps", 6)
    assert first.exit_code == 0, first.output
    again = train("--out", parts, *SMALL[6:], "--resume", "--steps", 12)
    assert again.exit_code == 0, again.output
    assert "resumed from" in again.output
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(x / "latest" / name) for x in (whole, parts))
        assert all((v == b[k]).all() for k, v in a.items())


def test_settings_from_a_file(tokens, tmp_path):
    file = tmp_path / "settings.json"
    values = {"shape": "hidden=32,layers=1,heads=2", "block": 16, "batch": 4, "steps": 3, "lr": 0.1}
    file.write_text(json.dumps(values))
    result = train(tokens, "--out", tmp_path / "run", "--config", file, "--lr", "0.01", *SMALL[6:])
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["config"]["lr"] == 0.01 and stored["config"]["steps"] == 3
    file.write_text('{"learning_rate": 1}')
    result = train(tokens, "--out", tmp_path / "other", "--config", file)
    assert result.exit_code == 1 and "unknown setting 'learning_rate'" in result.output
    assert not (tmp_path / "other").exists()


def test_terminated_it_keeps_the_step_and_says_how_to_go_on(tokens, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "fastlm", "train", str(tokens), "--out", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *SMALL, "--steps", "100000", "--log-every", "1"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (run / "log.jsonl").exists() or len(records_so_far(run)) < 4:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in err and f"--out {run} --resume" in out
    trainer = json.loads((run / "latest" / "trainer.json").read_text())
    assert trainer["progress"]["step"] == records(run)[-1]["step"]


def records_so_far(run):
    return (run / "log.jsonl").read_text().splitlines()


def test_bad_input_is_named(tokens, tmp_path):
    run = tmp_path / "run"

    def message(*arguments):
        result = train(*arguments)
        assert result.exit_code in (1, 2), result.output
        return " ".join(result.output.split())

    assert "no such folder" in message(tmp_path / "absent", "--out", run)
    assert "DATA is missing" in message("--out", run)
    assert "smaller than one block" in message(tokens, "--out", run, "--block", 100_000)
    assert "shape: expected one of tiny" in message(tokens, "--out", run, "--shape", "huge")
    assert "unknown field 'depth'" in message(tokens, "--out", run, "--shape", "tiny,depth=3")
    assert "steps or epochs" in message(tokens, "--out", run, "--steps", 3, "--epochs", 1)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "cannot be written" in message(tokens, "--out", blocked / "run", *SMALL)
    assert not (run / "checkpoints").exists()
    assert train(tokens, "--out", run, *SMALL, "--steps", 1).exit_code == 0
    assert "holds a run already" in message(tokens, "--out", run, *SMALL, "--steps", 1)
    other = tokens_folder(tmp_path / "other", LETTERS[::-1])
    words = message(other, "--out", tmp_path / "next", "--init", run, "--block", 16)
    assert "its tokenizer is not that of" in words and "prepare the text with" in words
    assert "beyond the model's 16 positions" in message(
        tokens, "--out", tmp_path / "next", "--init", run, "--block", 32
    )
    assert "source block = 16, now 8" in message("--out", run, "--resume", "--block", 8)
    assert "config lr = 0.001, now 0.1" in message("--out", run, "--resume", "--lr", 0.1)
