"""Speculative decoding: the text of ordinary decoding, token for token, whatever is guessed."""

from __future__ import annotations

import pytest
import torch

from fastlm import _ext
from fastlm.hf import tokenizer
from fastlm.models import Config, Decoder, plan
from fastlm.models.parts import DTYPES
from fastlm.models.plan import DecodePlan
from fastlm.models.speculative import DraftModel, PromptLookup, check_vocabulary
from fastlm.ops._registry import use_backend

LLAMA = {"vocab": 60, "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "max_positions": 300}
GPT2 = {
    **{"vocab": 60, "hidden": 40, "layers": 2, "heads": 4, "max_positions": 300},
    **{"norm": "layer", "positions": "learned", "gated": False, "activation": "gelu_tanh"},
    **{"qkv_bias": True, "out_bias": True, "mlp_bias": True},
}
SHAPES = {"llama": LLAMA, "window": {**LLAMA, "window": 7}, "gpt2": GPT2}
needs_plan = pytest.mark.skipif(plan.STEM not in _ext.native_stems, reason="no native plan")


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are too small for more, and waiting for each other costs most of their time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(shape: str, dtype=torch.float32, seed=0, **changes) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(Config(**{**SHAPES[shape], **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(0.1)
    return model.to(dtype).eval()


class Given:
    """A drafter that knows the text, but is wrong at every `wrong`-th place."""

    def __init__(self, text: list[int], wrong: int, count: int = 7) -> None:
        self.text, self.wrong, self.count = text, wrong, count
        self.offered = self.accepted = 0

    def propose(self, tokens, most):
        at = range(len(tokens), min(len(self.text), len(tokens) + min(most, self.count)))
        return [(self.text[i] + (i % self.wrong == 0)) % 60 for i in at]


DRAWS = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "top_k": 30, "seed": 5},
    "penalised": {"repetition_penalty": 1.4},
    "both": {"temperature": 0.8, "frequency_penalty": 0.5, "seed": 6},
}


@needs_plan
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*DTYPES, "int8", "int4"], ids=str)
@pytest.mark.parametrize("draw", DRAWS)
def test_the_text_is_that_of_ordinary_decoding(shape, dtype, draw):
    if isinstance(dtype, str):
        wide = {"hidden": 64, "heads": 4, "intermediate": 96}
        model = make(shape, **wide).quantize(int(dtype[3:]))
    else:
        model = make(shape, dtype)
    prompt = [1, 2, 3, 1, 2]
    options = {"eos": (), **DRAWS[draw]}
    plain = model.generate(prompt, 60, **options)
    for drafter in (Given(prompt + plain, 5), Given(prompt + plain, 1000), PromptLookup()):
        assert model.generate(prompt, 60, drafter=drafter, **options) == plain
    exact = Given(prompt + plain, 1000)
    model.generate(prompt, 60, drafter=exact, **options)
    assert exact.accepted == exact.offered > 40


@needs_plan
@pytest.mark.parametrize("draw", DRAWS)
def test_a_draft_model_changes_nothing_and_one_that_is_the_model_is_always_right(draw):
    model, small = make("llama"), make("llama", seed=1, layers=1, hidden=32)
    options = {"eos": (), **DRAWS[draw]}
    plain = model.generate([1, 2, 3], 50, **options)
    drafter = DraftModel(small, 3)
    assert model.generate([1, 2, 3], 50, drafter=drafter, **options) == plain
    again = model.generate([7, 2, 9], 50, drafter=drafter, **options)  # its cache begins anew
    assert again == model.generate([7, 2, 9], 50, **options)
    itself = DraftModel(model, 4)
    assert model.generate([1, 2, 3], 50, drafter=itself, **options) == plain
    if draw == "greedy":
        assert itself.accepted == itself.offered > 30


@needs_plan
def test_stories_are_the_same_and_repeated_text_is_guessed(stories):
    model, text = Decoder.from_pretrained(stories), tokenizer.load(stories)
    story = "Once upon a time there was a little girl named Lily. "
    prompt = text.encode(story * 3)
    for dtype in DTYPES:
        model.to(dtype)
        plain = model.generate(prompt, 200)
        for drafter in (PromptLookup(), PromptLookup(1, 15), DraftModel(model, 5)):
            assert model.generate(prompt, 200, drafter=drafter) == plain
        lookup = PromptLookup()
        model.generate(prompt, 100, drafter=lookup)
        assert 0 < lookup.accepted <= lookup.offered


@needs_plan
@pytest.mark.parametrize("past", [3, 254, 511])
@pytest.mark.parametrize("rows", [2, 5, 16])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_a_pass_over_rows_of_a_sequence_has_the_bits_of_single_steps(past, rows, kind):
    # 1100 and 33: products in several blocks, panels with a tail
    sizes = {"max_positions": 600, "intermediate": 1100, "vocab": 203}
    if kind.startswith("int"):
        model = make("llama", **{**sizes, "intermediate": 1088}).quantize(int(kind[3:]))
    else:
        model = make("llama", getattr(torch, kind), **sizes, tied_head=False)
    check_rows(model, past, rows)


