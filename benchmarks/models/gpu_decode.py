"""Decoding speed on a GPU: a CUDA graph a token, the same kernels one by one, transformers.

    python -m benchmarks.models.gpu_decode --size 7B --dtype bf16 int4 --out results/decode.json

Random weights are made on the device. Every variant continues the same prompt greedily, in turns; a
token's time is the median of the intervals between tokens. The limit beside it is the time that a
copy of 1 GiB says the bytes of a token take: all weights once, of the embedding a row, and the keys
and values of the tokens before. Before anything is timed the logits of the same shape with two
layers are judged against float64 beside the module path's.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastlm.models import Config, Decoder, graph
from fastlm.models.sampling import Options, Sampler
from fastlm.models.static_step import StaticStep
from fastlm.models.step import make_step
from fastlm.testing import error

from .. import machine, results_file
from ..case import DTYPES
from . import streaming
from .decode import BITS, PROMPT, SIZES, Turn, ours, transformers_of

SHAPES = {
    **{name: shape for name, shape in SIZES.items() if name != "gpt2"},
    "7B": {
        **{"hidden": 4096, "layers": 32, "heads": 32, "intermediate": 11008},
        **{"max_positions": 4096, "tied_head": False},
    },
}
NO_GPU = 3  # exit status


def make(size: str, kind: str, device: str, **changes: Any) -> Decoder:
    """A decoder of random weights, made on the device; integers for "int8" and "int4"."""
    with torch.device("meta"):
        model = Decoder(Config(**{"vocab": 32000, **SHAPES.get(size, {}), **changes}))
    dtype = torch.float64 if kind == "fp64" else DTYPES.get(kind, torch.bfloat16)
    model = model.to(dtype).to_empty(device=device)
    model.reset_parameters()
    return (model.quantize(BITS[kind], 128) if kind in BITS else model).eval()


@torch.inference_mode()
def check(size: str, kind: str, device: str, **changes: Any) -> None:
    """Raises AssertionError where the static step errs more than twice as much as the modules."""
    plain = kind if kind in DTYPES else "bf16"
    model, exact = (make(size, k, device, **{"layers": 2, **changes}) for k in (plain, "fp64"))
    exact.load_state_dict(model.state_dict())
    if kind in BITS:
        model.quantize(BITS[kind], 128)
        for quantized, wide in zip(model.modules(), [*exact.modules()], strict=False):
            if isinstance(wide, torch.nn.Linear):
                wide.weight.copy_(quantized.qweight.dequantize(torch.float64))
        if exact.head is None:
            exact.embed.weight.copy_(model.head.qweight.dequantize(torch.float64))
    found = []
    for given, static in ((model, True), (model, False), (exact, False)):
        cache, modules = given.new_cache(1), make_step(given)
        given.hidden(torch.tensor([PROMPT[:8]], device=device), cache=cache)
        sampler = Sampler(Options(), 0, [[]], given.config.vocab, device)
        step, logits = StaticStep(given, cache, sampler), []
        step.begin(torch.zeros(1, device=device), cache, sampler)
        for token in torch.tensor(PROMPT[8:24], device=device):
            if static:
                step.tokens.fill_(token)
                step.run()
                logits.append(step.logits.clone())
            else:
                logits.append(given.logits(modules(token[None], cache)))
        found.append(torch.cat(logits))
    result = error("logits", *found)
    assert result.ok, f"{size} {kind}: {result}"


def bytes_read(model: Decoder, length: int) -> int:
    """What a token reads: the weights, and the keys and values of `length` tokens."""
    named = [*model.named_parameters(), *model.named_buffers()]
    if model.head is not None:  # of the embedding a token reads one row
        named = [(name, x) for name, x in named if not name.startswith("embed.")]
    weights = sum(x.numel() * x.element_size() for name, x in named if "rope." not in name)
    c = model.config
    _, row, _ = c.qkv_rows
    return weights + 2 * c.layers * row * length * model.embed.weight.element_size()


def bandwidth(device: str, size: int = 2**29) -> float:
    """Bytes per second that a copy reads and writes: the best of many."""
    source = torch.ones(size, dtype=torch.int8, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(20):
        _wait(device)
        begin = time.perf_counter()
        for _ in range(8):
            target.copy_(source)
        _wait(device)
        best = max(best, 8 * 2 * size / (time.perf_counter() - begin))
    return best


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def launched(model: Decoder) -> Turn:
    """`Decoder.stream` without graphs: a kernel at a time, the host waits for each token."""

    def turn(count: int) -> list[float]:
        with mock.patch.object(graph, "unsupported", lambda model, cache: ["a peer here"]):
            return ours(model)(count)

    return turn


def transformers(model: Decoder) -> Turn:
    """transformers' `generate` with its static cache, compiled as it compiles itself."""
    hf = transformers_of(model).to(model.embed.weight.device)
    return lambda count: streaming.times(hf, PROMPT, count, cache_implementation="static")


