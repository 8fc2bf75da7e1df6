"""What `fastlm.patch` does to the decoders of transformers: builds each small, patches, verifies.

    python tools/architectures.py                        # a line for each architecture
    python tools/architectures.py qwen3 gemma2           # some of them
    python tools/architectures.py --speed --write        # with times; writes docs/architectures.md

Every model is made up on the spot: the architecture's own configuration class with small sizes and
random weights, so nothing is downloaded. An architecture that this transformers does not have is
left out. Ends with code 1 when one breaks or is not verified.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn

import fastlm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import machine  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"

# Sizes by the names that configuration classes give them.
_SIZES = {
    "vocab_size": 128,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "n_embed"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 128),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "shared_intermediate_size": 64,
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What grows for timing: times that small sizes would spend on overhead alone.
_LARGER = {64: 512, 128: 1536, 16: 64, 32: 256, 4: 8}

# model_type -> what its configuration needs beside the sizes
ROWS: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "axk1": {"head_dim": 8},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_chunk_size": 16},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 8},
    "cohere": {},
    "cohere2": {},
    "cohere2_moe": {},
    "ctrl": {},
    "cwm": {},
    "deepseek_v2": {"head_dim": 8},
    "deepseek_v3": {"head_dim": 8},
    "diffllama": {},
    "doge": {},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "exaone_moe": {},
    "falcon": {"num_kv_heads": None, "head_dim": None},
    "flex_olmo": {},
    "flint": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gpt_neox": {},
    "gpt_oss": {},
    "gptj": {"rotary_dim": 8},
    "granite": {},
    "granite_swa": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoeshared": {},
    "helium": {},
    "hrm_text": {},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hy_v3": {},
    "hyperclovax": {},
    "internlm3": {},
    "jais2": {},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "jetmoe": {},
    "kolibri1": {},
    "laguna": {},
    "lfm2": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "llama4_text": {},
    "mellum": {},
    "mimo_v2_flash": {},
    "minicpm3": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "ministral": {"head_dim": 16},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": {},
    "olmoe": {},
    "openai-gpt": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {"sliding_window": None},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
    "xglm": {},
    "youtu": {"head_dim": 8},
}


def available() -> list[str]:
    """The architectures of the table that this transformers has."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [name for name in sorted(ROWS) if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def small(name: str, larger: bool = False) -> nn.Module:
    """A model of an architecture with small sizes and random weights, in evaluation mode."""
    cls = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name]
    default, aliases = cls(), getattr(cls, "attribute_map", {})
    given = {n: v for n, v in _SIZES.items() if hasattr(default, n)}
    for alias, real in aliases.items():
        if real in given:
            given.pop(alias, None)
    for size in ("head_dim", "sliding_window", "n_inner", "q_lora_rank"):
        if getattr(default, size, 0) is None:
            given.pop(size, None)  # absent, or derived from other sizes
    heads = getattr(default, "num_attention_heads", None)
    if heads is not None and getattr(default, "num_key_value_heads", 0) == heads:
        given["num_key_value_heads"] = 4
    if larger:
        given = {n: v if n.endswith("_id") else _LARGER.get(v, v) for n, v in given.items()}
        given |= {n: 1024 for n in given if n.startswith(("max_pos", "n_pos", "n_ctx", "max_seq"))}
        given["vocab_size"] = 8192
    special = ROWS[name]
    if larger:
        special = {n: _LARGER.get(v, v) if isinstance(v, int) else v for n, v in special.items()}
    given |= special
    torch.manual_seed(0)
    config = cls(**{n: v for n, v in given.items() if v is not None})
    if not hasattr(config, "pad_token_id"):
        config.pad_token_id = None  # some classes of transformers 5.0 forgot it
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@dataclass
class Row:
    """What came of one architecture."""

    name: str
    replaced: dict[str, int] = field(default_factory=dict)  # stem -> modules
    kept: list[str] = field(default_factory=list)
    verified: str = ""  # "yes", or what is wrong
    forward: float | None = None  # times as fast as the original
    step: float | None = None

    @property
    def ok(self) -> bool:
        return self.verified == "yes"