@needs_plan
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_so_it_is_where_weights_come_from_memory(dtype):
    # over 24 MiB; 2056: a row in several blocks; 1111 and 6203: panels with a tail
    sizes = {"vocab": 6203, "hidden": 2056, "head_dim": 22, "intermediate": 1111, "layers": 1}
    model = make("llama", dtype, **sizes)
    for rows in (2, 7, 16):
        check_rows(model, 20, rows)


def check_rows(model: Decoder, past: int, rows: int) -> None:
    prompt, tokens = torch.randint(0, 203, (1, past)), torch.randint(0, 203, (rows,))
    caches = model.new_cache(1, 4), model.new_cache(1, 4)
    with torch.inference_mode():
        for cache in caches:
            model.hidden(prompt, cache=cache)
    single, many = DecodePlan(model, caches[0]), DecodePlan(model, caches[1], rows)
    expected = []
    for token in tokens:
        single.step(token[None])
        expected.append(single.logits.clone())
    torch.set_num_threads(2)
    many.step(tokens)
    assert torch.equal(many.logits, torch.cat(expected))
    assert torch.equal(many.best, many.logits.argmax(-1))
    for stored in ("keys", "values"):
        for one, other in zip(getattr(caches[0], stored), getattr(caches[1], stored), strict=True):
            assert torch.equal(one[:, :, : past + rows], other[:, :, : past + rows])
    assert caches[0].length == caches[1].length == past + rows


def test_without_a_plan_greedy_text_agrees_away_from_ties():
    model = make("llama")
    with use_backend("reference"):
        plain = model.generate([1, 2, 3], 40, eos=())
        assert model.generate([1, 2, 3], 40, eos=(), drafter=Given([1, 2, 3, *plain], 4)) == plain


def test_the_end_of_the_text_and_of_the_positions():
    model = make("llama", max_positions=30)
    free = model.generate([1, 2, 3], 100, eos=())
    assert len(free) == 28
    drafter = Given([1, 2, 3, *free], 9)
    assert model.generate([1, 2, 3], 100, eos=(), drafter=drafter) == free
    end = free[10]
    ended = free[: free.index(end) + 1]
    assert model.generate([1, 2, 3], 100, eos=end, drafter=drafter) == ended
    assert model.generate([1, 2, 3], 0, drafter=drafter) == []
    assert model.generate([[1, 2, 3]], 5, eos=(), drafter=drafter) == [free[:5]]


def test_who_stops_early_finds_the_cache_as_ordinary_decoding_leaves_it():
    model = make("llama")
    text = [1, 2, 3, *model.generate([1, 2, 3], 30, eos=())]
    for count in range(1, 12):
        cache = model.new_cache()
        run = model.stream([1, 2, 3], 30, eos=(), cache=cache, drafter=Given(text, 1000))
        found = [next(run) for _ in range(count)]
        run.close()
        assert found == text[3 : 3 + count] and cache.length == 3 + count - 1
        assert model.generate(found[-1:], 5, eos=(), cache=cache) == text[3 + count :][:5]


def test_a_history_is_penalised_and_looked_up():
    model = make("llama")
    text = [1, 2, 3, 4, 5, 6]
    whole = model.generate(text, 20, eos=(), repetition_penalty=1.5)
    cache = model.new_cache()
    with torch.inference_mode():
        model.hidden(torch.tensor([text[:4]]), cache=cache)
    options = {"eos": (), "repetition_penalty": 1.5, "history": text[:4], "cache": cache}
    assert model.generate(text[4:], 20, **options) == whole


def test_lookup_finds_what_followed_last():
    lookup = PromptLookup(3, 4)
    assert lookup.propose([1, 2, 3, 4, 1, 2], 8) == [3, 4]
    assert lookup.propose([1, 2, 3, 4, 1, 2, 3, 4], 8) == [1, 2, 3, 4]  # right: twice as many
    assert lookup.propose([1, 2, 3, 4, 1, 2, 3, 4, 9, 1, 2], 8) == [3, 4]  # wrong: half
    assert lookup.propose([1, 2, 3, 4, 1, 2, 3, 4, 9, 1, 2], 1) == [3]
    assert lookup.propose([1, 2, 3, 4, 1, 2, 9, 1, 2], 2) == [9, 1]  # another text
    assert lookup.propose([5, 6, 7], 4) == []
    assert lookup.propose([1], 4) == []
    assert lookup.propose([8, 8, 8], 4) == [8]


def test_wrong_arguments_are_named():
    model = make("llama")
    with pytest.raises(ValueError, match="PromptLookup: count must be 1 to 15, got 16"):
        PromptLookup(count=16)
    with pytest.raises(ValueError, match="DraftModel: count must be 1 to 15, got 0"):
        DraftModel(model, 0)
    with pytest.raises(ValueError, match="a drafter takes one prompt, got 2"):
        model.generate([[1], [2]], drafter=PromptLookup())
    with pytest.raises(ValueError, match="the vocabulary of the other, 60 tokens, got 50"):
        check_vocabulary(model, make("llama", vocab=50))
