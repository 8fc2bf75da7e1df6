"""Weights in integers cannot be trained, which is said before anything is written."""

from __future__ import annotations

import pytest

from fastlm.models.config import Config
from fastlm.models.decoder import Decoder
from fastlm.train import start
from fastlm.train.checkpoint import TrainingError
from fastlm.train.finetune import finetune


def test_quantized_weights_are_refused(tmp_path):
    path, out = tmp_path / "small", tmp_path / "out"
    model = Decoder(Config(vocab=64, hidden=32, layers=1, heads=2, intermediate=64))
    model.quantize(8)
    model.save_pretrained(path)
    with pytest.raises(TrainingError, match=r"small: its weights are quantized .* take the dir"):
        finetune(path, [], out)
    with pytest.raises(TrainingError, match=r"small: its weights are quantized .* take the dir"):
        start.model(None, out, str(path), None, 16, 0)
    assert not out.exists()
