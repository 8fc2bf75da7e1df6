"""The settings of a training run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "wsd", "linear", "constant")
PRECISIONS = ("fp32", "bf16", "bf16-pure", "fp16")
ENGINES = ("ddp", "fsdp")
PRODUCTS = ("measured", "own", "library")

# What a resumed run may have otherwise than its checkpoint: how long, how often, on what engine.
CHANGEABLE = {
    "steps",
    "epochs",
    "patience",
    "validate_every",
    "validation_batches",
    "log_every",
    "save_every",
    "save_minutes",
    "keep",
    "engine",
    "compile",
    "activation_checkpointing",
}


@dataclass
class TrainConfig:
    """How to train; checked when it is made: a bad value raises ValueError naming it."""

    # how long
    steps: int | None = None  # updates of the weights
    epochs: float | None = None  # passes over the source; 1 where steps is None too
    accumulate: int = 1  # micro-batches in a step, over all processes together

    # the optimiser
    optimizer: str = "adamw"
    lr: float = 1e-3  # the highest learning rate
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9  # of sgd
    weight_decay: float = 0.1  # decoupled; only of matrices, not of tables looked up, nor vectors
    clip: float | None = 1.0  # largest norm of the gradient

    # the learning rate's course
    schedule: str = "cosine"
    warmup: int | None = None  # steps of rising; a tenth of all, at most 100, when None
    min_lr: float = 0.1  # at the end, as a fraction of lr
    decay: float = 0.2  # wsd: the fraction of all steps that fall

    # arithmetic
    precision: str = "fp32"  # bf16, fp16: products in 16 bits, weights in fp32 (autocast)
    compile: bool = False
    activation_checkpointing: bool = False
    products: str = "measured"  # matrix products on a CPU: own kernels, the library, or the faster
    seed: int = 0  # of random numbers within a step

    # watching
    validate_every: int | None = None  # steps; a tenth of all when None
    validation_batches: int | None = None  # at most so many micro-batches; all when None
    patience: int | None = None  # stop after so many validations without a better one
    log_every: int = 10

    # keeping
    save_every: int | None = None  # steps
    save_minutes: float | None = 10.0
    keep: int = 2  # newest checkpoints; the best one is kept besides

    # several processes
    engine: str = "ddp"

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("TrainConfig: give steps or epochs, not both")
        if self.steps is None and self.epochs is None:
            self.epochs = 1.0
        for name in ("steps", "validate_every", "validation_batches", "patience", "save_every"):
            if getattr(self, name) is not None:
                self._whole(name, 1)
        for name in ("accumulate", "log_every", "keep"):
            self._whole(name, 1)
        for name in ("epochs", "clip", "save_minutes"):
            if getattr(self, name) is not None:
                self._number(name, above=0.0)
        if self.warmup is not None:
            self._whole("warmup", 0)
        self._whole("seed", 0)
        self._number("lr", above=0.0)
        self._number("eps", above=0.0)
        for name in ("beta1", "beta2", "momentum"):
            self._number(name, low=0.0, below=1.0)
        self._number("weight_decay", low=0.0)
        for name in ("epochs", "lr", "eps", "weight_decay"):
            if getattr(self, name) == math.inf:
                raise self._wrong(name, "finite")
        for name in ("min_lr", "decay"):
            self._number(name, low=0.0, high=1.0)
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("products", PRODUCTS),
            ("engine", ENGINES),
        ):
            if getattr(self, name) not in known:
                raise self._wrong(name, f"one of {', '.join(known)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "TrainConfig") -> TrainConfig:
        """From JSON or TOML values; an unknown name raises ValueError with the known ones."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"{where}: unknown setting {unknown[0]!r}; known are {', '.join(known)}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    def total_steps(self, micro_batches: int) -> int:
        """Steps of the whole run, for an epoch of so many micro-batches."""
        if self.steps is not None:
            return self.steps
        return -(-self.total_micro_batches(micro_batches) // self.accumulate)

    def total_micro_batches(self, micro_batches: int) -> int:
        """Micro-batches of the whole run; the last step takes what is left of them."""
        if self.steps is not None:
            return self.steps * self.accumulate
        assert self.epochs is not None  # set in __post_init__
        return max(1, round(self.epochs * micro_batches))

    def _whole(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self._wrong(name, f"a whole number of {low} or more")

    def _number(
        self,
        name: str,
        *,
        above: float | None = None,
        low: float | None = None,
        high: float | None = None,
        below: float | None = None,
    ) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        limits = (
            (above, "above", lambda v, n: v > n),
            (low, "at least", lambda v, n: v >= n),
            (high, "at most", lambda v, n: v <= n),
            (below, "below", lambda v, n: v < n),
        )
        for limit, word, holds in limits:
            if limit is not None and not (number and holds(value, limit)):
                raise self._wrong(name, f"a number {word} {limit:g}")

    def _wrong(self, name: str, expected: str) -> ValueError:
        got = getattr(self, name)
        return ValueError(f"TrainConfig: {name} must be {expected}, got {got!r}")
