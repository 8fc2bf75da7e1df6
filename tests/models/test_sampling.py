"""Sampling: what the generator decides; the drawing itself is tested with ops.sample."""

from __future__ import annotations

import torch

from fastlm.models import sampling


def test_a_seed_repeats_and_seeds_differ():
    logits = torch.randn(1, 1000).expand(20, -1)

    def run(seed):
        return sampling.sample(logits, torch.Generator().manual_seed(seed), 1.0, 50, 0.9).tolist()

    assert run(1) == run(1) != run(2)
    assert len(set(run(1))) > 5


def test_temperature_zero_takes_the_largest_and_no_random_number():
    logits, generator = torch.randn(7, 100), torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert torch.equal(sampling.sample(logits, generator, 0.0), logits.argmax(-1))
    assert torch.equal(generator.get_state(), before)


def test_every_row_draws_its_own_number():
    logits = torch.zeros(50, 1000)
    drawn = sampling.sample(logits, torch.Generator().manual_seed(0))
    assert drawn.unique().numel() > 40
