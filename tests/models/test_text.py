"""Text out of tokens: characters whole, stop strings never shown, batches as each alone."""

from __future__ import annotations

import itertools

import pytest

from fastlm.hf import tokenizer
from fastlm.models import Decoder
from fastlm.models.text import Answer, StopStrings, complete, stream_text


@pytest.fixture(scope="module")
def opened(byte_model):
    model = Decoder.from_pretrained(byte_model)
    return model, tokenizer.load(byte_model)


def feed(stop: StopStrings, pieces) -> list[str]:
    return [*(stop.feed(piece) for piece in pieces), stop.rest()]


def test_a_stop_string_is_found_however_it_is_cut():
    text, stops = "abcabxabcabyzzSTOPrest", ["abcaby", "STOP"]
    for cuts in itertools.chain.from_iterable(
        itertools.combinations(range(1, len(text)), n) for n in (0, 1, 2, 3)
    ):
        pieces = [text[i:j] for i, j in itertools.pairwise((0, *cuts, len(text)))]
        stop = StopStrings(stops)
        assert "".join(feed(stop, pieces)) == "abcabx" and stop.found == "abcaby"


def test_only_the_beginning_of_a_stop_string_is_held_back():
    stop = StopStrings(["aab"])
    assert feed(stop, ["x", "a", "a", "a", "c", "aa"]) == ["x", "", "", "a", "aac", "", "aa"]
    assert stop.found is None


def test_the_first_stop_string_wins():
    stop = StopStrings(["bc", "abc"])
    assert stop.feed("xabcd") == "x" and stop.found == "abc"
    assert stop.feed("more") == "" and stop.rest() == ""


@pytest.mark.parametrize("strings", [[""], ["a", ""], [3]])
def test_an_empty_stop_string_is_refused(strings):
    with pytest.raises(ValueError, match="generate: stop must be strings of text, got"):
        StopStrings(strings)


def test_characters_come_whole(opened):
    _, text = opened
    for words in ("naïve 😀 über", "日本語", "👩‍👩‍👧 family"):
        tokens = text.encode(words)
        step = text.streamer()
        pieces = [step(token) for token in tokens]
        assert "".join(pieces) == words
        assert all("\ufffd" not in piece for piece in pieces)


def test_what_is_no_utf8_comes_in_the_end(opened):
    _, text = opened
    broken = [text.encode("😀")[0], *text.encode("ab")]
    step = text.streamer()
    assert "".join(step(token) for token in broken) == "\ufffdab"
    lone = [text.encode("é")[1]] * 40  # continuation bytes without a beginning
    step = text.streamer()
    assert set("".join(step(token) for token in lone)) == {"\ufffd"}


def test_the_space_of_a_first_word_is_kept(stories):
    text = tokenizer.load(stories)
    words = "Once upon a time, there was a dog. 😀 It ran"
    tokens = text.encode(words)
    for cut in range(1, len(tokens)):
        step = text.streamer(tokens[:cut])
        whole = text.decode(tokens[:cut]) + "".join(step(token) for token in tokens[cut:])
        if not text.decode(tokens[:cut]).endswith("\ufffd"):
            assert whole == words


def test_streamed_pieces_are_the_decoded_text(opened):
    model, text = opened
    tokens = text.encode("hello")
    for seed in range(3):
        options = {"temperature": 1.0, "seed": seed, "eos": ()}
        made = model.generate(tokens, 60, vocab_limit=256, **options)
        streamed = "".join(stream_text(model, text, tokens, 60, **options, vocab_limit=256))
        # an unfinished character at the very end is left out
        assert (text.decode(tokens + made)[len("hello") :]).rstrip("\ufffd") == streamed.rstrip(
            "\ufffd"
        )


def test_a_batch_gives_the_texts_of_each_prompt_alone(opened):
    model, text = opened
    prompts = [text.encode(p) for p in ("a", "hello there", "The", "x" * 30, "12345")]
    for options in ({}, {"temperature": 0.9, "top_k": 20}, {"repetition_penalty": 1.5}):
        found = complete(model, text, prompts, 25, batch_size=2, seed=3, **options)
        for i, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
            alone = complete(model, text, [prompt], 25, seed=3 + i, **options)[0]
            assert one == alone
            assert one.text == "".join(stream_text(model, text, prompt, 25, seed=3 + i, **options))
            assert max(one.tokens) < text.vocab


def test_a_stop_string_ends_one_sequence_of_a_batch(opened):
    model, text = opened
    prompts = [text.encode(p) for p in ("abc", "hello")]
    free = complete(model, text, prompts, 40, eos=(), temperature=1.0)
    letters = free[0].text
    stop = next(letters[i : i + 2] for i in range(3, 30) if letters[i : i + 2] not in free[1].text)
    ended = complete(model, text, prompts, 40, eos=(), temperature=1.0, stop=[stop])
    assert ended[0].text == letters[: letters.index(stop)] and ended[0].finish == "stop"
    assert ended[1] == free[1] and ended[1].finish == "length"
    assert len(ended[0].tokens) < 40
    streamed = stream_text(
        model, text, prompts[0], 40, eos=(), temperature=1.0, stop=[stop], seed=0
    )
    assert "".join(streamed) == ended[0].text


def test_an_end_token_is_no_text(opened):
    model, text = opened
    prompt = text.encode("abc")
    free = complete(model, text, [prompt], 10, eos=(), temperature=1.0)[0]
    ended = complete(model, text, [prompt], 10, eos=free.tokens[4], temperature=1.0)[0]
    assert ended.finish == "end" and ended.tokens == free.tokens[:5]
    assert ended.text == free.text[: len(ended.text)]


def test_a_tokenizer_of_another_model_is_refused(opened):
    model, text = opened
    smaller = Decoder(type(model.config)(vocab=100, hidden=8, layers=1, heads=1))
    with pytest.raises(ValueError, match="tokenizer: its tokens must be below 100"):
        stream_text(smaller, text, [1, 2])
    with pytest.raises(ValueError, match="complete: batch_size must be 1 or more, got 0"):
        complete(model, text, [[1]], batch_size=0)


def test_a_text_that_is_no_unicode_is_refused(opened):
    with pytest.raises(ValueError, match="tokenizer: the text must be Unicode"):
        opened[1].encode("a\udcff")


def test_an_answer_says_why_it_ended(opened):
    _, text = opened
    answer = Answer(text, [], [257], ["END"])
    assert [answer.add(t) for t in text.encode("abEN")] == ["a", "b", "", ""]
    assert answer.close() == "EN" and answer.completion.finish == "length"
    assert answer.completion.text == "abEN"
