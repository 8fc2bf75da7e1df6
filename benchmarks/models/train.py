"""A training step and a forward pass: fastlm's decoder, transformers patched, compiled, as it is.

    python -m benchmarks.models.train --size 15M 110M --dtype fp32 bf16

All train the same random weights on the same random tokens, in turns: forward, loss, backward and
PyTorch's fused AdamW. Before anything is timed, the loss and all gradients of the same architecture
with two layers are judged against float64 beside transformers' own.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastlm
from fastlm.hf import families, weights
from fastlm.models import Decoder
from fastlm.testing import error

from .. import machine, results_file
from ..case import DTYPES
from ..session import duration
from ..timing import Thunk, Times, interleave
from .decode import SIZES, make, transformers_of

KINDS = (*DTYPES, "autocast")  # autocast: fp32 weights, products in bf16
BATCH, TOKENS, PROMPT, VOCAB = 8, 256, 512, 32000
Loss = Callable[[Tensor], Tensor]  # tokens [B, T] -> mean loss of every token but the first
EXAMPLE = """example:
  python -m benchmarks.models.train --size 15M --dtype fp32 --compile
"""


def loss_of(model: Any) -> Loss:
    """The language-modelling loss of a decoder or of a model of transformers."""
    if isinstance(model, Decoder):
        return lambda tokens: model(tokens, labels=tokens)
    return lambda tokens: model(input_ids=tokens, labels=tokens, use_cache=False).loss


def in_transformers(model: Decoder) -> Any:
    """The same weights in transformers, a copy of their own."""
    return transformers_of(copy.deepcopy(model))


def check(size: str, kind: str) -> None:
    """Raises AssertionError where a loss or gradient errs more than twice as much as theirs."""
    model = make(size, DTYPES.get(kind, torch.float32), layers=2)
    exact = make(size, torch.float64, layers=2)
    exact.load_state_dict(model.state_dict())
    theirs = in_transformers(model)
    patched = in_transformers(model)
    fastlm.patch(patched)
    tokens = torch.randint(0, model.config.vocab, (2, 64))
    found = {}
    for name, made in (("ours", model), ("theirs", theirs), ("patched", patched), ("", exact)):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast" and name != ""):
            loss = loss_of(made)(tokens)
        loss.backward()
        found[name] = loss.detach(), _gradients(made)
    names = list(found["theirs"][1])
    for name in ("ours", "patched"):
        vectors = [
            torch.cat([found[key][1][n].flatten() for n in names]) for key in (name, "theirs", "")
        ]
        result = error("gradients", *vectors)
        assert result.ok, f"{size} {kind} {name}: {result}"
        ours, peer, right = (float(found[key][0]) for key in (name, "theirs", ""))
        # one number may come out right by chance: the rounding of a loss is allowed besides
        assert abs(ours - right) <= 2 * abs(peer - right) + 1e-3 * right, f"{size} {kind} {name}"


def _gradients(model: Any) -> dict[str, Tensor]:
    """Every parameter's gradient, by its name in transformers."""
    if not isinstance(model, Decoder):
        return {name: p.grad.double() for name, p in model.named_parameters()}
    copied = copy.deepcopy(model)
    for kept, p in zip(copied.parameters(), model.parameters(), strict=True):
        assert p.grad is not None
        kept.data = p.grad.double()
    return weights.exported(copied, families.of(model.config))


def variants(size: str, kind: str, wanted: Sequence[str]) -> dict[str, Any]:
    """The models that are timed, each with weights of its own."""
    model = make(size, DTYPES.get(kind, torch.float32))
    found: dict[str, Any] = {}
    for name in wanted:
        if name == "ours":
            found[name] = copy.deepcopy(model).train()
            continue
        hf = in_transformers(model).train()
        if name == "patched":
            fastlm.patch(hf)
        found[name] = torch.compile(hf, dynamic=False) if name == "compile" else hf
    return found


