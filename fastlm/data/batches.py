"""What a training step is fed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORE = -100  # a target without loss


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        tokens: [B, T] int64.
        targets: [B, T] int64, already shifted: targets[b, t] is predicted at tokens[b, t]; -100
            where there is no loss.
        cu_seqlens: [n + 1] int32, from 0 to B T: where sequences start in the flattened tokens,
            none of which sees another. Every row starts one, so that rows can be dealt out to
            processes. None: each row is one sequence.
        positions: [B, T] int64, where tokens stand in their sequences; None: from 0 in each row.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None
    positions: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def counted(self) -> int:
        """Targets that have a loss."""
        return int((self.targets != IGNORE).sum())

    def rows(self, start: int, stop: int) -> Batch:
        """The rows from `start` up to `stop`."""
        starts = None
        if self.cu_seqlens is not None:
            width = self.tokens.shape[1]
            starts = self.cu_seqlens - start * width
            starts = starts[(starts >= 0) & (starts <= (stop - start) * width)]
        positions = None if self.positions is None else self.positions[start:stop]
        return Batch(self.tokens[start:stop], self.targets[start:stop], starts, positions)

    def without_loss(self) -> Batch:
        """The same tokens, no target."""
        none = torch.full_like(self.targets, IGNORE)
        return Batch(self.tokens, none, self.cu_seqlens, self.positions)

    def to(self, device: torch.device | str) -> Batch:
        """On another device."""
        moved = (
            None if x is None else x.to(device, non_blocking=True)
            for x in (self.tokens, self.targets, self.cu_seqlens, self.positions)
        )
        return Batch(*moved)  # type: ignore[arg-type]


class Source(Protocol):
    """Micro-batches by number.

    A batch is a pure function of its number and of the source's seed: a resumed run needs only the
    number it stopped at, and each of several processes takes its own.
    """

    def batch(self, index: int) -> Batch:
        """Micro-batch `index` from 0; beyond an epoch's the next epoch's come, in a new order."""

    def __len__(self) -> int:
        """Micro-batches in an epoch."""

    def describe(self) -> dict[str, Any]:
        """What makes the batches: JSON values. A run is resumed only with an equal one."""
