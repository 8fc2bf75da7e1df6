"""Softmax cross-entropy of class numbers, with its gradient in the same visit to the logits.

Computes   z = logits or cap tanh(logits / cap), lse = log sum_c e^z[c],
           loss = w[t] ((1 - e) (lse - z[t]) + z_loss lse^2) + e / V sum_c w[c] (lse - z[c]),
           grad[c] = f (p[c] (w[t] (1 - e + 2 z_loss lse) + e / V W) - e / V w[c]
                        - [c = t] w[t] (1 - e)), p = e^(z - lse), f the token's factor
Algorithm  one program a row. A row that fits stays in registers; a longer one is read tile by tile
           with a running maximum, and again for the gradient, from the L2 cache. What the sum is
           divided by is found first by one program, and read on the device: no number comes back
Tile       a row, or tiles of it, masked with -inf
Traffic    reads the logits once (from memory), writes the gradient once, in place where asked
Numerics   fp32; lse - z[t] as log(sum) + (max - z[t]), which a large maximum does not round away;
           sums over tokens in fp64 in a fixed order. A target that is no class gives NaN
Source     arXiv:1805.02867 (running maximum)
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.triton._configs import select
from fastlm.triton._launch import kernel
from fastlm.triton._primitives import as_rows, cap, ceil_div, dense, new_like, power_of_two

_NONE, _MEAN = 0, 1  # fastlm.ops.cross_entropy.REDUCTIONS


@kernel(do_not_specialize=["rows", "ignore_index"])
def _count(
    target,
    class_weight,
    token_weight,
    sums,
    rows,
    classes,
    ignore_index,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums = what the losses' sum is divided by, and the sum of the class weights."""
    total = 1.0
    if MEAN:
        parts = tl.zeros([BLOCK], tl.float64)
        for start in range(0, rows, BLOCK):
            at = start + tl.arange(0, BLOCK)
            t = tl.load(target + at, mask=at < rows, other=ignore_index)
            counts = (at < rows) & (t != ignore_index)
            part = tl.where(counts, 1.0, 0.0)
            if token_weight is not None:
                part *= tl.load(token_weight + at, mask=counts, other=0.0)
            if class_weight is not None:
                known = counts & (t >= 0) & (t < classes)
                part *= tl.load(class_weight + t, mask=known, other=float("nan"))
                part = tl.where(counts, part, 0.0)
            parts += part.to(tl.float64)
        total = tl.sum(parts, 0).to(tl.float32)
    tl.store(sums, total)
    if class_weight is not None:
        parts = tl.zeros([BLOCK], tl.float64)
        for start in range(0, classes, BLOCK):
            at = start + tl.arange(0, BLOCK)
            parts += tl.load(class_weight + at, mask=at < classes, other=0.0).to(tl.float64)
        tl.store(sums + 1, tl.sum(parts, 0).to(tl.float32))


@triton.jit
def _logits(x, col, classes, softcap, CAPPED: tl.constexpr):
    z = tl.load(x + col, mask=col < classes, other=0.0).to(tl.float32)
    if CAPPED:
        z = cap(z, softcap)
    return tl.where(col < classes, z, -float("inf"))


