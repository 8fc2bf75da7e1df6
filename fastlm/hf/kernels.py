"""fastlm's layers for `kernels.kernelize` of Hugging Face: a mapping without hub and download.

    from kernels import Mode, kernelize, use_kernel_mapping
    from fastlm.hf.kernels import mapping

    with use_kernel_mapping(mapping(), inherit_mapping=False):
        kernelize(model, mode=Mode.TRAINING, device="cpu")

`kernelize` goes by the names under which classes are registered and confirms nothing; rotations,
of which several kinds share one name, are therefore not in it. `fastlm.patch` reaches more and
tries everything first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.ops._library import autocasts


class _Layer(nn.Module):
    can_torch_compile = True
    has_backward = True


def _norm(self: Any, x: Tensor, offset: float) -> Tensor:
    eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
    weight = self.weight
    mixed = x.dtype != torch.float32 and autocasts(x)
    if mixed or weight.dtype != x.dtype:
        return type(self).forward(self, x)  # its result has another dtype
    return ops.rms_norm(x, weight, eps, weight_offset=offset)


class RMSNorm(_Layer):
    """rms_norm with the weight as it is."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As the class that it stands in for."""
        return _norm(self, hidden_states, 0.0)


class RMSNormZeroCentered(_Layer):
    """rms_norm with 1 + weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As the class that it stands in for."""
        return _norm(self, hidden_states, 1.0)


class SiLU(_Layer):
    """x * sigmoid(x)"""

    def forward(self, input: Tensor) -> Tensor:
        """As the class that it stands in for."""
        return ops.activation(input, "silu")


class GeluTanh(_Layer):
    """gelu by tanh"""

    def forward(self, input: Tensor) -> Tensor:
        """As the class that it stands in for."""
        return ops.activation(input, "gelu_tanh")


# Names of transformers' registered classes -> what computes them
LAYERS: dict[str, type[nn.Module]] = {
    "RMSNorm": RMSNorm,
    "RMSNormZeroCentered": RMSNormZeroCentered,
    "SiLU": SiLU,
    "GeluTanh": GeluTanh,
    "NewGELU": GeluTanh,
}


class _Here:
    """A repository of the `kernels` package that holds one class of this process."""

    def __init__(self, layer: type[nn.Module]):
        self.layer = layer

    def load(self) -> type[nn.Module]:
        return self.layer

    def __repr__(self) -> str:
        return f"fastlm.hf.kernels.{self.layer.__name__}"


_REPOSITORIES = {name: _Here(layer) for name, layer in LAYERS.items()}


def mapping(*devices: str) -> dict[str, dict[str, Any]]:
    """What `kernels.use_kernel_mapping` takes, for inference and training.

    Args:
        devices: "cpu", "cuda"; by default the CPU, and CUDA where it is there.

    Returns:
        {layer name: {device: repository}}

    Raises:
        ImportError: the package `kernels` is absent.
    """
    import kernels  # noqa: F401  # says what is missing here, not inside `kernelize`

    devices = devices or ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
    return {name: dict.fromkeys(devices, repository) for name, repository in _REPOSITORIES.items()}
