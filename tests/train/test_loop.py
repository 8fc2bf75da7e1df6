"""The training loop: what it computes, how it goes on, what it refuses."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastlm.hf.weights import load
from fastlm.testing import Pool, error
from fastlm.train import TrainConfig, TrainingError, loop, train
from fastlm.train.batches import IGNORE, Batch
from fastlm.train.checkpoint import Checkpoints, resolve

from . import tiny

TINY = Path(tiny.__file__)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(model=None, out=None, source=None, **changes):
    model = tiny.make() if model is None else model
    options = {k: changes.pop(k) for k in ("validation", "resume", "callbacks") if k in changes}
    settings = tiny.config(**changes)
    result = train(
        model,
        source or tiny.source(),
        settings,
        out=out,
        quiet=True,
        plot=False,
        device="cpu",
        **options,
    )
    return model, result


def same_bits(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


class Cut:
    """The same rows in smaller micro-batches."""

    def __init__(self, whole, parts):
        self.whole, self.parts = whole, parts

    def batch(self, index):
        index, part = divmod(index, self.parts)
        batch = self.whole.batch(index)
        size = -(-len(batch) // self.parts)
        return batch.rows(part * size, min((part + 1) * size, len(batch)))

    def __len__(self):
        return len(self.whole) * self.parts

    def describe(self):
        return {"kind": "cut", "parts": self.parts, **self.whole.describe()}


class Uneven:
    """Rows of which the later ones have more tokens with a loss."""

    def __init__(self, whole):
        self.whole = whole

    def batch(self, index):
        batch = self.whole.batch(index)
        targets = batch.targets.clone()
        for row, values in enumerate(targets):
            values[1 + 3 * row + (index % 2) :] = IGNORE
        return Batch(batch.tokens, targets, batch.cu_seqlens, batch.positions)

    def __len__(self):
        return len(self.whole)

    def describe(self):
        return {}


# ---- what a step computes ----------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_loss_falls(optimizer):
    records = []
    lr = 1e-2 if optimizer == "adamw" else 0.3
    _, result = run(optimizer=optimizer, lr=lr, steps=60, callbacks=[records.append])
    assert result.steps == 60 and result.stopped == "finished"
    assert records[-1]["loss"] < 0.75 * records[0]["loss"]
    assert result.tokens == records[-1]["tokens"] > 0


def gradients(dtype, parts):
    """Of the first step, as SGD without momentum shows them in the weights."""
    model = tiny.make(dtype)
    before = tiny.weights(model)
    settings = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip": None, "warmup": 0}
    whole = Uneven(tiny.source(batch=6))
    source = whole if parts == 1 else Cut(whole, parts)
    run(model, source=source, steps=1, lr=1.0, accumulate=parts, schedule="constant", **settings)
    return {name: before[name] - value for name, value in tiny.weights(model).items()}


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_micro_batches_are_one_large_batch(parts):
    """Though they hold unequal numbers of tokens with a loss."""
    cut = Cut(Uneven(tiny.source(batch=6)), parts)
    assert len({cut.batch(i).counted for i in range(parts)}) == parts
    pool = Pool()
    pool.add(
        gradients(torch.float32, parts), gradients(torch.float32, 1), gradients(torch.float64, 1)
    )
    errors = pool.errors()
    assert all(e.ok for e in errors), "\n".join(map(str, errors))


def test_every_token_weighs_the_same():
    """A step's loss is the mean over its tokens, not the mean of its micro-batches' means."""
    source, records = Cut(Uneven(tiny.source()), 2), []
    model = tiny.make()
    batches = [source.batch(i) for i in range(2)]
    assert batches[1].counted > 2 * batches[0].counted
    with torch.no_grad():
        losses = [model(b.tokens, targets=b.targets, cu_seqlens=b.cu_seqlens,
                        positions=b.positions, reduction="none") for b in batches]  # fmt: skip
    kept = [loss[b.targets != IGNORE] for loss, b in zip(losses, batches, strict=True)]
    mean = torch.cat(kept).double().mean()
    run(model, source=source, steps=1, accumulate=2, callbacks=[records.append])
    torch.testing.assert_close(records[0]["loss"], float(mean), rtol=1e-6, atol=0)


def test_epochs_end_with_an_unequal_step():
    source = tiny.source()
    count = len(source)
    assert count % 3 != 0
    records = []
    _, result = run(epochs=2, accumulate=3, source=source, callbacks=[records.append])
    assert result.steps == -(-2 * count // 3)
    assert records[-1]["epoch"] == 2.0
    tokens = sum(source.batch(i).counted for i in range(2 * count))
    assert result.tokens == tokens  # each of both epochs' tokens once


def test_weight_decay_leaves_norms_and_tables_alone():
    model = tiny.make(norm="layer", positions="learned", tied_head=False, gated=False,
                      activation="gelu", qkv_bias=True)  # fmt: skip
    from fastlm.train.optim import decays

    kept = {n for n, p in model.named_parameters() if not decays(model, n, p)}
    assert {"embed.weight", "positions.weight", "norm.weight", "norm.bias"} <= kept
    assert "blocks.0.attention.qkv.bias" in kept and "head.weight" not in kept
    assert "blocks.0.mlp.up.weight" not in kept
    tied = tiny.make()
    assert decays(tied, "embed.weight", tied.embed.weight)


def test_sgd_decay_is_decoupled():
    """Without gradients a weight shrinks by lr * decay; momentum never sees it."""
    from fastlm.train.optim import SGD

    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = SGD([{"params": [weight], "weight_decay": 0.5}], lr=0.1, momentum=0.9)
    for _ in range(2):
        weight.grad = torch.zeros(2, 2)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.95**2))


@pytest.mark.parametrize("precision", ["bf16", "bf16-pure", "fp16"])
def test_sixteen_bits(precision):
    records = []
    model, _ = run(precision=precision, steps=30, lr=1e-2, callbacks=[records.append])
    expected = torch.bfloat16 if precision == "bf16-pure" else torch.float32
    assert next(model.parameters()).dtype == expected
    assert records[-1]["loss"] < 0.85 * records[0]["loss"]
    plain = []
    run(steps=30, lr=1e-2, callbacks=[plain.append])
    assert records[0]["loss"] == pytest.approx(plain[0]["loss"], rel=2**-6)


def test_an_overflowing_loss_scale_is_halved_and_the_step_left_out(monkeypatch):
    begun = functools.partial(loop.Progress, loss_scale=2.0**40)
    monkeypatch.setattr(loop, "Progress", begun)
    records = []
    model, before = tiny.make(), tiny.weights(tiny.make())
    run(model, precision="fp16", steps=1, callbacks=[records.append])
    assert records[0]["loss_scale"] == 2.0**39
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_checkpointed_activations_change_no_bit():
    plain, _ = run(steps=4)
    again, _ = run(steps=4, activation_checkpointing=True)
    assert same_bits(plain, again)


def test_compiled_it_learns_the_same_and_names_stay(tmp_path):
    """Products and norms of compiled code differ in the last bits."""
    curves = []
    for dtype, changes in (
        (torch.float32, {"compile": True}),
        (torch.float32, {}),
        (torch.float64, {}),
    ):
        records = []
        out = tmp_path if changes else None
        run(tiny.make(dtype, layers=1), out, steps=3, callbacks=[records.append], **changes)
        curves.append(torch.tensor([r["loss"] for r in records], dtype=torch.float64))
    found = error("loss", curves[0].float(), curves[1].float(), curves[2])
    assert found.ok, str(found)
    names = load_file(tmp_path / "latest" / "optimizer.safetensors")
    names |= load_file(tmp_path / "latest" / "model.safetensors")
    assert not any("_orig_mod" in name or name.startswith("module.") for name in names)


def test_a_loss_that_is_not_finite_names_the_step(tmp_path):
    model = tiny.make()

    def spoil(record):
        if record["step"] == 3:
            with torch.no_grad():
                model.norm.weight.fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"step 4: the loss is not finite .*/step-00000002"):
        run(model, tmp_path, callbacks=[spoil], save_every=2)


# ---- going on ----------------------------------------------------------------------------------

SETTINGS = {
    "adamw": {},
    "sgd": {"optimizer": "sgd"},
    "fp16": {"precision": "fp16"},
    "bf16-pure": {"precision": "bf16-pure"},
    "accumulated": {"accumulate": 2, "schedule": "wsd"},
}


class Halt(Exception):
    """Ends a run from a callback, where a killed process would."""


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, name):
    changes = {**SETTINGS[name], "save_every": 5, "validate_every": 7}
    plain, expected = run(out=tmp_path / "a", validation=tiny.validation(), **changes)

    def halt(record):
        if record["step"] == 13:
            raise Halt

    with pytest.raises(Halt):
        run(out=tmp_path / "b", validation=tiny.validation(), callbacks=[halt], **changes)
    torch.manual_seed(77)  # nothing that the first process had in memory
    resumed, result = run(
        tiny.make(seed=5), tmp_path / "b", validation=tiny.validation(), resume=True, **changes
    )
    assert same_bits(plain, resumed)
    for field in ("steps", "tokens", "loss", "best_validation", "best_step"):
        assert getattr(result, field) == getattr(expected, field), field
    logs = []
    for place in "ab":
        lines = (tmp_path / place / "log.jsonl").read_text().splitlines()
        drop = ("tokens_per_s", "left_s", "peak_share")
        logs.append([{k: v for k, v in json.loads(x).items() if k not in drop} for x in lines])
    assert logs[0] == logs[1]
    states = [load_file(tmp_path / x / "latest" / "optimizer.safetensors") for x in "ab"]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_a_resumed_run_keeps_its_kernels(tmp_path, monkeypatch):
    """The measurement of products may come out otherwise; what the run began with stays."""
    from fastlm.ops import _product

    mine = _product.Winners(True, True, True, True, "own")
    monkeypatch.setattr(_product, "_measure", lambda dtype, threads: mine)
    run(out=tmp_path, products="measured", steps=12, schedule="constant")
    monkeypatch.setattr(
        _product,
        "_measure",
        lambda dtype, threads: _product.Winners(False, *[False] * 3, "library"),
    )
    seen = []
    model = tiny.make()
    run(model, tmp_path, products="measured", schedule="constant", resume=True,
        callbacks=[lambda r: seen.append(_product.winners(torch.float32).many)])  # fmt: skip
    assert seen and all(seen)
    assert _product.winners(torch.float32).many is False  # outside nothing stays fixed


def test_killed_at_any_moment(tmp_path):
    """SIGKILL, again and again: every start finds a whole checkpoint, and the end is the same."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.train.tiny"]
    arguments = [f"steps={tiny.STEPS}", "save_every=2", "keep=1"]
    root = TINY.parents[2]

    def start(out):
        return subprocess.Popen(
            [*command, str(out), *arguments], cwd=root, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    undisturbed = start(tmp_path / "a")
    killed, out = 0, tmp_path / "b"
    for moment in range(40):
        process = start(out)
        known = Checkpoints(out).latest()
        until = time.monotonic() + 60
        while process.poll() is None and Checkpoints(out).latest() == known:
            assert time.monotonic() < until
            time.sleep(0.001)
        time.sleep(0.004 * (moment % 7))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        found = Checkpoints(out).latest()
        if found is not None:
            load(found)
            load_file(found / "optimizer.safetensors")
        if killed == 2:
            break
    last = start(out)
    assert last.communicate(timeout=120)[0].split() == ["finished", str(tiny.STEPS)]
    assert undisturbed.wait(120) == 0
    assert killed == 2
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(tmp_path / x / "latest" / name) for x in "ab")
        assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_keeps_it(tmp_path, number):
    def send(record):
        if record["step"] == 9:
            os.kill(os.getpid(), number)

    plain, _ = run()
    before = signal.getsignal(number)
    _, result = run(out=tmp_path, callbacks=[send])
    assert result.stopped == number.name and result.steps == 9
    assert result.checkpoint.name == "step-00000009"
    assert signal.getsignal(number) is before
    resumed, result = run(tiny.make(seed=3), tmp_path, resume=True)
    assert result.stopped == "finished" and same_bits(plain, resumed)


