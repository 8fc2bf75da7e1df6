"""The Markdown of a GPU's result file."""

from __future__ import annotations

from collections.abc import Sequence

from fastlm.ops import _measured

FIRST = ("eager", "compile", "cudnn", "flash", "flex", "liger")  # columns, where there are any


def render(content: dict) -> str:
    """The machine, a row per timed case, and what was not timed and why."""
    timed = [c for c in content["cases"] if c["status"] == "timed"]
    parts = [_origin(content)]
    if timed:
        parts.append(_table(timed))
    parts += [part for part in (_untimed(content["cases"]), _failed(timed)) if part]
    return "\n\n".join(parts)


def fastest(content: dict) -> list[dict]:
    """Per timed case our implementations and eager, the fastest first: what a chooser could use."""
    found = []
    for case in content["cases"]:
        if case["status"] != "timed":
            continue
        own = [*content["backends"].get(case["op"], ()), "eager"]
        times = {n: t["median"] for n, t in case["times_us"].items() if n in own}
        times.setdefault(case["backend"], case["times_us"]["ours"]["median"])
        order = sorted(times, key=times.__getitem__)
        facts = {key: case[key] for key in ("op", "shape", "dtype", "direction")}
        found.append({**facts, "order": order, "us": {name: times[name] for name in order}})
    return found


def table(content: dict) -> dict:
    """A section of the chooser's table: the winner per class of calls, for GPUs of this name.

    Where several cases are of one class, their mean times decide. ValueError for results that
    were not measured on a GPU, or hold no class of which several implementations were timed.
    """
    facts, versions = content["machine"], content["versions"]
    if not facts.get("gpu") or not facts.get("capability"):
        raise ValueError("not measured on a GPU: the machine of the results has none")
    met: dict[tuple[str, str, str], list[dict]] = {}
    for case in content["cases"]:
        if case["status"] == "timed" and case.get("class"):
            met.setdefault((case["op"], case["class"]["facts"], case["class"]["sizes"]), []).append(
                case
            )
    verdicts: dict[str, dict[str, dict[str, dict]]] = {}
    for (op, name, sizes), cases in met.items():
        times = [{n: t["median"] for n, t in case["times_us"].items()} for case in cases]
        able = [n for n in cases[0]["class"]["able"] if all(n in us for us in times)]
        if len(able) < 2:
            continue
        us = {n: float(f"{sum(each[n] for each in times) / len(times):.4g}") for n in able}
        shape = ", ".join(case["shape"] for case in cases)
        entry = _measured.Entry(_measured.winner(us), us, shape, content["date"][:10])
        verdicts.setdefault(op, {}).setdefault(name, {})[sizes] = entry.stored()
    if not verdicts:
        raise ValueError("no class of calls of which several implementations were timed")
    named = ", ".join(f"{n} {versions[n]}" for n in ("torch", "cuda", "triton") if n in versions)
    note = f"measured on {facts['gpu']} with {named}, commit {content['commit']}"
    key = _measured.for_gpu(facts["gpu"], facts["capability"])
    return {"for": key, "note": note, "verdicts": verdicts}


def _origin(content: dict) -> str:
    facts, limits, versions = content["machine"], content["limits"], content["versions"]
    peaks = ", ".join(f"{d} {g / 1e3:.0f}" for d, g in limits["gflops"].items())
    named = ", ".join(f"{n} {versions[n]}" for n in ("torch", "cuda", "triton") if n in versions)
    return (
        f"{facts.get('gpu', facts['cpu'])}, {named}, {content['date'][:10]}, commit "
        f"{content['commit']}. PyTorch reaches here: copy {limits['bandwidth'][0][2]:.0f} GB/s; "
        f"{peaks} TFLOP/s."
    )


def _table(timed: Sequence[dict]) -> str:
    peers = [n for n in FIRST if any(n in c["ratios"] for c in timed)]
    own = dict.fromkeys(n for c in timed for n in c["ratios"] if n not in FIRST)
    header = ["operator", "shape", "pass", "dtype", "runs", "device", "host", "of the floor"]
    header += [f"against {name}" for name in [*peers, *own]]
    rows = [header, ["---"] * 5 + ["---:"] * (len(header) - 5)]
    for case in timed:
        cells = [f"`{case['op']}`", case["shape"], case["direction"], case["dtype"]]
        cells += [case["backend"], _time(case["times_us"]["ours"]["median"])]
        cells += [_time(case["host_us"]["ours"]), f"{case['share_of_floor']:.0%}"]
        for name in [*peers, *own]:
            cells.append(f"{case['ratios'][name]:.2f}x" if name in case["ratios"] else "-")
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _untimed(cases: Sequence[dict]) -> str:
    lines = []
    for status, meaning in (
        ("wrong", "wrong result, not timed"),
        ("error", "failed"),
        ("died", "died"),
    ):
        lines += [f"- `{c['id']}` {meaning}: {c['note']}" for c in cases if c["status"] == status]
    bare = sorted({c["op"] for c in cases if c["status"] == "reference"})
    if bare:
        lines.append(f"- no kernel of its own: {', '.join(f'`{op}`' for op in bare)}")
    return "\n".join(lines)


def _failed(timed: Sequence[dict]) -> str:
    lines = []
    for case in timed:
        for name, why in case.get("failed", {}).items():
            lines.append(f"- `{case['id']}`: {name} cannot: {why}")
        if case.get("slow_note"):
            lines.append(f"- `{case['id']}`: no compiled peers: {case['slow_note']}")
    return "\n".join(lines)


def _time(us: float) -> str:
    return f"{us / 1000:.2f} ms" if us >= 1000 else f"{us:.1f} µs"
