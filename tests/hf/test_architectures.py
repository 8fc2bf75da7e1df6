"""Every architecture of tools/architectures.py: patched, verified, undone."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import fastlm
from tools.architectures import ROWS, small

# What a patch of the architecture brings in at least; where nothing is said: everything.
FULL = {"attention", "linear", "cross_entropy", "linear_cross_entropy"}
# nothing of transformers' interface
OWN_ATTENTION = {"bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt", "xglm"}


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("name", ROWS)
def test_architecture(name):
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {name}")
    model = small(name)
    ids = torch.randint(3, 120, (2, 20))
    before, keys = logits(model, ids), list(model.state_dict())
    with fastlm.patch(model) as patch:
        # Own attention, with nothing of transformers' interface: some had it in older releases.
        own = "ALL_ATTENTION_FUNCTIONS" not in inspect.getsource(
            sys.modules[type(model).__module__]
        )
        done = {s for e in patch.entries if e.state == "replaced" for s in e.stems}
        assert done >= FULL - ({"attention"} if own else set())
        assert done & {"rms_norm", "layer_norm"}
        assert list(model.state_dict()) == keys
        made = logits(model, ids)
        assert not torch.equal(made, before), "nothing of ours ran"
        report = fastlm.verify(model)
    assert report.ok, report
    assert torch.equal(logits(model, ids), before)
