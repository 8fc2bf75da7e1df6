"""From a folder of tokens to the beginning of a run: sources, model, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastlm.data.packing import PackedDocuments
from fastlm.data.shards import TokenDataset
from fastlm.hf.weights import read_config
from fastlm.models.config import Config
from fastlm.models.decoder import Decoder
from fastlm.nn import QuantizedLinear
from fastlm.train import shapes
from fastlm.train.checkpoint import Checkpoints, TrainingError, copy_tokenizer, resolve


def sources(
    data: str, block: int, batch: int, seed: int, boundaries: bool
) -> tuple[PackedDocuments, PackedDocuments | None]:
    """The training source and, where the folder has enough of it, the validation source."""
    texts = TokenDataset(data, "train"), TokenDataset(data, "validation")
    made = PackedDocuments(texts[0], block, batch, seed, boundaries)
    if len(texts[1].tokens) == 0:
        return made, None
    # what is measured is the same for every block that fits
    short = min(block, max(1, len(texts[1].tokens) - len(texts[1])))
    return made, PackedDocuments(texts[1], short, batch, seed, boundaries, shuffle=False)


def usual_block(init: str | None, most: int = 256) -> int:
    """Tokens in a row where nobody says: `most`, or the positions of the model to begin with."""
    folder = None if init is None else resolve(init)
    if folder is None or not (folder / "config.json").is_file():
        return most
    return min(most, read_config(folder).max_positions)


def model(
    data: TokenDataset, out: Path, init: str | None, shape: str | None, block: int, seed: int
) -> Decoder:
    """A fresh decoder, or one with a checkpoint's weights, for the tokens of `data`.

    The run's folder gets the tokenizer's files, which every checkpoint then carries.

    Raises:
        TrainingError: the checkpoint's tokenizer is not the data's; a block beyond its positions.
    """
    if init is not None:
        start = resolve(init)
        made = Decoder.from_pretrained(start)
        refuse_integers(made, start)
        if isinstance(made.source, Path):
            _same_tokenizer(data, made, made.source)
    else:
        values = {"max_positions": block, **shapes.parse(shape or "tiny")}
        torch.manual_seed(seed)
        eos = () if data.eos is None else (data.eos,)
        made = Decoder(Config(vocab=data.vocab, eos_ids=eos, **values))
    if block > made.config.max_positions:
        raise TrainingError(
            f"block {block} is beyond the model's {made.config.max_positions} positions"
        )
    if data.vocab > made.config.vocab:
        raise TrainingError(
            f"{data.path}: its tokens are below {data.vocab}, the model {init} has a vocabulary of"
            f" {made.config.vocab}: prepare the text with the model's tokenizer"
        )
    tokenizer = out / "tokenizer"
    source = made.source if isinstance(made.source, Path) else data.tokenizer
    try:
        tokenizer.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(source, tokenizer)
    except OSError as error:
        raise TrainingError(f"{tokenizer} cannot be written: {error.strerror}") from error
    made.source = tokenizer
    return made


def refuse_integers(model: Decoder, path: Any) -> None:
    """Raises TrainingError for weights in integers, which have no gradients."""
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise TrainingError(
            f"{path}: its weights are quantized and cannot be trained; take the directory that it"
            " was quantized from"
        )


def resumed(out: Path) -> Decoder | None:
    """A model of the shape of a run's latest checkpoint, None where it has none."""
    found = Checkpoints(out).latest()
    if found is None:
        return None
    made = Decoder.from_pretrained(found)
    made.source = out / "tokenizer"
    return made


def _same_tokenizer(data: TokenDataset, model: Decoder, folder: Path) -> None:
    """Two vocabularies of one size may still number other words."""
    ours, theirs = (_vocabulary(x / "tokenizer.json") for x in (data.tokenizer, folder))
    if ours is None or theirs is None or ours == theirs:
        return
    odd = next((w for w in ours if theirs.get(w) != ours[w]), next(iter(theirs), ""))
    raise TrainingError(
        f"{data.path}: its tokenizer is not that of {folder} ({len(ours)} and {len(theirs)} words;"
        f" {odd!r} is {ours.get(odd)} and {theirs.get(odd)}): prepare the text with"
        f" --tokenizer {folder}"
    )


def _vocabulary(path: Path) -> dict[str, Any] | None:
    """Word -> number of a tokenizer.json; None where there is none."""
    if not path.is_file():
        return None
    vocab = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    if isinstance(vocab, list):  # a unigram model: [word, score] in order
        return {word: i for i, (word, _) in enumerate(vocab)}
    return dict(vocab)
