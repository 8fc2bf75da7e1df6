"""What changed between two result files of the operators."""

from __future__ import annotations

from .session import duration, geometric_mean


def table(before: dict, after: dict) -> str:
    """Cases that both timed, the largest change first; above 1: `after` is faster.

    Single times move with the machine, so each case is also given by its ratio to eager, which was
    timed in the same run: a case counts as changed where both agree by more than the spread.
    """
    old = {case["id"]: case for case in before["cases"] if case["status"] == "timed"}
    pairs = [
        (old[case["id"]], case)
        for case in after["cases"]
        if case["status"] == "timed" and case["id"] in old
    ]
    if not pairs:
        raise ValueError("the two files have no timed case in common")
    rows = []
    for a, b in pairs:
        direct = a["times_us"]["ours"]["median"] / b["times_us"]["ours"]["median"]
        relative = b["ratios"]["eager"] / a["ratios"]["eager"]
        noise = sum(_spread(case, who) for case in (a, b) for who in ("ours", "eager"))
        changed = min(direct, relative) > 1 + noise or max(direct, relative) < 1 / (1 + noise)
        rows.append((relative, direct, noise, changed, a, b))
    rows.sort(key=lambda row: row[0])
    lines = [f"{'case':58} {'before':>11} {'after':>11}  {'time':>6} {'vs eager':>9}"]
    for relative, direct, _, changed, a, b in rows:
        times = [duration(case["times_us"]["ours"]["median"]) for case in (a, b)]
        mark = ("  faster" if relative > 1 else "  SLOWER") if changed else ""
        lines.append(
            f"{b['id']:58} {times[0]:>11} {times[1]:>11}  {direct:5.2f}x {relative:8.2f}x{mark}"
        )
    mean = geometric_mean([row[0] for row in rows])
    count = [sum(row[3] and (row[0] > 1) == faster for row in rows) for faster in (True, False)]
    lines.append(
        f"{len(rows)} cases, geometric mean against eager {mean:.2f}x; beyond the noise: "
        f"{count[0]} faster, {count[1]} slower"
    )
    for name in ("cpu", "isa"):
        if before["machine"].get(name) != after["machine"].get(name):
            one, other = before["machine"].get(name), after["machine"].get(name)
            lines.append(f"note: {name} differs: {one} before, {other} after")
    return "\n".join(lines)


def _spread(case: dict, who: str) -> float:
    times = case["times_us"][who]
    return (times["p75"] - times["p25"]) / 2 / times["median"]
