"""How fastlm's kernels are judged: error against float64, budgeted by PyTorch's own error.

A kernel passes when, for every output and every gradient, its error against the float64 oracle is
at most `factor` times that of PyTorch's own kernel of the same dtype, both the root mean square and
the largest. Where PyTorch's is smaller than that of a correctly rounded result, the latter
takes its place. No tolerance is made by hand.

The largest of a few errors is luck. Small tensors are therefore judged over many draws: the same
inputs again, every value moved by up to a quarter at random, until there are 512 errors or 32
draws; of the largest errors of the draws the root mean square counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., Any]

WANTED = 512  # element errors of the smallest tensor, over all draws
FEWEST = 16  # draws, for rows of one draw share errors; and errors of which a mean is taken
MOST = 32  # draws
WORK = 2**19  # elements over all draws and tensors; 16 times that for tensors below 16 elements
JITTER = 0.25


@dataclass(frozen=True)
class Error:
    """The error of one tensor: ours, PyTorch's, and what was allowed."""

    name: str
    ours: float  # root mean squares,
    torch: float
    allowed: float
    largest: float = 0.0  # and largest values, root mean squares over the draws
    largest_torch: float = 0.0
    largest_allowed: float = math.inf

    @property
    def ok(self) -> bool:
        return self.ours <= self.allowed and self.largest <= self.largest_allowed  # NaN: false

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "TOO LARGE"
        return (
            f"{self.name}: error {self.ours:.3e}, PyTorch's {self.torch:.3e}, allowed "
            f"{self.allowed:.3e}; at most {self.largest:.3e}, PyTorch's {self.largest_torch:.3e}, "
            f"allowed {self.largest_allowed:.3e}: {verdict}"
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
    draws: int | None = None,
) -> list[Error]:
    """Runs three functions on the same inputs and returns the errors of outputs and gradients.

    `call` (ours) and `baseline` (PyTorch's own) get the inputs as they are, `oracle` gets the
    floating-point ones in float64. Gradients are taken of every floating-point input, for one
    random cotangent per output. After the first draw inputs and cotangents are jittered: times
    1 + u, |u| <= 1/4, zeros and infinities kept. `draws` is found from the sizes if None;
    1 is for inputs whose very values matter.
    """
    three = ((call, None), (baseline, None), (oracle, torch.float64))

    def run(moved: Sequence[Tensor | None], draw: int) -> list[dict[str, Tensor]]:
        return [_run(f, moved, gradients, seed, draw, dtype) for f, dtype in three]

    runs = run(inputs, 0)
    sizes = [x.numel() for x in runs[2].values() if x.numel()]
    if draws is None:
        draws = draws_for(sizes, sum(x.numel() for x in inputs if x is not None))
    pool = Pool(factor)
    pool.add(*runs)
    for draw in range(1, draws):
        generator = torch.Generator().manual_seed(1000 * seed + draw)
        moved = [
            _jittered(x, generator) if x is not None and x.is_floating_point() else x
            for x in inputs
        ]
        pool.add(*run(moved, draw))
    return pool.errors()


def check(
    call: Call, baseline: Call, oracle: Call, inputs: Sequence[Tensor | None], **kw: Any
) -> None:
    """`compare`, raising AssertionError with the table when an error is over its budget."""
    errors = compare(call, baseline, oracle, inputs, **kw)
    assert all(e.ok for e in errors), "\n" + "\n".join(map(str, errors))


def error(name: str, ours: Tensor, theirs: Tensor, exact: Tensor, factor: float = 2.0) -> Error:
    """The error of one tensor, of a single draw, and its budget."""
    pool = Pool(factor)
    pool.add({name: ours}, {name: theirs}, {name: exact})
    return pool.errors()[0]


def draws_for(sizes: Iterable[int], inputs: int = 0) -> int:
    """How many draws tensors of these sizes need, judged together; `inputs`: elements besides."""
    sizes = list(sizes)
    if not sizes:
        return 1
    smallest = min(sizes)
    work = WORK * (FEWEST if smallest < FEWEST else 1)
    wanted = max(FEWEST, math.ceil(WANTED / smallest))
    return max(1, min(wanted, work // (sum(sizes) + inputs), MOST))


class Pool:
    """Several draws of the same tensors, judged together."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor
        self._draws: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def add(
        self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], exact: Mapping[str, Tensor]
    ) -> None:
        """One draw: three runs, each tensors by name."""
        assert ours.keys() == exact.keys(), (list(ours), list(exact))
        for name, right in exact.items():
            if ours[name].shape != right.shape:
                shape, expected = list(ours[name].shape), list(right.shape)
                raise AssertionError(f"{name}: shape {shape}, expected {expected}")
            if right.numel():
                self._draws.setdefault(name, []).append((ours[name], theirs[name], right))

    def errors(self) -> list[Error]:
        """One verdict per tensor over all draws."""
        return [self._error(name, draws) for name, draws in self._draws.items()]

    def _error(self, name: str, draws: list[tuple[Tensor, Tensor, Tensor]]) -> Error:
        made, its, exact = (torch.stack(x) for x in zip(*draws, strict=True))
        exact = exact.double()
        ours, largest = _size(_difference(made, exact))
        theirs, largest_torch = _size(_difference(its, exact))
        rounding, largest_rounding = _size(_half_unit(exact, made.dtype))
        rounding /= 3**0.5  # of errors up to half a unit, all as likely
        enough = exact.numel() >= FEWEST
        return Error(
            name,
            ours,
            theirs,
            self.factor * max(theirs, rounding) if enough else math.inf,
            largest,
            largest_torch,
            self.factor * max(largest_torch, largest_rounding),
        )


def _size(x: Tensor) -> tuple[float, float]:
    """Root mean squares: of all values [draws, ...], and of the largest value of each draw."""
    largest = x.reshape(len(x), -1).amax(1)
    return float(x.square().mean().sqrt()), float(largest.square().mean().sqrt())


def _difference(x: Tensor, exact: Tensor) -> Tensor:
    x = x.double()
    return torch.where(x == exact, 0.0, (x - exact).abs())  # equal infinities


def _half_unit(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance of neighbours of `dtype` at each value: the largest rounding error."""
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0  # integers are exact
    finite = torch.where(exact.isfinite(), exact, 0.0)
    mantissa, _ = torch.frexp(finite)
    power = torch.where(mantissa == 0, 0.0, finite / mantissa)  # of two, above the value
    return power * (eps / 4)


def _jittered(x: Tensor, generator: torch.Generator) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    u = torch.rand(x.shape, generator=generator, dtype=wide) * (2 * JITTER) + (1 - JITTER)
    moved = (x.detach() * u.to(x.device)).to(x.dtype)
    return _like_strides(x, torch.where(moved.isfinite(), moved, x.detach()))


def _run(
    call: Call, inputs: Sequence[Tensor | None], gradients: bool, seed: int, draw: int, dtype: Any
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
        drawn = [torch.randn(out.shape, generator=generator) for out in outputs]
        if draw:  # errors of one draw with the next are comparable if their sizes are
            drawn = [_jittered(x, generator.manual_seed(1000 * seed + draw)) for x in drawn]
        given = inputs_dtype(inputs)
        cotangents = [x.to(given).to(out) for x, out in zip(drawn, outputs, strict=True)]
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
