"""How fastlm's kernels are judged: error against float64, budgeted by PyTorch's own error.

A kernel passes when, for every output and every gradient, its largest error against the float64
oracle is at most `factor` times that of PyTorch's own kernel of the same dtype. Where PyTorch
happens to be exact, one rounding of the largest value is allowed instead. No tolerance is made by
hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., Any]


@dataclass(frozen=True)
class Error:
    """The error of one tensor: ours, PyTorch's, and what was allowed."""

    name: str
    ours: float
    torch: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.allowed  # false for NaN

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "TOO LARGE"
        return (
            f"{self.name}: error {self.ours:.3e}, PyTorch's {self.torch:.3e}, "
            f"allowed {self.allowed:.3e}: {verdict}"
        )


def compare(
    call: Call,
    baseline: Call,
    oracle: Call,
    inputs: Sequence[Tensor | None],
    *,
    gradients: bool = True,
    factor: float = 2.0,
    seed: int = 0,
) -> list[Error]:
    """Runs three functions on the same inputs and returns the error of each output and gradient.

    `call` (ours) and `baseline` (PyTorch's own) get the inputs as they are, `oracle` gets the
    floating-point ones in float64. Gradients are taken of every floating-point input, for one
    random cotangent per output.
    """
    ours = _run(call, inputs, gradients, seed, None)
    theirs = _run(baseline, inputs, gradients, seed, None)
    exact = _run(oracle, inputs, gradients, seed, torch.float64)
    return [
        error(name, ours[name], theirs[name], exact[name], factor)
        for name in exact
        if exact[name].numel()
    ]


def check(
    call: Call, baseline: Call, oracle: Call, inputs: Sequence[Tensor | None], **kw: Any
) -> None:
    """`compare`, raising AssertionError with the table when an error is over its budget."""
    errors = compare(call, baseline, oracle, inputs, **kw)
    assert all(e.ok for e in errors), "\n" + "\n".join(map(str, errors))


def error(name: str, ours: Tensor, theirs: Tensor, exact: Tensor, factor: float = 2.0) -> Error:
    """The error of one tensor and its budget."""
    if ours.shape != exact.shape:
        raise AssertionError(f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}")
    eps = torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0.0  # integers are exact
    rounding = eps * _largest(exact)
    mine, its = _distance(ours, exact), _distance(theirs, exact)
    return Error(name, mine, its, max(factor * its, rounding))


def _largest(x: Tensor) -> float:
    finite = x[torch.isfinite(x)].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _distance(x: Tensor, exact: Tensor) -> float:
    x = x.double()
    difference = torch.where(x == exact, 0.0, (x - exact).abs())  # equal infinities
    return float(difference.max()) if not difference.isnan().any() else float("nan")


def _run(
    call: Call, inputs: Sequence[Tensor | None], gradients: bool, seed: int, dtype: Any
) -> dict[str, Tensor]:
    leaves: list[Tensor | None] = []
    for x in inputs:
        if x is not None and x.is_floating_point():
            x = _like_strides(x, x.detach().to(dtype or x.dtype))
            x.requires_grad_(gradients)
        leaves.append(x)
    made = call(*leaves)
    outputs = made if isinstance(made, tuple) else (made,)
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    if gradients:
        generator = torch.Generator().manual_seed(seed)
        cotangents = [
            torch.randn(out.shape, generator=generator).to(dtype=inputs_dtype(inputs)).to(out)
            for out in outputs
        ]
        wanted = [(i, x) for i, x in enumerate(leaves) if x is not None and x.requires_grad]
        grads = torch.autograd.grad(
            outputs, [x for _, x in wanted], cotangents, allow_unused=True, materialize_grads=True
        )
        for (i, _), g in zip(wanted, grads, strict=True):
            results[f"gradient of input {i}"] = g
    return results


def inputs_dtype(inputs: Sequence[Tensor | None]) -> torch.dtype:
    """The element type of the first floating-point input: cotangents are rounded to it."""
    return next(x.dtype for x in inputs if x is not None and x.is_floating_point())


def _like_strides(x: Tensor, values: Tensor) -> Tensor:
    """A fresh leaf with x's strides, so that the kernel under test sees the layout asked for."""
    out = torch.empty_strided(x.shape, x.stride(), dtype=values.dtype, device=x.device)
    return out.copy_(values) if out.numel() else out
