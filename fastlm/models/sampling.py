"""Choosing the next token from logits: random numbers, penalties, the draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm import ops
from fastlm.ops.sample import check_options

_BLOCK = 64  # random numbers taken from a generator at a time


@dataclass(frozen=True)
class Options:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k, top_p, min_p: see `fastlm.ops.sample`.
        repetition_penalty: above 1 makes every token that stands in the prompt or was generated
            less likely: a positive logit is divided by it, a negative one multiplied.
            Source: Keskar et al., arXiv:1909.05858 (CTRL).
        presence_penalty: subtracted from the logits of tokens that were generated.
        frequency_penalty: the same, times how often they were.

    Raises:
        ValueError: an option out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        check_options("generate", self.temperature, self.top_k, self.top_p, self.min_p)
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"generate: repetition_penalty must be above 0, got {self.repetition_penalty}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"generate: {name} must be finite, got {getattr(self, name)}")

    @property
    def penalised(self) -> bool:
        """Whether the choice depends on the tokens before."""
        others = self.presence_penalty or self.frequency_penalty
        return self.repetition_penalty != 1 or others != 0


class Uniforms:
    """A stream of random numbers in [0, 1) for every sequence.

    Sequence i has the generator of seed + i: its numbers depend neither on the other sequences nor
    on the device, so prompt i of a batch can be repeated alone with that seed.
    """

    def __init__(self, seed: int | None, batch: int, device: torch.device | str = "cpu") -> None:
        self._generators = [torch.Generator() for _ in range(batch)]
        self._device = device
        for i, generator in enumerate(self._generators):
            if seed is None:
                generator.seed()
            else:
                generator.manual_seed(seed + i)
        self._block = self._drawn(0)
        self._next = 0

    def next(self) -> Tensor:
        """[B] fp64."""
        if self._next == len(self._block):
            self._block = self._drawn(_BLOCK).to(self._device)
            self._next = 0
        self._next += 1
        return self._block[self._next - 1]

    def rows(self, count: int) -> Tensor:
        """[count, B] fp64 on the CPU: what as many calls of `next` would give."""
        left = self._block[self._next : self._next + count].cpu()
        self._next += len(left)
        return torch.cat((left, self._drawn(count - len(left))))

    def _drawn(self, count: int) -> Tensor:
        draws = [torch.rand(count, dtype=torch.float64, generator=g) for g in self._generators]
        return torch.stack(draws, 1) if draws else torch.empty(count, 0, dtype=torch.float64)


class Sampler:
    """Chooses the next token of each sequence and remembers what its penalties need.

    Args:
        options: how to choose.
        seed: of the random numbers, see `Uniforms`; None for fresh ones.
        prompts: the tokens before, one list a sequence.
        vocab, device: of the logits.
        limit: tokens from this number on are never chosen.
    """

    def __init__(
        self,
        options: Options,
        seed: int | None,
        prompts: Sequence[Sequence[int]],
        vocab: int,
        device: torch.device | str = "cpu",
        limit: int | None = None,
    ) -> None:
        self.options = options
        self.limit = limit
        self.uniforms = None if options.temperature == 0 else Uniforms(seed, len(prompts), device)
        self._zeros = torch.zeros(len(prompts), dtype=torch.float64, device=device)
        if options.penalised:
            self._seen = torch.zeros(len(prompts), vocab, dtype=torch.bool, device=device)
            self._counts = torch.zeros(len(prompts), vocab, device=device)
            for row, prompt in zip(self._seen, prompts, strict=True):
                row[list(prompt)] = True

    @property
    def takes_the_largest(self) -> bool:
        """Whether the choice is the largest logit, nothing else."""
        return self.options.temperature == 0 and not self.options.penalised

    def choose(self, logits: Tensor) -> Tensor:
        """[B, V] logits -> [B] tokens."""
        return self.draw(logits, None if self.uniforms is None else self.uniforms.next())

    def draw(self, logits: Tensor, uniform: Tensor | None) -> Tensor:
        """`choose` with given random numbers [B] fp64; nothing waits for the device."""
        o = self.options
        if o.penalised:
            logits = self._penalise(logits)
        tokens = ops.sample(
            logits[:, : self.limit],
            self._zeros if uniform is None else uniform,
            temperature=o.temperature,
            top_k=o.top_k,
            top_p=o.top_p,
            min_p=o.min_p,
        )
        if o.penalised:
            self._seen.scatter_(1, tokens[:, None], True)
            self._counts.scatter_add_(1, tokens[:, None], torch.ones_like(self._counts[:, :1]))
        return tokens

    def state(self) -> tuple[Tensor, ...]:
        """What the penalties remember; a `draw` writes to these very tensors."""
        return (self._seen, self._counts) if self.options.penalised else ()

    def _penalise(self, logits: Tensor) -> Tensor:
        o, x = self.options, logits.float()
        if o.repetition_penalty != 1:
            repeated = torch.where(x > 0, x / o.repetition_penalty, x * o.repetition_penalty)
            x = torch.where(self._seen, repeated, x)
        if o.presence_penalty or o.frequency_penalty:
            x = x - self._counts * o.frequency_penalty - (self._counts > 0) * o.presence_penalty
        return x
