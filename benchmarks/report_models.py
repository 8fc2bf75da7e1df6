"""The Markdown of results about whole models: decoding, training steps, fine-tuning, scaling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def decode(content: dict) -> str:
    """Tokens per second of a decoding step, and against each peer."""
    peers = [
        name
        for name in _names(case["tokens_per_second"] for case in content["cases"])
        if name != "ours"
    ]
    body = []
    for case in content["cases"]:
        speeds = case["tokens_per_second"]
        own, rate = speeds["ours"], case["gigabytes_per_second"]["ours"]
        cells = [case["size"], case["weights"], f"{own:,.0f}", f"{rate:.1f} GB/s"]
        body.append(cells + [_ratio(own, speeds.get(name)) for name in peers])
    header = ["parameters", "weights", "tokens/s", "weights read", *map(_against, peers)]
    probes = [case["probe_gigabytes_per_second"] for case in content["cases"]]
    read = f"sum() reads {min(probes):.0f} to {max(probes):.0f} GB/s here"
    return f"{origin(content)} {read}.\n\n{table(header, body, left=2)}"


def training(content: dict) -> str:
    """Times of training steps and forward passes; the decoder's and the patched model's ratios."""
    peers = [
        name
        for name in _names(case["times_us"] for case in content["cases"])
        if name not in ("ours", "patched")
    ]
    body = []
    for case in content["cases"]:
        times = {name: found["median"] for name, found in case["times_us"].items()}
        cells = [case["size"], case["dtype"], case["task"]]
        for own in ("ours", "patched"):
            cells.append(f"{times[own] / 1000:,.0f} ms")
            cells += [_ratio(times.get(name), times[own]) for name in peers]
        body.append(cells)
    header = ["shape", "dtype", "", "Decoder", *map(_against, peers)]
    header += ["patched", *map(_against, peers)]
    return f"{origin(content)}\n\n{table(header, body, left=3)}"


def finetune(content: dict) -> str:
    """Seconds from start to end, and what was learnt."""
    body = []
    for name, found in content["variants"].items():
        own = content["variants"]["ours"]["seconds"]
        title = "`fastlm finetune`" if name == "ours" else name
        losses = f"{found['held_out_loss_before']:.2f} → {found['held_out_loss']:.2f}"
        body.append([title, f"{found['seconds']:.1f} s", _ratio(found["seconds"], own), losses])
    header = ["", "whole run", "against ours", "held-out loss"]
    settings = content["settings"]
    said = (
        f"{content['model']}, LoRA of rank {settings['rank']}, {settings['conversations']} "
        f"conversations, {settings['epochs']} epochs."
    )
    return f"{origin(content)} {said}\n\n{table(header, body, left=1)}"


def scaling(content: dict) -> str:
    """How many times as fast as eager, where each curve begins, in its middle and where it ends."""
    body = []
    for curve in content["curves"]:
        times = curve["times_us"]
        pairs = zip(times.get("ours", []), times.get("eager", []), curve["values"], strict=False)
        there = [(value, eager / own) for own, eager, value in pairs if own and eager]
        if not there:
            continue
        ratios = [ratio for _, ratio in there]
        chosen = (there[0], there[len(there) // 2], there[-1])
        least = min(there, key=lambda pair: pair[1])
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        body.append(
            [
                f"`{curve['name']}`",
                curve["dtype"],
                curve["axis"],
                ", ".join(f"{value:,}: {ratio:.2f}x" for value, ratio in chosen),
                f"{least[0]:,}: {least[1]:.2f}x",
                f"{mean:.2f}x",
            ]
        )
    header = ["curve", "dtype", "along", "first, middle, last", "least", "mean"]
    return f"{origin(content)}\n\n{table(header, body, left=5)}"


RENDERED: dict[str, Callable[[dict], str]] = {
    "decode": decode,
    "training": training,
    "finetune": finetune,
    "scaling": scaling,
}


def origin(content: dict) -> str:
    """Where and when the figures were taken."""
    facts, versions = content["machine"], content["versions"]
    others = [f"{name} {versions[name]}" for name in ("transformers", "peft") if name in versions]
    if "llama_cpp_python" in versions:
        others.append(f"llama-cpp-python {versions['llama_cpp_python']}")
    return (
        f"{facts['cpu']} ({facts['isa'] or 'no native kernels'}), {content['settings']['threads']} "
        f"threads, {', '.join(['torch ' + versions['torch'], *others])}, {content['date'][:10]}, "
        f"commit {content['commit']}."
    )


def table(header: Sequence[str], body: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table whose first columns stand on the left."""
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *body))


def _names(found: object) -> list[str]:
    return list(dict.fromkeys(name for case in found for name in case))  # type: ignore[attr-defined]


def _against(peer: str) -> str:
    return f"against {peer}"


def _ratio(more: float | None, less: float | None) -> str:
    return f"**{more / less:.2f}x**" if more and less else "-"
