"""What stands in for single modules: forwards bound to one instance, and how to recognise them.

Each `match_*` looks at one module and returns a Candidate, a reason why it has none, or None when
the module is of another kind. The forwards are plain functions bound to the instance with
`types.MethodType`, which `copy.deepcopy` rebinds to the copy; they read every tensor and number
from the module at each call, so `.to()`, loading weights and tying keep working. At call time they
hand over to the class's own forward whenever something stands in their way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.hf import _probe
from fastlm.ops._library import autocasts

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class Candidate:
    """A forward that may replace a module's own, once the trial runs listed confirm it."""

    stems: tuple[str, ...]
    text: str  # what runs, for the report
    forward: Callable[..., Any]
    calls: _probe.Calls
    first_only: bool = False  # of the results, the first counts: the others are not made any more


def named_like(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A forward of ours whose input has the name that the class's own gives it, for keywords."""
    if ours in (linear_forward, conv1d_forward) or not isinstance(ours, FunctionType):
        return ours
    first = [
        p
        for p in inspect.signature(theirs).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    code = ours.__code__
    if len(first) < 2 or first[1].name in code.co_varnames:
        return ours
    names = (code.co_varnames[0], first[1].name, *code.co_varnames[2:])
    made = FunctionType(
        code.replace(co_varnames=names),
        ours.__globals__,
        ours.__name__,
        ours.__defaults__,
        ours.__closure__,
    )
    made.__dict__.update(ours.__dict__)
    return made


class Note(str):
    """A reason that is worth reporting and no failure."""


Match = Candidate | str | None


# Linear maps. The weight is read through `_parameters`: half a microsecond less than by attribute.


def linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    """The forward of a patched nn.Linear."""
    tensors = self._parameters
    w = tensors.get("weight")
    if type(w) is nn.Parameter or type(w) is Tensor:
        return ops.linear(input, w, tensors["bias"])
    return type(self).forward(self, input)  # sharded, quantised, parametrised


def conv1d_forward(self: nn.Module, x: Tensor) -> Tensor:
    """The forward of a patched transformers Conv1D: the kernel takes the weight as it lies."""
    tensors = self._parameters
    w = tensors.get("weight")
    if type(w) is nn.Parameter or type(w) is Tensor:
        return ops.linear(x, w.t(), tensors["bias"])
    return type(self).forward(self, x)


def match_linear(module: nn.Module) -> Match:
    """nn.Linear, and the map of GPT-2, whose weight is [in, out]."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # nn.MultiheadAttention reads it and never calls it
    if is_conv1d(module):
        forward: Callable[..., Any] = conv1d_forward
    elif type(module) is nn.Linear or _adds_nothing(module):
        forward = linear_forward
    else:
        return "a subclass of nn.Linear" if isinstance(module, nn.Linear) else None
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return "its weight is no plain floating-point parameter"
    x = _probe.rows_of(weight.shape[0 if is_conv1d(module) else 1], weight)
    return Candidate(("linear",), "linear", forward, [((x,), {})])


def _adds_nothing(module: nn.Module) -> bool:
    """Whether a subclass of nn.Linear holds what nn.Linear holds: the trial run tells the rest."""
    names = nn.Linear(1, 1, device="meta").__dict__.keys() | {"forward", "_is_hf_initialized"}
    return isinstance(module, nn.Linear) and module.__dict__.keys() <= names and not _extra(module)


def _extra(module: nn.Module) -> bool:
    return bool(module._buffers or module._modules) or not module._parameters.keys() <= {
        "weight",
        "bias",
    }


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the linear map that GPT-2 is made of."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_plain(module: nn.Module) -> bool:
    """Whether a linear map may be read instead of called: nn.Linear or known to compute the same.

    No hooks, no other tool. A subclass is known by the forward that `match_linear` gave it.
    """
    forward = module.__dict__.get("forward")
    if getattr(forward, "__func__", None) is not linear_forward and (
        forward is not None or type(module) is not nn.Linear
    ):
        return False
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or type(module._parameters.get("weight")) not in (nn.Parameter, Tensor)
    )


# Norms.


def match_norm(module: nn.Module) -> Match:
    """RMSNorm, with or without weight or weight offset, and LayerNorm."""
    tensors = dict(module.named_parameters(recurse=False))
    named = "norm" in type(module).__name__.lower()
    if next(module.children(), None) is not None or len(tensors) > 2:
        return "of another structure than RMSNorm and LayerNorm" if _only_norm(module) else None
    if any(p.dim() != 1 for p in tensors.values()) or not (tensors or named):
        return None
    if next(module.buffers(), None) is not None or isinstance(
        module, nn.modules.batchnorm._NormBase
    ):
        return "keeps statistics" if named else None
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return "its forward takes more than the hidden states" if named else None
    shape = getattr(module, "normalized_shape", None)
    if shape is not None and len(shape) != 1:
        return f"normalises over {len(shape)} axes"
    first = next(iter(tensors.values()), None)
    width = len(first) if first is not None else (shape[0] if shape else 64)
    # rows of different sizes bring out the epsilon, several of them what is no function of a row
    sizes = torch.tensor([[1e-3, 1.0, 30.0], [1e-5, 1e-2, 3.0]])[..., None]
    x = (_probe.rows_of(width) + 0.5) * sizes
    if first is not None:
        x = x.to(first.device)
    calls: _probe.Calls = [((x,), {})]
    reason = ""
    for forward, text in _norms(module, tensors):
        try:
            _probe.compare(module, forward, calls)
        except Exception as e:
            reason = reason or str(e)
            continue
        return Candidate((text.split()[0],), text, forward, [])
    return f"computes neither rms_norm nor layer_norm: {reason}" if named else None


def _norms(module: nn.Module, tensors: dict[str, Any]) -> Iterator[tuple[Callable[..., Any], str]]:
    """What a module with these parameters may compute, the likely first."""
    epsilons: list[str | float] = [n for n in _EPSILON_NAMES if n in module.__dict__]
    if not epsilons:
        epsilons = [n for n, v in module.__dict__.items() if type(v) is float]
        epsilons += _EPSILONS
    orders: list[tuple[str | None, str | None]] = [(None, None)]  # the weight's name, the bias's
    if len(tensors) == 2:
        a, b = tensors
        orders = [(b, a), (a, b)] if a in _BIAS_NAMES else [(a, b), (b, a)]
    elif tensors:
        (a,) = tensors
        orders = [(None, a)] if a in _BIAS_NAMES else [(a, None)]
    for e in epsilons:
        for weight, bias in orders:
            offsets = (0.0,) if weight is None else (0.0, 1.0)
            for offset in offsets if bias is None else ():
                text = "rms_norm (1 + weight)" if offset else "rms_norm"
                yield rms_norm_forward(e, offset, weight), text
            for offset in offsets:
                text = "layer_norm (1 + weight)" if offset else "layer_norm"
                yield layer_norm_forward(e, offset, weight, bias), text


def _only_norm(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return name.endswith("norm")


_BIAS_NAMES = ("bias", "beta", "shift", "b")
_EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")
# What a norm may have written into its forward instead of keeping it as an attribute.
_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)


def rms_norm_forward(
    eps: str | float, offset: float, weight_name: str | None = "weight"
) -> Callable[..., Any]:
    """The forward of a patched RMSNorm; with `residual`, of the sum, which it returns too.

    eps: the attribute that holds the epsilon, or its value.
    weight_name: of the parameter, None without.
    """

    def _fastlm_norm(self: nn.Module, x: Tensor, residual: Tensor | None = None) -> Any:
        weight = self._parameters.get(weight_name)  # type: ignore[arg-type]
        if _mixes(weight, x):
            return _own_norm(self, x, residual)
        epsilon = getattr(self, eps) if isinstance(eps, str) else eps
        if epsilon is None:
            epsilon = torch.finfo(x.dtype).eps
        return ops.rms_norm(x, weight, epsilon, residual=residual, weight_offset=offset)

    return _fastlm_norm


def layer_norm_forward(
    eps: str | float,
    offset: float = 0.0,
    weight_name: str | None = "weight",
    bias_name: str | None = "bias",
) -> Callable[..., Any]:
    """The forward of a patched LayerNorm; with `residual`, of the sum, which it returns too."""

    def _fastlm_norm(self: nn.Module, x: Tensor, residual: Tensor | None = None) -> Any:
        tensors: Any = self._parameters
        weight = tensors.get(weight_name)
        if _mixes(weight, x):
            return _own_norm(self, x, residual)
        epsilon = getattr(self, eps) if isinstance(eps, str) else eps
        offset_weight = weight + offset if offset and weight is not None else weight
        return ops.layer_norm(x, offset_weight, tensors.get(bias_name), epsilon, residual=residual)

    return _fastlm_norm


def _mixes(weight: Tensor | None, x: Tensor) -> bool:
    """Whether the result would have another dtype than x: a wider weight, or autocast's rule."""
    if weight is not None and weight.dtype != x.dtype:
        return True
    return x.dtype != torch.float32 and autocasts(x)


def _own_norm(module: nn.Module, x: Tensor, residual: Tensor | None) -> Any:
    """The class's own forward, where dtypes mix: its result then has another dtype than x."""
    if residual is None:
        return type(module).forward(module, x)
    total = x + residual
    return type(module).forward(module, total), total


def add_norm(norm: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(a + b), a + b), in one kernel where nothing watches the norm."""
    if (
        a.dtype == b.dtype
        and a.shape == b.shape
        and not (norm._forward_hooks or norm._forward_pre_hooks)
        and not (norm._backward_hooks or norm._backward_pre_hooks)
        and is_norm_forward(norm.__dict__.get("forward"))
    ):
        return norm.forward(a, b)
    total = a + b
    return norm(total), total


def is_norm_forward(forward: Any) -> bool:
    """Whether an instance's forward is one of ours, which take a residual."""
    function = getattr(forward, "__func__", None)
    return getattr(getattr(function, "__code__", None), "co_name", "") == "_fastlm_norm"


# Activations.


def kind_of_activation(function: Any, device: torch.device) -> str | None:
    """The name of an elementwise activation, found by its values; None for another function."""
    x = torch.cat([torch.linspace(-9, 9, 181), torch.tensor([-1e-3, 1e-3, 40.0])]).to(device)
    try:
        with torch.no_grad():
            y = function(x)
            for kind in ACTIVATIONS:
                expected = ops.activation(x, kind)
                if y.shape == x.shape and torch.allclose(y, expected, rtol=1e-5, atol=1e-6):
                    return kind
    except Exception:
        return None
    return None


def activation_forward(kind: str) -> Callable[..., Any]:
    """The forward of a patched activation module."""

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        if not input.is_contiguous():  # half of a wider tensor: a copy costs more than is gained
            return type(self).forward(self, input)
        return ops.activation(input, kind)

    return forward


def match_activation(module: nn.Module, device: torch.device) -> Match:
    """A module without parameters that computes one of the activations."""
    if next(module.children(), None) is not None or next(module.parameters(), None) is not None:
        return None
    name = type(module).__name__.lower()
    if not any(word in name for word in ("gelu", "silu", "swish", "relu", "activation")):
        return None
    kind = kind_of_activation(module, device)
    if kind is None:
        return f"none of {', '.join(ACTIVATIONS)}"
    x = _probe.random((3, 64), 0).to(device)
    return Candidate(
        ("activation",), f"activation ({kind})", activation_forward(kind), [((x,), {})]
    )
