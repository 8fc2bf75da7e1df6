"""Fine-tuning on conversations: rows to batches, all weights or LoRA, a directory at the end.

OUT/                  the model, in Hugging Face's layout: the best by validation loss
OUT/adapter/          with LoRA: adapter_config.json, adapter_model.safetensors (PEFT's)
OUT/finetune.json     what was learnt from what, and what came of it
OUT/run/              the training run: log, checkpoints to resume from; may be deleted
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlm.data.chat import Conversations, Example
from fastlm.data.examples import PackedExamples
from fastlm.data.rows import Row
from fastlm.hf import tokenizer as tokenizers
from fastlm.models.decoder import Decoder
from fastlm.train import lora as lora_
from fastlm.train.checkpoint import (
    Checkpoints,
    Save,
    load_decoder,
    resolve,
    save_decoder,
    write_record,
    write_text,
)
from fastlm.train.config import TrainConfig
from fastlm.train.loop import Result, train
from fastlm.train.start import refuse_integers

if TYPE_CHECKING:
    from fastlm.tasks import Task

FULL_LR, LORA_LR = 5e-5, 2e-4
# How fine-tuning differs from pre-training by default: gently, not for long, nothing decays.
DEFAULTS: dict[str, Any] = {"beta2": 0.999, "weight_decay": 0.0, "patience": 3, "keep": 1}


@dataclass
class Settings:
    """What is learnt, and how rows become tokens.

    Attributes:
        template: a chat template; by default the checkpoint's.
        plain: joins prompt and completion without a template.
        max_length: conversations are cut there; the rows of a batch are as long.
        batch_size: rows of a micro-batch.
        drop_bad_rows: see `fastlm.data.chat.Conversations`.
        seed: of the order of batches.
        lora: what `fastlm.train.lora.apply` takes (rank, alpha, dropout, targets); None trains
            all weights.
        merge: whether a LoRA's model is written merged, beside its adapter.
    """

    template: str | None = None
    plain: bool = False
    max_length: int = 512
    batch_size: int = 4
    drop_bad_rows: bool = False
    seed: int = 0
    lora: dict[str, Any] | None = None
    merge: bool = True


@dataclass
class Finetuned:
    """What came of it.

    Attributes:
        result: of the run, see `fastlm.train.loop.Result`.
        counts: conversations, tokens and tokens with a loss; conversations cut and left out.
        bad: the messages of the rows left out.
        parameters: how many were trained.
    """

    result: Result
    counts: dict[str, int]
    bad: list[str] = field(default_factory=list)
    parameters: int = 0


def finetune(
    model: str | os.PathLike[str],
    rows: Iterable[Row],
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    config: TrainConfig | None = None,
    *,
    validation: Iterable[Row] = (),
    task: Task | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    say: Callable[[str], None] = lambda text: None,
    quiet: bool = False,
) -> Finetuned:
    """Fine-tunes a model on rows and writes the result to a directory.

    Args:
        model: a Hugging Face directory, a .gguf file, or a training run's folder.
        rows: (where, row) pairs, see `fastlm.data.chat.messages_of` for a row's shapes.
        out: the directory; see the module for what it will hold.
        settings: Settings() when None.
        config: of the training; see `defaults`.
        validation: rows whose loss picks the best weights and ends the run early; none of them
            should be among `rows`.
        task: turns raw rows into prompts and completions.
        resume: goes on with the run in `out`.
        device: by default the first CUDA device, else the CPU.
        say: told what is going on, a line at a time.
        quiet: no progress on standard error.

    Raises:
        RowError: a row that nothing can be learnt from; the message names it.
        TrainingError, CheckpointError, ValueError: before anything is written, where possible.
    """
    settings = settings or Settings()
    model, out = resolve(model), Path(out)
    if out.resolve() == Path(model).resolve():
        raise ValueError(f"{out}: the result needs a directory of its own, not the model's")
    if (out / "config.json").exists() and not resume:
        raise ValueError(f"{out}: holds a model already; take another directory")
    decoder = Decoder.from_pretrained(model)
    refuse_integers(decoder, model)
    stored = decoder.embed.weight.dtype
    decoder = decoder.float()
    text = tokenizers.load(decoder.source or model)
    text.check_fits(decoder.config.vocab)
    _name_the_end(decoder, text)
    length = min(settings.max_length, decoder.config.max_positions)
    plain = settings.plain or (task is not None and not task.chat)
    conversations = Conversations(text, settings.template, plain, length, settings.drop_bad_rows)
    learnt, held = (
        conversations.examples(_prompted(given, task, conversations.plain))
        for given in (rows, validation)
    )
    if not learnt:
        raise ValueError("finetune: there are no rows to learn from")
    counts = _counts(learnt, held, conversations)
    say(", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items()))
    block = min(length, max(sum(len(e.tokens) - 1 for e in learnt), _longest([*learnt, *held])))
    source = PackedExamples(learnt, block, settings.batch_size, settings.seed)
    watched = None
    if held:
        watched = PackedExamples(held, block, settings.batch_size, shuffle=False)

    adapter: lora_.LoRA | None = None
    save: Save = save_decoder
    load: Save = load_decoder
    if settings.lora is not None:
        adapter = lora_.apply(decoder, seed=settings.seed, **settings.lora)
        save, load = _files(adapter)
    parameters = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    say(f"{parameters:,} of {sum(p.numel() for p in decoder.parameters()):,} parameters learn")
    result = train(
        decoder,
        source,
        config or defaults(settings.lora is not None),
        validation=watched,
        out=out / "run",
        resume=resume,
        device=device,
        save_model=save,
        load_model=load,
        quiet=quiet,
    )
    came = Finetuned(result, counts, conversations.bad, parameters)
    if result.stopped not in ("finished", "early stop"):
        say(f"stopped by {result.stopped} at step {result.steps}: go on with resume")
        return came
    if torch.distributed.get_node_local_rank(0):
        return came  # one process of a torchrun writes
    run = Checkpoints(out / "run")
    kept = run.best() or run.latest()
    assert kept is not None  # a run that ends writes one
    say(f"taking the weights of {kept.name}")
    del decoder, adapter  # they may be sharded; the files are whole
    if settings.lora is None:
        tuned = Decoder.from_pretrained(kept)
    else:
        tuned = Decoder.from_pretrained(model).float()
        lora = lora_.load(tuned, kept)
        lora.save(out / "adapter")
        tuned = lora.merge()
    if settings.lora is None or settings.merge:
        new = _ends(learnt, conversations) - set(tuned.config.eos_ids)
        tuned.config.eos_ids = (*tuned.config.eos_ids, *new)
        tuned.to(stored).save_pretrained(out)
        _write_ends(out, tuned.config.eos_ids if new else ())
        if settings.template is not None and not conversations.plain:
            write_text(out / "chat_template.jinja", settings.template)
    write_record(
        out / "finetune.json",
        {
            "model": str(model),
            "task": None if task is None else task.name,
            "settings": asdict(settings),
            **{key: value for key, value in asdict(came).items() if key != "result"},
            "steps": result.steps,
            "best_step": result.best_step,
            "best_validation": result.best_validation,
            "stopped": result.stopped,
            "seconds": round(result.seconds, 1),
        },
    )
    return came


def defaults(lora: bool, **changes: Any) -> TrainConfig:
    """The training's settings for fine-tuning; a change of None keeps the default."""
    given = {key: value for key, value in changes.items() if value is not None}
    config = TrainConfig(**{"lr": LORA_LR if lora else FULL_LR, **DEFAULTS, **given})
    if config.steps is None and "epochs" not in given:
        config = replace(config, epochs=3.0)
    return config


