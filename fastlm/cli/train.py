"""fastlm train: pre-training and continued training."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from fastlm.train.config import ENGINES, OPTIMIZERS, PRECISIONS, PRODUCTS, SCHEDULES, TrainConfig

HELP = {
    "steps": "Updates of the weights; or --epochs.",
    "epochs": "Passes over the text; 1 unless --steps is given.",
    "accumulate": "Micro-batches in a step, over all processes together.",
    "optimizer": "",
    "lr": "The highest learning rate.",
    "beta1": "Of AdamW.",
    "beta2": "Of AdamW.",
    "eps": "Of AdamW.",
    "momentum": "Of SGD.",
    "weight_decay": "Decoupled; of matrices, not of norms, biases and looked-up tables.",
    "clip": "Largest norm of the gradient.",
    "schedule": "The learning rate's course after the warm-up.",
    "warmup": "Steps of rising; a tenth of all, at most 100, if not given.",
    "min_lr": "At the end, as a fraction of --lr.",
    "decay": "wsd: the fraction of all steps that fall.",
    "precision": "bf16, fp16: products in 16 bits, weights in fp32; bf16-pure: all in 16 bits.",
    "compile": "Through torch.compile.",
    "activation_checkpointing": "Less memory, a third more arithmetic.",
    "products": "Matrix products on a CPU: own kernels, the library, or the faster.",
    "seed": "Of fresh weights, the order of the text and random numbers.",
    "validate_every": "Steps; a tenth of all if not given.",
    "validation_batches": "At most so many micro-batches; all if not given.",
    "patience": "Stop after so many validations without a better one.",
    "log_every": "Steps.",
    "save_every": "Steps between checkpoints.",
    "save_minutes": "Minutes between checkpoints.",
    "keep": "Newest checkpoints; the best one stays besides.",
    "engine": "Of several processes: whole models, or shares (FSDP2).",
}
CHOICES = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "products": PRODUCTS,
    "engine": ENGINES,
}
# Settings beside TrainConfig's that a file may hold and a resumed run remembers.
OTHERS = {"data", "init", "shape", "block", "batch", "windows"}


def settings(command: Callable[..., None]) -> Callable[..., None]:
    """An option for every field of TrainConfig."""
    for field in reversed(dataclasses.fields(TrainConfig)):
        flag = "--" + field.name.replace("_", "-")
        default = field.default
        options: dict[str, Any] = {"default": default, "help": HELP[field.name]}
        options["show_default"] = default is not None
        if field.name in CHOICES:
            options["type"] = click.Choice(CHOICES[field.name])
        elif isinstance(default, bool):
            flag, options["is_flag"] = f"{flag}/--no-{flag[2:]}", True
        else:
            options["type"] = float if "float" in str(field.type) else int
        command = click.option(flag, field.name, **options)(command)
    return command


@click.command()
@click.argument("data", required=False, type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="The run's folder.")
@click.option("--resume", is_flag=True, help="Go on from the run's latest checkpoint, if any.")
@click.option("--config", "file", type=click.Path(exists=True), help="Settings: .json or .toml.")
@click.option("--init", type=click.Path(), help="Begin with this model: a folder or a run.")
@click.option("--shape", help="Of a fresh model: a preset, fields, or both.  [default: tiny]")
@click.option("--block", type=int, help="Tokens in a row; 256, or as many as --init has positions.")
@click.option("--batch", default=16, show_default=True, help="Rows in a micro-batch.")
@click.option("--windows", is_flag=True, help="Random windows of the text, across documents.")
@settings
@click.option("--device", help="cpu or cuda; by default CUDA where there is one.")
@click.option("--threads", type=click.IntRange(min=1), help="Of the CPU.")
@click.option(
    "--keep-memory/--no-keep-memory",
    default=True,
    show_default=True,
    help="On a CPU: let glibc keep freed memory for the next step (fastlm.keep_freed_memory).",
)
@click.option("--quiet", is_flag=True, help="Print nothing but the end.")
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> None:
    """Train a decoder on DATA, a folder that `fastlm prepare` wrote.

    The run's folder holds log.jsonl, plot.png and checkpoints that transformers opens; RUN/best and
    RUN/latest point to two of them. Ctrl-C or SIGTERM finishes the step and writes a checkpoint. A
    run that ended in whatever way goes on, bit for bit, with the same command and --resume; its
    settings need not be repeated.

    Presets of --shape: tiny, 260K, 15M, 42M, 110M, gpt2; fields as in fastlm.models.Config.

    \b
    Example:
      fastlm train ./tokens --out ./run --shape tiny --block 64 --steps 2000
      fastlm train --out ./run --resume
      fastlm train ./tokens --out ./run2 --init ./run --lr 1e-4 --steps 300
      fastlm train ./tokens --out ./run3 --shape 'hidden=384,layers=6,heads=6' --precision bf16
      torchrun --nproc-per-node 2 -m fastlm train ./tokens --out ./run4 --accumulate 2
    """
    import torch

    import fastlm
    from fastlm.data.shards import TokenDataset
    from fastlm.train import start
    from fastlm.train.loop import train

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    out = Path(options["out"])
    try:
        values = merged(ctx, options, out)
        config = TrainConfig(**{f.name: values[f.name] for f in dataclasses.fields(TrainConfig)})
        if values["data"] is None:
            raise click.UsageError("DATA is missing: the folder that `fastlm prepare` wrote")
        if values["block"] is None:
            values["block"] = start.usual_block(values["init"])
        block, batch, seed = values["block"], values["batch"], config.seed
        source, validation = start.sources(
            values["data"], block, batch, seed, not values["windows"]
        )
        model = start.resumed(out) if options["resume"] else None
        if model is None:
            refuse_another(out, options["resume"])
            data = TokenDataset(values["data"], "train")
            model = start.model(data, out, values["init"], values["shape"], block, seed)
        remember(out, values)
        on_cpu = options["device"] == "cpu" or not torch.cuda.is_available()
        if options["keep_memory"] and on_cpu:
            fastlm.keep_freed_memory()
        result = train(
            model,
            source,
            config,
            validation=validation,
            out=out,
            resume=options["resume"],
            device=options["device"],
            quiet=options["quiet"],
        )
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if result.first:
        click.echo(summary(result, out))
    stopped = getattr(signal, result.stopped, None)
    if isinstance(stopped, signal.Signals):
        sys.exit(128 + stopped)


def merged(ctx: click.Context, options: dict[str, Any], out: Path) -> dict[str, Any]:
    """The settings: defaults, then a resumed run's, then the file's, then the command line's."""
    known = {f.name for f in dataclasses.fields(TrainConfig)} | OTHERS
    given = {
        name
        for name in known
        if ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)
        and options[name] is not None
    }
    layers = [{name: options[name] for name in known}]
    if options["resume"] and (out / "command.json").is_file():
        layers.append(json.loads((out / "command.json").read_text(encoding="utf-8")))
    if options["file"] is not None:
        layers.append(read_settings(Path(options["file"]), known))
    layers.append({name: options[name] for name in given})
    values: dict[str, Any] = {}
    for layer in layers:
        for one, other in (("steps", "epochs"), ("init", "shape")):  # one replaces the other
            for name, rival in ((one, other), (other, one)):
                if layer.get(name) is not None and layer.get(rival) is None:
                    values[rival] = None
        values.update({k: v for k, v in layer.items() if v is not None or k not in values})
    return values


