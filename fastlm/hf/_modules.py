"""What stands in for single modules: forwards bound to one instance, and how to recognise them.

Each `match_*` looks at one module and returns a Candidate, a reason why it has none, or None when
the module is of another kind. The forwards are plain functions bound to the instance with
`types.MethodType`, which `copy.deepcopy` rebinds to the copy; they read every tensor and number
from the module at each call, so `.to()`, loading weights and tying keep working. At call time they
hand over to the class's own forward whenever something stands in their way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
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
    if is_conv1d(module):
        forward: Callable[..., Any] = conv1d_forward
    elif type(module) is nn.Linear or _adds_nothing(module):
        forward = linear_forward
    else:
        return "a subclass of nn.Linear" if isinstance(module, nn.Linear) else None
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return "its weight is no plain floating-point parameter"
    width = weight.shape[0 if is_conv1d(module) else 1]
    x = _probe.random((3, width), 0, weight)
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
    if next(module.children(), None) is not None or not set(tensors) <= {"weight", "bias"}:
        return "of another structure than RMSNorm and LayerNorm" if _only_norm(module) else None
    if any(p.dim() != 1 for p in tensors.values()) or not (tensors or named):
        return None
    if next(module.buffers(), None) is not None or isinstance(
        module, nn.modules.batchnorm._NormBase
    ):
        return "keeps statistics" if named else None
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return "its forward takes more than the hidden states" if named else None
    eps = [n for n in ("variance_epsilon", "eps", "epsilon") if n in module.__dict__]
    if len(eps) > 1:
        return "its epsilon was not found" if named else None
    shape = getattr(module, "normalized_shape", None)
    if shape is not None and len(shape) != 1:
        return f"normalises over {len(shape)} axes"
    weight = tensors.get("weight")
    width = len(weight) if weight is not None else (shape[0] if shape else 64)
    rows = torch.tensor([[1e-3], [1.0], [30.0]])
    x = (_probe.random((3, width), 0) + 0.5) * rows
    if weight is not None:
        x = x.to(weight.device)
    calls: _probe.Calls = [((x,), {})]
    sources: list[str | float] = [*eps] or list(_EPSILONS)
    choices = []
    for e in sources:
        if "bias" not in tensors:
            choices.append((rms_norm_forward(e, 0.0), "rms_norm"))
            if weight is not None:
                choices.append((rms_norm_forward(e, 1.0), "rms_norm (1 + weight)"))
        choices.append((layer_norm_forward(e), "layer_norm"))
        if weight is not None:
            choices.append((layer_norm_forward(e, 1.0), "layer_norm (1 + weight)"))
    reason = ""
    for forward, text in choices:
        try:
            _probe.compare(module, forward, calls)
        except Exception as e:
            reason = str(e)
            continue
        return Candidate((text.split()[0],), text, forward, [])
    return f"computes neither rms_norm nor layer_norm: {reason}" if named else None


def _only_norm(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return name.endswith("norm")


# What a norm may have written into its forward instead of keeping it as an attribute.
_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)


def rms_norm_forward(eps: str | float, offset: float) -> Callable[..., Any]:
    """The forward of a patched RMSNorm; with `residual`, of the sum, which it returns too.

    eps: the attribute that holds the epsilon, or its value.
    """

    def forward(self: nn.Module, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        weight = self._parameters.get("weight")
        if _mixes(weight, hidden_states):
            return _own_norm(self, hidden_states, residual)
        epsilon = getattr(self, eps) if isinstance(eps, str) else eps
        if epsilon is None:
            epsilon = torch.finfo(hidden_states.dtype).eps
        return ops.rms_norm(hidden_states, weight, epsilon, residual=residual, weight_offset=offset)

    return forward


def layer_norm_forward(eps: str | float, offset: float = 0.0) -> Callable[..., Any]:
    """The forward of a patched LayerNorm; with `residual`, of the sum, which it returns too."""

    def forward(self: nn.Module, input: Tensor, residual: Tensor | None = None) -> Any:
        tensors = self._parameters
        weight = tensors.get("weight")
        if _mixes(weight, input):
            return _own_norm(self, input, residual)
        epsilon = getattr(self, eps) if isinstance(eps, str) else eps
        offset_weight = weight + offset if offset and weight is not None else weight
        return ops.layer_norm(input, offset_weight, tensors.get("bias"), epsilon, residual=residual)

    return forward


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
    code = getattr(getattr(forward, "__func__", None), "__code__", None)
    return code is _RMS_CODE or code is _LAYER_CODE


_RMS_CODE = rms_norm_forward("eps", 0.0).__code__  # type: ignore[attr-defined]
_LAYER_CODE = layer_norm_forward("eps").__code__  # type: ignore[attr-defined]


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
