"""What makes a run the same run when it is resumed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastlm.ops import _measured, _product
from fastlm.train.batches import Source
from fastlm.train.checkpoint import TrainingError
from fastlm.train.config import CHANGEABLE, TrainConfig

Values = dict[str, Any]


def describe(config: TrainConfig, source: Source, validation: Source | None) -> Values:
    """Settings and data, as JSON values."""
    return {
        "config": config.to_dict(),
        "source": source.describe(),
        "validation": None if validation is None else validation.describe(),
        "threads": torch.get_num_threads(),
    }


def compare(stored: Values, asked: Values, where: Path) -> None:
    """Refuses to go on with other settings or other data than the run began with.

    Raises:
        TrainingError: naming the setting.
    """
    for part in ("config", "source"):
        theirs, mine = stored.get(part, {}), asked[part]
        for key in sorted(set(mine) | set(theirs)):
            if part == "config" and key in CHANGEABLE:
                continue
            if mine.get(key) != theirs.get(key):
                raise TrainingError(
                    f"{where}: the run has {part} {key} = {theirs.get(key)!r}, now"
                    f" {mine.get(key)!r} is asked for; what decides the result cannot change on the"
                    " way: begin another run from its weights instead"
                )


def products(config: TrainConfig, device: torch.device) -> Values:
    """Which kernels compute the matrix products on a CPU, by element type, and what was tuned.

    They are measured when a run begins and kept in its folder: a measurement after a resume could
    choose otherwise, and the kernels differ in the last bits.
    """
    if device.type != "cpu":
        return {"tuned": _measured.stored(device.type)}
    if config.products != "measured":
        own = config.products == "own"
        verdict = asdict(_product.Winners(own, own, own, own, f"products = {config.products!r}"))
        return {"float32": verdict, "bfloat16": verdict}
    types = [torch.float32] + [torch.bfloat16] * ("bf16" in config.precision)
    table = {str(t).removeprefix("torch."): asdict(_product.winners(t)) for t in types}
    return {**table, "tuned": _measured.stored("cpu")}
