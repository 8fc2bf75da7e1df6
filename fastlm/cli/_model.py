"""The options that commands with a model share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from fastlm.hf.tokenizer import Text
    from fastlm.models import Decoder
    from fastlm.models.speculative import Drafter

F = TypeVar("F", bound=Callable[..., Any])


def model_options(command: F) -> F:
    """--dtype, --quantize, --device and --adapter, as `open_model` takes them."""
    for option in (
        click.option("--adapter", type=click.Path(exists=True), help="A LoRA's directory."),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."),
        click.option(
            "--quantize",
            type=click.Choice(["int8", "int4", "stored"]),
            help="Hold the weights in integers; stored: in those of a GGUF file as they are.",
        ),
        click.option("--dtype", help="float32 or bfloat16; by default as stored."),
    ):
        command = option(command)
    return command


def sampling_options(command: F) -> F:
    """How tokens are chosen, by the names of `fastlm.models.generate.stream`."""
    for option in (
        click.option("--seed", default=0, show_default=True, help="Of the random numbers."),
        click.option("--frequency-penalty", default=0.0, help="Subtracted per earlier occurrence."),
        click.option("--presence-penalty", default=0.0, help="Subtracted from what occurred."),
        click.option(
            "--repetition-penalty",
            default=1.0,
            show_default=True,
            help="Above 1: what stands in the text becomes less likely.",
        ),
        click.option("--min-p", type=float, help="Draw among tokens this near the likeliest."),
        click.option("--top-p", type=float, help="Draw among the likeliest of this probability."),
        click.option("--top-k", type=int, help="Draw among the k likeliest."),
        click.option(
            "--temperature", "-t", default=0.0, show_default=True, help="0: the likeliest token."
        ),
    ):
        command = option(command)
    return command


def drafter_options(command: F) -> F:
    """--lookup, --draft and --draft-tokens, as `open_drafter` takes them."""
    for option in (
        click.option("--draft-tokens", default=4, show_default=True, help="How many it guesses."),
        click.option(
            "--draft", type=click.Path(exists=True), help="A smaller model that guesses ahead."
        ),
        click.option(
            "--lookup", type=int, help="Guess so many tokens ahead from text that recurs."
        ),
    ):
        command = option(command)
    return command


def open_model(
    path: str,
    dtype: str | None = None,
    quantize: str | None = None,
    device: str = "cpu",
    adapter: str | None = None,
) -> tuple[Decoder, Text]:
    """The decoder and the tokenizer in PATH; ValueError where they do not fit each other."""
    import torch

    from fastlm.hf import tokenizer
    from fastlm.models import Decoder
    from fastlm.train.checkpoint import TrainingError, resolve

    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {device!r}") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: {device} is not there, {torch.cuda.device_count()} GPUs are")
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {device!r}")
    try:
        path = str(resolve(path))  # a training run's best checkpoint
    except TrainingError as error:
        raise ValueError(str(error)) from error
    model = Decoder.from_pretrained(path, dtype, quantized=quantize == "stored").eval()
    text = tokenizer.load(model.source or path)
    text.check_fits(model.config.vocab)
    if adapter is not None:
        from fastlm import nn
        from fastlm.train import lora

        if any(isinstance(module, nn.QuantizedLinear) for module in model.modules()):
            raise ValueError(f"--adapter: {path} is held in integers, into which none is merged")
        lora.load(model, adapter).merge()
    if quantize in ("int8", "int4"):
        model.quantize(int(quantize.removeprefix("int")))
    return model.to(place), text


def open_drafter(
    model: Decoder,
    text: Text,
    lookup: int | None,
    draft: str | None,
    count: int,
    *how: Any,
) -> Drafter | None:
    """What guesses ahead, or None; `how` is the rest of `open_model`'s arguments."""
    from fastlm.models.speculative import DraftModel, PromptLookup, check_vocabulary

    if lookup is not None and draft is not None:
        raise click.UsageError("--lookup and --draft exclude each other")
    if lookup is not None:
        return PromptLookup(count=lookup)
    if draft is None:
        return None
    other, theirs = open_model(draft, *how)
    check_vocabulary(model, other)
    if text.tokenizer.get_vocab() != theirs.tokenizer.get_vocab():
        raise ValueError(f"--draft: {draft} must have the tokenizer of the model, got another")
    return DraftModel(other, count, text.vocab)
