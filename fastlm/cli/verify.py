"""fastlm verify: a model of transformers, patched, against itself in float64."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False))
@click.option("--dtype", help="float32, bfloat16 or float16; by default as stored.")
@click.option("--prompt", "-p", help="Text to run on; by default random tokens.")
@click.option("--gradients/--no-gradients", default=True, show_default=True, help="Compare them.")
@click.option("--tokens", "-n", default=16, show_default=True, help="Greedy tokens to compare.")
@click.option("--json", "target", type=click.Path(dir_okay=False), help="Write the figures there.")
def command(
    path: str, dtype: str | None, prompt: str | None, gradients: bool, tokens: int, target: str
) -> None:
    """Patch the Hugging Face model in PATH and compare it with itself in float64.

    Prints what was replaced and why the rest was not, a table of errors (modules, logits, loss,
    gradients) beside those of the original model, and whether the greedy text is the same. Ends
    with code 0 when every error is within its budget, 1 when one is not.

    \b
    Example:
      fastlm verify ./smollm2 --dtype bfloat16 --json report.json
    """
    import torch
    import transformers

    import fastlm

    model, inputs = open_model(path, dtype, prompt)
    start = time.perf_counter()
    click.echo(f"{type(model).__name__}, {model.num_parameters():,} parameters", err=True)
    before = _greedy(model, inputs, tokens)
    with fastlm.patch(model) as patch:
        click.echo(patch.report())
        after = _greedy(model, inputs, tokens)
        click.echo("comparing with float64 ...", err=True)
        report = fastlm.verify(model, inputs, gradients=gradients)
    click.echo(str(report))
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b), None)
    text = "the same" if same is None else f"differs from token {same + 1} on"
    click.echo(f"greedy text of {len(before)} tokens: {text}")
    if target:
        content: dict[str, Any] = {
            "model": type(model).__name__,
            "path": str(path),
            "dtype": str(model.dtype).removeprefix("torch."),
            "versions": {
                "fastlm": fastlm.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "seconds": round(time.perf_counter() - start, 1),
            "greedy_same": same is None,
            "patch": [vars(entry) for entry in patch.entries],
            **report.to_dict(),
        }
        partial = Path(target + ".tmp")
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(target)
    sys.exit(0 if report.ok else 1)


def open_model(path: str, dtype: str | None, prompt: str | None) -> tuple[Any, Any]:
    """The model of transformers in a folder, in evaluation mode, and the prompt's tokens."""
    import torch
    import transformers

    wanted = getattr(torch, dtype, None) if dtype else "auto"
    if wanted not in ("auto", torch.float32, torch.bfloat16, torch.float16):
        raise click.UsageError(f"--dtype must be float32, bfloat16 or float16, got {dtype}")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=wanted, local_files_only=True, trust_remote_code=False
        )
        inputs = None
        if prompt is not None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
            inputs = dict(tokenizer(prompt, return_tensors="pt"))
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(f"{path} cannot be opened: {error}") from error
    return model.eval(), inputs


def _greedy(model: Any, inputs: dict[str, Any] | None, count: int) -> list[int]:
    import torch

    if count <= 0:
        return []
    ids = torch.arange(3, 11)[None] % model.config.vocab_size if inputs is None else None
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if ids is not None else {}
    made = model.generate(
        **(inputs or given), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return made[0, -count:].tolist()
