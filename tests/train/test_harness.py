"""The adapter for lm-eval: its three methods, on requests like lm-eval's."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from byte_text import byte_text

from fastlm.data.template import CHATML
from fastlm.models import Config, Decoder
from fastlm.train.evaluate import text_loss
from fastlm.train.evaluate_harness import Harness, as_lm


def harness(kind=Harness, template: str | None = None):
    torch.manual_seed(5)
    text = byte_text(template)
    model = Decoder(Config(text.vocab, 32, 2, 4, max_positions=64, eos_ids=(text.vocab - 1,)))
    with torch.no_grad():
        model.embed.weight.mul_(20)
    return kind(model.eval(), text=text, batch_size=2)


def asked(*args):
    return SimpleNamespace(args=args)


def test_log_likelihoods_add_up():
    """log p(ab | c) = log p(a | c) + log p(b | ca)."""
    lm = harness()
    whole, first, second, bare = lm.loglikelihood(
        [asked("abc", "defg"), asked("abc", "de"), asked("abcde", "fg"), asked("", "abc")]
    )
    assert whole[0] == pytest.approx(first[0] + second[0], rel=1e-5)
    (rolling, nothing) = lm.loglikelihood_rolling([asked("abc"), asked("")])
    assert rolling == pytest.approx(bare[0], rel=1e-5) and nothing == 0.0
    assert rolling == -text_loss(lm.model, lm.text, ["abc"]).nats
    assert math.isfinite(whole[0]) and whole[0] < 0


def test_generation_stops_at_until():
    lm = harness()
    free, same = lm.generate_until([asked("abc", {"until": [], "max_gen_toks": 9})] * 2)
    assert free == same and len(free) > 3
    (short,) = lm.generate_until([asked("abc", {"until": [free[2]], "max_gen_toks": 9})])
    assert short == free.split(free[2])[0].strip()
    (told,) = lm.loglikelihood([asked("abc", free[:1])])
    assert told[1]


def test_chat_prompts_keep_their_special_tokens():
    lm = harness(template=CHATML)
    prompt = lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert lm.chat_template(True) == CHATML and lm.chat_template(False) is None
    assert math.isfinite(lm.loglikelihood([asked(prompt, "Yes")])[0][0])


def test_in_lm_eval():
    api = pytest.importorskip("lm_eval.api.model")
    lm = harness(as_lm)
    assert isinstance(lm, api.LM)
    assert lm.loglikelihood([asked("abc", "d")]) == harness().loglikelihood([asked("abc", "d")])