def measure(model: Decoder, wanted: Sequence[str], rounds: int, count: int) -> dict[str, Any]:
    """Tokens per second of each variant; a round is a turn of each, after one that warms up."""
    makers = {"graph": ours, "launched": launched, "transformers": transformers}
    turns, found = {}, {}
    for name in wanted:
        try:
            turns[name] = makers[name](model)
            turns[name](count)
        except Exception as failure:
            if name == "graph":
                raise
            turns.pop(name, None)
            found[name] = {"failed": f"{type(failure).__name__}: {failure}"[:300]}
    between: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            at = turn(count)
            # the first intervals hold the prompt and what a first step has to bind
            between[name] += [b - a for a, b in itertools.pairwise(at[2:])]
    for name, gaps in between.items():
        median = statistics.median(gaps)
        found[name] = {"tokens_per_second": 1 / median, "intervals": len(gaps)}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.gpu_decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=["7B"])
    parser.add_argument("--dtype", nargs="+", choices=["bf16", *BITS], default=["bf16", "int4"])
    parser.add_argument("--peer", nargs="*", choices=["launched", "transformers"])
    parser.add_argument("--new", type=int, default=128, help="tokens a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_decode: needs an NVIDIA GPU; none is here", file=sys.stderr)
        return NO_GPU
    present = importlib.util.find_spec("transformers") is not None
    peers = args.peer
    if peers is None:
        peers = ["launched", *(["transformers"] if present else [])]
    say = functools.partial(print, flush=True)
    speed = bandwidth("cuda")
    say(f"{torch.cuda.get_device_name()}: copies {speed / 1e9:.0f} GB/s")
    models = []
    for size in args.size:
        for kind in args.dtype:
            check(size, kind, "cuda")
            model = make(size, kind, "cuda")
            wanted = ["graph", *(p for p in peers if p != "transformers" or kind not in BITS)]
            needed = bytes_read(model, len(PROMPT) + args.new // 2)
            found = measure(model, wanted, args.rounds, args.new)
            limit = speed / needed
            for name, figures in found.items():
                rate = figures.get("tokens_per_second")
                said = figures.get("failed") or f"{rate:.1f} tokens/s, {rate / limit:.0%} of limit"
                say(f"{size} {kind} {name}: {said}")
            models.append(
                {"size": size, "dtype": kind, "bytes": needed, "limit": limit, "variants": found}
            )
            graph.release(model)
            del model
            torch.cuda.empty_cache()
    if args.out is not None:
        content = {
            "kind": "gpu_decode",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": machine.commit(),
            "gpu": torch.cuda.get_device_name(),
            "versions": machine.versions(),
            "copy_gbs": speed / 1e9,
            "settings": {"prompt": len(PROMPT), "new": args.new, "rounds": args.rounds},
            "models": models,
        }
        results_file.write(args.out, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
