"""The static step of decoding with the kernels that a GPU would run: the text of the CPU's own."""

from __future__ import annotations

import pytest

from fastlm import nn
from fastlm.models import graph
from fastlm.ops import _registry, use_backend
from tests.models.test_graph import PROMPTS, make


@pytest.mark.parametrize(
    "shape, bits, prompts", [("llama", 4, "unequal"), ("gpt2", None, "one")], ids=str
)
def test_text_is_that_of_the_cpus_kernels(shape, bits, prompts, monkeypatch):
    model = make(shape, bits=bits)
    for module in model.modules():
        if isinstance(module, nn.QuantizedLinear):  # as it lies on a GPU
            parts = module.qweight.unpack()
            module.values, module.scale, module.minimum, *_, module.outputs = parts
    with use_backend(None):  # not every operator of a step has a Triton kernel
        expected = model.generate(PROMPTS[prompts], 4, eos=())
        for stem in _registry.stems():
            found = _registry.backends(stem)
            if "triton" in {backend.name for backend in found}:
                left = [backend for backend in found if backend.name not in ("cpu", "torch")]
                monkeypatch.setitem(_registry._backends, stem, left)
        monkeypatch.setattr(graph, "DEVICES", ("cpu",))
        with _registry.recording() as verdicts:
            assert model.generate(PROMPTS[prompts], 4, eos=()) == expected
    ran = {(verdict.stem, verdict.chosen) for verdict in verdicts}
    wanted = {"rope_append", "decode_attention"} | ({"quantized_linear"} if bits else set())
    assert {(stem, "triton") for stem in wanted} | {(graph.STEM, "graph")} <= ran
