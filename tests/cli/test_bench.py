"""fastlm bench: shapes of one's own, pages, pictures, comparisons."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import changes, custom, machine, page, results_file
from benchmarks.case import OPS
from fastlm.cli import main

RESULTS = Path(results_file.__file__).parent / "results"
LIMITS = machine.Limits(
    [("L2", 2**20, 400.0), ("L3", 2**24, 200.0), ("memory", 2**62, 50.0)],
    {"fp32": 200.0, "bf16": 400.0},
)


def bench(*arguments: object):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(machine, "probe", lambda realtime: LIMITS)
    return ["--op", "rms_norm", "--shape", "3x64", "--seconds", "0.02", "--system-malloc"]


@pytest.fixture(scope="module")
def published() -> dict:
    files = [f for f in RESULTS.rglob("*.json") if json.loads(f.read_text())["kind"] == "ops"]
    return results_file.read(files[0])


def test_a_shape_of_ones_own_is_timed_written_and_shown(quick, tmp_path):
    out, shown = tmp_path / "run.json", tmp_path / "run.html"
    result = bench(*quick, "--out", out, "--html", shown)
    assert result.exit_code == 0, result.output
    cases = results_file.read(out)["cases"]
    assert [c["id"] for c in cases] == [
        f"rms_norm/3x64/{dtype}/{way}" for way in ("fwd", "fwd+bwd") for dtype in ("fp32", "bf16")
    ]
    if cases[0]["status"] == "timed":
        assert "rms_norm 3x64 fwd fp32" in shown.read_text()
    again = bench(*quick, "--compare", out)
    assert "4 cases, geometric mean against eager" in again.output, again.output


@pytest.mark.parametrize("op", OPS)
def test_every_operator_takes_a_shape(op):
    numbers = custom.FORMS[op].names.count("x") + 1
    for case in custom.cases(op, "x".join("2" * numbers)):
        assert case.op == op and case.bytes > 0


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--op", "rms_norm", "--shape", "3"], "shape must be ROWSxWIDTH, whole numbers"),
        (["--op", "attention", "--shape", "1x2x0x4x5"], "BATCHxHEADSxKV_HEADSxTOKENSxHEAD_DIM"),
        (["--op", "norm"], "--op: expected one of rms_norm"),
        (["--shape", "3x4"], "--shape needs exactly one --op"),
        (["--model", ".", "--op", "rope"], "--model goes with"),
        (["--model", ".", "--dtype", "fp8"], "--dtype: expected fp32, bf16"),
        (["--out", "no/such/folder/x.json"], "there is no folder"),
        (["--compare", __file__, "--op", "rope"], "not a JSON file"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_anything_is_timed(arguments, text):
    result = bench(*arguments)
    assert result.exit_code != 0 and text in result.output, result.output


def test_the_page_stands_alone_and_shows_every_case(published):
    text = page.render(published)
    for case in published["cases"]:
        assert case["status"] != "timed" or f"{case['op']} {case['shape']}" in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    with pytest.raises(ValueError, match="no case was timed"):
        page.render({**published, "cases": []})


def test_the_picture_is_drawn(published, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import picture

    picture.draw({**published, "cases": published["cases"][:4]}, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_change_counts_beyond_the_noise_only(published):
    before = json.loads(json.dumps(published))
    case = next(c for c in before["cases"] if c["status"] == "timed")
    for key in ("median", "p25", "p75", "least"):
        case["times_us"]["ours"][key] *= 10
    case["ratios"]["eager"] /= 10
    text = changes.table(before, published)
    assert "beyond the noise: 1 faster, 0 slower" in text
    assert text.splitlines()[-2].startswith(case["id"]) and text.splitlines()[-2].endswith("faster")
    with pytest.raises(ValueError, match="no timed case in common"):
        changes.table({**published, "cases": []}, published)


def test_a_curve_is_measured_and_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from benchmarks import scaling

    curve = scaling.Curve("rms_norm", "2x{}", "width", (8, 16))
    monkeypatch.setattr(scaling, "CURVES", (curve,))
    monkeypatch.setattr(machine, "use_allocator", lambda keep: "malloc as it is")
    out = tmp_path / "scaling.json"
    assert scaling.main(["--seconds", "0.01", "--dtype", "fp32", "--out", str(out)]) == 0
    wide, threads = results_file.read(out)["curves"]
    assert wide["values"] == [8, 16] and all(wide["times_us"]["ours"])
    assert threads["axis"] == "threads" and threads["values"][0] == 1
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert scaling.main(["--only", "nothing like it"]) == 2


def test_every_curve_has_points():
    from benchmarks import scaling

    for curve in scaling.CURVES:
        assert len(scaling.points(curve, "fp32")) == len(curve.values)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_the_page_has_no_error_in_a_browser(published, tmp_path):
    page.write(published, tmp_path / "page.html")
    script = "<script>document.querySelectorAll('th button').forEach((b) => b.click());"
    script += "console.error('sorted ' + document.querySelector('td').textContent)</script>"
    text = (tmp_path / "page.html").read_text().replace("</html>", script + "</html>")
    (tmp_path / "page.html").write_text(text)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    run = subprocess.run(
        [*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    said = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert len(said) == 1 and "sorted" in said[0], said
