"""Several processes: the same curve, checkpoints for any number of them, and what death leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlm.hf.weights import load
from fastlm.testing import error
from fastlm.train import TrainingError, train

from . import tiny

ROOT = Path(__file__).parents[2]
SETTINGS = {"accumulate": 2, "schedule": "constant", "validate_every": 4, "save_every": 4}

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="PyTorch without Gloo",
)


def launch(processes, out, **settings):
    """tiny.py under torchrun; returns (exit code, what it said)."""
    pairs = [f"{k}={v}" for k, v in {**SETTINGS, **settings}.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--standalone", "-m", "tests.train.tiny", str(out), *pairs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    return done.returncode, done.stdout + done.stderr


def curve(out):
    """The losses and validation losses of a run."""
    lines = (out / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return torch.tensor([r.get("loss", r.get("validation")) for r in records])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Curves of one process, in fp32 and float64."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    curves = []
    for dtype in (torch.float32, torch.float64):
        out = tmp_path_factory.mktemp("alone")
        train(
            tiny.make(dtype),
            tiny.source(),
            tiny.config(**SETTINGS, steps=12),
            validation=tiny.validation(),
            out=out,
            device="cpu",
            quiet=True,
            plot=False,
        )
        curves.append(curve(out))
    torch.set_num_threads(before)
    return curves


def finish_alone(out):
    """The rest of a run, in this process."""
    train(
        tiny.make(seed=9),
        tiny.source(),
        tiny.config(**SETTINGS, steps=12),
        validation=tiny.validation(),
        out=out,
        resume=True,
        device="cpu",
        quiet=True,
        plot=False,
    )


def test_data_parallel_has_the_same_curve_and_survives_a_death(alone, tmp_path):
    one, exact = alone
    # the second process dies in step 10, between two checkpoints
    code, said = launch(2, tmp_path, steps=12, deadly=18)
    assert code != 0
    assert "after step 9: another process of the run has died" in said, said
    assert "step-00000009, go on from it with resume" in said, said
    load(tmp_path / "latest")
    finish_alone(tmp_path)
    found = error("loss", curve(tmp_path), one, exact)
    assert found.ok, str(found)


def test_shares_go_on_in_any_number_of_processes(alone, tmp_path):
    one, exact = alone
    code, said = launch(2, tmp_path, steps=4, engine="fsdp")
    assert code == 0, said
    assert len(list((tmp_path / "latest" / "optimizer").iterdir())) == 2
    load(tmp_path / "latest")
    code, said = launch(3, tmp_path, steps=8, engine="fsdp")
    assert code == 0, said
    assert f"resumed from {tmp_path / 'checkpoints' / 'step-00000004'}" in said
    finish_alone(tmp_path)
    assert (tmp_path / "latest" / "optimizer.safetensors").is_file()
    found = error("loss", curve(tmp_path), one, exact)
    assert found.ok, str(found)


def test_shares_need_torchrun():
    with pytest.raises(TrainingError, match="engine fsdp needs torchrun"):
        train(tiny.make(), tiny.source(), tiny.config(engine="fsdp"), device="cpu", quiet=True)