@triton.jit
def _finite(top):
    """A maximum to subtract: 0 where there is none yet, for -inf - -inf is NaN."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _weighted(class_weight, z, col, classes, origin):
    """w[c] (z[c] - origin), 0 outside."""
    z = z - origin
    if class_weight is not None:
        z *= tl.load(class_weight + col, mask=col < classes, other=0.0)
    return tl.where(col < classes, z, 0.0)


@triton.jit
def _write(
    out,
    z,
    col,
    classes,
    top,
    t,
    slope,
    pull,
    even,
    class_weight,
    softcap,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
):
    """The gradient: e^(z - top) slope - even w[c], less `pull` at the target."""
    g = tl.exp(z - top) * slope
    if SMOOTHED:
        if class_weight is not None:
            g -= even * tl.load(class_weight + col, mask=col < classes, other=0.0)
        else:
            g -= even
    g = tl.where(col == t, g - pull, g)
    if CAPPED:
        part = z / softcap
        g *= 1.0 - part * part
    tl.store(out + col, g, mask=col < classes)


@kernel(do_not_specialize=["rows", "ignore_index"])
def _rows(
    logits,
    target,
    class_weight,
    token_weight,
    sums,
    losses,
    grad,
    rows,
    classes,
    stride,
    grad_stride,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(target + row)
    x = logits + row * stride
    if grad is not None:
        out = grad + row * grad_stride
    if t == ignore_index:
        tl.store(losses + row, 0.0)
        if grad is not None:
            for start in range(0, classes, BLOCK):
                col = start + tl.arange(0, BLOCK)
                zeros = tl.zeros([BLOCK], tl.float32)
                tl.store(out + col, zeros, mask=col < classes)
    else:
        known = (t >= 0) & (t < classes)
        at_target = tl.load(x + t, mask=known, other=float("nan")).to(tl.float32)
        if CAPPED:
            at_target = cap(at_target, softcap)
        weight = 1.0
        all_weights = classes * 1.0
        if class_weight is not None:
            weight = tl.load(class_weight + t, mask=known, other=float("nan"))
            all_weights = tl.load(sums + 1)
        tokens = 1.0
        if token_weight is not None:
            tokens = tl.load(token_weight + row)

        plain = 0.0  # sum_c w[c] (z[c] - origin)
        if WHOLE:
            col = tl.arange(0, BLOCK)
            z = _logits(x, col, classes, softcap, CAPPED)
            top = tl.max(z, 0)
            shift = _finite(top)
            total = tl.sum(tl.exp(z - shift), 0)
            origin = shift
            if SMOOTHED:
                plain = tl.sum(_weighted(class_weight, z, col, classes, origin), 0)
        else:
            col = tl.arange(0, BLOCK)
            top = -float("inf")
            total = 0.0
            origin = _finite(tl.max(_logits(x, col, classes, softcap, CAPPED), 0))
            for start in range(0, classes, BLOCK):
                col = start + tl.arange(0, BLOCK)
                z = _logits(x, col, classes, softcap, CAPPED)
                higher = tl.maximum(top, tl.max(z, 0))
                shift = _finite(higher)
                total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), 0)
                top = higher
                if SMOOTHED:
                    plain += tl.sum(_weighted(class_weight, z, col, classes, origin), 0)
            shift = _finite(top)

        log_sum = tl.log(total)
        lse = shift + log_sum
        loss = (1.0 - smoothing) * (log_sum + (shift - at_target)) + z_loss * lse * lse
        loss *= weight
        if SMOOTHED:
            share = smoothing / classes
            loss += share * (all_weights * (log_sum + (shift - origin)) - plain)
        tl.store(losses + row, loss * tokens)
        if grad is not None:
            factor = tokens / tl.load(sums)
            even = 0.0
            slope = weight * (1.0 - smoothing + 2.0 * z_loss * lse)
            if SMOOTHED:
                even = factor * smoothing / classes
                slope += smoothing / classes * all_weights
            slope *= factor / total
            slope = tl.where(known, slope, float("nan"))
            pull = factor * weight * (1.0 - smoothing)
            if WHOLE:
                _write(
                    out,
                    z,
                    col,
                    classes,
                    shift,
                    t,
                    slope,
                    pull,
                    even,
                    class_weight,
                    softcap,
                    CAPPED,
                    SMOOTHED,
                )
            else:
                for start in range(0, classes, BLOCK):
                    col = start + tl.arange(0, BLOCK)
                    z = _logits(x, col, classes, softcap, CAPPED)
                    _write(
                        out,
                        z,
                        col,
                        classes,
                        shift,
                        t,
                        slope,
                        pull,
                        even,
                        class_weight,
                        softcap,
                        CAPPED,
                        SMOOTHED,
                    )


@kernel(do_not_specialize=["rows"])
def _reduce(losses, sums, out, rows, BLOCK: tl.constexpr):
    """out = the sum of the losses, divided."""
    parts = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        parts += tl.load(losses + at, mask=at < rows, other=0.0).to(tl.float64)
    total = tl.sum(parts, 0) / tl.load(sums).to(tl.float64)
    tl.store(out, total.to(tl.float32))


@kernel(do_not_specialize=["count"])
def _scale(values, factor, count, BLOCK: tl.constexpr):
    """values *= factor; a factor of one costs the launch alone."""
    f = tl.load(factor).to(tl.float32)
    if f != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(values + at, mask=at < count).to(tl.float32)
        tl.store(values + at, v * f, mask=at < count)


class Losses:
    """What one call of a loss needs besides its logits: targets, weights, options, sums."""

    def __init__(
        self,
        target: Tensor,
        class_weight: Tensor | None,
        token_weight: Tensor | None,
        classes: int,
        ignore_index: int,
        smoothing: float,
        z_loss: float,
        softcap: float,
        mean: bool,
    ) -> None:
        self.target = target.reshape(-1).contiguous()
        self.class_weight = dense(class_weight)
        self.token_weight = None if token_weight is None else token_weight.reshape(-1).contiguous()
        self.classes, self.ignore_index = classes, ignore_index
        self.numbers = smoothing, z_loss, softcap
        self.losses = target.new_empty(target.numel(), dtype=torch.float32)
        self.sums = target.new_empty(2, dtype=torch.float32)
        self.config = select("cross_entropy", power_of_two(classes), target.get_device())
        self.loop = select("cross_entropy_sums", 1, target.get_device())
        _count(
            (1, 1, 1),
            (self.target, self.class_weight, self.token_weight, self.sums),
            (target.numel(), classes, ignore_index),
            self.loop,
            MEAN=mean,
            BLOCK=self.loop.tile[0],
        )

    def rows(self, logits: Tensor, grad: Tensor | None, first: int) -> None:
        """The losses, and the gradient, of a chunk of rows that begins at row `first`."""
        count = logits.shape[0]
        logits, stride = as_rows(logits)
        token_weight = None if self.token_weight is None else self.token_weight[first:]
        size = self.config.tile[0]
        whole = power_of_two(self.classes) <= size
        smoothing, _, softcap = self.numbers
        _rows(
            (count, 1, 1),
            (
                logits,
                self.target[first:],
                self.class_weight,
                token_weight,
                self.sums,
                self.losses[first:],
                grad,
            ),
            (count, self.classes, stride, self.classes, self.ignore_index, *self.numbers),
            self.config,
            CAPPED=softcap > 0.0,
            SMOOTHED=smoothing > 0.0,
            WHOLE=whole,
            BLOCK=power_of_two(self.classes) if whole else size,
        )

    def reduced(self) -> Tensor:
        """The sum of the losses, divided by what `mean` asks for."""
        out = self.losses.new_empty(())
        tensors = self.losses, self.sums, out
        count = self.losses.numel()
        _reduce((1, 1, 1), tensors, (count,), self.loop, BLOCK=self.loop.tile[0])
        return out


def misfit(
    shape: torch.Size,
    like: Tensor,
    target: Tensor,
    classes: int,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
) -> bool:
    """What would make a kernel read the wrong memory; the facade words it better."""
    if target.shape != shape or target.dtype != torch.int64 or target.device != like.device:
        return True
    for weight, count in ((class_weight, classes), (token_weight, target.numel())):
        if weight is not None and (
            weight.dtype != torch.float32 or weight.numel() != count or weight.device != like.device
        ):
            return True
    return False


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: int,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The operator of this name."""
    classes = logits.shape[-1] if logits.dim() else 0
    if classes == 0 or misfit(logits.shape[:-1], logits, target, classes, weight, token_weight):
        raise RuntimeError("cross_entropy: the arguments do not fit each other")
    options = ignore_index, smoothing, z_loss, softcap, reduction == _MEAN
    made = Losses(target, weight, token_weight, classes, *options)
    grad = new_like(logits) if gradient else logits.new_empty(0)
    rows = logits.reshape(-1, classes) if target.numel() else logits.new_empty((0, classes))
    made.rows(rows, grad if gradient else None, 0)
    return made.losses if reduction == _NONE else made.reduced(), grad


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """values *= factor, a number on the device; at no cost where it is one."""
    size = select("activation", 1, values.get_device())
    grid = ceil_div(values.numel(), size.tile[0]), 1, 1
    _scale(grid, (values, factor), (values.numel(),), size, BLOCK=size.tile[0])
    return values


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls whose kernels are compiled ahead of time."""
    for classes in (1000, 4096, 32000, 128256):
        x = torch.empty(8192, classes, dtype=torch.bfloat16, device="meta")
        t = torch.empty(8192, dtype=torch.int64, device="meta")
        plain = partial(cross_entropy, x, t, None, None, -100, 0.0, 0.0, 0.0, _MEAN, True)
        yield f"cross_entropy {classes}", plain
    w = torch.empty(classes, dtype=torch.float32, device="meta")
    tokens = torch.empty(8192, dtype=torch.float32, device="meta")
    every = partial(cross_entropy, x, t, w, tokens, -100, 0.1, 1e-4, 30.0, _MEAN, True)
    yield "cross_entropy with all options", every
    half = partial(cross_entropy, x.half(), t, None, None, -100, 0.0, 0.0, 0.0, _MEAN, True)
    yield "cross_entropy of halves", half
    yield "cross_entropy scaled", partial(scale_, x, tokens[0])
