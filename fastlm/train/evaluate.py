"""How likely a model finds a text: losses of whole texts and of continuations.

Sequences of a batch are padded on the right, which nothing to their left sees, so a number does not
depend on what else is in its batch (but for the rounding of products of another size).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fastlm import nn, ops

if TYPE_CHECKING:
    from fastlm.hf.tokenizer import Text
    from fastlm.models.decoder import Decoder

_ROWS = 256  # of logits at a time
_IGNORE = -100
Progress = Callable[[int], None]  # told how many more sequences are done
T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """Of one continuation: the sum of its tokens' log-probabilities (natural logarithm), their
    number, and whether each of them was the likeliest."""

    logprob: float
    tokens: int
    greedy: bool


@dataclass(frozen=True)
class TextLoss:
    """Of a text: the sum of its tokens' losses in nats, its tokens and its bytes in UTF-8."""

    nats: float
    tokens: int
    bytes: int
    lossless: bool = True  # whether the tokenizer gives the text back

    @property
    def loss(self) -> float:
        """Mean loss of a token in nats."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers: bits for each byte of the raw text."""
        return self.nats / math.log(2) / self.bytes


def prefix_of(model: Decoder, text: Text) -> int | None:
    """The token that stands before a text's first: <bos>, else <eos>, as in lm-eval."""
    for role in ("bos_token", "eos_token"):
        if role in text.special:
            number = text.tokenizer.token_to_id(text.special[role])
            if number is not None:
                return int(number)
    ends = model.config.eos_ids
    return model.config.bos_id if model.config.bos_id is not None else next(iter(ends), None)


@torch.inference_mode()
def score(
    model: Decoder,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[Score]:
    """How likely each continuation is after its context.

    Args:
        model: the decoder.
        pairs: (context, continuation), both of at least one token. What does not fit
            max_positions loses tokens on the left, as in lm-eval.
        batch_size: sequences at a time.
        progress: called with the size of each batch that is done.

    Returns:
        A Score for each pair.
    """
    for context, continuation in pairs:
        if not context or not continuation:
            raise ValueError("score: a context and a continuation must have at least one token")
    device, out = model.embed.weight.device, {}
    inputs: dict[tuple[int, ...], list[int]] = {}  # equal ones, as of one-token choices, run once
    for i, (context, continuation) in enumerate(pairs):
        whole = (*context, *continuation)[-model.config.max_positions - 1 :]
        inputs.setdefault(whole[:-1], []).append(i)
    order = sorted(inputs, key=lambda tokens: -len(tokens))
    for chosen in batches(order, batch_size):
        places, targets, counts, numbers = [], [], [], []
        for row, tokens in enumerate(chosen):
            for i in inputs[tokens]:
                wanted = list(pairs[i][1])[-len(tokens) :]
                first = len(tokens) - len(wanted)
                places += [(row, place) for place in range(first, len(tokens))]
                targets += wanted
                counts.append(len(wanted))
                numbers.append(i)
        hidden = model.hidden(pad(chosen, 0, device))
        rows, columns = torch.tensor(places, device=device).T
        wanted_tokens = torch.tensor(targets, device=device)
        losses, best = _losses_and_best(model, hidden[rows, columns], wanted_tokens)
        right = best == wanted_tokens
        for i, loss, hit, count in zip(
            numbers, losses.split(counts), right.split(counts), counts, strict=True
        ):
            out[i] = Score(-float(loss.double().sum()), count, bool(hit.all()))
        if progress is not None:
            progress(len(numbers))
    return [out[i] for i in range(len(pairs))]


@torch.inference_mode()
def text_loss(
    model: Decoder,
    text: Text,
    documents: Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> TextLoss:
    """The loss of texts.

    Each document begins with the model's first token (see `prefix_of`), which itself is not
    predicted. A document longer than the window is read in several: each predicts `stride` further
    tokens and repeats window - stride tokens before them as context. Every token is predicted
    once.

    Args:
        model, text: the decoder and its tokenizer.
        documents: the texts; none of them sees another.
        window: tokens read at once; max_positions by default (and at most).
        stride: tokens that a window predicts, between 1 and window; the whole window by default,
            as in lm-eval. Smaller strides cost more and give each token more context.
        batch_size: windows at a time.
        progress: called with the number of tokens of each batch.

    Raises:
        ValueError: no text, a window or stride out of range, a tokenizer of another model.
    """
    text.check_fits(model.config.vocab)
    limit = model.config.max_positions
    window = limit if window is None else window
    stride = window if stride is None else stride
    if not 1 <= window <= limit:
        raise ValueError(f"text_loss: window must be between 1 and {limit}, got {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"text_loss: stride must be between 1 and {window}, got {stride}")
    device = model.embed.weight.device
    prefix = prefix_of(model, text)
    size, count, nats, lossless = 0, 0, 0.0, True

    def windows() -> Iterator[tuple[list[int], list[int]]]:
        nonlocal size, lossless
        for document in documents:
            tokens = text.encode(document, special=False)
            lossless = lossless and text.decode(tokens) == document
            size += len(document.encode())
            whole = tokens if prefix is None else [prefix, *tokens]
            end = 0  # targets done so far
            while end < len(whole) - 1:
                step = window if end == 0 else stride
                stop = min(end + step, len(whole) - 1)
                start = max(0, stop - window)
                targets = [_IGNORE] * (end - start) + whole[end + 1 : stop + 1]
                yield whole[start:stop], targets
                end = stop

    for chosen in batches(windows(), batch_size):
        rows, targets = zip(*chosen, strict=True)
        wanted = pad(targets, _IGNORE, device)
        kept = wanted != _IGNORE
        hidden = model.hidden(pad(rows, 0, device))[kept]
        nats += float(_losses(model, hidden, wanted[kept]).double().sum())
        count += int(kept.sum())
        if progress is not None:
            progress(int(kept.sum()))
    if not count:
        raise ValueError("text_loss: the text is empty")
    return TextLoss(nats, count, size, lossless)


def encode_pair(text: Text, context: str, continuation: str, *, special: bool = True) -> Any:
    """(tokens of the context, tokens of the continuation), as lm-eval cuts them.

    White space at the context's end goes to the continuation, as tokenizers keep it at the
    beginning of words; both are encoded in one piece.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = text.encode(stripped + continuation, special)
    before = text.encode(stripped, special)
    return before, whole[len(before) :]


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last of fewer."""
    if size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {size}")
    group: list[T] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def pad(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """[B, T], filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)


def _losses(model: Decoder, hidden: Tensor, targets: Tensor) -> Tensor:
    """[N] losses, without all logits at once."""
    if isinstance(model.head, nn.QuantizedLinear):
        return _losses_and_best(model, hidden, targets)[0]
    return ops.linear_cross_entropy(hidden, model.head_weight, targets, reduction="none")


def _losses_and_best(model: Decoder, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """[N] losses and [N] likeliest tokens."""
    losses, best = [], []
    for rows, wanted in zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True):
        logits = model.logits(rows)
        losses.append(ops.cross_entropy(logits, wanted, reduction="none"))
        best.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(best)
