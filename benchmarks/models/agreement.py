"""Whether the three variants of a checkpoint say the same, judged against float64."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastlm.testing import Error, error

from ..case import DTYPES
from .variants import TITLES, Transformers, load


@dataclass(frozen=True)
class Agreement:
    """The largest error of the logits of each variant, and how often the likeliest token agrees."""

    original: float
    errors: dict[str, Error]  # of the patched model and of the decoder
    same_token: dict[str, float]  # share of positions

    @property
    def ok(self) -> bool:
        """Whether all keep the rule: at most twice the original's error, mean and largest."""
        return all(e.ok for e in self.errors.values())

    def lines(self) -> list[str]:
        """For a reader."""
        allowed = max(e.largest_allowed for e in self.errors.values())
        found = [f"largest error of the logits against float64: original {self.original:.2e}"]
        for name, e in self.errors.items():
            verdict = "ok" if e.ok else "TOO LARGE"
            same = f"same likeliest token at {self.same_token[name]:.0%} of the positions"
            found.append(
                f"{TITLES[name]} {e.largest:.2e}, {verdict} (allowed {allowed:.2e}); {same}"
            )
        return found

    def record(self) -> dict:
        """The JSON form."""
        return {
            "ok": self.ok,
            "original": self.original,
            "errors": {name: asdict(e) for name, e in self.errors.items()},
            "same_token": self.same_token,
        }


@torch.inference_mode()
def agreement(folder: Path, dtype: str, tokens: Tensor) -> tuple[Agreement, Transformers]:
    """Compares the variants on tokens [B, T]; returns the patched model too.

    The oracle is the decoder's reference in float64, with the weights as `dtype` holds them.
    """
    model = load("original", folder, DTYPES[dtype])
    assert isinstance(model, Transformers)
    original = model.logits(tokens)
    decoder = load("decoder", folder, DTYPES[dtype])
    found = {"decoder": decoder.logits(tokens)}
    decoder.model.double()
    exact = decoder.logits(tokens)
    del decoder
    model.apply_patch()
    found = {"patched": model.logits(tokens), **found}
    errors = {name: error(name, logits, original, exact) for name, logits in found.items()}
    likeliest = original.argmax(-1)
    same = {
        name: float((logits.argmax(-1) == likeliest).float().mean())
        for name, logits in found.items()
    }
    return Agreement(errors["patched"].largest_torch, errors, same), model