def read_settings(path: Path, known: set[str]) -> dict[str, Any]:
    """A file's settings; an unknown one raises ValueError."""
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".toml":
            import tomllib

            values = tomllib.loads(text)
        else:
            values = json.loads(text)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: TOML needs Python 3.11; use JSON") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected settings by name, got {type(values).__name__}")
    unknown = sorted(set(values) - known)
    if unknown:
        names = ", ".join(sorted(known))
        raise ValueError(f"{path}: unknown setting {unknown[0]!r}; known are {names}")
    return values


def refuse_another(out: Path, resume: bool) -> None:
    """A folder with a run is not begun again."""
    from fastlm.train.checkpoint import Checkpoints, TrainingError

    if not resume and Checkpoints(out).latest() is not None:
        raise TrainingError(f"{out} holds a run already: --resume it, or take another --out")


def remember(out: Path, values: dict[str, Any]) -> None:
    """What --resume needs not be told again."""
    from fastlm.train.checkpoint import write_record

    try:
        out.mkdir(parents=True, exist_ok=True)
        kept = {**values, "data": str(Path(values["data"]).resolve())}
        if kept["init"] is not None:
            kept["init"] = str(Path(kept["init"]).resolve())
        write_record(out / "command.json", kept)
    except OSError as error:
        raise click.ClickException(f"{out} cannot be written: {error.strerror}") from error


def summary(result: Any, out: Path) -> str:
    """How a run ended, and what to do next."""
    from fastlm.train.log import duration

    lines = [f"{result.stopped} at step {result.steps} after {duration(result.seconds)}"]
    if result.loss is not None:
        lines[0] += f": loss {result.loss:.4f}"
    if result.best_validation is not None:
        lines[0] += f", best validation {result.best_validation:.4f} (step {result.best_step})"
    if result.stopped.startswith("SIG"):
        lines.append(f"go on: fastlm train --out {out} --resume")
    else:
        best = "best" if (out / "best").exists() else "latest"
        lines.append(f"try it: fastlm generate {out / best} --prompt '...'")
    return "\n".join(lines)
