"""The head and loss that TRL's trainers put into a model, with fastlm's kernel for the loss.

`SFTTrainer` gives the model that it trains a forward of its own, which takes hidden states and the
head's weights to a function of TRL's that never holds all logits. That forward stays as it is: a
copy of it runs against globals in which this one function is another. It scores the tokens that
have a label, on every device, and a trial run confirms loss, scores and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.hf import _head, _probe
from fastlm.ops._library import autocasts

_KERNEL, _COMPACTS = "_ChunkedLogProbFunction", "_use_triton"  # globals of TRL's forward
_FLAG = "fused_lm_head"
_CHUNK = 16 << 20  # bytes of logits that the statistics are taken of at a time


def forward_of(module: nn.Module) -> FunctionType | None:
    """The forward that a trainer of TRL gave a model; None where there is none."""
    function = getattr(module.__dict__.get("forward"), "__func__", None)
    if not isinstance(function, FunctionType) or is_exchanged(function):
        return None
    known = {_KERNEL, _COMPACTS} <= set(function.__code__.co_names)
    return function if known and hasattr(function.__globals__.get(_KERNEL), "apply") else None


def is_exchanged(forward: Any) -> bool:
    """Whether a forward is what `exchanged` makes."""
    return hasattr(forward, "instead_of")


def exchanged(function: FunctionType) -> FunctionType:
    """TRL's forward with fastlm's kernel in place of TRL's."""
    kernel = type("Kernel", (_Kernel,), {"theirs": function.__globals__[_KERNEL]})
    globals_ = {**function.__globals__, _KERNEL: kernel, _COMPACTS: lambda device: True}
    del globals_["__name__"]  # by which torch.compile would find the original ones
    made = FunctionType(
        function.__code__, globals_, "forward", function.__defaults__, function.__closure__
    )
    made.__kwdefaults__, made.__dict__ = function.__kwdefaults__, {**function.__dict__}
    made.__module__, made.__qualname__ = function.__module__, function.__qualname__
    made.instead_of = function  # type: ignore[attr-defined]
    made.whole = True  # type: ignore[attr-defined]  # as in _head.model_forward
    return made


class _Kernel:
    """Called as TRL's function is; hands on to that what it cannot take."""

    theirs: Any

    @classmethod
    def apply(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk: int,
        cap: float | None = None,
        scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities [N], entropy [N], two that are not made here, is_top1 [N]."""
        rest = temperature, chunk, cap, scale, outputs
        plain = autocasts(hidden) or hidden.dtype == weight.dtype
        if not plain or not {"entropy", "is_top1"} >= {*outputs} - {"log_probs"}:
            return cls.theirs.apply(hidden, weight, bias, targets, *rest)
        if cap is not None and temperature != 1.0:
            return cls.theirs.apply(hidden, weight, bias, targets, *rest)
        x, b, factor = hidden, bias, scale / temperature
        if factor != 1.0:
            x, b = hidden * factor, None if bias is None else bias * factor
        loss = ops.linear_cross_entropy(x, weight, targets, bias=b, softcap=cap, reduction="none")
        entropy = top = None
        if set(outputs) & {"entropy", "is_top1"}:
            tensors = hidden, weight, bias, targets
            entropy, top = _Statistics.apply(*tensors, factor, cls.theirs, rest)
        return -loss, entropy if "entropy" in outputs else None, None, None, top


class _Statistics(torch.autograd.Function):
    """Entropy of each token's distribution and whether its target is the likeliest token.

    Trainers log both and take gradients of the entropy seldom; TRL's own kernel makes those.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        factor: float,
        theirs: Any,
        rest: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.theirs, ctx.rest = theirs, rest
        cap = rest[2]
        rows = max(1, _CHUNK // (weight.shape[0] * 4))
        entropies, tops = [], []
        for x, target in zip(hidden.split(rows), targets.split(rows), strict=True):
            z = ops.linear(x, weight, bias).float() * factor
            if cap is not None:
                z = cap * torch.tanh(z / cap)
            tops.append(z.argmax(-1) == target)
            z -= z.amax(-1, keepdim=True)
            e = z.exp()
            total = e.sum(-1)
            entropies.append(total.log() - torch.linalg.vecdot(e, z) / total)
        entropy, top = torch.cat(entropies), torch.cat(tops)
        ctx.mark_non_differentiable(top)
        return entropy, top

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return (None,) * 7
        *leaves, targets = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [x if x is None else x.detach().requires_grad_() for x in leaves]
            entropy = ctx.theirs.apply(*leaves, targets, *ctx.rest)[1]
        wanted = [x for x in leaves if x is not None]
        made = iter(torch.autograd.grad(entropy, wanted, grad))
        return *(None if x is None else next(made) for x in leaves), *(None,) * 4


def confirm(model: Any, function: FunctionType) -> None:
    """Raises Mismatch unless the exchanged forward agrees with TRL's: see `_head.confirm`."""
    leaves, labels = _head.leaves_and_labels(model)

    def read(whole: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, **kwargs: Any) -> list[Tensor]:
            out = whole(self, **{_FLAG: True, **kwargs})
            told = (out.entropy, out.is_top1)
            return [out.loss, out.log_probs, *(x.float() for x in told if x is not None)]

        return forward

    results = [
        _head.trial(model, read(f), nn.Linear.forward, None, leaves, labels, {})
        for f in (function, exchanged(function))
    ]
    _probe.agree(results[1], results[0])


def below(forward: Any, module: nn.Module) -> MethodType:
    """TRL's own forward, for which an exchanged one stands in."""
    return MethodType(forward.instead_of, module)
