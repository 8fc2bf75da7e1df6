"""Which micro-batches a step takes, and which of them a process."""

from __future__ import annotations

from fastlm.data.batches import IGNORE, Batch, Source

__all__ = ["IGNORE", "Batch", "Source", "share"]


def share(source: Source, indices: range, rank: int = 0, world: int = 1) -> list[Batch]:
    """The micro-batches, or parts of them, that process `rank` of `world` computes.

    Every process gets the same number of them, none empty: whole ones where their number divides
    evenly, else some rows of each. A process without a row of its own computes one without loss,
    because the others wait for it in the exchange of gradients.
    """
    if len(indices) % world == 0:
        return [source.batch(i) for i in indices[rank::world]]
    parts = []
    for index in indices:
        batch = source.batch(index)
        start, stop = (len(batch) * r // world for r in (rank, rank + 1))
        mine = batch.rows(start, stop) if stop > start else batch.rows(0, 1).without_loss()
        parts.append(mine)
    return parts
