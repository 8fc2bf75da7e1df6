"""A model's score on a task: choices compared, last words guessed, answers generated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fastlm.data.chat import Conversations
from fastlm.data.rows import Row
from fastlm.models.text import Completion, complete
from fastlm.train.evaluate import (
    Progress,
    encode_pair,
    prefix_of,
    score,
)
from fastlm.train.evaluate_metrics import METRICS, require

if TYPE_CHECKING:
    from fastlm.hf.tokenizer import Text
    from fastlm.models.decoder import Decoder
    from fastlm.tasks import Task

Prompter = Callable[[str], list[int]]


@dataclass
class Result:
    """What came of a task.

    Attributes:
        task: its name.
        rows: how many rows were scored.
        scores: metric -> value; a share has its standard error beside it as `<metric>_stderr`.
        samples: of each row what was asked, what was right and what came.
    """

    task: str
    rows: int
    scores: dict[str, float]
    samples: list[dict[str, Any]] = field(default_factory=list)


def evaluate(
    model: Decoder,
    text: Text,
    task: Task,
    rows: Sequence[Row],
    *,
    batch_size: int = 8,
    chat: bool | None = None,
    progress: Progress | None = None,
) -> Result:
    """A model's score on a task.

    - "choice": acc, the share of rows whose right choice is the likeliest; acc_norm, by
      log-probability for each character of the choice (both as lm-eval defines them); acc_bytes,
      for each byte.
    - "last_word": acc, the share of rows whose last word is what greedy decoding writes, and
      perplexity, exp of the mean loss of a whole word.
    - "generate": the task's metrics of greedily generated answers.
    - "loss": loss and perplexity for each token of the right answers, bits_per_byte.

    Args:
        model, text: the decoder and its tokenizer.
        task: what to ask.
        rows: (where, row) pairs.
        batch_size: sequences at a time; the scores do not depend on it.
        chat: whether prompts go through the chat template; by default where the model has one and
            the task does not refuse.
        progress: called with the number of rows (of choices, for "choice") done.

    Raises:
        ValueError: no rows, a row the task cannot be asked about, a tokenizer of another model.
        ModuleNotFoundError: a metric's package is missing (extra `metrics`).
    """
    if not rows:
        raise ValueError(f"task {task.name}: there are no rows")
    text.check_fits(model.config.vocab)
    for name in task.metrics:
        require(name)
    if chat is None:
        chat = task.chat and text.template is not None
    if chat and text.template is None:
        raise ValueError(f"task {task.name}: the checkpoint has no chat template")
    asked = _Asked(model, text, task, chat, batch_size, progress)
    result = getattr(asked, task.kind)(rows)
    for name in [name for name in result.scores if name.startswith(("acc", "exact_match"))]:
        share = result.scores[name]
        spread = share * (1 - share) / max(len(rows) - 1, 1)
        result.scores[f"{name}_stderr"] = math.sqrt(spread)
    return result


def answers(
    model: Decoder,
    text: Text,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    progress: Progress | None = None,
    **options: Any,
) -> list[str]:
    """What the model writes after each prompt, up to the first of the stop strings.

    White space around an answer is left out. A prompt that leaves no room for max_new_tokens loses
    tokens on the left. The rest is as in `fastlm.models.text.complete`.
    """
    room = max(model.config.max_positions - max_new_tokens, 1)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    given = [list(prompts[i])[-room:] for i in order]

    def done(number: int, answer: Completion) -> None:
        if progress is not None:
            progress(1)

    found = complete(
        model,
        text,
        given,
        max_new_tokens,
        stop=stop,
        batch_size=batch_size,
        callback=done,
        **options,
    )
    written = {i: completion.text.strip() for i, completion in zip(order, found, strict=True)}
    return [written[i] for i in range(len(prompts))]


@dataclass
class _Asked:
    """One method for each kind of task."""

    model: Decoder
    text: Text
    task: Task
    chat: bool
    batch_size: int
    progress: Progress | None

    def __post_init__(self) -> None:
        self.conversations = Conversations(self.text)
        self.prefix = prefix_of(self.model, self.text)

    def pair(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of a prompt and of what is to follow."""
        if self.chat:
            context = self._prompt(prompt)
            return context, self.text.encode(answer, special=False)
        separator = self.task.separator if prompt else ""
        context, rest = encode_pair(self.text, prompt, separator + answer)
        if prompt:
            return context, rest
        special = self.text.encode("")
        if not special and self.prefix is not None:
            special = [self.prefix]
        if not special:
            return rest[:1], rest[1:]  # nothing can predict the first token
        return special, self.text.encode(answer, special=False)

    def _prompt(self, prompt: str) -> list[int]:
        if self.chat:
            return self.conversations.prompt([{"role": "user", "content": prompt}])
        return self.text.encode(prompt)

    def scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Any:
        return score(self.model, pairs, batch_size=self.batch_size, progress=self.progress)

    def choice(self, rows: Sequence[Row]) -> Result:
        pairs, questions = [], []
        for _, row in rows:
            prompt, choices = self.task.fill_prompt(row), self.task.options_of(row)
            questions.append((prompt, choices, self.task.right(row)))
            pairs += [self.pair(prompt, choice) for choice in choices]
        scores = iter(self.scores(pairs))
        counts = dict.fromkeys(("acc", "acc_norm", "acc_bytes"), 0)
        samples = []
        for prompt, choices, gold in questions:
            logprobs = [next(scores).logprob for _ in choices]
            best = {
                "acc": _largest(logprobs, [1] * len(choices)),
                "acc_norm": _largest(logprobs, [len(c) for c in choices]),
                "acc_bytes": _largest(logprobs, [len(c.encode()) for c in choices]),
            }
            for name, number in best.items():
                counts[name] += number == gold
            samples.append(
                {
                    "prompt": prompt,
                    "choices": choices,
                    "gold": gold,
                    "chosen": best["acc"],
                    "logprobs": logprobs,
                }
            )
        shares = {name: count / len(rows) for name, count in counts.items()}
        return Result(self.task.name, len(rows), shares, samples)

    def last_word(self, rows: Sequence[Row]) -> Result:
        texts = [self._filled(row) for _, row in rows]
        scores = self.scores([self.pair(prompt, word) for prompt, word in texts])
        shares = {
            "acc": sum(s.greedy for s in scores) / len(rows),
            "perplexity": math.exp(-sum(s.logprob for s in scores) / len(rows)),
        }
        samples = [
            {"prompt": prompt, "gold": word, "logprob": s.logprob, "greedy": s.greedy}
            for (prompt, word), s in zip(texts, scores, strict=True)
        ]
        return Result(self.task.name, len(rows), shares, samples)

    def loss(self, rows: Sequence[Row]) -> Result:
        texts = [self._filled(row) for _, row in rows]
        scores = self.scores([self.pair(prompt, answer) for prompt, answer in texts])
        nats, tokens = -sum(s.logprob for s in scores), sum(s.tokens for s in scores)
        size = sum(len(answer.encode()) for _, answer in texts)
        shares = {
            "loss": nats / tokens,
            "perplexity": math.exp(nats / tokens),
            "bits_per_byte": nats / math.log(2) / size,
        }
        samples = [
            {"prompt": prompt, "gold": answer, "logprob": s.logprob, "tokens": s.tokens}
            for (prompt, answer), s in zip(texts, scores, strict=True)
        ]
        return Result(self.task.name, len(rows), shares, samples)

    def generate(self, rows: Sequence[Row]) -> Result:
        asked = [self.task.fill_prompt(row) for _, row in rows]
        right = [self.task.right_texts(row) for _, row in rows]
        written = answers(
            self.model,
            self.text,
            [self._prompt(prompt) for prompt in asked],
            max_new_tokens=self.task.max_new_tokens,
            stop=self.task.stop,
            batch_size=self.batch_size,
            progress=self.progress,
        )
        shares: dict[str, float] = {}
        for name in self.task.metrics:
            shares |= METRICS[name](written, right)
        samples = [
            {"prompt": prompt, "gold": gold, "answer": answer}
            for prompt, gold, answer in zip(asked, right, written, strict=True)
        ]
        return Result(self.task.name, len(rows), shares, samples)

    def _filled(self, row: Mapping[str, Any]) -> tuple[str, str]:
        prompt, answer = self.task.fill_prompt(row), self.task.example(row, plain=False)
        return prompt, answer["completion"]


def _largest(logprobs: Sequence[float], sizes: Sequence[int]) -> int:
    """The number of the largest log-probability for each unit; the first of equals."""
    values = torch.tensor(logprobs, dtype=torch.float64) / torch.tensor(sizes)
    return int(values.argmax())
