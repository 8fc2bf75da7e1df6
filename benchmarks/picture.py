"""A result file of the operators as a picture: how many times as fast, case by case."""

from __future__ import annotations

from pathlib import Path

from .page import COLORS, OTHER
from .results_file import write_with


def draw(content: dict, path: Path) -> None:
    """Writes beside the target, then renames; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [case for case in content["cases"] if case["status"] == "timed"]
    if not timed:
        raise ValueError("no case was timed: there is nothing to draw")
    bars = [(case, peer, ratio) for case in timed for peer, ratio in case["ratios"].items()]
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.17 * len(bars)))
    for row, (_, peer, ratio) in enumerate(bars):
        color = COLORS.get(peer, OTHER) if ratio >= 1 else "#c0392b"
        axes.barh(row, ratio - 1, left=1, height=0.8, color=color)
        axes.annotate(f" {ratio:.2f}x {peer}", (max(ratio, 1), row), va="center", fontsize=6.5)
    names = [f"{c['op']} {c['shape']} {c['direction']} {c['dtype']}" for c, _, _ in bars]
    axes.set_yticks(range(len(bars)), names, fontsize=6.5)
    axes.set_ylim(len(bars), -1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    facts, versions = content["machine"], content["versions"]
    axes.set_title(
        f"fastlm {versions['fastlm']} beside torch {versions['torch']}: {facts['cpu']}, "
        f"{content['settings']['threads']} threads, {content['date'][:10]}",
        fontsize=9,
        loc="left",
    )
    save = {"dpi": 130, "bbox_inches": "tight", "facecolor": "white", "format": "png"}
    write_with(path, lambda temporary: figure.savefig(temporary, **save))
    plt.close(figure)
