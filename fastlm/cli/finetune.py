"""fastlm finetune: teach a model to answer, from rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_TRAINING = (
    *("epochs", "steps", "lr", "accumulate", "schedule", "warmup", "weight_decay"),
    *("validate_every", "patience", "precision", "compile", "activation_checkpointing", "seed"),
)
_TEMPLATES = ("chatml", "plain")


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.argument("rows", type=click.Path(exists=True))
@click.option("--out", "-o", required=True, type=click.Path(file_okay=False), help="Directory.")
@click.option("--task", help="A task's name or .json file: ROWS are its raw data.")
@click.option(
    "--template",
    help="A Jinja chat template's file, 'chatml', or 'plain' for none; by default the model's.",
)
@click.option("--lora-rank", "-r", type=click.IntRange(min=1), help="Train a LoRA of this rank.")
@click.option("--lora-alpha", type=float, help="Its weight; by default twice the rank.")
@click.option("--lora-dropout", type=float, default=0.0, show_default=True)
@click.option(
    "--lora-targets",
    default="all-linear",
    show_default=True,
    help="all-linear, attention, mlp, or layers' names: q_proj,v_proj.",
)
@click.option("--merge/--no-merge", default=True, show_default=True, help="Also write the model.")
@click.option("--epochs", type=float, help="Passes over the rows.  [default: 3]")
@click.option("--steps", type=click.IntRange(min=1), help="Updates, in place of --epochs.")
@click.option("--lr", type=float, help="Learning rate.  [default: 5e-5, with LoRA 2e-4]")
@click.option("--batch-size", "-b", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--accumulate", type=click.IntRange(min=1), help="Batches in an update.")
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Tokens in a row of a batch; longer conversations are cut.",
)
@click.option("--schedule", help="cosine, wsd, linear or constant.")
@click.option("--warmup", type=click.IntRange(min=0), help="Steps of a rising learning rate.")
@click.option("--weight-decay", type=float, help="[default: 0]")
@click.option(
    "--validation",
    default="0.1",
    show_default=True,
    help="Share of the rows to watch the loss on, or a file of such rows; 0 for none.",
)
@click.option("--validate-every", type=click.IntRange(min=1), help="Steps; by default a tenth.")
@click.option(
    "--patience", type=click.IntRange(min=1), help="Stop after so many validations.  [default: 3]"
)
@click.option("--limit", type=click.IntRange(min=1), help="Learn from so many rows alone.")
@click.option("--drop-bad-rows", is_flag=True, help="Leave out rows nothing can be learnt from.")
@click.option("--precision", help="fp32, bf16, bf16-pure or fp16.")
@click.option("--compile", is_flag=True, default=None, help="torch.compile the model.")
@click.option("--activation-checkpointing", is_flag=True, default=None, help="Less memory.")
@click.option("--device", help="cpu or cuda; by default CUDA where there is one.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
def command(model: str, rows: str, out: str, **options: Any) -> None:
    """Fine-tune MODEL, a Hugging Face directory or a .gguf file, on the conversations in ROWS.

    ROWS is JSONL or JSON with the columns messages, or prompt and completion, or instruction,
    input and output; with --task its raw data. Only the assistant's answers are learnt. The
    result opens in fastlm and in transformers; a LoRA's adapter, in adapter/, in peft.

    \b
    Example:
      fastlm finetune ./smollm2 rows.jsonl --out ./mine
      fastlm finetune ./smollm2 reviews.zip --task sentiment --lora-rank 8 --out ./critic
      fastlm eval ./critic --task sentiment --data reviews.zip --split validation
    """
    import torch

    from fastlm import tasks
    from fastlm.data import rows as data_rows
    from fastlm.train.checkpoint import TrainingError
    from fastlm.train.finetune import defaults, finetune

    other = torch.distributed.get_node_local_rank(0)  # of several processes the first one speaks
    try:
        settings = _settings(options)
        config = defaults(options["lora_rank"] is not None, **{k: options[k] for k in _TRAINING})
        task = None if options["task"] is None else tasks.load(options["task"])
        read = data_rows.read if task is None else task.read
        learnt, held = _split(list(read(rows)), read, options)
        came = finetune(
            model,
            data_rows.sample(learnt, options["limit"], seed=options["seed"]),
            out,
            settings,
            config,
            validation=held,
            task=task,
            resume=options["resume"],
            device=options["device"],
            say=lambda text: None if other else click.echo(text, err=True),
        )
    except (ValueError, ImportError, OSError, TrainingError) as error:
        raise click.ClickException(str(error)) from error
    if other:
        return
    for message in came.bad:
        click.echo(f"left out: {message}", err=True)
    result = came.result
    if result.best_validation is not None:
        best = f"best validation loss {result.best_validation:.4f} at step {result.best_step}"
        click.echo(f"{result.stopped} after {result.steps} steps, {best}")
    elif result.loss is not None:
        click.echo(f"{result.stopped} after {result.steps} steps, loss {result.loss:.4f}")
    if result.stopped in ("finished", "early stop"):
        click.echo(f"written to {out}")


def _split(rows: list[Any], read: Any, options: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """(rows to learn, rows to watch)."""
    from fastlm.data import rows as data_rows

    wanted = options["validation"]
    try:
        share = float(wanted)
    except ValueError:
        return rows, list(read(wanted))
    learnt, held = data_rows.split(rows, share, seed=options["seed"])
    if share and not held:
        raise ValueError(
            f"{len(rows)} rows leave none for validation: give more, or --validation 0"
        )
    if options["limit"]:  # watch as small a share of what is learnt
        count = max(1, round(options["limit"] * share / (1 - share)))
        held = data_rows.sample(held, count, seed=options["seed"]) if share else []
    return learnt, held


def _settings(options: dict[str, Any]) -> Any:
    from fastlm.data.template import CHATML
    from fastlm.train.finetune import Settings

    lora = None
    if options["lora_rank"] is not None:
        lora = {"rank": options["lora_rank"], "alpha": options["lora_alpha"]}
        lora |= {"dropout": options["lora_dropout"], "targets": options["lora_targets"]}
    template = options["template"]
    if template == "chatml":
        template = CHATML
    elif template is not None and template != "plain":
        if not Path(template).is_file():
            names = ", ".join(_TEMPLATES)
            raise ValueError(f"--template must be {names} or a file, got {template!r}")
        template = Path(template).read_text(encoding="utf-8")
    return Settings(
        template=None if template == "plain" else template,
        plain=template == "plain",
        max_length=options["max_length"],
        batch_size=options["batch_size"],
        drop_bad_rows=options["drop_bad_rows"],
        seed=options["seed"],
        lora=lora,
        merge=options["merge"],
    )
