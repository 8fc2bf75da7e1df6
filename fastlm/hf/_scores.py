"""Attention that a model writes out in its forward: the product of queries and keys is put off.

Between that product and the one with the values, models scale, add biases and masks, take the
softmax. A `Scores` puts these steps down while the model's own lines run over it; the product with
the values is then one call of the kernel. Any other step makes the scores themselves, by the steps
so far as the model wrote them, and the rest runs as ever: what is not known here stays right.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastlm.hf.attention_interface import sdpa
from fastlm.ops._library import needs_grad

# No score comes near it: where it is added or filled in, the key is hidden.
_HIDDEN = torch.finfo(torch.float16).min


def product(
    module: nn.Module, function: Callable[..., Any], asked: bool | None, *args: Any, **kwargs: Any
) -> Any:
    """A product before the softmax: put off, unless somebody asks for the weights."""
    if (
        asked
        or module._forward_hooks  # of somebody who looks at what the module returns
        or getattr(getattr(module, "config", None), "output_attentions", False)
        or torch.compiler.is_compiling()
    ):
        return function(*args, **kwargs)
    made = _put_off(function, args, kwargs)
    return function(*args, **kwargs) if made is None else made


def released(result: Any) -> Any:
    """What a forward returns, without weights that were never made."""
    if isinstance(result, (tuple, list)):
        return type(result)(None if isinstance(x, Scores) else x for x in result)
    return result


class _Returned(threading.local):
    count = 0  # of scores that `kept` had to make, in this thread


returned = _Returned()


def kept(result: Any) -> Any:
    """What a forward returns that nobody can tell whether its weights are wanted: all of it."""

    def made(x: Any) -> Any:
        if isinstance(x, Scores):
            returned.count += 1
        return _value(x)

    return tree_map(made, result)


def _put_off(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Scores | None:
    bias, scale = None, 1.0
    if getattr(function, "__name__", "") == "baddbmm":  # beta * bias + alpha * q k
        given = dict(zip(("batch1", "batch2"), args, strict=False)) | kwargs
        bias, beta = getattr(function, "__self__", None), given.pop("beta", 1)
        scale = given.pop("alpha", 1)
        q, k = given.pop("batch1", None), given.pop("batch2", None)
        if given or not isinstance(bias, Tensor) or beta != 1:
            return None
    elif len(args) == 2 and not kwargs:
        q, k = args
    else:
        return None
    if not (
        isinstance(q, Tensor)
        and isinstance(k, Tensor)
        and q.dim() == k.dim() in (3, 4)
        and q.shape[:-2] == k.shape[:-2]
        and q.dtype == k.dtype
    ):
        return None
    made = Scores(lambda: function(*args, **kwargs), q, k.transpose(-1, -2), float(scale))
    return made if bias is None else made._plus(bias)


class Scores:
    """q k^T and the steps after it, not computed yet; after a softmax, the weights."""

    def __init__(self, make: Callable[[], Tensor], q: Tensor, k: Tensor, scale: float):
        self._make = make
        self._q, self._k, self._scale = q, k, scale
        self._steps: tuple[Callable[[Any], Any], ...] = ()
        self._heads = tuple(q.shape[:2]) if q.dim() == 4 else None  # (B, H), once it is seen
        self._terms: tuple[Tensor, ...] = ()  # added to the scores, as wide as they then were
        self._hidden: tuple[Tensor, float] | None = None  # True: not seen; the score filled in
        # [B, H, Tq, 1], broadcast: the part of the gradient that comes back through the steps to a
        # query that sees no key; its scores are one and the same number, whatever the query is
        self._returned: Tensor | None = None
        self._weights = False
        self._made: Tensor | None = None  # once somebody has written into them
        self.shape = torch.Size((*q.shape[:-1], k.shape[-2]))

    def value(self) -> Tensor:
        """The scores, or the weights, by the steps of the model."""
        if self._made is not None:
            return self._made
        made = self._make()
        for step in self._steps:
            made = step(made)
        return made

    def _then(self, step: Callable[[Any], Any], **changes: Any) -> Any:
        if self._made is not None:
            return step(self._made)
        made = object.__new__(Scores)
        made.__dict__.update(self.__dict__, _steps=(*self._steps, step), **changes)
        return made

    @property
    def dtype(self) -> torch.dtype:
        """That of the queries; nothing but a softmax in fp32 is expected to ask."""
        return self._q.dtype

    @property
    def device(self) -> torch.device:
        """Where they would lie."""
        return self._q.device

    def dim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one size."""
        return self.shape if dim is None else self.shape[dim]

    def view(self, *shape: Any) -> Any:
        """Batch and heads as one dimension or two."""
        sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)
        if all(isinstance(s, int) for s in sizes) and sizes.count(-1) <= 1:
            total = math.prod(self.shape)
            if -1 in sizes:
                rest = math.prod(s for s in sizes if s != -1)
                sizes[sizes.index(-1)] = total // rest if rest else 0
            whole = torch.Size(sizes)
            if len(whole) in (3, 4) and whole[-2:] == self.shape[-2:] and whole.numel() == total:
                heads = tuple(whole[:2]) if len(whole) == 4 else self._heads
                if self._heads in (None, heads):
                    return self._then(lambda x: x.view(whole), shape=whole, _heads=heads)
        return self.value().view(*shape)

    reshape = view

    def float(self) -> Any:
        """In fp32, as the kernel takes them anyway."""
        return self._then(lambda x: x.float())

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The same in another dtype; anything else makes them."""
        if len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs:
            return self._then(lambda x: x.to(args[0]))
        return self.value().to(*args, **kwargs)

    type = to

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, (int, float)) and not (self._weights or self._terms or self._masked):
            return self._then(lambda x: x * other, _scale=self._scale * other)
        return self.value() * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        simple = not (self._weights or self._terms or self._masked)
        if simple and isinstance(other, (int, float)) and other:
            return self._then(lambda x: x / other, _scale=self._scale / other)
        return self.value() / other

    @property
    def _masked(self) -> bool:
        return self._hidden is not None

    def __add__(self, other: Any) -> Any:
        if (
            isinstance(other, Tensor)
            and other.is_floating_point()
            and not (other.requires_grad or self._weights or self._masked)
            and self._made is None
            and other.dim() <= self.dim()
            and _fits(other.shape, self.shape)
        ):
            made = self._plus(other)
            return made._then(lambda x: x + other)
        return self.value() + other

    __radd__ = __add__

    def _plus(self, term: Tensor) -> Scores:
        made = self._then(lambda x: x)
        wide = term.view((1,) * (self.dim() - term.dim()) + tuple(term.shape))
        made._steps, made._terms = self._steps, (*self._terms, wide)
        return made

    def masked_fill(self, mask: Any, value: Any) -> Any:
        """Scores of hidden keys become so low that they weigh nothing."""
        if (
            isinstance(mask, Tensor)
            and mask.dtype == torch.bool
            and isinstance(value, (int, float))
            and value <= _HIDDEN
            and not (self._weights or self._masked)
            and mask.dim() == self.dim() == 4
            and _fits(mask.shape, self.shape)
        ):
            fill: dict[str, Any] = {"_hidden": (mask, value)}
            if needs_grad(self._q, self._k):
                fill["_returned"] = (~mask.all(-1, keepdim=True)).to(self.dtype)
            return self._then(lambda x: x.masked_fill(mask, value), **fill)
        return self.value().masked_fill(mask, value)

    def softmax(self, *args: Any, **kwargs: Any) -> Any:
        """The weights, not computed yet either."""
        return F.softmax(self, *args, **kwargs)  # type: ignore[arg-type]

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __setitem__(self, where: Any, value: Any) -> None:
        self._made = self.value()
        self._made[_value(where)] = _value(value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name.endswith("_"):  # writes into them: from now on they are there
            self._made = self.value()
        return getattr(self.value(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(function)
        made = None
        if handler is not None and args and isinstance(args[0], Scores):
            made = handler(*args, **kwargs)
        if made is not None:
            return made
        args, kwargs = tree_map(_value, (args, kwargs))
        return function(*args, **kwargs)


def _value(x: Any) -> Any:
    return x.value() if isinstance(x, Scores) else x


def _delegated(name: str) -> Callable[..., Any]:
    def method(self: Scores, *args: Any) -> Any:
        return getattr(self.value(), name)(*map(_value, args))

    method.__name__ = name
    return method


_NAMES = "rsub rtruediv sub neg pow rmatmul getitem len iter lt le gt ge bool"
for _name in _NAMES.split():
    setattr(Scores, f"__{_name}__", _delegated(f"__{_name}__"))


def _fits(shape: torch.Size, whole: torch.Size) -> bool:
    """Whether a shape spreads over another without enlarging it."""
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(whole), strict=False))


def _softmax(x: Scores, dim: Any = None, *rest: Any, **kwargs: Any) -> Scores | None:
    if dim not in (-1, x.dim() - 1) or x._weights or x._made is not None:
        return None
    return x._then(lambda s: F.softmax(s, dim, *rest, **kwargs), _weights=True)


def _dropout(x: Scores, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return x if p == 0.0 or not training else None


def _at_least(x: Scores, lowest: Any) -> Scores | None:
    """max(scores, lowest number of their dtype): changes nothing that is finite."""
    if x._weights or len(x._terms) != 1 or x.dim() != 4 or x._masked or x._made is not None:
        return None
    (mask,) = x._terms
    if not isinstance(lowest, Tensor) or lowest.dim() or not lowest.is_cpu:
        return None
    if float(lowest) != torch.finfo(mask.dtype).min:
        return None
    changes: dict[str, Any] = {"_terms": (torch.max(mask, lowest),)}
    if needs_grad(x._q, x._k):
        dead = (mask <= lowest).all(-1, keepdim=True)
        changes["_returned"] = 1.0 - 0.5 * dead.to(x.dtype)  # a maximum of equals halves it
    return x._then(lambda s: torch.max(s, lowest), **changes)


def _attend(x: Scores, v: Any) -> Tensor | None:
    """The product of the weights with the values."""
    q, k = x._q, x._k
    if not (
        x._weights
        and x._made is None
        and isinstance(v, Tensor)
        and q.dtype == v.dtype
        and v.shape[:-1] == (*x.shape[:-2], x.shape[-1])
    ):
        return None
    heads = x._heads or (1, x.shape[0])
    if x._returned is not None:
        q = (q.view(*heads, *q.shape[-2:]) * x._returned).view(q.shape)
    q, k, wide = (t.reshape(*heads, *t.shape[-2:]) for t in (q, k, v))
    out = sdpa(q, k, wide, _mask(x, heads), 0.0, False, x._scale)
    return out.reshape(*x.shape[:-1], v.shape[-1])


def _mask(x: Scores, heads: tuple[int, ...]) -> Tensor | None:
    """Everything that is added to the scores, in one tensor.

    A hidden key keeps the finite score that the model gave it: where a query sees no key, its
    weights are equal then, not zero.
    """
    total = None
    for term in x._terms:
        if term.dim() == 3:  # batch and heads in one
            term = term[None] if term.shape[0] == 1 else term.view(*heads, *term.shape[1:])
        total = term if total is None else total.float() + term
    if x._hidden is None:
        return total
    hidden, low = x._hidden
    if total is None:
        total = torch.zeros((), dtype=x.dtype, device=hidden.device)
    return total.masked_fill(hidden, low)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.softmax: _softmax,
    torch.softmax: _softmax,
    F.dropout: _dropout,
    torch.max: _at_least,
    torch.maximum: _at_least,
    torch.bmm: _attend,
    torch.matmul: _attend,
}
