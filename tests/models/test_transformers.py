"""Decoder against transformers: logits, loss and gradients of the same weights."""

from __future__ import annotations

import pytest
import torch

from fastlm.hf import families
from fastlm.hf.weights import hf_names
from fastlm.models import Decoder
from fastlm.testing import Pool, error

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama-gqa": ("llama", {**SIZES, "num_key_value_heads": 2}),
    "llama-mha-tied": ("llama", {**SIZES, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {**SIZES, "head_dim": 16, "num_key_value_heads": 1}),
    "llama-rope-llama3": (
        "llama",
        {**SIZES, "rope_parameters": {"rope_theta": 500.0, **LLAMA3}},
    ),
    "llama-rope-linear": (
        "llama",
        {**SIZES, "rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
    ),
    "mistral-window": ("mistral", {**SIZES, "num_key_value_heads": 2, "sliding_window": 5}),
    "qwen2": ("qwen2", {**SIZES, "num_key_value_heads": 2}),
    "gpt2": (
        "gpt2",
        {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "gpt2-untied-inner": (
        "gpt2",
        {
            "vocab_size": 61,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "n_inner": 48,
            "activation_function": "relu",
            "tie_word_embeddings": False,
        },
    ),
}


def theirs(case: str):
    """A small random model of transformers, without dropout; biases are not zero."""
    model_type, options = CASES[case]
    config = transformers.AutoConfig.for_model(model_type, **options)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def in_float64(model):
    """The same model as an oracle; transformers' RMS norm computes in fp32 whatever it is given."""
    exact = transformers.AutoModelForCausalLM.from_config(model.config).eval().double()
    exact.load_state_dict(model.state_dict())
    for module in exact.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps = module.variance_epsilon
            module.forward = lambda x, module=module, eps=eps: (
                module.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))
            )
    return exact


def run_theirs(model, tokens):
    """Logits, loss and gradients under Decoder's names."""
    out = model(tokens, labels=tokens)
    if out.logits.dtype == torch.float64:  # transformers takes the loss of logits cut to fp32
        shifted = out.logits[:, :-1].flatten(0, 1)
        out.loss = torch.nn.functional.cross_entropy(shifted, tokens[:, 1:].flatten())
    model.zero_grad()
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    config = families.read(model.config.to_dict(), "config")
    names = hf_names(families.of(config))
    found = {"logits": out.logits.detach(), "loss": out.loss.detach()}
    for name, _ in Decoder(config).named_parameters():
        stored, transposed = names(name, config)
        parts = [grads[part].T if transposed else grads[part] for part in stored]
        found[name] = torch.cat(parts)
    return found


def run_ours(model, tokens):
    loss = model(tokens, labels=tokens)
    model.zero_grad()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": model(tokens).detach(), "loss": loss.detach(), **grads}


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_as_accurate(case, tmp_path):
    model = theirs(case)
    model.save_pretrained(tmp_path)
    ours, exact = Decoder.from_pretrained(tmp_path), in_float64(model)
    pool = Pool()
    for _ in range(16):
        tokens = torch.randint(0, 61, (2, 17))
        pool.add(run_ours(ours, tokens), run_theirs(model, tokens), run_theirs(exact, tokens))
    bad = [str(e) for e in pool.errors() if not e.ok]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("case", CASES)
def test_saved_directory_opens_in_transformers_with_the_same_weights(case, tmp_path):
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    Decoder.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(model)
    weights, reread = model.state_dict(), again.state_dict()
    assert weights.keys() == reread.keys()
    assert all(torch.equal(weights[name], reread[name]) for name in weights)
    tokens = torch.randint(0, 61, (2, 17))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)
    before, after = model.config.to_dict(), again.config.to_dict()
    for name in before.keys() - {"transformers_version", "_name_or_path", "dtype"}:
        if before[name] is not None:  # None: left to a default, which the saved config spells out
            assert after[name] == before[name], name


@pytest.mark.parametrize("case", ["llama-gqa", "gpt2"])
def test_left_padding_gives_the_logits_of_the_unpadded(case, tmp_path):
    model = theirs(case)
    model.save_pretrained(tmp_path)
    ours = Decoder.from_pretrained(tmp_path)
    tokens = torch.randint(0, 61, (2, 12))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    exact = Decoder.from_pretrained(tmp_path).double()
    with torch.no_grad():
        padded = ours(tokens, mask=mask)
        found = {"padded": padded[0, 5:], "whole": padded[1]}
        alone, right = (
            {"padded": model(tokens[:1, 5:])[0], "whole": model(tokens[1:])[0]}
            for model in (ours, exact)
        )
    for name in found:
        assert (e := error(name, found[name], alone[name], right[name])).ok, str(e)
