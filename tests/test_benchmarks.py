"""The benchmarks: right results are timed and recorded, wrong ones are not."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import case as cases
from benchmarks import driver, machine, report, results_file, session, timing
from benchmarks.__main__ import main
from benchmarks.case import Case, Work
from benchmarks.session import line, summary
from benchmarks.timing import Times, interleave

ROOT = Path(__file__).resolve().parent.parent
LIMITS = machine.Limits(
    [("L2", 2**20, 400.0), ("L3", 2**24, 200.0), ("memory", 2**62, 50.0)],
    {"fp32": 200.0, "bf16": 400.0},
)


def softmax_case(scale: float = 1.0, **facts) -> Case:
    def build() -> Work:
        return Work(
            (torch.randn(4, 16),),
            lambda x: F.softmax(x, -1) * scale,
            lambda x: F.softmax(x, -1),
            lambda x: F.softmax(x, -1),
        )

    defaults = {"dtype": "fp32", "backward": True, "bytes": 512, "flops": 640}
    return Case("softmax", "4x16", build=build, **(defaults | facts))


def run(case: Case, **settings) -> driver.Outcome:
    return driver.run(case, LIMITS, seconds=0.02, **settings)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("cold", [False, True])
def test_a_right_result_is_timed(backward, cold):
    outcome = run(softmax_case(backward=backward, cold=cold, bytes=2**22))
    assert outcome.status == "timed", outcome.note
    assert set(outcome.times) == {"ours", "eager"}
    assert all(t.samples >= 5 and t.p25 <= t.median <= t.p75 for t in outcome.times.values())
    assert "x eager" in line(outcome)


def test_a_wrong_result_is_not_timed():
    outcome = run(softmax_case(scale=1.001))
    assert outcome.status == "wrong" and not outcome.times
    assert "TOO LARGE" in outcome.note and "TOO LARGE" in line(outcome)
    assert "1 cases gave a wrong result" in summary([outcome])


def test_a_failing_implementation_is_reported():
    def build() -> Work:
        raise RuntimeError("no such kernel")

    outcome = run(Case("softmax", "4x16", "fp32", False, 1, 1, build))
    assert outcome.status == "error" and "no such kernel" in outcome.note


def test_an_operator_without_a_kernel_of_its_own_is_timed_only_when_asked_for():
    case = next(c for c in cases.load(["linear_cross_entropy"]) if c.shape == "16x288x1000")
    from fastlm import ops

    with ops.use_backend("reference"):
        assert run(case).status == "reference"
        assert run(case, reference=True).status == "timed"


def test_turns_are_fair_and_samples_are_counted():
    seen = []
    thunks = {
        "a": [lambda: seen.append("a0"), lambda: seen.append("a1")],
        "b": [torch.zeros(1).sum],
    }
    times = interleave(thunks, seconds=0.01)
    assert abs(seen.count("a0") - seen.count("a1")) <= 1
    assert times["a"].samples >= 5 and times["a"].least > 0


def test_a_long_call_is_made_no_more_often_than_it_is_timed():
    seen = []

    def long():
        seen.append(1)
        time.sleep(timing.LONG)

    times = interleave({"a": [long]}, seconds=0.01)["a"]
    assert (
        times.samples + times.disturbed == len(seen) - 2
    )  # once before, once to see that it is long
    assert times.least > 1e6 * timing.LONG


def test_a_slow_call_is_timed_twice_while_others_go_on(monkeypatch):
    monkeypatch.setattr(timing, "SLOW", 0.02)
    seen = []

    def slow():
        seen.append(1)
        time.sleep(0.03)

    times = interleave({"slow": [slow], "quick": [torch.zeros(1).sum]}, seconds=0.05)
    assert len(seen) == 3 and times["slow"].samples == 2
    assert times["quick"].samples >= 5


def test_operators_share_the_time_of_a_run(monkeypatch):
    """Two slow cases at the beginning cost those after them nothing."""
    clock = itertools.count(0, 0.01)
    monkeypatch.setattr(session.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(machine, "probe", lambda realtime: LIMITS)
    ran = []

    def run(case, *args, **kw):
        nonlocal clock
        ran.append(case.id)
        clock = itertools.count(next(clock) + (3.0 if case.op == "slow" else 0.5), 0.01)
        return driver.Outcome(case, "timed", times={"ours": Times.of([1e-6])})

    monkeypatch.setattr(driver, "run", run)
    each = [
        Case(op, str(n), "fp32", False, 1, 1, softmax_case)
        for op, count in (("slow", 4), ("quick", 4), ("last", 2))
        for n in range(count)
    ]
    _, outcomes = session.measure(each, session.Plan(budget=10), lambda text: None)
    assert [o.case.op for o in outcomes if o.status == "skipped"] == ["slow", "slow"]
    assert len(ran) == 8


def test_what_the_host_took_away_counts_as_waiting(monkeypatch):
    stolen = iter([1.0, 1.25])
    monkeypatch.setattr(timing, "_stolen", lambda: next(stolen))
    _, waited = timing._sample(itertools.cycle([torch.zeros(1).sum]), 3, realtime=False)
    assert waited >= 0.25


def test_of_two_rounds_the_calmer_one_counts():
    def outcome(*microseconds):
        times = {"ours": Times.of([1e-6 * us for us in microseconds])}
        return driver.Outcome(cases.load(["rope"])[0], "timed", times=times)

    restless, calm = outcome(1, 5, 9), outcome(7, 7.1, 7.2)
    assert session.calmest(restless, calm, 2) is calm and calm.rounds == 2
    assert session.calmest(calm, restless, 3) is calm and calm.rounds == 3
    assert calm.record()["rounds"] == 3
    failed = driver.Outcome(calm.case, "error", "no memory")
    assert session.calmest(restless, failed, 2) is restless


def test_quartiles_of_known_samples():
    times = Times.of([1e-6, 2e-6, 3e-6, 4e-6, 5e-6])
    assert (times.median, times.least, times.samples) == (pytest.approx(3.0), pytest.approx(1.0), 5)


def test_floor_is_the_larger_of_bytes_and_arithmetic():
    assert LIMITS.floor_us("fp32", 2**19, 0, False) == pytest.approx(2**19 / 400e3)
    assert LIMITS.floor_us("fp32", 2**19, 0, True) == pytest.approx(2**19 / 50e3)
    assert LIMITS.floor_us("bf16", 1, 4 * 10**8, False) == pytest.approx(1000.0)


def test_case_names_are_unique_and_cover_every_operator_in_both_dtypes():
    every = cases.load()
    assert len({c.id for c in every}) == len(every)
    assert {(c.op, c.dtype) for c in every} == {(o, d) for o in cases.OPS for d in cases.DTYPES}
    promised = {(c.op, c.shape, c.direction) for c in every}
    assert set(report.HEADLINES) <= promised


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_the_smallest_case_of_each_operator_is_right(op, dtype):
    mine = [c for c in cases.load([op]) if c.dtype == dtype]
    for backward in {c.backward for c in mine}:
        case = min((c for c in mine if c.backward == backward), key=lambda c: c.flops + c.bytes)
        if case.flops > 2e9:
            continue  # the row's own tests cover gradients; too slow here
        assert driver.problems(case, driver.build(case, 0)) == ""


@pytest.fixture(scope="module")
def result_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "run.json"
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(machine, "probe", lambda realtime: LIMITS)
        arguments = ["--op", "rms_norm", "--filter", "/1x768/", "--out", str(path)]
        assert main([*arguments, "--seconds", "0.02", "--allocator", "system"]) == 0
    torch.set_num_threads(before)
    return path


def test_the_command_writes_a_whole_result_file(result_file):
    content = results_file.read(result_file)
    assert content["format"] == 1 and content["kind"] == "ops"
    assert [c["dtype"] for c in content["cases"]] == ["fp32", "bf16"]
    for case in content["cases"]:
        if case["status"] == "timed":
            assert case["ratios"]["eager"] > 0 and case["times_us"]["ours"]["samples"] >= 5
    assert {"cpu", "cores", "isa"} <= content["machine"].keys()
    assert content["settings"]["allocator"] and content["versions"]["torch"] == torch.__version__
    assert list(result_file.parent.iterdir()) == [result_file]


def test_the_report_shows_every_timed_case(result_file):
    content = results_file.read(result_file)
    text = report.render(content)
    assert "| `rms_norm` | 1x768 | fwd |" in text or content["cases"][0]["status"] != "timed"
    assert content["machine"]["cpu"] in text and content["settings"]["allocator"] in text


def test_the_report_fills_marked_blocks_and_only_those():
    page = "a\n<!-- figures: ops -->\n<!-- end: ops -->\nb\n"
    once = report.insert(page, "ops", "table", "results/x.json")
    assert once == "a\n<!-- figures: ops from results/x.json -->\ntable\n<!-- end: ops -->\nb\n"
    assert report.insert(once, "ops", "table", "results/x.json") == once
    assert report.published(once) == [("ops", "results/x.json", "table")]
    with pytest.raises(ValueError, match="figures: demo"):
        report.insert(page, "demo", "table", "x")


MEASURED = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc",
    "machine": {"cpu": "a cpu", "isa": None},
    "versions": {"torch": "2.11"},
    "settings": {"threads": 3, "rank": 8, "conversations": 4, "epochs": 1},
}


@pytest.mark.parametrize(
    ("kind", "content", "row"),
    [
        (
            "decode",
            {
                "cases": [
                    {
                        "size": "15M",
                        "weights": "int8",
                        "tokens_per_second": {"ours": 1500.0, "llama.cpp": 1000.0},
                        "gigabytes_per_second": {"ours": 20.0},
                        "probe_gigabytes_per_second": 30.0,
                    }
                ]
            },
            "| 15M | int8 | 1,500 | 20.0 GB/s | **1.50x** |",
        ),
        (
            "training",
            {
                "cases": [
                    {
                        "size": "15M",
                        "dtype": "fp32",
                        "task": "step 8x256",
                        "times_us": {
                            "ours": {"median": 2e6},
                            "patched": {"median": 4e6},
                            "transformers": {"median": 3e6},
                        },
                    }
                ]
            },
            "| 15M | fp32 | step 8x256 | 2,000 ms | **1.50x** | 4,000 ms | **0.75x** |",
        ),
        (
            "finetune",
            {
                "model": "m",
                "variants": {
                    "ours": {"seconds": 2.0, "held_out_loss_before": 3.0, "held_out_loss": 1.0},
                    "peer": {"seconds": 5.0, "held_out_loss_before": 3.0, "held_out_loss": 1.5},
                },
            },
            "| peer | 5.0 s | **2.50x** | 3.00 → 1.50 |",
        ),
        (
            "scaling",
            {
                "curves": [
                    {
                        "name": "attention fwd",
                        "axis": "tokens",
                        "dtype": "fp32",
                        "values": [1, 2, 4],
                        "times_us": {"ours": [1.0, 2.0, None], "eager": [4.0, 2.0, 9.0]},
                    }
                ]
            },
            "| `attention fwd` | fp32 | tokens | 1: 4.00x, 2: 1.00x, 2: 1.00x | 2: 1.00x | 2.00x |",
        ),
    ],
)
def test_results_about_models_have_tables(kind, content, row):
    text = report.render({"kind": kind, **MEASURED, **content})
    assert row in text.splitlines()
    assert "a cpu (no native kernels), 3 threads, torch 2.11, 2026-01-02, commit abc." in text


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    results_file.write(path, {"kind": "ops"})
    with pytest.raises(TypeError):
        results_file.write(path, {"kind": object()})
    assert results_file.read(path)["kind"] == "ops" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', "\x00"])
def test_a_foreign_result_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.json"):
        results_file.read(path)


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_every_published_figure_comes_from_its_result_file(name):
    for kind, source, block in report.published((ROOT / name).read_text()):
        content = results_file.read(ROOT / source)
        assert content["kind"] == kind.split("_")[0]
        assert report.render(content, headlines=report.DOCUMENTS[name]) == block


def test_results_are_plain_json(result_file):
    assert json.loads(result_file.read_text())["cases"][0]["id"].startswith("rms_norm/1x768/")


@pytest.mark.parametrize("gpt2", [False, True])
def test_a_training_step_is_checked_and_timed_beside_transformers(monkeypatch, gpt2):
    pytest.importorskip("transformers")
    from benchmarks.models import decode, train

    shape = {"hidden": 64, "layers": 2, "heads": 2, "max_positions": 64, "vocab": 96}
    tiny = {**(decode.SIZES["gpt2"] if gpt2 else {}), **shape}
    monkeypatch.setitem(decode.SIZES, "tiny", tiny)
    for name, value in (("BATCH", 2), ("TOKENS", 16), ("PROMPT", 32), ("VOCAB", 96)):
        monkeypatch.setattr(train, name, value)
    wanted = ["ours", "patched", "transformers"]
    step, forward = train.measure("tiny", "fp32", wanted, seconds=0.02, realtime=False)
    assert step["task"] == "step 2x16" and forward["task"] == "forward 1x32"
    for record in (step, forward):
        assert set(record["times_us"]) == set(wanted)
        assert set(record["ratios"]) == {"ours", "patched"}
        assert set(record["ratios"]["ours"]) == {"transformers"}
        assert "ours" in train.line(record)


def test_fine_tuning_batches_hold_the_answers_alone():
    from benchmarks.models import finetune
    from fastlm.data.chat import Example

    examples = [
        Example("a", [5, 6, 7], [False, False, True]),
        Example("b", [8, 9], [False, True]),
    ]
    batch = finetune.padded(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, 9, -100]]
    rows = finetune.additions(3, seed=0)
    assert rows == finetune.additions(3, seed=0) != finetune.additions(3, seed=1)
    for _, row in rows:
        a, b = row["messages"][0]["content"].removesuffix("?").split("is ")[1].split(" + ")
        assert row["messages"][1]["content"] == str(int(a) + int(b))
