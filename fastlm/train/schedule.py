"""The learning rate's course."""

from __future__ import annotations

import math

from fastlm.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of update `step`, from 0, of `total`.

    It rises linearly to lr over the warm-up (the first update has lr / warmup, not 0); then

    cosine    falls as half a cosine to min_lr lr at the last update
    linear    falls linearly to there
    wsd       stays, and over the last `decay` of all updates falls linearly to there
    constant  stays
    """
    warmup = min(100, total // 10) if config.warmup is None else config.warmup
    if step < warmup:
        return config.lr * (step + 1) / warmup
    fall = total - warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        fall = min(fall, round(config.decay * total))
    # 0 before the fall, 1 at the last update
    done = min(1.0, max(0.0, (step - (total - fall) + 1) / fall)) if fall > 0 else 0.0
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (config.min_lr + (1 - config.min_lr) * left)
