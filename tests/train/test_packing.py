"""Documents in rows: nothing lost, nothing mixed, and the gradients of each document alone."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastlm.data.packing import PackedDocuments
from fastlm.models import Config, Decoder
from fastlm.ops._registry import use_backend
from fastlm.testing import Pool
from fastlm.train.batches import IGNORE, share

LENGTHS = [5, 1, 17, 2, 40, 0, 9, 3]
SHAPES = {
    "llama": {"kv_heads": 2},
    "window": {"window": 4},
    "gpt2": {"norm": "layer", "positions": "learned", "gated": False, "activation": "gelu_tanh"},
}


def dataset(lengths=LENGTHS, vocab=50):
    """Documents whose tokens rise by one modulo the vocabulary, each from its own start."""
    documents = [(np.arange(n) + 7 * d) % vocab for d, n in enumerate(lengths)]
    tokens = np.concatenate(documents).astype(np.uint16)
    return SimpleNamespace(tokens=tokens, offsets=np.cumsum([0, *lengths]))


def make(shape="llama", dtype=torch.float32) -> Decoder:
    torch.manual_seed(1)
    config = Config(vocab=50, hidden=32, layers=2, heads=4, max_positions=64, **SHAPES[shape])
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(0.1)
    return model.to(dtype)


def pairs(source, epoch=0):
    """(token, target) of everything with a loss in an epoch."""
    found = []
    for i in range(len(source)):
        batch = source.batch(epoch * len(source) + i)
        kept = batch.targets != IGNORE
        found += zip(batch.tokens[kept].tolist(), batch.targets[kept].tolist(), strict=True)
    return sorted(found)


def expected_pairs(data):
    ends = zip(data.offsets[:-1], data.offsets[1:], strict=True)
    documents = [data.tokens[a:b].astype(int) for a, b in ends]
    return sorted(p for d in documents for p in itertools.pairwise(d))


@pytest.mark.parametrize("block", [1, 7, 16, 69])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_pair_of_every_document_once(block, shuffle):
    data = dataset()
    source = PackedDocuments(data, block, 2, seed=3, shuffle=shuffle)
    for epoch in range(3):
        assert pairs(source, epoch) == expected_pairs(data)


def test_orders_differ_between_epochs_and_seeds_and_repeat():
    source = PackedDocuments(dataset(), 8, 2, seed=3)
    again = PackedDocuments(dataset(), 8, 2, seed=3)
    other = PackedDocuments(dataset(), 8, 2, seed=4)
    for index in (7, 0, 12, 1):  # in any order
        assert torch.equal(source.batch(index).tokens, again.batch(index).tokens)
    epoch = torch.cat([source.batch(i).tokens for i in range(len(source))])
    following = torch.cat([source.batch(i + len(source)).tokens for i in range(len(source))])
    seeded = torch.cat([other.batch(i).tokens for i in range(len(source))])
    assert not torch.equal(epoch, following)
    assert not torch.equal(epoch, seeded)


def test_sequences_are_runs_of_one_document():
    source = PackedDocuments(dataset(), 8, 3, seed=1)
    for index in range(2 * len(source)):
        batch = source.batch(index)
        starts = batch.cu_seqlens.tolist()
        assert starts[0] == 0 and starts[-1] == batch.tokens.numel() and starts == sorted(starts)
        assert set(range(0, starts[-1], 8)) <= set(starts)  # every row starts one
        tokens, targets = batch.tokens.flatten(), batch.targets.flatten()
        for a, b in itertools.pairwise(starts):
            assert batch.positions.flatten()[a:b].tolist() == list(range(b - a))
            kept = targets[a:b] != IGNORE
            assert kept.all() or not kept.any()
            if kept.any():
                assert torch.equal(targets[a:b], (tokens[a:b] + 1) % 50)
                assert torch.equal(tokens[a + 1 : b], targets[a : b - 1])


def test_windows_are_pieces_of_the_text():
    data = dataset()
    source = PackedDocuments(data, 8, 4, seed=1, boundaries=False)
    text = data.tokens.astype(int).tolist()
    windows = [text[i : i + 9] for i in range(len(text) - 8)]
    seen = set()
    for index in range(40):
        batch = source.batch(index)
        assert batch.cu_seqlens is None and batch.tokens.shape == (4, 8)
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            assert [*tokens, targets[-1]] in windows and tokens[1:] == targets[:-1]
            seen.add(tuple(tokens))
    assert len(seen) > 30
    ordered = PackedDocuments(data, 8, 4, boundaries=False, shuffle=False)
    assert len(pairs(ordered)) == len(text) - 1


@pytest.mark.parametrize("boundaries", [True, False])
def test_a_corpus_below_one_block_is_refused(boundaries):
    with pytest.raises(ValueError, match=r"smaller than one block: 77 tokens in 8 documents"):
        PackedDocuments(dataset(), 80, 1, boundaries=boundaries)
    with pytest.raises(ValueError, match="block must be 1 or more, got 0"):
        PackedDocuments(dataset(), 0, 1)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("indices", [range(0, 4), range(4, 9), range(8, 9)])
def test_processes_share_the_rows_of_a_step(world, indices):
    source = PackedDocuments(dataset(), 8, 3, seed=1)
    shares = [share(source, indices, rank, world) for rank in range(world)]
    assert len({len(s) for s in shares}) == 1
    targets = torch.cat([b.targets.flatten() for s in shares for b in s])
    whole = torch.cat([source.batch(i).targets.flatten() for i in indices])
    counted = targets[targets != IGNORE].sort().values
    assert torch.equal(counted, whole[whole != IGNORE].sort().values)
    for batch in (b for s in shares for b in s):
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == batch.tokens.numel() > 0


def losses(model, batch):
    return model(
        batch.tokens,
        targets=batch.targets,
        cu_seqlens=batch.cu_seqlens,
        positions=batch.positions,
        reduction="sum",
    )


def of_each_alone(model, batch):
    """The same loss, sequence by sequence."""
    tokens, targets = batch.tokens.flatten(), batch.targets.flatten()
    starts = batch.cu_seqlens.tolist()
    total = 0.0
    for a, b in itertools.pairwise(starts):
        total = total + model(tokens[None, a:b], targets=targets[None, a:b], reduction="sum")
    return total


def results(model, batch, function):
    loss = function(model, batch)
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_gradients_are_those_of_each_document_alone(shape):
    source = PackedDocuments(dataset(), 24, 2, seed=2)
    model, exact = make(shape), make(shape, torch.float64)
    pool = Pool()
    for index in range(4):
        batch = source.batch(index)
        right = results(exact, batch, of_each_alone)
        ours = results(model, batch, losses)
        with use_backend("reference"):
            theirs = results(model, batch, of_each_alone)
        pool.add(ours, theirs, right)
    errors = pool.errors()
    assert all(e.ok for e in errors), "\n".join(map(str, errors))


def test_checkpointed_activations_change_no_bit():
    batch = PackedDocuments(dataset(), 24, 2, seed=2).batch(0)
    model = make().train()
    plain = results(model, batch, losses)
    model.activation_checkpointing = True
    again = results(model, batch, losses)
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name


def test_positions_are_found_from_the_starts():
    batch = PackedDocuments(dataset(), 24, 2, seed=2).batch(0)
    model = make().eval()
    given = model(batch.tokens, cu_seqlens=batch.cu_seqlens, positions=batch.positions)
    assert torch.equal(given, model(batch.tokens, cu_seqlens=batch.cu_seqlens))


def test_decoder_refuses_what_does_not_fit():
    model, tokens = make(), torch.zeros(2, 5, dtype=torch.long)
    starts = torch.tensor([0, 5, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens come without mask and cache"):
        model(tokens, cu_seqlens=starts, cache=model.new_cache(2))
    with pytest.raises(ValueError, match=re.escape("targets must be [2, 5] like tokens")):
        model(tokens, targets=tokens[:1])
    with pytest.raises(ValueError, match="labels come alone"):
        model(tokens, labels=tokens, targets=tokens)
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        model(tokens, cu_seqlens=starts[:2])
