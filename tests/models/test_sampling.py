"""Sampling: what random numbers and penalties decide; the draw is tested with ops.sample."""

from __future__ import annotations

import pytest
import torch

from fastlm.models.sampling import Options, Sampler, Uniforms


def draw(seed, logits, **options):
    sampler = Sampler(Options(**options), seed, [[]] * len(logits), logits.shape[1])
    return torch.stack([sampler.choose(logits) for _ in range(100)])


def test_a_seed_repeats_and_seeds_differ():
    logits = torch.randn(1, 1000)
    first, again, other = (draw(s, logits, temperature=1.0, top_k=50) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.unique().numel() > 5


def test_a_sequence_has_the_random_numbers_of_its_own_seed():
    batch = Uniforms(7, 3)
    alone = [Uniforms(7 + i, 1) for i in range(3)]
    for _ in range(150):
        assert torch.equal(batch.next(), torch.cat([one.next() for one in alone]))
    assert not torch.equal(Uniforms(None, 1).next(), Uniforms(None, 1).next())


def test_temperature_zero_takes_the_largest():
    logits = torch.randn(7, 100)
    assert torch.equal(draw(3, logits)[0], logits.argmax(-1))
    assert Sampler(Options(), 0, [[]], 100).takes_the_largest
    assert not Sampler(Options(presence_penalty=0.1), 0, [[]], 100).takes_the_largest


def test_every_row_draws_its_own_number():
    sampler = Sampler(Options(temperature=1.0), 0, [[]] * 50, 1000)
    assert sampler.choose(torch.zeros(50, 1000)).unique().numel() > 40


def test_the_repetition_penalty_is_that_of_transformers():
    processors = pytest.importorskip("transformers.generation.logits_process")
    theirs = processors.RepetitionPenaltyLogitsProcessor(1.3)
    prompts, logits = [[1, 2, 2, 5], [0, 9]], torch.randn(2, 12)
    sampler = Sampler(Options(repetition_penalty=1.3), 0, prompts, 12)
    ids = [torch.tensor(prompt) for prompt in prompts]
    for _ in range(8):
        expected = torch.stack(
            [theirs(i[None], x[None].clone())[0] for i, x in zip(ids, logits, strict=True)]
        )
        assert torch.equal(sampler._penalise(logits), expected)
        tokens = sampler.choose(logits)
        assert torch.equal(tokens, expected.argmax(-1))
        ids = [torch.cat([i, t[None]]) for i, t in zip(ids, tokens, strict=True)]


def test_presence_and_frequency_count_what_was_generated():
    logits = torch.tensor([[3.0, 2.5, 0.0]])

    def text(**options):
        sampler = Sampler(Options(**options), 0, [[0, 0, 0]], 3)
        return [int(sampler.choose(logits)) for _ in range(4)]

    assert text(presence_penalty=1.0) == [0, 1, 0, 0]  # 3, then 2.5 over 2, then 2 over 1.5
    assert text(frequency_penalty=1.0) == [0, 1, 0, 1]


def test_tokens_beyond_the_limit_are_never_chosen():
    logits = torch.arange(10.0)[None]
    for options in ({}, {"temperature": 5.0}, {"repetition_penalty": 2.0}):
        sampler = Sampler(Options(**options), 0, [[1]], 10, limit=4)
        assert max(int(sampler.choose(logits)) for _ in range(50)) < 4


@pytest.mark.parametrize(
    "options, text",
    [
        ({"temperature": -0.5}, "temperature must be 0 or more, got -0.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be finite, got nan"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
    ],
)
def test_options_out_of_range_are_named(options, text):
    with pytest.raises(ValueError, match=f"generate: {text}"):
        Options(**options)
