"""The three ways to run one checkpoint, behind the same few methods."""

from __future__ import annotations

import abc
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import streaming

NAMES = ("original", "patched", "decoder")
TITLES = {"original": "original", "patched": "patched", "decoder": "fastlm Decoder"}


class Variant(abc.ABC):
    """A loaded model; `generate` and `train` do what a person would call, and take the time."""

    model: torch.nn.Module

    @abc.abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """[B, T, vocab] for tokens [B, T]."""

    @abc.abstractmethod
    def loss(self, tokens: Tensor) -> Tensor:
        """The mean next-token loss."""

    @abc.abstractmethod
    def stream(self, prompt: list[int], count: int) -> list[float]:
        """Generates greedily; the moment (perf_counter) at which each new token was there."""

    def generate(self, prompt: list[int], count: int) -> tuple[float, list[float]]:
        """(seconds to the first new token, seconds between the following ones)."""
        start = time.perf_counter()
        at = self.stream(prompt, count)
        if len(at) != count:
            raise RuntimeError(f"expected {count} new tokens, got {len(at)}")
        return at[0] - start, [b - a for a, b in itertools.pairwise(at)]

    def start_training(self) -> None:
        """Makes the optimizer, the fused AdamW of PyTorch."""
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def train(self, tokens: Tensor) -> tuple[float, float]:
        """(seconds, loss) of one step: forward, backward, update."""
        start = time.perf_counter()
        loss = self.loss(tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start, float(loss)


class Transformers(Variant):
    """The model as transformers runs it, or the same patched."""

    def __init__(self, folder: Path, dtype: torch.dtype, patched: bool) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.patch = None
        if patched:
            self.apply_patch()

    def apply_patch(self) -> None:
        """One line for a user."""
        import fastlm

        self.patch = fastlm.patch(self.model)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits

    def loss(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def stream(self, prompt: list[int], count: int) -> list[float]:
        return streaming.times(self.model, prompt, count)


class Decoder(Variant):
    """The same checkpoint in fastlm's own decoder."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from fastlm.models import Decoder as Model

        self.model: Any = Model.from_pretrained(folder, dtype=dtype)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def loss(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, labels=tokens)

    def stream(self, prompt: list[int], count: int) -> list[float]:
        return [time.perf_counter() for _ in self.model.stream(prompt, count, eos=())]


def load(name: str, folder: Path, dtype: torch.dtype) -> Variant:
    """Opens the checkpoint in one of NAMES."""
    if name == "decoder":
        return Decoder(folder, dtype)
    return Transformers(folder, dtype, patched=name == "patched")
