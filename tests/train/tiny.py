"""A tiny decoder and a tiny text, for the tests of training and their subprocesses."""

from __future__ import annotations

import os
import signal
import sys
from types import SimpleNamespace

import numpy as np
import torch

from fastlm.data.packing import PackedDocuments
from fastlm.models import Config, Decoder
from fastlm.train import TrainConfig, train

STEPS = 24


def make(dtype=torch.float32, seed=1, **changes) -> Decoder:
    torch.manual_seed(seed)
    shape = {"vocab": 40, "hidden": 32, "layers": 2, "heads": 4, "max_positions": 64, **changes}
    return Decoder(Config(**shape)).to(dtype)


def dataset(documents=30, seed=0, vocab=40):
    """Documents that count upwards by steps of their own: something to learn."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 30, documents)
    pieces = [
        (random.integers(vocab) + random.integers(1, 4) * np.arange(n)) % vocab for n in lengths
    ]
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return SimpleNamespace(tokens=np.concatenate(pieces).astype(np.uint16), offsets=offsets)


def source(block=16, batch=4, seed=5, **options) -> PackedDocuments:
    return PackedDocuments(dataset(), block, batch, seed, **options)


def validation(**options) -> PackedDocuments:
    return PackedDocuments(dataset(8, seed=9), 16, 4, shuffle=False, **options)


def config(**changes) -> TrainConfig:
    values = {"steps": STEPS, "lr": 3e-3, "log_every": 1, "products": "own", **changes}
    if "epochs" in values:
        values.pop("steps")
    return TrainConfig(**values)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Deadly:
    """A source whose batch `index` kills the second process."""

    def __init__(self, whole, index):
        self.whole, self.index = whole, index
        self.describe = whole.describe

    def __len__(self):
        return len(self.whole)

    def batch(self, index):
        if index >= self.index and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.whole.batch(index)


def main() -> None:
    """tiny.py OUT [key=value ...]: trains there, resuming."""
    out, *pairs = sys.argv[1:]
    options = dict(pair.split("=") for pair in pairs)
    changes = {k: int(v) if v.isdigit() else v for k, v in options.items()}
    deadly = changes.pop("deadly", None)
    result = train(
        make(),
        source() if deadly is None else Deadly(source(), deadly),
        config(**changes),
        validation=validation(),
        out=out,
        resume=True,
        device="cpu",
        plot=False,
    )
    print(result.stopped, result.steps)


if __name__ == "__main__":
    main()
