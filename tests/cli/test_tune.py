"""fastlm tune: cases, shapes and models, with made-up times."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import fastlm.tune
from fastlm import ops
from fastlm.cli import main
from fastlm.ops import _measured, _registry

pytestmark = pytest.mark.skipif("cpu" not in ops.implementations("linear"), reason="no kernels")
LINEAR = ["--op", "linear", "--shape", "70x32x48"]


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("FASTLM_TUNE_FILE", str(path))
    _measured.reload()
    _registry.forget()
    yield path
    _measured.reload()
    _registry.forget()


@pytest.fixture(autouse=True)
def times(monkeypatch):
    """Every implementation is twice as fast as the one before it in the list."""
    monkeypatch.setattr(
        fastlm.tune,
        "_interleave",
        lambda verdict, names, *rest: {name: 80.0 / 2**i for i, name in enumerate(names)},
    )


def tune(*arguments: object):
    return CliRunner().invoke(main, ["tune", *map(str, arguments)])


def test_a_shape_is_measured_kept_and_shown(table):
    result = tune(*LINEAR)
    assert result.exit_code == 0, result.output
    assert "4 cases, 13 s at the most" in result.output
    assert "4 classes of calls measured" in result.output
    (section,) = json.loads(table.read_text())["sections"]
    assert section["for"] == _measured.identity("cpu")
    classes = section["verdicts"]["linear"]["bfloat16, rows=over 64, transposed=False"]
    assert list(classes) == ["65-128 x 32 x 48", "65-128 x 32 x 48, with gradients"]
    assert classes["65-128 x 32 x 48"]["winner"] == "torch"
    assert "65-128 x 32 x 48 (float32, rows=over 64" in tune("--show").output
    assert "nothing to measure" in tune(*LINEAR).output
    assert "4 classes of calls measured" in tune(*LINEAR, "--again").output
    assert "removed" in tune("--clear").output
    assert not table.exists()
    assert "nothing was measured here yet" in tune("--show").output


def test_every_operator_with_two_implementations_can_be_tuned(table):
    from benchmarks import custom

    for op, form in custom.FORMS.items():
        size = "32" if op == "quantized_linear" else "2"
        numbers = [size] * (form.names.count("x") + 1)
        result = tune("--op", op, "--shape", "x".join(numbers))
        assert result.exit_code == 0 and "failed" not in result.output, result.output
    kept = json.loads(table.read_text())["sections"][0]["verdicts"]
    assert {"rms_norm", "rope", "attention", "decode_attention", "linear_cross_entropy"} <= {*kept}


def test_a_model_tunes_the_calls_it_makes(byte_model, table):
    result = tune("--model", byte_model)
    assert result.exit_code == 0, result.output
    kept = json.loads(table.read_text())["sections"][0]["verdicts"]
    assert {"rms_norm", "linear", "attention", "decode_attention", "linear_cross_entropy"} <= {
        *kept
    }
    sizes = {name for classes in kept["linear"].values() for name in classes}
    assert any(name.startswith("1 x ") for name in sizes)  # decoding
    assert any(name.startswith("65-128 x ") for name in sizes)  # the prompt
    assert any(name.endswith("with gradients") for name in sizes)  # training


def test_what_is_measured_is_kept_when_it_is_interrupted(table, monkeypatch):
    measure, calls = fastlm.tune.measure, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(fastlm.tune, "measure", interrupted)
    result = tune(*LINEAR)
    assert "2 classes of calls measured" in result.output, result.output
    assert len(_measured.load(table)[0]["verdicts"]["linear"]) == 2


@pytest.mark.parametrize("arguments", [LINEAR, ["--model", "."], []], ids=str)
def test_a_dry_run_measures_nothing(arguments, table):
    result = tune(*arguments, "--dry-run")
    assert result.exit_code == 0 and "s at the most" in result.output, result.output
    assert not table.exists()


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--op", "norm"], "--op: expected one of rms_norm"),
        (["--op", "rms_norm", "--shape", "3"], "shape must be ROWSxWIDTH"),
        (["--shape", "3x4"], "--shape needs exactly one --op"),
        (["--model", ".", "--op", "rope"], "--model goes without --op"),
        (["--dtype", "float32"], "--dtype goes with --model"),
        (["--model", "nowhere"], "does not exist"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_bad_input_is_refused(arguments, text):
    result = tune(*arguments)
    assert result.exit_code != 0 and text in result.output, result.output


def test_a_file_of_another_kind_is_not_written_over(table):
    table.write_text("my notes")
    result = tune(*LINEAR)
    assert result.exit_code != 0 and f"{table}: not a table" in result.output
    assert table.read_text() == "my notes"


def test_a_result_file_says_whether_the_run_was_tuned(monkeypatch):
    from benchmarks import driver, machine, session, timing

    monkeypatch.setattr(machine, "probe", lambda realtime: machine.Limits([], {}))
    monkeypatch.setattr(machine, "use_allocator", lambda keep: "malloc as it is")
    tune(*LINEAR)
    content, _ = session.measure([], session.Plan(), lambda text: None)
    assert content["settings"]["tuned"] == 4
    times = {"ours": timing.Times.of([1e-6])}
    timed = driver.Outcome(None, "timed", backend="torch", times=times)
    assert "1 cases ran PyTorch's own kernels" in session.summary([timed])
