"""The experts of a mixture: feed-forward blocks in one tensor, of which a token takes a few."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fastlm import ops
from fastlm.hf import _probe
from fastlm.hf._modules import Candidate, Match, kind_of_activation

_WEIGHTS = ("gate_up_proj", "down_proj")


def match_experts(module: Any, device: torch.device) -> Match:
    """Modules of transformers' experts interface: gate_up_proj [E, 2F, H], down_proj [E, H, F].

    Both may lie transposed and carry biases; the gate may be one of the class's own.
    """
    shapes = {n: p.dim() for n, p in module._parameters.items() if p is not None}
    if shapes == {"weight": 3}:
        return _match_maps(module)
    if not {n for n, dims in shapes.items() if dims == 3} >= set(_WEIGHTS):
        return None
    if not set(shapes) <= {*_WEIGHTS, *(f"{n}_bias" for n in _WEIGHTS)}:
        return "experts: parameters of another kind than gate_up_proj and down_proj"
    facts = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")
    if not all(hasattr(module, name) for name in facts) or not module.has_gate:
        return "experts: not of the form that transformers' experts interface describes"
    if getattr(module, "has_post_expert_norm", False):
        return "experts: each has a norm of its own"
    kind = None
    if type(module)._apply_gate.__name__ == "_default_apply_gate":
        kind = kind_of_activation(getattr(module, "act_fn", None), device)
    experts, width = module.num_experts, module.down_proj.shape[1]
    if module.is_transposed:
        width = module.down_proj.shape[2]
    x = _probe.random((5, width), 0).to(device)
    chosen = torch.stack([torch.arange(5) % experts, torch.arange(1, 6) % experts], -1).to(device)
    weights = _probe.random((5, 2), 1).abs().to(device)
    text = f"experts, one by one (linear, {kind or 'their own gate'})"
    stems = ("linear", "activation") if kind else ("linear",)
    return Candidate(stems, text, experts_forward(kind), [((x, chosen, weights), {})])


def experts_forward(kind: str | None) -> Callable[..., Any]:
    """The forward of patched experts.

    Each expert that was chosen runs once, over the tokens that chose it; a token's results are
    added up in the order of its choices, so that the sum does not depend on the other tokens.
    With gradients on, and while compiling, the class's own forward runs.
    """

    def forward(
        self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        tensors = self._parameters
        if (
            is_dynamo_compiling()  # which expert runs is known to the data only
            or torch.is_grad_enabled()  # a grouped product has the quicker backward pass
            or self._is_expert_parallel
            or any(type(p) not in (nn.Parameter, Tensor) for p in tensors.values())
        ):
            return type(self).forward(self, hidden_states, top_k_index, top_k_weights)
        tokens, choices = top_k_index.shape
        order = top_k_index.reshape(-1).argsort(stable=True)
        counts = top_k_index.reshape(-1).bincount(minlength=self.num_experts).tolist()
        x = hidden_states[order.div(choices, rounding_mode="floor")]
        hit = [e for e, count in enumerate(counts) if count]
        made = []
        rows = x.split([counts[e] for e in hit])
        up_bias, down_bias = tensors.get("gate_up_proj_bias"), tensors.get("down_proj_bias")
        for e, block in zip(hit, rows, strict=True):
            up, down = tensors["gate_up_proj"][e], tensors["down_proj"][e]
            if self.is_transposed:
                up, down = up.t(), down.t()
            bias = None if up_bias is None else up_bias[e]
            inner = ops.linear(block, up, bias)
            if kind is None:
                inner = self._apply_gate(inner)
            else:
                inner = ops.gated_activation(inner, None, kind)
            bias = None if down_bias is None else down_bias[e]
            made.append(ops.linear(inner, down, bias))
        if not made:
            return torch.zeros_like(hidden_states)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        results = torch.cat(made)[back].view(tokens, choices, -1)
        summed = (results * top_k_weights[..., None]).sum(1)
        return summed.to(hidden_states.dtype)

    return forward


def _match_maps(module: Any) -> Match:
    """One linear map [E, out, in] for each expert, over rows that lie sorted by experts."""
    if list(inspect.signature(type(module).forward).parameters)[1:] != ["inputs", "expert_size"]:
        return None
    weight = module.weight
    sizes = [i % 4 for i in range(weight.shape[0])]
    x = _probe.random((sum(sizes), weight.shape[2]), 0, weight)
    text = "linear, for one expert after the other"
    return Candidate(("linear",), text, maps_forward, [((x, sizes), {})])


def maps_forward(self: Any, inputs: Tensor, expert_size: Any) -> Tensor:
    """The forward of such a module, patched."""
    weight = self._parameters.get("weight")
    if (
        type(weight) not in (nn.Parameter, Tensor)
        or is_dynamo_compiling()  # which expert gets how many rows is known to the data only
        or len(expert_size) != len(weight)
    ):
        return type(self).forward(self, inputs, expert_size)
    rows = inputs.split(expert_size)
    # unbind: one gradient of the whole weight, where indexing would make one for each expert
    made = [ops.linear(x, w) for x, w in zip(rows, weight.unbind(), strict=True) if len(x)]
    return torch.cat(made) if made else type(self).forward(self, inputs, expert_size)
