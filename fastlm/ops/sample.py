"""Drawing the next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import reference
from fastlm.ops import _checks
from fastlm.ops._library import define
from fastlm.ops._registry import Backend, choose, native, register

_OP = "sample"

_NATIVE = native(torch.float32, torch.bfloat16, torch.float16)

register(_OP, Backend("cuda", ("cuda",), _NATIVE), Backend("cpu", ("cpu",), _NATIVE))

_forward = define(
    "sample(Tensor logits, Tensor uniform, float temperature, int top_k, float top_p, float min_p)"
    " -> Tensor",
    lambda logits, uniform, *options: logits.new_empty(logits.shape[:1], dtype=torch.int64),
)


def sample(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """One token per row, drawn with softmax(logits / temperature) of what the cuts leave.

    The cuts follow each other: the top_k largest logits; of these the fewest largest whose
    probabilities together reach top_p (the one that crosses it included); of these the ones with
    p >= min_p max(p). Equally likely tokens stay or go together.

    Args:
        logits: [B, V], any strides; fp32, bf16, fp16 or fp64. -inf excludes a token.
        uniform: [B], fp64 in [0, 1), on the device of logits: the token drawn is the first, in
            the order of the vocabulary, whose cumulative probability exceeds it.
        temperature: 0 or more; 0 takes the first of the largest logits, whatever `uniform` is.
        top_k: 1 or more; None for all.
        top_p: in (0, 1]; None for all.
        min_p: in [0, 1]; None for all.

    Returns:
        tokens [B], int64.

    Raises:
        ValueError: a shape, device or option that does not fit.
        TypeError: an argument that is no tensor of the kind asked for.
        RuntimeError: on the CPU kernel, a row that holds NaN or +inf, or nothing above -inf.

    Exponentials and sums of 64 of them are fp32, sums of these fp64. The same input gives the same
    tokens for any number of threads; a `uniform` within rounding of a boundary may give the
    neighbour elsewhere.
    Source: Holtzman et al., arXiv:1904.09751 (top_p); Nguyen et al., arXiv:2407.01082 (min_p).

    >>> logits = torch.tensor([[0.0, 3.0, 2.0, -1.0]])
    >>> sample(logits, torch.tensor([0.9], dtype=torch.float64), top_k=2)
    tensor([2])
    """
    _checks.floating(_OP, "logits", logits)
    _checks.rank(_OP, "logits", logits, 2)
    if logits.shape[1] == 0:
        raise _checks.fail(_OP, "logits", "[B, V] with V > 0", list(logits.shape))
    _checks.tensor(_OP, "uniform", uniform)
    _checks.shape(_OP, "uniform", uniform, logits.shape[:1])
    if uniform.dtype != torch.float64:
        raise TypeError(f"{_OP}: uniform must be of torch.float64, got {uniform.dtype}")
    _checks.same_device(_OP, "uniform", uniform, logits)
    check_options(_OP, temperature, top_k, top_p, min_p)
    if choose(_OP, logits) == "reference":
        return reference.sample(
            logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
        )
    k = logits.shape[1] if top_k is None else top_k
    return _forward(logits, uniform, temperature, k, 1.0 if top_p is None else top_p, min_p or 0.0)


def check_options(
    op: str, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    """Raises ValueError for options out of range."""
    if not 0 <= temperature < float("inf"):
        raise _checks.fail(op, "temperature", "0 or more", temperature)
    if top_k is not None and top_k < 1:
        raise _checks.fail(op, "top_k", "1 or more", top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise _checks.fail(op, "top_p", "in (0, 1]", top_p)
    if min_p is not None and not 0 <= min_p <= 1:
        raise _checks.fail(op, "min_p", "in [0, 1]", min_p)