def _prompted(rows: Iterable[Row], task: Task | None, plain: bool) -> Iterable[Row]:
    for where, row in rows:
        yield where, row if task is None else task.example(row, plain=plain)


def _counts(
    learnt: Sequence[Example], held: Sequence[Example], conversations: Conversations
) -> dict[str, int]:
    return {
        "conversations": len(learnt),
        "tokens": sum(len(e.tokens) for e in learnt),
        "tokens_of_answers": sum(e.answers for e in learnt),
        "validation_conversations": len(held),
        "cut": conversations.cut,
        "left_out": len(conversations.bad),
    }


def _longest(examples: Sequence[Example]) -> int:
    return max(len(example.tokens) - 1 for example in examples)


def _files(adapter: lora_.LoRA) -> tuple[Save, Save]:
    """How a run's checkpoints keep an adapter: without the weights that do not change."""
    return lambda model, folder: adapter.write(folder), lambda model, folder: adapter.read(folder)


def _name_the_end(model: Decoder, text: tokenizers.Text) -> None:
    """Templates ask for the end token by name; some tokenizers' files do not say it."""
    if "eos_token" not in text.special and model.config.eos_ids:
        token = text.tokenizer.id_to_token(model.config.eos_ids[0])
        if token is not None:
            text.special["eos_token"] = token


def _ends(examples: Sequence[Example], conversations: Conversations) -> set[int]:
    """The special token that ends every answer, where there is one: generation must stop there."""
    last = {e.tokens[len(e.mask) - 1 - e.mask[::-1].index(True)] for e in examples}
    special = last & conversations.ends
    return special if len(special) == 1 else set()


def _write_ends(out: Path, ends: Sequence[int]) -> None:
    """generation_config.json names the end tokens too, and counts before config.json."""
    file = out / "generation_config.json"
    if ends and file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        write_record(file, {**values, "eos_token_id": list(ends)})
