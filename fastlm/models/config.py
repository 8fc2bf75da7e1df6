"""What a decoder is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastlm.nn.rope import scaled_frequencies
from fastlm.ops.feed_forward import KINDS

NORMS = ("rms", "layer")
POSITIONS = ("rope", "learned")


@dataclass
class Config:
    """The shape of a `Decoder`.

    Only the first four have no default. A config is checked when it is made: a value that does not
    fit raises ValueError naming it.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int | None = None  # heads when None; fewer: grouped queries
    head_dim: int | None = None  # hidden / heads when None
    intermediate: int | None = None  # 4 hidden when None
    max_positions: int = 2048
    norm: str = "rms"  # "rms" or "layer"
    norm_eps: float = 1e-5
    positions: str = "rope"  # "rope" or "learned"
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None  # as in Hugging Face: "linear" or "llama3"
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None  # sliding window of the attention
    tied_head: bool = True
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    family: str | None = None  # the row of fastlm.hf.families it is saved as; found when None
    extra: dict[str, Any] = field(default_factory=dict)  # config.json's other keys, kept for saving

    def __post_init__(self) -> None:
        for name in ("vocab", "hidden", "layers", "heads", "max_positions"):
            self._count(name)
        if self.kv_heads is None:
            self.kv_heads = self.heads
        self._count("kv_heads")
        self._require(self.heads % self.kv_heads == 0, "kv_heads", f"a divisor of {self.heads}")
        if self.head_dim is None:
            self._require(self.hidden % self.heads == 0, "heads", f"a divisor of {self.hidden}")
            self.head_dim = self.hidden // self.heads
        self._count("head_dim")
        if self.intermediate is None:
            self.intermediate = 4 * self.hidden
        self._count("intermediate")
        self._require(self.norm in NORMS, "norm", f"one of {', '.join(NORMS)}")
        self._require(self.positions in POSITIONS, "positions", f"one of {', '.join(POSITIONS)}")
        self._require(self.activation in KINDS, "activation", f"one of {', '.join(KINDS)}")
        self._require(self.norm_eps >= 0, "norm_eps", "0 or more")
        if self.window is not None:
            self._count("window")
        if self.positions == "rope":
            self._require(self.head_dim % 2 == 0, "head_dim", "even for rope")
            self._require(self.rope_theta > 0, "rope_theta", "positive")
            scaled_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)
        if isinstance(self.eos_ids, int):
            self.eos_ids = (self.eos_ids,)
        self.eos_ids = tuple(self.eos_ids)

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of the q, k and v parts of the fused projection."""
        assert self.kv_heads is not None and self.head_dim is not None  # set in __post_init__
        kv = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, kv, kv

    def _count(self, name: str) -> None:
        value = getattr(self, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        self._require(whole and value > 0, name, "a positive integer")

    def _require(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"Config: {name} must be {expected}, got {getattr(self, name)!r}")