def test_best_and_early_stop(tmp_path):
    settings = {"lr": 0.3, "warmup": 0, "validate_every": 2, "patience": 2, "steps": 200}
    _, result = run(out=tmp_path, validation=tiny.validation(), keep=1, **settings)
    assert result.stopped == "early stop" and result.steps < 200
    assert result.best_step == result.steps - 4
    best = Checkpoints(tmp_path).best()
    assert best.name == f"step-{result.best_step:08}" and resolve(tmp_path) == best
    model = load(best).eval()
    found, tokens = 0.0, 0
    source = tiny.validation()
    for i in range(len(source)):
        b = source.batch(i)
        with torch.no_grad():
            found += float(model(b.tokens, targets=b.targets, cu_seqlens=b.cu_seqlens,
                                 positions=b.positions, reduction="sum"))  # fmt: skip
        tokens += b.counted
    assert found / tokens == result.best_validation


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    run(out=tmp_path, save_every=3, keep=2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000021", "step-00000024"]
    assert (tmp_path / "latest").resolve().name == "step-00000024"
    assert not (tmp_path / "best").exists()


def test_the_clock_saves_too(tmp_path):
    seen = []

    def look(record):
        seen.append(sorted(p.name for p in (tmp_path / "checkpoints").iterdir()))

    run(out=tmp_path, steps=4, save_minutes=1e-9, keep=9, callbacks=[look])
    assert seen[-1] == ["step-00000001", "step-00000002", "step-00000003"]


def test_checkpoints_open_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, result = run(out=tmp_path, steps=3, compile=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "latest")
    names = load_file(result.checkpoint / "model.safetensors")
    assert not any("_orig_mod" in n or n.startswith("module.") for n in names)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        a, b = model(tokens), theirs(tokens).logits
    torch.testing.assert_close(a, b)


# ---- bad input ---------------------------------------------------------------------------------


def test_another_run_is_not_overwritten(tmp_path):
    run(out=tmp_path, steps=2)
    with pytest.raises(TrainingError, match="holds a run already"):
        run(out=tmp_path, steps=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, r"config lr = 0.003, now 0.5"),
        ({"accumulate": 2}, r"config accumulate = 1, now 2"),
        ({"source": tiny.source(block=8)}, r"source block = 16, now 8"),
        ({"source": tiny.source(seed=6)}, r"source seed = 5, now 6"),
        ({"model": tiny.make(hidden=16)}, r"another shape: hidden is 32, the model's is 16"),
        ({"model": tiny.make(layers=1)}, r"another shape: layers is 2, the model's is 1"),
    ],
    ids=("lr", "accumulate", "block", "seed", "hidden", "layers"),
)
def test_a_resume_with_something_else_is_refused(tmp_path, changes, message):
    run(out=tmp_path, steps=2)
    with pytest.raises(TrainingError, match=message):
        run(out=tmp_path, resume=True, **{"steps": 4, **changes})


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path, monkeypatch):
    steps = []
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(TrainingError, match="cannot be written: Not a directory"):
        run(out=blocked / "run", callbacks=[steps.append])
    usage = type("usage", (), {"free": 10_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(TrainingError, match=r"takes \d+ KB .* only 10 KB are free"):
        run(out=tmp_path / "full", callbacks=[steps.append])
    assert not steps


def test_a_model_that_cannot_be_saved_is_found_before_training(tmp_path):
    """Layer norms with rotary positions and gates: no architecture of transformers."""
    steps = []
    with pytest.raises(TrainingError, match="the model could not be saved"):
        run(tiny.make(norm="layer", mlp_bias=True), tmp_path, callbacks=[steps.append])
    assert not steps and not list((tmp_path / "checkpoints").iterdir())


def test_a_disk_that_fills_up_loses_no_checkpoint(tmp_path, monkeypatch):
    save = loop.save_tensors

    def full(engine, tensors, folder, name):
        if folder.name.endswith("8"):
            raise OSError(28, "No space left on device")
        save(engine, tensors, folder, name)

    monkeypatch.setattr(loop, "save_tensors", full)
    with pytest.raises(TrainingError, match=r"step 8: .*No space left.*step-00000004"):
        run(out=tmp_path, save_every=4)
    monkeypatch.undo()
    torch.set_num_threads(1)
    plain, _ = run(save_every=4)
    resumed, _ = run(out=tmp_path, save_every=4, resume=True)
    assert same_bits(plain, resumed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of 1 or more, got 0"),
        ({"steps": 3, "epochs": 1}, "steps or epochs, not both"),
        ({"lr": -1}, "lr must be a number above 0, got -1"),
        ({"lr": float("inf")}, "lr must be finite, got inf"),
        ({"beta1": 1.0}, "beta1 must be a number below 1, got 1.0"),
        ({"schedule": "step"}, "schedule must be one of cosine, wsd"),
        ({"precision": "int8"}, "precision must be one of fp32"),
        ({"accumulate": 0.5}, "accumulate must be a whole number"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)
    with pytest.raises(ValueError, match="unknown setting 'learning_rate'; known are steps"):
        TrainConfig.from_dict({"learning_rate": 1})
