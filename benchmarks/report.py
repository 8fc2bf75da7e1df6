"""`python -m benchmarks.report FILE`: a result file as a Markdown table.

With --write the table goes between the markers of README.md and docs/performance.md, which name the
file it came from, so that every published figure can be traced and rendered again. A block's name
is the file's kind, or that, an underscore and a word.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import gpu_report, results_file
from .machine import ROOT
from .report_models import RENDERED, table

# What README shows of the operators: the shapes the project promises.
HEADLINES = (
    ("rms_norm", "2048x768", "fwd+bwd"),
    ("layer_norm", "2048x768", "fwd+bwd"),
    ("rope", "(1,2048,32,128)", "fwd"),
    ("attention", "causal (1,12,1024,64)", "fwd"),
    ("attention", "causal (1,12,1024,64)", "fwd+bwd"),
    ("decode_attention", "1x12/12 heads, 2048 keys, 64", "fwd"),
    ("linear", "1 row 768x2048 cold", "fwd"),
    ("feed_forward", "gated silu 1 row 576x1536 cold", "fwd"),
    ("cross_entropy", "512x32000", "fwd+bwd"),
)
DOCUMENTS = {"README.md": True, "docs/performance.md": False}  # whether only the headlines


def render(content: dict, *, headlines: bool = False) -> str:
    """The Markdown of a result file."""
    if content.get("kind") == "demo":
        return _demo(content)
    if content.get("kind") == "gpu":
        return gpu_report.render(content)
    if content.get("kind") in RENDERED:
        return RENDERED[content["kind"]](content)
    return _ops(content, headlines)


def _ops(content: dict, headlines: bool) -> str:
    rows: dict[tuple[str, str, str], dict[str, dict]] = {}
    shown = []
    for case in content["cases"]:
        key = (case["op"], case["shape"], case["direction"])
        if case["status"] == "timed" and (not headlines or key in HEADLINES):
            rows.setdefault(key, {})[case["dtype"]] = case
            shown.append(case)
    dtypes = list(dict.fromkeys(case["dtype"] for case in shown))
    # eager has a column; peers that few operators have share one
    every = dict.fromkeys(name for case in shown for name in case["ratios"])
    peers = [name for name in every if all(name in case["ratios"] for case in shown)]
    others = [name for name in every if name not in peers]

    header = ["operator", "shape", "pass"]
    for dtype in dtypes:
        header += [dtype, *(f"against {peer}" for peer in peers)]
        header += [*(["against others"] if others else []), "of the floor"]
    body = []
    for (op, shape, direction), by_dtype in rows.items():
        cells = [f"`{op}`", shape, direction]
        for dtype in dtypes:
            cells += _cells(by_dtype.get(dtype), peers, others)
        body.append(cells)
    grid = table(header, body, left=3)
    return "\n\n".join(part for part in (_origin(content), grid, _notes(content)) if part)


def _cells(case: dict | None, peers: Sequence[str], others: Sequence[str]) -> list[str]:
    if case is None:
        return ["-"] * (len(peers) + bool(others) + 2)
    plain = case.get("plain_malloc", {}).get("ratios", {})
    cells = [_duration(case["times_us"]["ours"]["median"])]
    for peer in peers:
        ratio = f"**{case['ratios'][peer]:.2f}x**"
        cells.append(ratio + (f" ({plain[peer]:.1f}x)" if peer in plain else ""))
    if others:
        given = [f"{name} {case['ratios'][name]:.2f}x" for name in others if name in case["ratios"]]
        cells.append(", ".join(given) or "-")
    return [*cells, f"{case['share_of_floor']:.0%}"]


def _notes(content: dict) -> str:
    lines = []
    if any("plain_malloc" in case for case in content["cases"]):
        lines.append("In brackets: the same under malloc as it is, where the allocator matters.")
    for status, meaning in (
        ("reference", "Not timed, no kernel of its own on this machine"),
        ("wrong", "Not timed, wrong result"),
        ("error", "Not timed, failed"),
    ):
        ops = dict.fromkeys(c["op"] for c in content["cases"] if c["status"] == status)
        if ops:
            lines.append(f"{meaning}: {', '.join(f'`{op}`' for op in ops)}.")
    return " ".join(lines)


def _origin(content: dict) -> str:
    facts, settings, limits = content["machine"], content["settings"], content["limits"]
    bandwidth = ", ".join(f"{level} {gbs:.0f}" for level, gbs in limits["bandwidth_gbs"].items())
    peaks = ", ".join(f"{dtype} {peak:.0f}" for dtype, peak in limits["gflops"].items())
    return (
        f"{facts['cpu']} ({facts['isa'] or 'no native kernels'}), {settings['threads']} threads, "
        f"torch {content['versions']['torch']}, {settings['allocator']}, "
        f"{content['date'][:10]}, commit {content['commit']}. "
        f"PyTorch reaches here: {bandwidth} GB/s; {peaks} GFLOP/s."
    )


def _demo(content: dict) -> str:
    """original | patched | decoder, per measure and dtype."""
    facts, settings = content["machine"], content["settings"]
    origin = (
        f"{content['model']}, {facts['cpu']} ({facts['isa'] or 'no native kernels'}), "
        f"{settings['threads']} threads, torch {content['versions']['torch']}, transformers "
        f"{content['versions']['transformers']}, {settings['allocator']}, "
        f"{content['date'][:10]}, commit {content['commit']}."
    )
    return f"{origin}\n\n{table(['', 'dtype', *content['variants']], demo_rows(content), left=2)}"


def demo_rows(content: dict) -> list[list[str]]:
    """The cells of a demonstration's table; a measure is named in its first row only."""
    first, *others = content["variants"]
    body = []
    for measure in content["measures"]:
        name = measure["name"]
        for dtype, values in measure["values"].items():
            cells = [name, dtype, f"{_number(values[first])} {measure['unit']}"]
            for other in others:
                value, base = values[other], values[first]
                gain = value / base if measure["more_is_better"] else base / value
                cells.append(f"{_number(value)} ({gain:.2f}x)")
            body.append(cells)
            name = ""
    return body


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _duration(us: float) -> str:
    return f"{us / 1000:.2f} ms" if us >= 1000 else f"{us:.1f} µs"


