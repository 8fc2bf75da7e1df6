"""Packed conversations: nothing lost, nothing mixed, the same gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fastlm.data.batches import IGNORE
from fastlm.data.chat import Example
from fastlm.data.examples import PackedExamples
from fastlm.models import Config, Decoder


def examples(sizes=(5, 3, 9, 2, 7, 4, 9)) -> list[Example]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for i, size in enumerate(sizes):
        tokens = torch.randint(1, 50, (size,), generator=generator).tolist()
        mask = torch.randint(0, 2, (size - 1,), generator=generator).bool().tolist()
        made.append(Example(f"f:{i}", tokens, [*mask, True]))
    return made


def test_every_conversation_comes_once_in_an_epoch_and_whole():
    source = PackedExamples(examples(), 10, 2, seed=3)
    for epoch in range(2):
        found = []
        for index in range(epoch * len(source), (epoch + 1) * len(source)):
            batch = source.batch(index)
            starts = batch.cu_seqlens.tolist()
            assert set(range(0, batch.tokens.numel() + 1, 10)) <= set(starts)
            flat = [x.flatten() for x in (batch.tokens, batch.targets, batch.positions)]
            for start, stop in pairwise(starts):
                tokens, targets, positions = (x[start:stop].tolist() for x in flat)
                assert positions == list(range(stop - start))
                if set(targets) != {IGNORE}:
                    found.append((tokens, targets))
        wanted = [
            (
                e.tokens[:-1],
                [t if m else IGNORE for t, m in zip(e.tokens[1:], e.mask[1:], strict=True)],
            )
            for e in examples()
        ]
        assert sorted(found) == sorted(wanted)


def test_rows_are_filled():
    """36 tokens to predict cannot take fewer than four rows of ten; best fit needs no more."""
    assert len(PackedExamples(examples((10, 3, 9, 2, 8, 4, 6)), 10, 1).rows) == 4


def test_a_batch_is_a_function_of_its_number():
    first, again = (PackedExamples(examples(), 10, 2, seed=3) for _ in range(2))
    for index in (5, 0, 3):
        a, b = first.batch(index), again.batch(index)
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
    assert first.describe() == again.describe()
    assert first.describe() != PackedExamples(examples()[::-1], 10, 2, seed=3).describe()
    still = PackedExamples(examples(), 10, 2, shuffle=False)
    assert torch.equal(still.batch(1).tokens, still.batch(1 + len(still)).tokens)


def test_packed_gradients_are_those_of_each_conversation():
    model = Decoder(Config(50, 16, 2, 2, max_positions=32)).double()
    source = PackedExamples(examples(), 12, 8)
    batch = source.batch(0)
    loss = model(
        batch.tokens,
        targets=batch.targets,
        cu_seqlens=batch.cu_seqlens,
        positions=batch.positions,
        reduction="sum",
    )
    loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for example in examples():
        tokens = torch.tensor([example.tokens])
        targets = torch.where(torch.tensor([example.mask[1:]]), tokens[:, 1:], IGNORE)
        alone = model(tokens[:, :-1], targets=targets, reduction="sum")
        alone.backward()
        total += float(alone.detach())
    assert float(loss.detach()) == pytest.approx(total, rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_refuses():
    with pytest.raises(ValueError, match="there are no examples"):
        PackedExamples([], 8, 1)
    with pytest.raises(ValueError, match="f:0: 5 tokens do not fit a row of 3"):
        PackedExamples(examples((5,)), 3, 1)
