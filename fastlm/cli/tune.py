"""fastlm tune: measures which implementation is fastest here, and has the chooser use it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastlm.cli._progress import Progress
from fastlm.cli.bench import suite

if TYPE_CHECKING:
    from fastlm.tune import Result

Say = Callable[["Result"], None]
PROMPT, STEPS = 128, 4  # tokens of a model's prompt, and decoding steps after it


@click.command()
@click.option("--op", "ops", multiple=True, help="Only this operator (repeatable).")
@click.option("--shape", help="With one --op: your shape, written as for `fastlm bench`.")
@click.option(
    "--model",
    type=click.Path(exists=True, path_type=Path),
    help="A Hugging Face directory or .gguf file: the calls it makes in a prompt, in decoding and "
    "in a training step.",
)
@click.option("--dtype", help="With --model: float32, bfloat16 or float16; by default as stored.")
@click.option("--seconds", default=150.0, show_default=True, help="No further case begins after.")
@click.option("--threads", type=click.IntRange(min=1), help="The table counts for so many.")
@click.option("--realtime", is_flag=True, help="On a machine with other work (needs root).")
@click.option("--again", is_flag=True, help="Measure what the table knows already, too.")
@click.option("--dry-run", is_flag=True, help="Say what would be measured, and end.")
@click.option("--show", is_flag=True, help="Print the table of this machine, and end.")
@click.option("--clear", is_flag=True, help="Remove the table's file, and end.")
def command(
    ops: tuple[str, ...],
    shape: str | None,
    model: Path | None,
    dtype: str | None,
    seconds: float,
    threads: int | None,
    realtime: bool,
    again: bool,
    dry_run: bool,
    show: bool,
    clear: bool,
) -> None:
    """Time the implementations of the operators on this machine and keep the winners.

    Each implementation's result is checked first. The chooser then takes the winner for calls of
    the same class: the same widths and heads, a number of rows up to the same power of two, the
    same element type, with or without gradients. `fastlm explain` shows the times behind a choice.

    \b
    Examples:
      fastlm tune                                    the benchmarks' cases
      fastlm tune --op linear --shape 64x768x2048    your shape, forward and backward
      fastlm tune --model ./my-model                 the calls that your model makes
      fastlm tune --show
    """
    import torch

    from fastlm.ops import _measured

    if shape is not None and len(ops) != 1:
        raise click.UsageError("--shape needs exactly one --op")
    if model is not None and ops:
        raise click.UsageError("--model goes without --op")
    if dtype is not None and model is None:
        raise click.UsageError("--dtype goes with --model")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        path = _measured.location()
        if clear:
            _measured.clear()
            return click.echo(f"removed: {path}")
        _measured.load(path)  # a file of another kind is not written over
        if show:
            return click.echo(_table())
        if model is not None:
            click.echo(f"the calls of {model}, some {2 * seconds / 3:.0f} s at the most")
            run = _of_model(model, dtype, seconds, again)
        else:
            chosen = _cases(ops, shape)
            click.echo(f"{len(chosen)} cases, {_duration(len(chosen), seconds)} s at the most")
            if dry_run:
                return click.echo("\n".join(case.id for case in chosen))
            run = _of_cases(chosen, seconds, again, realtime)
        if dry_run:
            return click.echo(f"the winners go to {path}")
        results = _kept(run)
    except (OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(summary(results))
    click.echo(f"the table: {path}")


def summary(results: list[Result]) -> str:
    """A line per class, what was left out, and how much was won."""
    if not results:
        return "nothing to measure: the table knows these calls, or one implementation is able"
    lines, changed = [], []
    for result in results:
        for name, fault in result.wrong.items():
            lines.append(f"{result.name}: {name} is left out, its result is wrong: {fault}")
        if result.entry is None:
            continue
        times = ", ".join(f"{name} {us:.4g} us" for name, us in result.entry.us.items())
        new = result.entry.winner != result.verdict.chosen
        text = f"  {result.gain:.2f}x {result.verdict.chosen}, chosen until now" if new else ""
        lines.append(f"{result.name}: {result.entry.winner}  ({times}){text}")
        if new:
            changed.append(result.gain)
    measured = sum(result.entry is not None for result in results)
    text = f"{measured} classes of calls measured, another choice than before in {len(changed)}"
    if changed:
        mean = math.exp(sum(map(math.log, changed)) / len(changed))
        text += f": {mean:.2f}x as fast there (geometric mean)"
    return "\n".join([*lines, "", text])


def _duration(count: int, seconds: float) -> int:
    """Seconds that so many cases take at most, the checks among them."""
    return round(min(seconds, 3.0 * count + 1))


def _table() -> str:
    """What the file holds for this machine, and why the rest is not used."""
    from fastlm.ops import _measured, _registry

    lines = []
    for device in ("cpu", "cuda"):
        for stem, facts in sorted(_measured.verdicts(device).items()):
            for name, classes in facts.items():
                for sizes, entry in classes.items():
                    lines.append(f"{stem} {sizes} ({name}): {entry.winner}  {entry}")
        for stem in _registry.stems():
            lines += [f"{stem}: {why}" for why in _measured.stale(stem, device)]
    return "\n".join(lines) or "nothing was measured here yet: fastlm tune"


def _kept(run: Iterator[Result]) -> list[Result]:
    """The results, each put into the file at once, so that an interruption loses none."""
    from fastlm.ops import _measured

    results = []
    try:
        for result in run:
            results.append(result)
            if result.entry is not None:
                _measured.save()
    except KeyboardInterrupt:
        click.echo("interrupted; what was measured is kept", err=True)
    return results


# ---- the benchmarks' cases -----------------------------------------------------------------------


def _cases(ops: tuple[str, ...], shape: str | None) -> list[Any]:
    case = suite("case")
    for op in ops:
        if op not in case.OPS:
            raise click.UsageError(f"--op: expected one of {', '.join(case.OPS)}, got {op!r}")
    chosen = suite("custom").cases(ops[0], shape) if shape else case.load(ops or case.OPS)
    return sorted(chosen, key=lambda c: c.flops > 2e10)  # short ones first


def _of_cases(cases: list[Any], seconds: float, again: bool, realtime: bool) -> Iterator[Result]:
    started, met = time.perf_counter(), set[Any]()
    each = min(0.3, max(0.05, 0.4 * seconds / len(cases)))
    with Progress() as progress:
        for done, case in enumerate(cases):
            progress("measuring", done, len(cases))
            if time.perf_counter() - started > seconds:
                click.echo(f"{len(cases) - done} cases were left out: the time was up", err=True)
                return
            try:
                yield from measure_case(case, each, again, met, realtime)
            except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                click.echo(f"{case.id} failed: {error}", err=True)


def measure_case(
    case: Any, seconds: float, again: bool, met: set[Any], realtime: bool = False
) -> Iterator[Result]:
    """Measures the classes of calls that a case of the benchmarks makes, those in `met` excepted.

    Cold cases rotate their inputs, as in the benchmarks.
    """
    import torch

    from fastlm import tune
    from fastlm.ops import _registry

    driver = suite("driver")
    work = driver.build(case, 0)
    with torch.set_grad_enabled(case.backward):
        with _registry.unmeasured(again) as waiting:
            driver.thunk(case, work, work.ours)()
        found = []
        for verdict in reversed(waiting):  # what an operator asks of another comes first
            facts = _registry.fact_text(verdict.dtype, verdict.facts)
            key = verdict.stem, facts, verdict.sizes
            if key not in met and len(tune.candidates(verdict)) > 1:
                met.add(key)
                found.append(verdict)
        if not found:
            return
        works = [work] + [driver.build(case, copy) for copy in range(1, driver.copies(case))]
        thunks = [driver.thunk(case, w, w.ours) for w in works]

        def check() -> str:
            with torch.enable_grad():
                return str(driver.problems(case, work))

        for verdict in found:
            yield tune.measure(
                verdict, thunks, check, shape=case.shape, seconds=seconds, realtime=realtime
            )


# ---- a model -------------------------------------------------------------------------------------


def _of_model(path: Path, dtype: str | None, seconds: float, again: bool) -> Iterator[Result]:
    """The calls of a prompt, of decoding, and of a training step, measured as they come."""
    from fastlm import tune

    parts = _parts(path, dtype)
    started = time.perf_counter()
    with Progress() as progress, tune.tuning(again=again) as results:
        told = 0
        for done, (name, part) in enumerate(parts):
            progress(name, done, len(parts))
            if time.perf_counter() - started > seconds:
                click.echo(f"{name} was left out: the time was up", err=True)
                continue
            part()
            yield from results[told:]
            told = len(results)


def _parts(path: Path, dtype: str | None) -> list[tuple[str, Callable[[], object]]]:
    """What is done with a model: in fastlm's decoder, or patched where that does not open it."""
    import torch

    from fastlm.models import Decoder

    try:
        model = Decoder.from_pretrained(path, dtype)
    except ValueError as error:
        if not path.is_dir():
            raise
        click.echo(f"not in fastlm's decoder, but patched: {error}", err=True)
        return _patched(path, dtype)
    tokens = torch.arange(min(PROMPT, model.config.max_positions - STEPS))[None] + 3
    tokens = tokens % model.config.vocab
    cache = model.new_cache()

    @torch.inference_mode()
    def read() -> None:
        model(tokens, cache=cache)

    @torch.inference_mode()
    def write() -> None:
        for _ in range(STEPS):
            model(tokens[:, :1], cache=cache)

    def learn() -> None:
        model.train()(tokens, labels=tokens).backward()

    return [("prompt", read), ("decoding", write), ("training step", learn)]


def _patched(path: Path, dtype: str | None) -> list[tuple[str, Callable[[], object]]]:
    import torch

    import fastlm
    from fastlm.cli.verify import open_model

    model, _ = open_model(str(path), dtype, None)
    fastlm.patch(model)
    tokens = torch.arange(PROMPT)[None] % model.config.vocab_size

    def write() -> None:
        with torch.no_grad():
            model.generate(tokens, max_new_tokens=STEPS, do_sample=False)

    def learn() -> None:
        model.train()(tokens, labels=tokens).loss.backward()

    return [("prompt and decoding", write), ("training step", learn)]
