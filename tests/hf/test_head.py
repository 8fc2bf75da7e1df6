"""The loss without logits: when they are left out, who gets them all the same."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import transformers
from tiny_models import as_accurate, exactly, tiny, token_numbers
from torch import nn

import fastlm
from fastlm.hf import _head
from fastlm.hf._deferred import Deferred
from fastlm.hf._head import worth
from fastlm.hf.patch import suspended
from fastlm.ops import _registry
from fastlm.testing import Pool

IDS = token_numbers()


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    monkeypatch.setattr(_head, "WORTH", 0)


def stems(run):
    with _registry.recording() as verdicts:
        made = run()
    return [v.stem for v in verdicts], made


def is_deferred(out):
    return isinstance(dict.get(out, "logits"), Deferred)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_training_step_makes_no_logits(name):
    model = tiny(name).train()
    with fastlm.patch(model, strict=True):
        called, out = stems(lambda: model(IDS, labels=IDS))
        out.loss.backward()
        assert called.count("linear_cross_entropy") == 1 and "cross_entropy" not in called
        assert is_deferred(out) and dict.get(out, "logits")._made is None


def test_every_way_of_reading_them_gives_the_logits():
    model = tiny()
    with fastlm.patch(model):
        expected = model(IDS).logits

        def out():
            made = model(IDS, labels=IDS)
            assert is_deferred(made) and list(made)[:2] == ["loss", "logits"]
            assert list(made)[2:] in (["past_key_values"], ["cache"])  # the latter from 5.24 on
            return made

        assert isinstance(out(), transformers.modeling_outputs.CausalLMOutputWithPast)
        ways = [
            out().logits,
            out()["logits"],
            out()[1],
            out()[1:][0],
            out().to_tuple()[1],
            out().get("logits"),
            dict(out())["logits"],
            {**out()}["logits"],
            getattr(pickle.loads(pickle.dumps(copy.deepcopy(detached(out())))), "logits"),  # noqa: B009
            next(v for k, v in out().items() if k == "logits").value(),
            model(IDS, labels=IDS, return_dict=False)[1],
        ]
        for made in ways:
            assert isinstance(made, torch.Tensor) and torch.equal(made, expected)
        assert out().get("nothing", 3) == 3
        assert isinstance(out()[0], torch.Tensor) and out()[0].dim() == 0
        entry = dict.get(out(), "logits")
        assert entry.shape == expected.shape and entry.dtype == expected.dtype
        for made, wanted in (
            (torch.argmax(entry, -1), expected.argmax(-1)),
            (entry[..., 1:, :], expected[..., 1:, :]),
            (entry.softmax(-1), expected.softmax(-1)),
            (2 * entry - 1, 2 * expected - 1),
            (torch.tanh(entry / 3).value(), torch.tanh(expected / 3)),
            (entry.float().value(), expected),
        ):
            assert torch.equal(made, wanted)


def detached(out):
    with torch.no_grad():
        return type(out)(**{k: v.detach() for k, v in out.items() if k in ("loss", "logits")})


DRAWS = [token_numbers(seed=seed) for seed in range(16)]


def within_the_rule(model, run):
    """run(model, ids) -> tensors by name: judged over sixteen inputs."""
    with suspended(model):
        others = [(run(model, ids), exactly(run, model, ids)) for ids in DRAWS]
    pool, verdicts = Pool(), []
    for ids, (theirs, exact) in zip(DRAWS, others, strict=True):
        called, made = stems(lambda ids=ids: run(model, ids))
        verdicts += called
        pool.add(made, theirs, exact)
    bad = [str(e) for e in pool.errors() if not e.ok]
    assert not bad, "\n".join(bad)
    return verdicts.count("linear_cross_entropy")


def gradients(model):
    made = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return made


def test_a_loss_of_ones_own_from_the_logits_has_gradients():
    def run(model, ids):
        out = model(ids, labels=ids)
        with torch.no_grad():
            out.logits.sum()  # made without gradients first
        (out.loss + out.logits.square().mean()).backward()
        return gradients(model)

    model = tiny()
    with fastlm.patch(model):
        assert within_the_rule(model, run) == len(DRAWS)


def test_evaluation_and_small_logits_are_as_ever(monkeypatch):
    model = tiny()
    with fastlm.patch(model):
        with torch.no_grad():
            called, out = stems(lambda: model(IDS, labels=IDS))
        assert type(out.logits) is torch.Tensor and "linear_cross_entropy" not in called
        monkeypatch.setattr(_head, "WORTH", 10**6)
        called, out = stems(lambda: model(IDS, labels=IDS))
        assert not is_deferred(out) and "linear_cross_entropy" not in called


def test_always_and_never():
    model = tiny()
    expected = model(IDS, labels=IDS)
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    with fastlm.patch(model, logits="always", strict=True) as patch:
        assert "linear_cross_entropy" not in patch.report()
        assert type(model(IDS, labels=IDS).logits) is torch.Tensor
    with fastlm.patch(model, logits="never", strict=True) as patch:
        assert "linear_cross_entropy (logits: never)" in patch.report()
        for context in (torch.enable_grad(), torch.no_grad()):
            with context:
                called, out = stems(lambda: model(IDS, labels=IDS))
                assert out.logits is None and "logits" not in out
                assert len(model(IDS, labels=IDS, return_dict=False)) == 2
                assert called.count("linear_cross_entropy") == 1
                torch.testing.assert_close(out.loss, expected.loss)
        assert model(IDS).logits.shape == expected.logits.shape
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), tokens)
    with pytest.raises(ValueError, match="patch: logits must be one of auto, always, never, got 3"):
        fastlm.patch(model, logits=3)


def test_the_loss_takes_what_transformers_gives_it():
    model = tiny()
    labels = IDS.clone()
    labels[0, :6] = -100
    shifted = torch.nn.functional.pad(IDS, (0, 1), value=7)[..., 1:].contiguous()
    for options in (
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": torch.tensor(5)},
        {"labels": labels, "num_items_in_batch": 5},
        {"labels": IDS, "shift_labels": shifted},
        {"labels": IDS, "ignore_index": int(IDS[0, 3])},
    ):
        expected = model(IDS, **options).loss
        with fastlm.patch(model):
            called, out = stems(lambda options=options: model(IDS, **options))
        assert "linear_cross_entropy" in called, options
        torch.testing.assert_close(out.loss, expected)


def test_nothing_to_learn_from():
    model = tiny()
    labels = torch.full_like(IDS, -100)
    expected = model(IDS, labels=labels, num_items_in_batch=4).loss
    with fastlm.patch(model):
        assert model(IDS, labels=labels).loss.isnan()  # a mean over nothing, as PyTorch's
        loss = model(IDS, labels=labels, num_items_in_batch=4).loss
        loss.backward()
    assert loss == expected == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


class Ending(transformers.LlamaForCausalLM):
    """A model that does something to its logits before the loss."""

    def after(self, logits):
        return logits

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.after(self.lm_head(self.model(input_ids).last_hidden_state))
        loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


ENDINGS = {
    "scaled": (lambda x: x * 0.0625, True),
    "divided": (lambda x: (x / 3.0).float(), True),
    "capped": (lambda x: 5.0 * torch.tanh(x / 5.0), True),
    "scaled and capped": (lambda x: torch.tanh(x * 0.5 / 2.0) * 2.0, True),
    "a scale that is learnt": (lambda x: x * torch.tensor(2.0), False),
    "shifted": (lambda x: x + 1.0, False),
    "clipped": (lambda x: x.clamp(-1, 1), False),
    "cut off": (lambda x: x[..., :96], False),
}


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_what_a_model_does_to_its_logits(name, bias):
    after, known = ENDINGS[name]
    model = Ending(tiny().config)
    model.after = after
    if bias:  # scaled with the product
        model.lm_head.bias = torch.nn.Parameter(torch.randn(96))

    def run(model, ids):
        out = model(ids, ids)
        out.loss.backward()
        return {"logits": out.logits.detach(), **gradients(model)}

    with fastlm.patch(model) as patch:
        assert within_the_rule(model, run) == (len(DRAWS) if known else 0)
    kept = [e.text for e in patch.entries if e.state == "kept"]
    reason = "linear_cross_entropy: its forward does more with the logits than the loss"
    assert kept == ([] if known else [reason])


def test_a_loss_function_of_ones_own_is_called():
    model = tiny()
    model.loss_function = lambda logits, labels, vocab_size, **kw: logits.sum() * 0 + 5
    with fastlm.patch(model) as patch:
        assert model(IDS, labels=IDS).loss == 5
        assert "it has a loss function of its own" in patch.report()
    model = tiny()
    patch = fastlm.patch(model)
    model.loss_function = lambda logits, labels, vocab_size, **kw: logits.sum() * 0 + 6
    assert model(IDS, labels=IDS).loss == 6
    with pytest.raises(RuntimeError, match="1 forwards were replaced by another tool"):
        patch.undo()
    assert model(IDS, labels=IDS).loss == 6


def test_a_head_that_has_to_be_called_is_called():
    model = tiny()
    with fastlm.patch(model):
        seen = []
        handle = model.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.shape))
        called, _ = stems(lambda: model(IDS, labels=IDS))
        assert len(seen) == 1 and "linear_cross_entropy" not in called
    with fastlm.patch(model) as patch:
        assert "its head has hooks, as offloaded and sharded ones do" in patch.report()
    handle.remove()

    class Head(nn.Linear):
        pass

    model.lm_head = Head(32, 96, bias=False)
    with fastlm.patch(model) as patch:
        assert "its head is a Head of test_head, which has to be called" in patch.report()
    model = tiny(tie_word_embeddings=False)
    model.lm_head.weight.ds_id = 0
    with fastlm.patch(model) as patch:
        assert "its head's weight is sharded (ZeRO)" in patch.report()
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    with fastlm.patch(model) as patch:
        assert "which has to be called" in patch.report()


def test_logits_read_after_the_weights_are_gone():
    model = tiny(tie_word_embeddings=False)
    with fastlm.patch(model):
        out = model(IDS, labels=IDS)
        del model.lm_head._parameters["weight"]
        with pytest.raises(RuntimeError, match=r'fastlm.patch\(model, logits="always"\)'):
            _ = out.logits


def test_mixed_precision():
    """The logits are made under the autocast of the forward pass, wherever they are read."""
    model = tiny()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return model(IDS, labels=IDS)

    theirs = run()
    with fastlm.patch(model):
        ours = run()
        assert is_deferred(ours) and dict.get(ours, "logits").dtype == torch.bfloat16
        assert ours.logits.dtype == theirs.logits.dtype
        as_accurate(
            ours.logits.detach(),
            theirs.logits.detach(),
            exactly(lambda m: m(IDS).logits.detach(), model),
        )


def test_the_signature_stays():
    """Trainers choose columns and options by it."""
    model = tiny()
    before = inspect.signature(model.forward)
    with fastlm.patch(model):
        assert inspect.signature(model.forward) == before


def test_compiled_without_logits():
    """The compiled model makes them for its loss and returns none."""
    model = tiny(num_hidden_layers=1)
    expected = model(IDS, labels=IDS).loss
    with fastlm.patch(model, logits="never"):
        out = torch.compile(model, fullgraph=True, backend="eager")(IDS, labels=IDS)
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected)


def test_another_thread_is_not_touched():
    """A forward in one thread leaves the head of another thread's call alone."""
    model = tiny()
    with fastlm.patch(model), worth(0), _head._deferring(model.lm_head, 0):
        x = torch.zeros(1, 32)
        assert isinstance(model.lm_head(x), Deferred)
        import concurrent.futures

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert type(pool.submit(model.lm_head, x).result()) is torch.Tensor


def test_a_second_patch_adds_the_loss_to_a_decode_plan():
    model = tiny().train()
    plain, options = model.forward, {"max_new_tokens": 4, "do_sample": False}
    with fastlm.patch(model, ops=["decode_plan"]):
        first = model.forward
        with fastlm.patch(model) as second:
            assert not [e for e in second.entries if e.state == "kept"]
            called, _ = stems(lambda: model(IDS, labels=IDS).loss.backward())
            assert called.count("linear_cross_entropy") == 1
            called, _ = stems(lambda: model.eval().generate(IDS, **options))
            assert "decode_plan" in called
            with fastlm.patch(model) as third:
                assert not third._undo
        assert model.forward == first
    assert model.forward == plain
