"""fastlm bench: this machine, or a model, measured beside PyTorch and transformers."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import click


@click.command()
@click.option("--op", "ops", multiple=True, help="Only this operator (repeatable).")
@click.option("--shape", help="With one --op: your shape, such as 1x32x8x2048x128 for attention.")
@click.option(
    "--model",
    type=click.Path(exists=True, path_type=Path),
    help="A Hugging Face directory or .gguf file: as it is, patched, and in fastlm's decoder.",
)
@click.option("--dtype", default="fp32,bf16", show_default=True, help="With --model.")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile as a further peer (slow).")
@click.option("--minutes", default=2.5, show_default=True, help="No further case begins after.")
@click.option("--seconds", type=float, help="Of timing per case; 0.15, with --op 0.6.")
@click.option("--threads", type=click.IntRange(min=1), help="Of PyTorch and the kernels.")
@click.option("--system-malloc", is_flag=True, help="Leave malloc as it is; else it keeps memory.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Result as JSON.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Result as a page.")
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Result as a picture.")
@click.option(
    "--compare",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Another result's JSON: what has changed since.",
)
def command(
    ops: tuple[str, ...],
    shape: str | None,
    model: Path | None,
    threads: int | None,
    out: Path | None,
    html: Path | None,
    png: Path | None,
    compare: Path | None,
    dtype: str,
    **options: Any,
) -> None:
    """Time fastlm's operators beside PyTorch's, each result checked against float64 first.

    \b
    Examples:
      fastlm bench                                   this machine, in three minutes
      fastlm bench --op attention --shape 1x32x8x2048x128
      fastlm bench --model ./my-model                original, patched, fastlm's decoder
      fastlm bench --out new.json --compare old.json --html report.html
    """
    import torch

    for path in (out, html, png):
        if path is not None and not path.absolute().parent.is_dir():
            raise click.UsageError(f"{path}: there is no folder {path.absolute().parent}")
    if shape is not None and len(ops) != 1:
        raise click.UsageError("--shape needs exactly one --op")
    if model is not None and (ops or shape or html or compare):
        raise click.UsageError("--model goes with --dtype, --out and --png only")
    if png is not None:
        importlib.import_module("matplotlib")  # the command line says which extra brings it
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        suite()
        content = (
            _model(model, dtype.split(",")) if model else _operators(ops, shape, compare, options)
        )
        results_file, page, picture = (suite(n) for n in ("results_file", "page", "picture"))
        if out is not None:
            results_file.write(out, content)
        if html is not None:
            page.write(content, html)
        if png is not None:
            (suite("models.plot") if model else picture).draw(content, png)
    except (ValueError, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    for path in (out, html, png):
        if path is not None:
            click.echo(f"written: {path}")


def suite(name: str = "") -> Any:
    """A module of the benchmarks: fastlm.benchmarks where installed, benchmarks in a checkout."""
    dotted = f".{name}" if name else ""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "benchmarks" / "case.py").is_file():
        if str(checkout) not in sys.path:
            sys.path.insert(0, str(checkout))
        return importlib.import_module(f"benchmarks{dotted}")
    return importlib.import_module(f"fastlm.benchmarks{dotted}")


def _operators(
    ops: tuple[str, ...], shape: str | None, compare: Path | None, options: dict[str, Any]
) -> dict[str, Any]:
    case, custom, session = suite("case"), suite("custom"), suite("session")
    for op in ops:
        if op not in case.OPS:
            raise click.UsageError(f"--op: expected one of {', '.join(case.OPS)}, got {op!r}")
    earlier = suite("results_file").read(compare) if compare else None
    chosen = custom.cases(ops[0], shape) if shape else case.load(ops or case.OPS)
    if not ops:  # the short ones first, so that the time reaches for every operator
        chosen.sort(key=lambda c: c.flops > 2e10)
    plan = session.Plan(
        seconds=options["seconds"] or (0.6 if ops else 0.15),
        compiled=options["compiled"],
        reference=bool(ops),
        keep=not options["system_malloc"],
        budget=60 * options["minutes"],
    )
    content, outcomes = session.measure(chosen, plan, click.echo)
    click.echo("\n" + session.summary(outcomes))
    if earlier is not None:
        click.echo("\n" + suite("changes").table(earlier, content))
    if any(o.status in ("wrong", "error") for o in outcomes):
        click.echo("some results were wrong or failed: see above", err=True)
    return dict(content)


def _model(path: Path, dtypes: list[str]) -> dict[str, Any]:
    """original | patched | decoder: prefill, decoding, a training step, memory."""
    case, own, report = suite("case"), suite("models.own"), suite("report")
    for dtype in dtypes:
        if dtype not in case.DTYPES:
            raise click.UsageError(f"--dtype: expected fp32, bf16 or fp32,bf16, got {dtype!r}")
    content: dict[str, Any] = own.measure(path, dtypes, lambda text: click.echo(text, err=True))
    rows = [["", "", *content["variants"]], *report.demo_rows(content)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    return content
