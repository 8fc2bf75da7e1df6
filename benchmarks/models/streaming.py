"""When each new token of a transformers model comes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch


class _Clock:
    """A streamer that only looks at the time."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, tokens: object) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def times(model: Any, prompt: Sequence[int], count: int, **options: object) -> list[float]:
    """The moments at which `generate` brings `count` new tokens, greedily, whatever they are."""
    clock, tokens = _Clock(), torch.tensor([prompt], device=model.device)
    model.generation_config.eos_token_id = None
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
        **options,
    )
    return clock.at[1:]  # the first call brings the prompt
