"""Logits that are made when somebody looks at them, and model outputs that hold such.

The loss of a training step needs no matrix of logits (`ops.linear_cross_entropy`), but code around
a model may: metrics, a loss of one's own. So a head that may leave them out returns a `Deferred`
instead: the hidden states, and what the model does to the head's output afterwards. The loss takes
it as it is; everything else that touches it gets the logits themselves, made there and then. In the
model's output it is the entry `logits`, which turns into a tensor on its way out.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

# What models do to the head's output before the loss: put down, to be read by `form`.
_KEPT = frozenset(
    {torch.tanh, torch.mul, torch.multiply, torch.div, torch.divide, torch.true_divide}
)


class Deferred:
    """head(hidden) and the steps after it, not computed yet.

    Operators, methods and functions of torch other than the few of `form` compute it.
    """

    def __init__(
        self,
        head: nn.Module,
        hidden: Tensor,
        make: Callable[[Tensor], Tensor],
        steps: tuple[Callable[[Any], Any], ...] = (),
    ):
        device = hidden.device.type
        self.head, self.hidden, self.steps = head, hidden, steps
        self._make = make
        self._autocast: dict[str, Any] = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        self._made: Tensor | None = None

    def value(self) -> Tensor:
        """The logits; with gradients where they are on now."""
        made = self._made
        if made is None or (torch.is_grad_enabled() and not made.requires_grad):
            if type(self.head._parameters.get("weight")) not in (nn.Parameter, Tensor):
                raise RuntimeError(
                    "logits: the head's weight has been sharded since the forward pass; ask for"
                    ' them beforehand: fastlm.patch(model, logits="always")'
                )
            with torch.autocast(**self._autocast):
                made = self._make(self.hidden)
                for step in self.steps:
                    made = step(made)
            self._made = made
        return made

    def then(self, step: Callable[[Any], Any]) -> Deferred:
        """One more step, put down."""
        made = Deferred(self.head, self.hidden, self._make, (*self.steps, step))
        made._autocast = self._autocast
        return made

    def form(self) -> tuple[float, float | None] | None:
        """(scale, cap), where the steps are scale*x or cap*tanh(scale*x/cap); else None.

        They are run on a few numbers, so that it does not matter how they are written.
        """
        if not self.steps:
            return 1.0, None
        x = torch.tensor([1.0, 1e-4, -3.0, 0.5, -1e6, 1e6], dtype=torch.float64)
        try:
            y = x
            for step in self.steps:
                y = step(y)
            y = y.double()
        except Exception:
            return None
        scale = float(y[0])
        if torch.allclose(y, scale * x, rtol=1e-6, atol=0):
            return scale, None
        scale, cap = float(y[1]) / 1e-4, float(y[5])
        scale = round(scale) if abs(scale - round(scale)) < 1e-6 else scale
        fits = cap > 0 and torch.allclose(y, cap * torch.tanh(scale * x / cap), rtol=1e-6, atol=0)
        return (scale, cap) if fits else None

    @property
    def shape(self) -> torch.Size:
        """That of the logits."""
        return torch.Size((*self.hidden.shape[:-1], self.head._parameters["weight"].shape[0]))  # type: ignore[union-attr]

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits, as far as it is known without them."""
        if any(step is _widened for step in self.steps):
            return torch.float32
        narrow: torch.dtype = self._autocast["dtype"]
        return narrow if self._autocast["enabled"] else self.hidden.dtype

    @property
    def device(self) -> torch.device:
        """That of the logits."""
        return self.hidden.device

    def float(self) -> Deferred:
        """In fp32."""
        return self.then(_widened)

    def contiguous(self) -> Deferred:
        """They will be."""
        return self

    def __mul__(self, other: Any) -> Any:
        return self._by_number(torch.mul, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._by_number(torch.div, other)

    def _by_number(self, function: Callable[..., Any], other: Any) -> Any:
        if isinstance(other, (int, float)):
            return self.then(lambda x: function(x, other))
        return function(self.value(), other)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.value(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        x, others = (args[0], args[1:]) if args else (None, ())
        numbers = not kwargs and all(isinstance(v, (int, float)) for v in others)
        if func in _KEPT and isinstance(x, cls) and numbers:
            return x.then(lambda y: func(y, *others))
        return func(*_values(args), **_values(kwargs))


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _values(nest: Any) -> Any:
    return tree_map(lambda x: x.value() if isinstance(x, Deferred) else x, nest)


def _delegated(name: str) -> Callable[..., Any]:
    def method(self: Deferred, *args: Any) -> Any:
        return getattr(self.value(), name)(*_values(args))

    method.__name__ = name
    return method


for _name in ("add", "radd", "sub", "rsub", "rtruediv", "neg", "pow", "getitem", "len", "iter"):
    setattr(Deferred, f"__{_name}__", _delegated(f"__{_name}__"))


class _Lazy(OrderedDict[str, Any]):
    """Over a ModelOutput: `logits` is a tensor wherever it is read by name, number or as a tuple.

    items() and values() hand the Deferred over as it is: those are what wrappers that rebuild an
    output go by (mixed precision, sharding), and they are not meant to compute anything.
    """

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # reads every field, some releases do by name
        self.__dict__["_made"] = True

    @property
    def logits(self) -> Any:
        value = self.__dict__.get("logits")
        return value.value() if isinstance(value, Deferred) and "_made" in self.__dict__ else value

    @logits.setter
    def logits(self, value: Any) -> None:
        self.__dict__["logits"] = value

    def __getitem__(self, k: Any) -> Any:
        names = list(self.keys())
        if isinstance(k, slice):
            return tuple(self[name] for name in names[k])
        name = k if isinstance(k, str) else names[k]
        return self.get(name) if name in self else super().__getitem__(name)

    def get(self, k: str, default: Any = None) -> Any:
        value = super().get(k, default)
        return value.value() if isinstance(value, Deferred) else value

    def __reduce__(self) -> Any:
        fields = self.__dataclass_fields__  # type: ignore[attr-defined]
        return type(self).__mro__[2], tuple(getattr(self, name) for name in fields)


@functools.cache
def _lazy(cls: Any) -> Any:
    """The output class whose logits may be Deferred."""
    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (_Lazy, cls), members)


def outlet(out: Any, keep: bool) -> Any:
    """A model's output as it leaves the model: with logits to be looked at, or without any."""
    if isinstance(out, tuple):
        if keep:
            return tuple(x.value() if isinstance(x, Deferred) else x for x in out)
        return tuple(x for x in out if not isinstance(x, Deferred))
    logits = dict.get(out, "logits") if isinstance(out, dict) else None
    if logits is None or (keep and not isinstance(logits, Deferred)):
        return out
    if keep and dict.get(out, "loss") is None:
        out["logits"] = logits.value()
        return out
    values = {n: v for n, v in out.items() if keep or n != "logits"}
    cls: Any = type(out)
    return (_lazy(cls) if keep else cls)(**values)
