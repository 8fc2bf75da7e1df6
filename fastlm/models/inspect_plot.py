"""The picture of an inspection: the text coloured by probability, the heads' attention as maps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlm.models.inspect import Inspection

_WIDTH, _LINE, _PANEL, _LABEL = 12.0, 0.28, 1.3, 0.35  # inches
_LETTER = 0.085  # width of a letter, inches
_WORST = -8.0  # log-probability of the deepest red


def draw(found: Inspection, texts: Sequence[str], to: IO[bytes] | str, title: str = "") -> None:
    """Writes a PNG; needs matplotlib (extra `demo`).

    Args:
        found: from `inspect`.
        texts: the tokens' texts.
        to: a file name or a file open for bytes.
        title: printed on top.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [visible(text) for text in texts]
    lines = _wrap([max(1, len(text)) * _LETTER + 0.06 for text in shown])
    heads = max((len(maps) for maps in found.attention.values()), default=0)
    strip = _LINE * (lines[-1][1] + 1) + 0.3
    width = max(_WIDTH, heads * _PANEL + 2 * _LABEL)
    height = 0.5 + strip + 0.5 + len(found.attention) * _PANEL + 0.2
    figure = plt.figure(figsize=(width, height), dpi=110)
    try:
        figure.text(0.3 / width, 1 - 0.3 / height, title, size=10, parse_math=False)
        _strip(figure, found, shown, lines, (width, height), strip)
        _maps(figure, found, (width, height), 0.5 + strip + 0.5)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # characters the font lacks
            figure.savefig(to, format="png")
    finally:
        plt.close(figure)


def visible(text: str) -> str:
    """A token's text with its spaces and line ends to be seen, and no other control characters."""
    text = text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "?" for c in text)


def _wrap(widths: Sequence[float]) -> list[tuple[float, int, float]]:
    """(left, line, width) of each token, in inches."""
    placed, left, line = [], 0.0, 0
    for width in widths:
        if left + width > _WIDTH - 0.6 and left > 0:
            left, line = 0.0, line + 1
        placed.append((left, line, width))
        left += width
    return placed


def _strip(
    figure: Any,
    found: Inspection,
    shown: Sequence[str],
    lines: Sequence[tuple[float, int, float]],
    size: tuple[float, float],
    strip: float,
) -> None:
    import matplotlib
    from matplotlib.patches import Rectangle

    width, height = size
    colours = matplotlib.colormaps["RdYlGn"]
    axes = figure.add_axes(
        (0.3 / width, 1 - (0.5 + strip) / height, 1 - 0.6 / width, strip / height)
    )
    axes.set_xlim(0, width - 0.6)
    axes.set_ylim(strip, 0)
    axes.axis("off")
    for text, p, (left, line, wide) in zip(shown, found.logprobs, lines, strict=True):
        colour = "lightgrey" if p is None else colours(1 - max(p, _WORST) / _WORST)
        axes.add_patch(Rectangle((left, line * _LINE), wide, _LINE * 0.9, color=colour, lw=0))
        where = left + wide / 2, (line + 0.45) * _LINE
        style = {"ha": "center", "va": "center", "family": "monospace", "size": 9}
        axes.text(*where, text, parse_math=False, **style)
    loss = found.loss
    note = "" if math.isnan(loss) else f"mean {-loss:.3f}, perplexity {math.exp(loss):.2f}"
    axes.text(
        0,
        strip - 0.08,
        f"log-probability of each token, red {_WORST:g} to green 0; {note}",
        size=8,
    )


def _maps(figure: Any, found: Inspection, size: tuple[float, float], top: float) -> None:
    width, height = size
    for row, (layer, maps) in enumerate(found.attention.items()):
        for head, weights in enumerate(maps):
            left = _LABEL + head * _PANEL
            bottom = height - top - (row + 1) * _PANEL
            inner = _PANEL - 0.18
            axes = figure.add_axes((left / width, bottom / height, inner / width, inner / height))
            # the square root shows small weights, too
            axes.imshow(weights.sqrt().numpy(), cmap="magma", vmin=0, vmax=1, aspect="auto")
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                axes.set_title(f"head {head}", size=7, pad=2)
            if head == 0:
                axes.set_ylabel(f"layer {layer}", size=7, labelpad=1)
    if found.attention:
        note = "attention of each token (row, from the top) to those before (column)"
        figure.text(_LABEL / width, 1 - (top - 0.25) / height, note, size=8)