def step(model: Any, kind: str, tokens: Tensor) -> Thunk:
    """A whole training step."""
    loss_at = loss_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def thunk() -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            loss = loss_at(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return thunk


def forward(model: Any, kind: str, tokens: Tensor) -> Thunk:
    """Logits of a prompt."""

    def thunk() -> object:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            made = model(tokens) if isinstance(model, Decoder) else model(input_ids=tokens).logits
        return made

    return thunk


def measure(
    size: str, kind: str, wanted: Sequence[str], seconds: float, realtime: bool
) -> list[dict[str, Any]]:
    """The records of one size and kind: a training step and a forward pass."""
    check(size, kind)
    torch.manual_seed(0)
    batch = torch.randint(0, VOCAB, (BATCH, TOKENS))
    prompt = torch.randint(0, VOCAB, (1, PROMPT))
    torch._dynamo.reset()
    models = variants(size, kind, wanted)
    steps = {name: [step(model, kind, batch)] for name, model in models.items()}
    records = [
        _record(size, kind, f"step {BATCH}x{TOKENS}", interleave(steps, seconds, realtime=realtime))
    ]
    del steps
    for name, model in models.items():
        if name != "compile":  # a model that was compiled for training is not the peer here
            model.eval()
    passes = {
        name: [forward(model, kind, prompt)] for name, model in models.items() if name != "compile"
    }
    times = interleave(passes, seconds / 4, realtime=realtime)
    return [*records, _record(size, kind, f"forward 1x{PROMPT}", times)]


def _record(size: str, kind: str, task: str, times: dict[str, Times]) -> dict[str, Any]:
    return {
        "size": size,
        "dtype": kind,
        "task": task,
        "times_us": {
            name: {
                "median": round(t.median),
                "p25": round(t.p25),
                "p75": round(t.p75),
                "samples": t.samples,
                "disturbed": t.disturbed,
            }
            for name, t in times.items()
        },
        "ratios": {
            own: {
                name: round(t.median / times[own].median, 3)
                for name, t in times.items()
                if name not in ("ours", "patched")
            }
            for own in ("ours", "patched")
            if own in times
        },
    }


def line(record: dict[str, Any]) -> str:
    """One record in one line."""
    times = {name: duration(t["median"]) for name, t in record["times_us"].items()}
    text = f"{record['size']:5} {record['dtype']:8} {record['task']:14}"
    text += "  ".join(f"{name} {time.strip()}" for name, time in times.items())
    for own, ratios in record["ratios"].items():
        for name, ratio in ratios.items():
            text += f"  {own} {ratio:.2f}x {name}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the chosen sizes and types; --out writes a result file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.train",
        description=__doc__.splitlines()[0],
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--size", nargs="+", choices=SIZES, default=["15M", "110M"])
    add("--dtype", nargs="+", choices=KINDS, default=list(DTYPES), help="autocast: bf16 products")
    add("--compile", action="store_true", help="torch.compile of transformers' model as a peer")
    add("--seconds", type=float, default=40.0, help="of timing per size and type (default 40)")
    add("--realtime", action="store_true", help="run before others (needs the right)")
    add("--out", type=Path, help="the JSON file")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: pip install 'fastlm[hf]'", file=sys.stderr)
        return 2
    wanted = ["ours", "patched", "transformers", *(["compile"] if args.compile else [])]
    started = time.perf_counter()
    allocator = machine.use_allocator(keep=True)
    records = []
    for size in args.size:
        for kind in args.dtype:
            for record in measure(size, kind, wanted, args.seconds, args.realtime):
                records.append(record)
                print(f"[{time.perf_counter() - started:4.0f} s] {line(record)}", flush=True)
    if args.out:
        import transformers

        content = {
            "kind": "training",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": machine.commit(),
            "machine": machine.machine(),
            "versions": machine.versions() | {"transformers": transformers.__version__},
            "settings": {
                "threads": torch.get_num_threads(),
                "allocator": allocator,
                "realtime": args.realtime,
                "seconds": args.seconds,
            },
            "cases": records,
        }
        results_file.write(args.out, content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
