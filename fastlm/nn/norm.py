"""Normalisation layers that take the residual addition before them along."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm import ops


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm on `fastlm.ops.layer_norm`: same arguments, same parameters."""

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of input; with a residual the pair (norm of the sum, the sum)."""

        def norm(x: Tensor, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
            weight, bias = (None if p is None else p.flatten() for p in (self.weight, self.bias))
            return ops.layer_norm(x, weight, bias, self.eps, residual=residual)  # type: ignore[call-overload,no-any-return]

        return _over_trailing(norm, self.normalized_shape, input, residual)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm on `fastlm.ops.rms_norm`: same arguments, same parameters."""

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with a residual the pair (norm of the sum, the sum)."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps

        def norm(x: Tensor, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
            weight = None if self.weight is None else self.weight.flatten()
            return ops.rms_norm(x, weight, eps, residual=residual)  # type: ignore[call-overload,no-any-return]

        return _over_trailing(norm, self.normalized_shape, x, residual)


_Norm = Callable[[Tensor, "Tensor | None"], "Tensor | tuple[Tensor, Tensor]"]


def _over_trailing(
    norm: _Norm, shape: tuple[int, ...], x: Tensor, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs a norm of one dimension over the trailing dimensions of a normalized_shape."""
    if len(shape) == 1:
        return norm(x, residual)
    if tuple(x.shape[-len(shape) :]) != tuple(shape):
        raise ValueError(f"norm: x must end in {list(shape)}, got {list(x.shape)}")
    start = x.dim() - len(shape)
    made = norm(x.flatten(start), None if residual is None else residual.flatten(start))
    if isinstance(made, tuple):
        return made[0].view(x.shape), made[1].view(x.shape)
    return made.view(x.shape)
