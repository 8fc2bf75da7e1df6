"""A result file as one self-contained HTML page: ratios, rooflines, and a table to sort."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from string import Template

from .results_file import write_text
from .session import geometric_mean

COLORS = {"ours": "#2f7ed8", "eager": "#9aa5b1", "compile": "#7b61c4"}
OTHER = "#c98a1b"
TEMPLATE = Path(__file__).with_name("page.html")


def write(content: dict, path: Path) -> None:
    """Writes the page beside the target, then renames."""
    write_text(path, render(content))


def render(content: dict) -> str:
    """The page of a result of kind "ops"; raises ValueError where no case was timed."""
    timed = [case for case in content["cases"] if case["status"] == "timed"]
    if not timed:
        raise ValueError("no case was timed: there is nothing to show")
    peers = list(dict.fromkeys(name for case in timed for name in case["ratios"]))
    facts, settings = content["machine"], content["settings"]
    origin = (
        f"{facts['cpu']} ({facts['isa'] or 'no native kernels'}), {settings['threads']} threads, "
        f"torch {content['versions']['torch']}, fastlm {content['versions']['fastlm']}, "
        f"{settings['allocator']}, {content['date'][:10]}, commit {content['commit']}"
    )
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        origin=html.escape(origin),
        cards="".join(_card(name, timed) for name in peers),
        ratios=_ratios(timed, peers),
        rooflines="".join(
            _roofline(op, [c for c in timed if c["op"] == op], content["limits"])
            for op in dict.fromkeys(case["op"] for case in timed)
        ),
        table=_table(timed, peers),
        notes=_notes(content["cases"]),
    )


def _card(peer: str, timed: Sequence[dict]) -> str:
    ratios = [case["ratios"][peer] for case in timed if peer in case["ratios"]]
    slower = sum(ratio < 1 for ratio in ratios)
    return (
        f'<div class="card"><b>{geometric_mean(ratios):.2f}x</b><span>as fast as '
        f"{html.escape(peer)}, geometric mean of {len(ratios)} cases; slower in {slower}"
        "</span></div>"
    )


def _ratios(timed: Sequence[dict], peers: Sequence[str]) -> str:
    """One bar per case and peer on a logarithmic axis around 1."""
    left, width, bar = 330, 560, 11
    span = max(2.0, *(abs(math.log2(r)) for case in timed for r in case["ratios"].values()))

    def at(ratio: float) -> float:
        return left + width * (math.log2(ratio) + 1) / (span + 1) if ratio > 0.5 else left

    y, parts = 22.0, []
    for case in timed:
        name = f"{case['op']} {case['shape']} {case['direction']} {case['dtype']}"
        parts.append(
            f'<text x="{left - 8}" y="{y + 9}" text-anchor="end">{html.escape(name)}</text>'
        )
        for peer in peers:
            ratio = case["ratios"].get(peer)
            if ratio is None:
                continue
            a, b = sorted((at(1.0), at(ratio)))
            color = COLORS.get(peer, OTHER) if ratio >= 1 else "#c0392b"
            tip = f"{name}: {ratio:.2f} times as fast as {peer}"
            parts.append(
                f'<rect x="{a:.1f}" y="{y:.1f}" width="{max(b - a, 1):.1f}" height="{bar - 2}" '
                f'fill="{color}"><title>{html.escape(tip)}</title></rect>'
                + _text(b + 4, y + 8, f"{ratio:.2f}x {peer}", "start")
            )
            y += bar
        y += 5
    lines = "".join(
        _line("grid" if e else "one", at(2.0**e), 16, at(2.0**e), y)
        + _text(at(2.0**e), 11, f"{2.0**e:g}x")
        for e in range(-1, int(span) + 1)
    )
    size = f"0 0 {left + width + 110} {y:.0f}"
    return f'<svg viewBox="{size}" role="img">{lines}{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="small" {place} {more}>{html.escape(text)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float, tip: str = "") -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{kind}" {ends}><title>{html.escape(tip)}</title></line>'


def _roofline(op: str, cases: Sequence[dict], limits: dict) -> str:
    """Arithmetic speed over arithmetic intensity, under what memory and products reach here."""
    w, h, pad = 420, 250, 38
    points = [
        (
            case["flops"] / case["bytes"],
            case["flops"] / case["times_us"][who]["median"] * 1e-3,
            who,
            case,
        )
        for case in cases
        for who in ("eager", "ours")
        if who in case["times_us"] and case["flops"]
    ]
    if not points:
        return ""
    memory, peak = limits["bandwidth_gbs"]["memory"], max(limits["gflops"].values())
    xs = [p[0] for p in points]
    low_x, high_x = math.log10(min(xs) / 2), math.log10(max(*xs, peak / memory) * 2)
    low_y = math.log10(min(p[1] for p in points) / 2)
    high_y = math.log10(max(peak, *(p[1] for p in points)) * 1.6)

    def x(value: float) -> float:
        return pad + (w - pad - 8) * (math.log10(value) - low_x) / (high_x - low_x)

    def y(value: float) -> float:
        return h - pad + (pad + 14 - h) * (math.log10(value) - low_y) / (high_y - low_y)

    parts = []
    for name, gbs in limits["bandwidth_gbs"].items():
        first, last = max(10**low_x, 10**low_y / gbs), peak / gbs
        if first < last:
            ends = x(first), y(first * gbs), x(last), y(last * gbs)
            parts.append(_line("roof", *ends, f"{name}: {gbs:.0f} GB/s"))
    for name, gflops in limits["gflops"].items():
        at = y(gflops)
        parts.append(_line("roof", x(gflops / memory), at, w - 8, at, f"{gflops:.0f} GFLOP/s"))
        parts.append(_text(w - 10, at - 3, f"{name} {gflops:.0f}", "end"))
    for intensity, speed, who, case in points:
        tip = f"{who}, {case['shape']} {case['direction']} {case['dtype']}: {speed:.3g} GFLOP/s"
        place = f'cx="{x(intensity):.1f}" cy="{y(speed):.1f}" r="4"'
        parts.append(
            f'<circle {place} fill="{COLORS[who]}" fill-opacity=".85">'
            f"<title>{html.escape(tip)}</title></circle>"
        )
    axes = _text(w / 2, h - 6, "operations per byte")
    axes += _text(10, h / 2, "GFLOP/s", more=f'transform="rotate(-90 10 {h / 2})"')
    for e in range(math.ceil(low_x), math.floor(high_x) + 1):
        axes += _text(x(10.0**e), h - pad + 14, f"{10.0**e:g}")
    for e in range(math.ceil(low_y), math.floor(high_y) + 1):
        at = y(10.0**e)
        axes += _line("grid", pad, at, w - 8, at) + _text(pad - 4, at + 3, f"{10.0**e:g}", "end")
    return (
        f'<figure><figcaption>{html.escape(op)}</figcaption><svg viewBox="0 0 {w} {h}" role="img">'
        f"{axes}{''.join(parts)}</svg></figure>"
    )


def _table(timed: Sequence[dict], peers: Sequence[str]) -> str:
    head = ["operator", "shape", "pass", "dtype", "backend", "µs", "spread", *peers, "of the floor"]
    rows = []
    for case in timed:
        ours = case["times_us"]["ours"]
        spread = (ours["p75"] - ours["p25"]) / 2 / ours["median"]
        cells = [
            *(_cell(case[key]) for key in ("op", "shape", "direction", "dtype", "backend")),
            _cell(f"{ours['median']:,.1f}", ours["median"]),
            _cell(f"±{spread:.0%}", spread),
        ]
        for peer in peers:
            ratio = case["ratios"].get(peer)
            slower = ratio is not None and ratio < 1
            cells.append(_cell("" if ratio is None else f"{ratio:.2f}x", ratio or 0.0, slower))
        cells.append(_cell(f"{case['share_of_floor']:.0%}", case["share_of_floor"]))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    header = "".join(f"<th><button>{html.escape(name)}</button></th>" for name in head)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(text: str, value: float | str | None = None, loss: bool = False) -> str:
    """What is shown, and what a column is sorted by."""
    key = html.escape(str(text if value is None else value))
    return f'<td data-v="{key}"{" class=loss" if loss else ""}>{html.escape(text)}</td>'


def _notes(cases: Sequence[dict]) -> str:
    others = [case for case in cases if case["status"] != "timed"]
    lines = "".join(
        f"<li>{html.escape(case['id'])}: {html.escape(case['status'])}, "
        f"{html.escape(case.get('note', ''))}</li>"
        for case in others
    )
    return f"<h2>Not timed</h2><ul>{lines}</ul>" if lines else ""
