"""Decoding speed, one token after another: fastlm's plan, its modules, transformers as it is and
patched, llama.cpp.

    python -m benchmarks.models.decode --size 15M 110M --dtype fp32 bf16 int8 int4

Every peer holds the same random weights (transformers' are views of ours; llama.cpp reads a GGUF
file written here, where llama-cpp-python is installed) and continues the same prompt greedily, in
turns. A token's time is the median of the intervals between tokens; the read rate beside it is that
of a probe over as many bytes as a token reads. Before anything is timed the logits of the same
architecture with two layers are judged against float64 beside transformers' own.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fastlm
from fastlm.models import Config, Decoder, plan
from fastlm.testing import error

from .. import machine, results_file
from ..case import DTYPES
from ..timing import raised
from . import llama_cpp, streaming

SIZES = {
    "15M": {"hidden": 288, "layers": 6, "heads": 6, "intermediate": 768, "max_positions": 1024},
    "110M": {"hidden": 768, "layers": 12, "heads": 12, "intermediate": 2048, "max_positions": 1024},
    "1.1B": {
        **{"hidden": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "intermediate": 5632},
        **{"max_positions": 2048, "tied_head": False},
    },
    "gpt2": {
        **{"hidden": 768, "layers": 12, "heads": 12, "max_positions": 1024, "vocab": 50257},
        **{"norm": "layer", "positions": "learned", "activation": "gelu_tanh", "gated": False},
        **{"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    },
}
NEW = {"15M": 48, "110M": 24, "1.1B": 8, "gpt2": 24}  # tokens a turn
BITS = {"int8": 8, "int4": 4}
PROMPT = list(range(1, 65))
Turn = Callable[[int], list[float]]  # moments at which each of so many new tokens was there


def make(size: str, dtype: torch.dtype, **changes: Any) -> Decoder:
    """A decoder of random weights."""
    config = Config(**{"vocab": 32000, **SIZES.get(size, {}), **changes})
    uniform = torch.nn.init.uniform_
    with mock.patch("torch.nn.init.normal_", lambda w, std: uniform(w, -2 * std, 2 * std)):
        return Decoder(config).to(dtype).eval()


def transformers_of(model: Decoder) -> Any:
    """The same model in transformers: of Llama's shape on the same memory, else a copy."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    c = model.config
    if c.positions == "learned":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            dtype = model.embed.weight.dtype
            hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            return hf.eval()
    with torch.device("meta"):
        hf = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=c.vocab,
                hidden_size=c.hidden,
                intermediate_size=c.intermediate,
                num_hidden_layers=c.layers,
                num_attention_heads=c.heads,
                num_key_value_heads=c.kv_heads,
                max_position_embeddings=c.max_positions,
                rms_norm_eps=c.norm_eps,
                tie_word_embeddings=c.tied_head,
            )
        )
    weights = {"model.embed_tokens": model.embed.weight, "model.norm": model.norm.weight}
    weights["lm_head"] = model.head_weight
    block: Any
    for i, block in enumerate(model.blocks):
        q, k, v = block.attention.qkv.weight.split(c.qkv_rows)
        layer = {
            **{"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v},
            "self_attn.o_proj": block.attention.out.weight,
            "input_layernorm": block.attention_norm.weight,
            "post_attention_layernorm": block.mlp_norm.weight,
            "mlp.gate_proj": block.mlp.gate.weight,
            "mlp.up_proj": block.mlp.up.weight,
            "mlp.down_proj": block.mlp.down.weight,
        }
        weights |= {f"model.layers.{i}.{name}": w for name, w in layer.items()}
    hf.load_state_dict({f"{name}.weight": w for name, w in weights.items()}, assign=True)
    hf.model.rotary_emb = type(hf.model.rotary_emb)(hf.config)  # its tables are no weights
    return hf.eval()


def ours(model: Decoder) -> Turn:
    """`Decoder.stream`."""
    return lambda count: [time.perf_counter() for _ in model.stream(PROMPT, count, eos=())]


def modules(model: Decoder) -> Turn:
    """`Decoder.stream` as it goes where there is no plan."""

    def turn(count: int) -> list[float]:
        with mock.patch.object(plan, "unsupported", lambda model, cache: ["a peer here"]):
            return ours(model)(count)

    return turn


def transformers(hf: Any) -> Turn:
    """transformers' `generate`."""
    return lambda count: streaming.times(hf, PROMPT, count)


def check(size: str, dtype: torch.dtype) -> None:
    """Raises AssertionError where the plan errs more than twice as much as transformers does."""
    model = make(size, dtype, layers=2)
    exact = make(size, torch.float64, layers=2)
    exact.load_state_dict(model.state_dict())
    hf = transformers_of(model)
    cache, found = model.new_cache(1), []
    made = plan.NextLogits(model, cache)
    tokens = torch.tensor([PROMPT])
    with torch.inference_mode():
        model.hidden(tokens[:, :8], cache=cache)
        for token in PROMPT[8:24]:
            found.append(made(torch.tensor([token])).clone())
        logits = torch.cat(found)
        theirs = hf(tokens[:, :24]).logits[0, 8:]
        result = error("logits", logits, theirs, exact(tokens[:, :24])[0, 8:])
    assert result.ok, f"{size} {dtype}: {result}"


@contextlib.contextmanager
def peers(size: str, kind: str, wanted: Sequence[str]) -> Iterator[tuple[dict[str, Turn], int]]:
    """The variants to be timed, and the bytes of weights that a token reads."""
    model = make(size, DTYPES.get(kind, torch.float32))
    found: dict[str, Turn] = {}
    with contextlib.ExitStack() as stack:
        if "llama.cpp" in wanted and model.config.positions == "rope":  # what `write` can write
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            llama_cpp.write(model, folder / "model.gguf", kind)
            peer = stack.enter_context(llama_cpp.opened(folder / "model.gguf"))
            found["llama.cpp"] = lambda count: peer(PROMPT, count)
        if kind in BITS:
            rounded = make(size, torch.float32)
            rounded.load_state_dict(model.state_dict())
            rounded.quantize(BITS[kind], activations="int8")
            model.quantize(BITS[kind])
            found = {"ours": ours(model), "ours, x in 8 bits": ours(rounded), **found}
        else:
            found = {"ours": ours(model), **found}
            if "transformers" in wanted:
                found["transformers"] = transformers(transformers_of(model))
                patched = transformers_of(model)
                fastlm.patch(patched)
                found["transformers, patched"] = transformers(patched)
        if "modules" in wanted:
            found["modules"] = modules(model)
        named = [*model.named_parameters(), *model.named_buffers()]
        if model.head is not None:  # of the embedding a token reads one row
            named = [(name, x) for name, x in named if not name.startswith("embed.")]
        size_read = sum(x.numel() * x.element_size() for name, x in named if "rope." not in name)
        yield found, size_read


def measure(
    size: str, kind: str, wanted: Sequence[str], rounds: int, realtime: bool
) -> dict[str, Any]:
    """Tokens per second of each peer; a round is a turn of each, forwards and backwards."""
    check(size, DTYPES.get(kind, torch.float32))
    with peers(size, kind, wanted) as (turns, bytes_read):
        probe = torch.ones(max(bytes_read // 4, 1))
        between: dict[str, list[float]] = {name: [] for name in turns}
        reads: list[float] = []
        for name in turns:
            turns[name](3)  # warms up
        for number in range(rounds):
            for name in turns if number % 2 else reversed(turns):
                with raised(realtime):
                    at = turns[name](NEW[size])
                between[name] += [b - a for a, b in itertools.pairwise(at)]
            with raised(realtime):
                start = time.perf_counter()
                probe.sum()
                reads.append(time.perf_counter() - start)
        seconds = {name: statistics.median(found) for name, found in between.items()}
        return {
            "size": size,
            "weights": kind,
            "bytes_per_token": bytes_read,
            "tokens_per_second": {name: round(1 / s, 2) for name, s in seconds.items()},
            "gigabytes_per_second": {
                name: round(1e-9 * bytes_read / s, 2) for name, s in seconds.items()
            },
            "probe_gigabytes_per_second": round(1e-9 * bytes_read / statistics.median(reads), 2),
            "samples": {name: len(found) for name, found in between.items()},
        }


def line(found: dict[str, Any]) -> str:
    """One measurement in one line."""
    speeds = found["tokens_per_second"]
    own = speeds["ours"]
    text = f"{found['size']:5} {found['weights']:5} {own:8.1f} tokens/s"
    text += f" ({found['gigabytes_per_second']['ours']:.1f} GB/s;"
    text += f" sum() reads {found['probe_gigabytes_per_second']:.1f})"
    for name, speed in speeds.items():
        if name != "ours":
            text += f"  {own / speed:5.2f}x {name} ({speed:.1f})"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the chosen sizes and kinds of weights; --out writes a result file."""
    here = argparse.ArgumentParser(prog="python -m benchmarks.models.decode")
    here.add_argument("--size", nargs="+", choices=SIZES, default=["15M", "110M"])
    here.add_argument(
        "--dtype", nargs="+", choices=[*DTYPES, *BITS], default=["fp32", "bf16", *BITS]
    )
    here.add_argument("--rounds", type=int, default=6)
    here.add_argument("--realtime", action="store_true", help="run before others (needs the right)")
    here.add_argument("--out", type=Path)
    args = here.parse_args(argv)
    wanted = ["modules"]
    for name, package in (("transformers", "transformers"), ("llama.cpp", "llama_cpp")):
        if importlib.util.find_spec(package) is None:
            print(f"{name} is not installed: not compared")
        else:
            wanted.append(name)
    cases = []
    for size in args.size:
        for kind in args.dtype:
            cases.append(measure(size, kind, wanted, args.rounds, args.realtime))
            print(line(cases[-1]), flush=True)
    if args.out:
        content = {
            "kind": "decode",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": machine.commit(),
            "machine": machine.machine(),
            "versions": machine.versions() | llama_cpp.version(),
            "settings": {"threads": torch.get_num_threads(), "realtime": args.realtime},
            "cases": cases,
        }
        results_file.write(args.out, content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
