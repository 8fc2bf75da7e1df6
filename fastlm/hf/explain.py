"""The model half of `fastlm.explain`: what runs in each layer, and which kernels that means."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from fastlm.explain import describe
from fastlm.hf import _probe
from fastlm.hf.patch import is_ours, patch, suspended
from fastlm.hf.verify import _arguments
from fastlm.ops import _registry


def explain_model(model: nn.Module, inputs: Any = None) -> str:
    """What `patch` does to each module of a model, and which kernels then run and why.

    Args:
        model: patched or not; it is as it was afterwards.
        inputs: what to call it with, as for `verify`; made up by default.

    Returns:
        Text: the report of the patch, then one line for each kind of call of an operator in a
        forward pass, with the backend that ran, and below it why others did not.
    """
    with suspended(model), patch(model) as made:
        lines = [made.report()]
    patched = any(is_ours(m.__dict__.get("forward")) for m in model.modules())
    with contextlib.nullcontext() if patched else patch(model), _probe.evaluating(model):
        try:
            arguments = _arguments(model, inputs)
        except TypeError as e:
            return "\n".join([*lines, str(e)])
        with torch.no_grad(), _registry.recording() as verdicts:
            model(**arguments)
    counts: dict[str, int] = {}
    for verdict in verdicts:
        text = describe(verdict)
        counts[text] = counts.get(text, 0) + 1
    lines.append(f"one forward pass calls fastlm's operators {len(verdicts)} times:")
    for text, n in counts.items():
        first, *rest = text.splitlines()
        lines += [f"  {first}  ({n} times)" if n > 1 else f"  {first}", *(f"  {r}" for r in rest)]
    return "\n".join(lines)