def insert(document: str, kind: str, block: str, source: str) -> str:
    """The document with its `figures: kind` block replaced; raises ValueError where it has none."""
    pattern = re.compile(rf"(<!-- figures: {kind}\b[^>]*-->)\n.*?(<!-- end: {kind} -->)", re.DOTALL)
    text = f"<!-- figures: {kind} from {source} -->\n{block}\n<!-- end: {kind} -->"
    replaced, count = pattern.subn(lambda _: text, document)
    if count != 1:
        raise ValueError(f"expected one block of markers 'figures: {kind}', found {count}")
    return replaced


def published(document: str) -> list[tuple[str, str, str]]:
    """(kind, source, block) of every filled block of a document."""
    pattern = re.compile(r"<!-- figures: (\w+) from (\S+) -->\n(.*?)\n<!-- end: \1 -->", re.DOTALL)
    return pattern.findall(document)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, or writes it into the documents."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--headlines", action="store_true", help="only the promised shapes")
    parser.add_argument("--write", action="store_true", help="into README.md, docs/performance.md")
    help_ = "the markers' name; by default the file's kind (ops_avx2: a second machine's table)"
    parser.add_argument("--block", help=help_)
    args = parser.parse_args(argv)
    try:
        content = results_file.read(args.file)
        if not args.write:
            print(render(content, headlines=args.headlines))
            return 0
        source = args.file.resolve()
        if not source.is_relative_to(results_file.FOLDER):
            raise ValueError(f"{args.file}: only files under benchmarks/results can be published")
        kind = args.block or content.get("kind", "ops")
        pages = [
            name for name in DOCUMENTS if f"<!-- figures: {kind} " in (ROOT / name).read_text()
        ]
        if not pages:
            raise ValueError(f"no page has a block of markers 'figures: {kind}'")
        for name in pages:
            path = ROOT / name
            block = render(content, headlines=DOCUMENTS[name])
            relative = source.relative_to(ROOT).as_posix()
            path.write_text(insert(path.read_text(), kind, block, relative))
            print(f"written: {path}")
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
