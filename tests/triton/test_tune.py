"""The tuner of the tables: candidates, checks, choices and the file, with injected times."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from fastlm.triton import _configs
from fastlm.triton._configs import ANY, LIBRARY, Config

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    module = importlib.import_module("tune")
    monkeypatch.setattr(module, "DRAWS", 2)  # the interpreter is slow
    return module


def one(tool, name, arch="sm_90", at=0):
    return tool.classes([name], arch)[at]


def test_every_table_has_a_case_and_every_row_a_class(tool):
    assert set(tool.CASES) == set(_configs.TABLE)
    for arch in _configs.ARCHITECTURES:
        rows = tool.classes([], arch)
        assert [(r.name, r.bound) for r in rows] == [
            (name, bound) for name in tool.CASES for bound, _ in _configs.rows(name, arch)
        ]
        for row in rows:
            assert _configs._select(row.name, row.size, arch) == row.config, row


def test_candidates_are_neighbours_and_the_library(tool):
    row = one(tool, "activation")
    found = tool.candidates(row, tool.CASES["activation"], 6)
    assert found[0] == row.config and len(found) == len(set(found)) == 6
    assert all(tool._changes(c, row.config) == 1 for c in found[1:])
    rows = tool.classes(["feed_forward"], "sm_90")
    for row in rows:
        assert LIBRARY in tool.candidates(row, tool.CASES[row.name], 3), row
        assert any(c.tile for c in tool.candidates(row, tool.CASES[row.name], 3)), row


def fake(times):
    """A timer that runs every call once, and has its times by part of its text."""
    asked = []

    def timer(calls):
        for label, call in calls.items():
            assert call() is not None
            asked.append(label)
        return {n: next((t for part, t in times.items() if part in n), 1.0) for n in calls}

    return timer, asked


@pytest.fixture
def small(tool, monkeypatch):
    """The small inputs in place of those that are timed; the interpreter is slow."""
    made = tool.placed
    monkeypatch.setattr(tool, "placed", lambda row, case, _, *rest: made(row, case, True, *rest))


@pytest.mark.parametrize(
    "times, expected", [({"8 warps": 0.9}, 8), ({"8 warps": 0.99}, 4)], ids=["faster", "noise"]
)
def test_the_fastest_takes_the_place_if_by_more_than_noise(tool, small, times, expected):
    said, row = [], one(tool, "rope")
    timer, asked = fake(times)
    found = tool.tune([row], timer, "cpu", torch.float32, 4, said.append)
    assert found == ({row: Config(row.config.tile, expected, 1)}, [])
    assert asked[0] == tool.text(row.config) and len(asked) == 4
    assert said[0].startswith("[1/1] rope: ") and "4 timed, 0 out" in said[0]


def test_a_wrong_result_is_out_and_named_where_it_is_in_use(tool, small, monkeypatch):
    row, case = one(tool, "rope"), tool.CASES["rope"]
    right, broken = case.call, Config(row.config.tile, 8, 1)

    def call(*tensors):
        q, k = right(*tensors)
        config = _configs.select("rope", 64, -1)
        if config == broken:
            q = q * 1.001
        if config.warps == 2:
            raise RuntimeError("out of resources: shared memory")
        return q, k

    monkeypatch.setitem(tool.CASES, "rope", tool.Case(call, case.baseline, case.oracle, case.make))
    timer, asked = fake({"8 warps": 0.1, "2 warps": 0.1})
    best, complaints = tool.tune([row], timer, "cpu", torch.float32, 4, lambda line: None)
    assert best == {row: row.config} and not complaints
    assert asked == [tool.text(c) for c in (row.config, row.config._replace(stages=2))]
    stands = tool.Class(row.name, row.bound, broken, row.size, row.own)
    _, complaints = tool.tune([stands], timer, "cpu", torch.float32, 1, lambda line: None)
    assert complaints[0].startswith("rope: 2048, 8 warps, 1 stages, in use, is out: AssertionError")


@pytest.mark.parametrize("name", ["norm_backward", "feed_forward_kept", "decode_attention"])
def test_cases_run_and_pass_their_check(tool, small, monkeypatch, name):
    case = tool.CASES[name]
    row = tool.Class(name, ANY, Config((64, 1), 4) if name == "norm_backward" else None, 32, ())
    config = row.config or (Config((16, 16, 16), 4) if "feed" in name else Config((16, 16)))
    assert tool.wrong(row, case, config, "cpu", torch.float32) == ""
    timer, asked = fake({})
    timer(tool.runs(row, case, [config], "cpu", torch.float32))
    assert asked == [tool.text(config)]


ABOUT = {"device": "a GPU", "date": "2026-11-23", "torch": "2.13", "triton": "3.7.1"}


def test_the_file_is_read_back_and_keeps_what_was_there(tool, tmp_path, monkeypatch):
    file = tmp_path / "tuned.json"
    row = one(tool, "norm", at=1)
    tool.written({row: Config((4096,), 16, 2)}, "sm_90", ABOUT, file)
    other = one(tool, "rope", "sm_80")
    tool.written({other: Config((512,), 2, 1)}, "sm_80", ABOUT, file)
    content = json.loads(file.read_text())
    assert content["sm_90"]["date"] == "2026-11-23"
    tables = _configs.parsed(content, str(file))
    assert tables["sm_80"] == {"rope": [(ANY, Config((512,), 2, 1))]}
    expected = _configs.rows("norm", "sm_90")
    assert tables["sm_90"]["norm"] == [
        (bound, Config((4096,), 16, 2) if bound == row.bound else config)
        for bound, config in expected
    ]
    before = file.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(tool.os, "replace", lambda *names: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tool.written({row: Config((1,), 1, 1)}, "sm_90", ABOUT, file)
    assert file.read_text() == before


@pytest.mark.parametrize(
    "arch, name, lines, text",
    [
        ("sm_70", "norm", [[None, [1], 1, 1]], "there is no table 'norm' of 'sm_70'"),
        ("sm_90", "norms", [[None, [1], 1, 1]], "there is no table 'norms' of 'sm_90'"),
        ("sm_90", "norm", [[64, [1], 1, 1]], r"norm of sm_90: bounds must ascend .* got \[64\]"),
    ],
)
def test_a_file_that_is_no_table_is_named(arch, name, lines, text):
    with pytest.raises(ValueError, match="tuned.json: " + text):
        _configs.parsed({arch: {"tables": {name: lines}}}, "tuned.json")


def test_the_command(tool, tmp_path, capsys):
    file = tmp_path / "tuned.json"
    assert tool.main(["--dry-run", "--only", "attention_kv", "--arch", "sm_80"]) == 0
    assert "attention_kv up to 64 (size 64): 64x64, 8 warps, 2 stages; " in capsys.readouterr().out
    assert tool.main(["--out", str(file)]) == (3 if not torch.cuda.is_available() else 0)
    assert "no GPU: tuning needs one" in capsys.readouterr().err and not file.exists()
    for wrong, text in (
        (["--only", "nothing"], "no table has a name with 'nothing'; there are norm,"),
        (["--most", "0"], "--most must be 1 or more"),
        (["--out", str(tmp_path / "none" / "x.json")], "is no folder"),
    ):
        with pytest.raises(SystemExit):
            tool.main(wrong)
        assert text in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    assert "python tools/tune.py --only norm+rope --dry-run" in capsys.readouterr().out


def test_what_the_command_writes_is_read_with_the_package(tool, small, tmp_path, monkeypatch):
    """The whole way, with a stub for the GPU and for the clock."""
    timer, _ = fake({"8 warps": 0.5})
    tune = tool.tune
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a stub")
    monkeypatch.setattr(_configs, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tool, "on_gpu", lambda seconds: timer)
    on_cpu = lambda rows, timer, _, dtype, most: tune(rows, timer, "cpu", dtype, most)  # noqa: E731
    monkeypatch.setattr(tool, "tune", on_cpu)
    file = tmp_path / "tuned.json"
    assert tool.main(["--only", "rope", "--most", "4", "--out", str(file)]) == 0
    assert json.loads(file.read_text())["sm_90"]["device"] == "a stub"

    # the module that reads the file beside it, as the package's does
    copy = tmp_path / "_configs.py"
    copy.write_text(Path(_configs.__file__).read_text())
    spec = importlib.util.spec_from_file_location("copied_configs", copy)
    read = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(read)
    before = _configs.select("rope", 64, 0)
    assert read._select("rope", 64, "sm_90") == (before.tile, 8, before.stages)
    assert read._select("rope", 64, "sm_80") == before
    assert read._select("norm", 64, "sm_90") == _configs.select("norm", 64, 0)
