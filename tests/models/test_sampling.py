"""Sampling: the probabilities exactly, the drawing on a grid of random numbers."""

from __future__ import annotations

import math

import pytest
import torch

from fastlm.models import sampling

LOGITS = torch.tensor([[math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]])


def dense(probabilities, ids, vocab=4):
    """[B, V] probabilities, zero where cut."""
    if ids is None:
        return probabilities
    return torch.zeros(len(ids), vocab).scatter(1, ids, probabilities)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.95}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
    ],
    ids=str,
)
def test_probabilities(options, expected):
    found = dense(*sampling.distribution(LOGITS, **options))
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float32))


@pytest.mark.parametrize("spread", [0.1, 5.0])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_a_long_row_is_cut_as_if_it_were_sorted_whole(spread, top_p):
    logits = torch.randn(2, 5000) * spread
    found = dense(*sampling.distribution(logits, 1.0, None, top_p), vocab=5000)
    p, order = logits.softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    expected = torch.zeros(2, 5000).scatter(1, order, p / p.sum(-1, keepdim=True))
    torch.testing.assert_close(found, expected)


def test_drawing_inverts_the_cumulative_distribution(monkeypatch):
    p = torch.tensor([0.0, 0.25, 0.5, 0.0, 0.25, 0.0])
    grid = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    monkeypatch.setattr(torch, "rand", lambda shape, **options: grid.view(shape))
    drawn = sampling.draw(p.expand(400, 6), torch.Generator())
    assert drawn.bincount(minlength=6).tolist() == [0, 100, 200, 0, 100, 0]
    edges = torch.tensor([0.0, 0.25, 1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda shape, **options: edges.view(shape))
    assert sampling.draw(p.expand(3, 6), torch.Generator()).tolist() == [1, 2, 4]


def test_a_seed_repeats_and_seeds_differ():
    logits = torch.randn(1, 1000).expand(20, -1)

    def run(seed):
        return sampling.sample(logits, torch.Generator().manual_seed(seed), 1.0, 50, 0.9).tolist()

    assert run(1) == run(1) != run(2)
    assert len(set(run(1))) > 5


def test_temperature_zero_takes_the_largest():
    logits = torch.randn(7, 100)
    found = sampling.sample(logits, torch.Generator(), 0.0)
    assert torch.equal(found, logits.argmax(-1))


def test_a_masked_logit_is_never_drawn():
    logits = torch.zeros(1, 8)
    logits[0, 3:] = -math.inf
    generator = torch.Generator().manual_seed(0)
    drawn = {int(sampling.sample(logits, generator)) for _ in range(60)}
    assert drawn == {0, 1, 2}
