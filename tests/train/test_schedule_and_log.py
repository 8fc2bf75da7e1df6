"""The learning rate's course, and what a run says of itself."""

from __future__ import annotations

import builtins
import io
import json

import pytest

from fastlm.train import TrainConfig
from fastlm.train.log import RunLog, duration, flops_per_token, read_log, sparkline
from fastlm.train.schedule import learning_rate
from fastlm.train.shapes import PRESETS, parse

from . import tiny


def course(total=100, **changes):
    config = TrainConfig(steps=total, lr=1.0, **changes)
    return [learning_rate(config, step, total) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_courses_rise_over_the_warmup_and_end_at_the_floor(schedule):
    rates = course(schedule=schedule, warmup=10, min_lr=0.25)
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == rates[9] == 1.0
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.25)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_courses_between():
    assert course(schedule="wsd", warmup=0, decay=0.2)[79] == 1.0
    assert course(schedule="wsd", warmup=0, decay=0.2, min_lr=0.0)[89] == pytest.approx(0.5)
    assert course(schedule="linear", warmup=0, min_lr=0.0)[49] == pytest.approx(0.5)
    assert course(schedule="cosine", warmup=20, min_lr=0.0)[59] == pytest.approx(0.5)
    assert course(schedule="cosine")[9] == 1.0  # by default a tenth warms up


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_courses_of_few_steps_have_a_rate(schedule, total):
    assert all(0 < rate <= 1 for rate in course(total, schedule=schedule, warmup=total - 1))


def record(step, loss=2.0, **more):
    return {"step": step, "steps": 9, "loss": loss, "lr": 0.1, "tokens_per_s": 10.0, "left_s": 3.0,
            **more}  # fmt: skip


def test_log_is_json_whatever_the_loss(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, show=False)
    log.add(record(1, float("nan")))
    log.close()
    assert json.loads(path.read_text())["loss"] is None


def test_a_resumed_log_forgets_what_is_done_again(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(record(s)) + "\n" for s in range(1, 6)) + '{"step": 6, "lo')
    log = RunLog(path, 3, show=False)
    log.add(record(4, 1.5))
    log.close()
    assert [(r["step"], r["loss"]) for r in read_log(path)] == [(1, 2), (2, 2), (3, 2), (4, 1.5)]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is no JSON: 'nonsense'"):
        read_log(path)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_are_overwritten_on_a_terminal_only():
    for stream, ends in ((io.StringIO(), 2), (Terminal(), 0)):
        log = RunLog(None, stream=stream)
        log.add(record(1, grad_norm=1.0, peak_share=0.5))
        log.add(record(2))
        assert stream.getvalue().count("\n") == ends
        assert "step 2/9" in stream.getvalue() and "50% of peak" in stream.getvalue()


def test_curves():
    log = RunLog(None, show=False)
    assert log.curve() == ""
    for step in range(1, 200):
        log.add(record(step, 5.0 / step))
    lines = log.curve(width=40, height=4).splitlines()
    assert len(lines) == 6 and max(map(len, lines)) <= 56
    assert lines[0].count("█") + lines[0].count("▇") <= 2 and "steps" in lines[-1]
    assert sparkline([1.0, 2.0], 8) == "▁█"
    assert sparkline([1.0], 8) == "▁" and sparkline([], 8) == ""
    assert [duration(s) for s in (7, 200, 3720)] == ["7s", "3m20s", "1h02m"]


def test_without_matplotlib_the_run_ends_well(tmp_path, monkeypatch):
    find = builtins.__import__

    def missing(name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return find(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    stream = io.StringIO()
    RunLog(None, stream=stream).end(tmp_path / "plot.png")
    assert "no plot: matplotlib is not installed (pip install 'fastlm[demo]')" in stream.getvalue()


def test_arithmetic_is_counted():
    model = tiny.make()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    attention = 3 * 4 * 2 * 32 * 8  # layers, width, half of 16 keys
    assert flops_per_token(model, 16) == 6 * matrices + attention
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert flops_per_token(model, 16) == 4 * matrices + attention


def test_shapes():
    assert parse("15M,layers=4")["layers"] == 4 and parse("15M")["hidden"] == 288
    fields = parse("hidden=8, layers=1, heads=2, gated=false, norm=layer, rope_theta=5e5")
    assert fields["gated"] is False and fields["norm"] == "layer" and fields["rope_theta"] == 5e5
    for preset in PRESETS:
        parse(preset)
    for text, message in (
        ("hidden=8", "layers, heads must be given"),
        ("tiny,layers=four", "layers must be a value of type int, got 'four'"),
        ("tiny,gated=1", "gated must be true or false"),
        ("vocab=3", "unknown field 'vocab'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(text)
