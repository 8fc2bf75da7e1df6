"""fastlm's layers under `kernelize`, in this process, for both modes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastlm.hf.kernels import LAYERS, mapping
from fastlm.ops import _registry
from fastlm.testing import check

kernels = pytest.importorskip("kernels", reason="pip install fastlm[kernels]")


def registered(name):
    class Norm(nn.Module):
        def __init__(self, eps_name="variance_epsilon"):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64))
            setattr(self, eps_name, 1e-5)

        def forward(self, hidden_states):
            offset = 1.0 if name == "RMSNormZeroCentered" else 0.0
            x = hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + 1e-5)
            return (self.weight + offset) * x

    class Activation(nn.Module):
        def forward(self, input):
            if name == "SiLU":
                return nn.functional.silu(input)
            return nn.functional.gelu(input, approximate="tanh")

    return kernels.use_kernel_forward_from_hub(name)(Norm if "Norm" in name else Activation)


@pytest.mark.parametrize("mode", ["INFERENCE", "TRAINING"])
@pytest.mark.parametrize("name", LAYERS)
def test_kernelize(name, mode):
    cls = registered(name)
    model, other = nn.Sequential(cls()), cls()
    with kernels.use_kernel_mapping(mapping("cpu"), inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode[mode], device="cpu")
    x = torch.randn(8, 64)
    with _registry.recording() as verdicts:
        model(x)
        other(x)
    assert len(verdicts) == 1, "one runs in the kernel, the other is as it was"
    own = cls.forward
    inputs = [x, *([model[0].weight.detach()] if "Norm" in name else [])]

    def run(forward):
        def call(x, *weight):
            values = dict(zip(("weight",), weight, strict=False))
            layer = cls().to(x.dtype)
            layer.forward = forward.__get__(layer)
            return torch.func.functional_call(layer, values, (x,))

        return call

    ours, theirs = run(LAYERS[name].forward), run(own)
    check(ours, theirs, theirs, inputs, gradients=mode == "TRAINING")