def examine(name: str, speed: bool = False) -> Row:
    """Patches, verifies and, if asked, times an architecture."""
    row = Row(name)
    try:
        model = small(name)
        with fastlm.patch(model) as patch:
            for entry in patch.entries:
                for stem in entry.stems if entry.state == "replaced" else ():
                    row.replaced[stem] = row.replaced.get(stem, 0) + 1
            kept = {f"{e.module}: {e.text}" for e in patch.entries if e.state == "kept"}
            row.kept = sorted(kept)
            report = fastlm.verify(model)
        wrong = [str(e) for e in report.errors if not e.ok]
        row.verified = "yes" if report.ok else "; ".join(wrong[:2])
        if speed:
            row.forward, row.step = _times(small(name, larger=True))
    except Exception as e:
        row.verified = f"{type(e).__name__}: {str(e).splitlines()[0][:160]}"
    return row


def _times(model: nn.Module) -> tuple[float, float]:
    """Forward and training step of 256 tokens: the original's time over the patched model's."""
    ids = torch.randint(3, 8000, (1, 256))
    patched = copy.deepcopy(model)
    fastlm.patch(patched)

    def forward(m: Any) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad():
                m(input_ids=ids, use_cache=False)

        return run

    def step(m: Any) -> Callable[[], Any]:
        def run() -> None:
            m(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            m.zero_grad()

        return run

    return _ratio(forward(model), forward(patched)), _ratio(step(model), step(patched))


def _ratio(theirs: Callable[[], Any], ours: Callable[[], Any], rounds: int = 7) -> float:
    """Median of theirs over median of ours, in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for run, kept in zip((theirs, ours), times, strict=True):
            start = time.perf_counter()
            run()
            if turn:  # the first warms up
                kept.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


STEMS = (
    "attention",
    "rope",
    "rms_norm",
    "layer_norm",
    "feed_forward",
    "linear",
    "activation",
    "cross_entropy",
    "linear_cross_entropy",
)


def page(rows: list[Row]) -> str:
    """The table as docs/architectures.md shows it."""
    done = sum(row.ok for row in rows)
    timed = any(row.forward is not None for row in rows)
    lines = [
        "# Architectures",
        "",
        f"Made by `python tools/architectures.py {'--speed ' if timed else ''}--write`; not to be"
        " edited by hand.",
        "",
        f"{len(rows)} decoders of transformers {transformers.__version__}, torch"
        f" {torch.__version__}, each built small with random weights in fp32; {done} verified:"
        " logits, loss and every gradient of the patched model against float64, beside the"
        " original's own error. The numbers count replaced modules in two layers.",
    ]
    if timed:
        here, day = machine.machine(), time.strftime("%Y-%m-%d")
        lines.append(
            "The last columns say how many times as fast as the original a larger model (width 512)"
            f" runs 256 tokens, forward and in a training step: {here['cpu']} ({here['isa']}),"
            f" {torch.get_num_threads()} threads, {day}."
        )
    lines += [
        "",
        f"| architecture | {' | '.join(f'`{s}`' for s in STEMS)} | verified |"
        + (" forward | step |" if timed else ""),
        f"|---|{'---:|' * len(STEMS)}---|" + ("---:|---:|" if timed else ""),
    ]
    for row in rows:
        cells = [row.name, *(str(row.replaced.get(stem, "-")) for stem in STEMS), row.verified]
        if timed:
            cells += ["" if t is None else f"{t:.2f}x" for t in (row.forward, row.step)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Left alone, and why", ""]
    lines += [f"- **{row.name}**: {'; '.join(row.kept)}" for row in rows if row.kept]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="model types; all of the table by default")
    parser.add_argument("--speed", action="store_true", help="time a larger model, too")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.names) - ROWS.keys())
    if unknown:
        parser.error(f"unknown architectures {', '.join(unknown)}; known: {', '.join(ROWS)}")
    transformers.logging.set_verbosity_error()
    names = args.names or available()
    rows = []
    for number, name in enumerate(names, 1):
        rows.append(examine(name, args.speed))
        row = rows[-1]
        times = "" if row.forward is None else f"  {row.forward:.2f}x {row.step:.2f}x"
        print(f"[{number:2}/{len(names)}] {name:18} {row.verified}{times}", flush=True)
    if args.write:
        partial = PAGE.with_suffix(".tmp")
        partial.write_text(re.sub(r"[ \t]+\n", "\n", page(rows)))
        partial.replace(PAGE)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
