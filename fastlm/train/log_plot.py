"""A run's picture, from its log."""

from __future__ import annotations

from pathlib import Path

from fastlm.train.log import Record


def plot(records: list[Record], path: Path) -> None:
    """Loss, learning rate and speed over steps, as PNG; needs matplotlib (extra `demo`)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1), layout="constrained"
    )
    for key, style in (("loss", {"linewidth": 1}), ("validation", {"marker": "o"})):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            above.plot(*zip(*points, strict=True), label=key, **style)
    above.set_ylabel("cross-entropy (nats per token)")
    above.legend(loc="upper right")
    above.grid(alpha=0.3)
    steps = [r["step"] for r in records if "lr" in r]
    rate = above.twinx()
    rate.plot(steps, [r["lr"] for r in records if "lr" in r], color="gray", alpha=0.5)
    rate.set_ylabel("learning rate")
    below.plot(steps, [r["tokens_per_s"] for r in records if "lr" in r])
    below.set_ylabel("tokens/s")
    below.set_ylim(bottom=0)
    share = [(r["step"], 100 * r["peak_share"]) for r in records if r.get("peak_share")]
    if share:
        other = below.twinx()
        other.plot(*zip(*share, strict=True), color="C1")
        other.set_ylabel("% of peak", color="C1")
        other.set_ylim(bottom=0)
    below.set_xlabel("step")
    below.grid(alpha=0.3)
    fresh = path.with_name(f".{path.name}")
    figure.savefig(fresh, format="png", dpi=120)
    plt.close(figure)
    fresh.replace(path)
