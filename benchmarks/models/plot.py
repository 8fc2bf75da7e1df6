"""The demonstration's picture: one panel per measure, bars per variant and dtype."""

from __future__ import annotations

import math
from pathlib import Path

from ..results_file import write_with

COLORS = ("#9aa5b1", "#f2a33c", "#2f7ed8")
GREY = "#5a6570"
COLUMNS = 3


def draw(content: dict, path: Path) -> None:
    """Draws a demonstration's result file; writes beside the target, then renames."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures = content["measures"]
    rows = math.ceil((len(measures) + 1) / COLUMNS)  # the legend takes a place of its own
    with plt.rc_context({"font.size": 10, "font.family": "DejaVu Sans"}):
        size = (3.7 * COLUMNS, 3.3 * rows + 0.9)
        figure, grid = plt.subplots(rows, COLUMNS, figsize=size, squeeze=False)
        places = list(grid.flat)
        for place, measure in zip(places, measures, strict=False):
            _panel(place, measure, content["variants"])
        for place in places[len(measures) :]:
            place.set_axis_off()
        _legend(places[-1], places[0], content)
        inch = 1 / size[1]
        figure.text(0.012, 1 - 0.18 * inch, content["model"], fontsize=16, weight="bold", va="top")
        figure.text(0.012, 1 - 0.55 * inch, subtitle(content), color=GREY, va="top")
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.8 * inch), w_pad=2.0, h_pad=1.6)
        save = {"dpi": 144, "facecolor": "white", "format": "png"}
        write_with(path, lambda temporary: figure.savefig(temporary, **save))
        plt.close(figure)


def subtitle(content: dict) -> str:
    """Where and when."""
    facts, versions = content["machine"], content["versions"]
    return (
        f"{facts['cpu']} ({facts['isa'] or 'no native kernels'}), "
        f"{content['settings']['threads']} threads, {content['date'][:10]}, "
        f"fastlm {versions['fastlm']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}"
    )


def _panel(panel, measure: dict, variants: list[str]) -> None:
    dtypes = list(measure["values"])
    width = 0.84 / len(variants)
    highest = 0.0
    for index, variant in enumerate(variants):
        for group, dtype in enumerate(dtypes):
            value = measure["values"][dtype].get(variant)
            if value is None:
                continue
            at = group + (index - (len(variants) - 1) / 2) * width
            label = variant if group == 0 else None
            panel.bar(at, value, width * 0.92, color=COLORS[index % len(COLORS)], label=label)
            highest = max(highest, value)
            amount = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
            _above(panel, at, value, 2, amount, color=GREY, fontsize=8)
            if index:
                base = measure["values"][dtype][variants[0]]
                gain = value / base if measure["more_is_better"] else base / value
                _above(panel, at, value, 12, f"{gain:.2f}x", weight="bold", fontsize=8.2)
    better = "more is better" if measure["more_is_better"] else "less is better"
    panel.set_title(measure["name"], loc="left", fontsize=11, weight="bold", pad=16)
    where = {"transform": panel.transAxes, "fontsize": 8.5, "color": GREY}
    panel.text(0, 1.02, f"{measure['unit']}, {better}", **where)
    panel.set_xticks(range(len(dtypes)), dtypes)
    panel.set_ylim(0, 1.18 * highest or 1)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="both", length=0)
    panel.tick_params(axis="y", labelsize=8, labelcolor=GREY)
    panel.grid(axis="y", color="#e4e8ec")
    panel.set_axisbelow(True)


def _above(panel, at: float, value: float, points: int, text: str, **style) -> None:
    panel.annotate(
        text, (at, value), xytext=(0, points), textcoords="offset points", ha="center", **style
    )


def _legend(place, panel, content: dict) -> None:
    place.legend(
        *panel.get_legend_handles_labels(), loc="upper left", frameon=False, fontsize=11,
        bbox_to_anchor=(-0.02, 1.0),
    )  # fmt: skip
    note = (
        "Bold: how many times as good as the original,\nabove 1 is better. Medians of runs that "
        "took turns.\nMemory: resident size of a process of its own\nafter loading, Python and "
        f"PyTorch included.\nAllocator: {content['settings']['allocator']}."
    )
    place.text(0, 0.58, note, transform=place.transAxes, va="top", fontsize=9, color=GREY)
