"""Evaluation: the definitions, checked against plain computations; padding changes nothing."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from byte_text import byte_text

from fastlm import tasks
from fastlm.hf import tokenizer
from fastlm.models import Config, Decoder
from fastlm.train import evaluate as ev
from fastlm.train import evaluate_metrics as metrics
from fastlm.train.evaluate_tasks import answers, evaluate

VOCAB = 262


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(3)
    config = Config(VOCAB, 32, 2, 4, kv_heads=2, max_positions=48, eos_ids=(VOCAB - 1,))
    decoder = Decoder(config).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)  # far from uniform
    return decoder


@functools.cache
def exact(model: Decoder) -> Decoder:
    """The same in float64."""
    wide = Decoder(model.config).double().eval()
    wide.load_state_dict(model.state_dict())
    return wide


def losses(model: Decoder, tokens: list[int]) -> torch.Tensor:
    """[T - 1] in float64: the oracle."""
    with torch.no_grad():
        logits = exact(model)(torch.tensor([tokens[:-1]]))[0]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), generator=generator).tolist()


def test_scores_are_sums_of_log_probabilities(model):
    pairs = [(random_tokens(n, n), random_tokens(m, m)) for n, m in ((3, 2), (20, 1), (1, 9))]
    alone = [ev.score(model, [pair])[0] for pair in pairs]
    for batch_size in (1, 2, 3):
        for (context, rest), score, single in zip(
            pairs, ev.score(model, pairs, batch_size=batch_size), alone, strict=True
        ):
            wanted = -float(losses(model, context + rest)[-len(rest) :].sum())
            assert score.tokens == len(rest)
            # a sum of up to 9 log-probabilities in fp32, each of a few roundings of about 10
            assert abs(score.logprob - wanted) < 9 * 10 * 2**-20
            assert abs(score.logprob - single.logprob) < 9 * 10 * 2**-20
    with pytest.raises(ValueError, match="at least one token"):
        ev.score(model, [([], [1])])


def test_greedy_continuations_are_found(model):
    context = random_tokens(5, 1)
    best = model.generate(context, 4, eos=())
    other = [*best[:3], (best[3] + 1) % VOCAB]
    found = ev.score(model, [(context, best), (context, other)], batch_size=2)
    assert [s.greedy for s in found] == [True, False]


def test_a_long_context_loses_its_beginning(model):
    context, rest = random_tokens(100, 1), random_tokens(4, 2)
    (score,) = ev.score(model, [(context, rest)])
    short = ev.score(model, [((context + rest)[-49:-4], rest)])[0]
    assert score == short


@pytest.mark.parametrize("window, stride", [(None, None), (16, None), (16, 4), (7, 1), (1, 1)])
def test_every_token_is_predicted_once(model, window, stride):
    text = byte_text()
    documents = ["Once upon a time, " * 3, "é", "The end."]
    found = ev.text_loss(model, text, documents, window=window, stride=stride, batch_size=3)
    width, step = window or 48, stride or window or 48
    wanted, count = 0.0, 0
    prefix = text.tokenizer.token_to_id("</s>")
    for document in documents:
        tokens = [prefix, *text.encode(document)]
        for i in range(1, len(tokens)):  # which window predicts token i
            end = width
            while end < i:
                end += step
            end = min(end, len(tokens) - 1)
            start = max(0, end - width)
            wanted += float(losses(model, tokens[start : i + 1])[-1])
            count += 1
    assert found.tokens == count
    assert found.bytes == sum(len(d.encode()) for d in documents)
    assert found.loss == pytest.approx(wanted / count, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(wanted / math.log(2) / found.bytes, rel=1e-5)
    assert found.lossless


def test_more_context_never_costs_a_token(model):
    """The same tokens are counted whatever the stride."""
    text, documents = byte_text(), ["abc " * 40]
    sizes = {ev.text_loss(model, text, documents, window=16, stride=s).tokens for s in (1, 5, 16)}
    assert sizes == {160}


def test_a_tokenizer_that_drops_text_is_told():
    from tokenizers import normalizers

    text = byte_text()
    text.tokenizer.normalizer = normalizers.Lowercase()
    decoder = Decoder(Config(VOCAB, 16, 1, 2)).eval()
    assert not ev.text_loss(decoder, text, ["Abc"]).lossless


def test_refuses(model):
    text = byte_text()
    with pytest.raises(ValueError, match="stride must be between 1 and 8, got 9"):
        ev.text_loss(model, text, ["a"], window=8, stride=9)
    with pytest.raises(ValueError, match="window must be between 1 and 48, got 49"):
        ev.text_loss(model, text, ["a"], window=49)
    with pytest.raises(ValueError, match="the text is empty"):
        ev.text_loss(model, text, [""])
    small = Decoder(Config(100, 16, 1, 2))
    with pytest.raises(ValueError, match=r"its tokens must be below 100, .* got 261"):
        ev.text_loss(small, text, ["a"])
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        ev.text_loss(model, text, ["a"], batch_size=0)
    with pytest.raises(ValueError, match="there are no rows"):
        evaluate(model, text, tasks.load("copa"), [])


# ---- tasks -------------------------------------------------------------------------------------

QUESTIONS = [
    {"query": "He fell,", "choices": ["so it hurt.", "so he flew to the moon."], "gold": 0},
    {"query": "Why", "choices": ["not?", "é", "the sky is blue"], "gold": 1},
    {"query": "It rained, therefore", "choices": ["dry", "they all got wet"], "gold": 1},
]


def test_choices_by_lm_evals_definitions(model):
    """acc: the largest sum; acc_norm: for each character; acc_bytes: for each byte."""
    text = byte_text()
    rows = [(f"q:{i}", row) for i, row in enumerate(QUESTIONS)]
    right = dict.fromkeys(("acc", "acc_norm", "acc_bytes"), 0)
    for row in QUESTIONS:
        sums = []
        for choice in row["choices"]:
            context = text.encode(row["query"])
            whole = text.encode(f"{row['query']} {choice}")
            sums.append(-float(losses(model, whole)[len(context) - 1 :].sum()))
        for name, size in (
            ("acc", lambda c: 1),
            ("acc_norm", len),
            ("acc_bytes", lambda c: len(c.encode())),
        ):
            each = [s / size(c) for s, c in zip(sums, row["choices"], strict=True)]
            right[name] += each.index(max(each)) == row["gold"]
    for batch_size in (1, 2, 8):
        found = evaluate(model, text, tasks.load("copa"), rows, batch_size=batch_size)
        assert {n: round(found.scores[n] * 3) for n in right} == right
    spread = math.sqrt(found.scores["acc"] * (1 - found.scores["acc"]) / 2)
    assert found.scores["acc_stderr"] == spread


def test_a_sentence_without_context_begins_at_the_prefix(model):
    """BLiMP compares whole sentences."""
    text = byte_text()
    row = {"sentence_good": "He was.", "sentence_bad": "He were."}
    (sample,) = evaluate(model, text, tasks.load("blimp"), [("b:1", row)]).samples
    prefix = text.tokenizer.token_to_id("</s>")
    for sentence, logprob in zip(row.values(), sample["logprobs"], strict=True):
        wanted = losses(model, [prefix, *text.encode(sentence)]).sum()
        assert logprob == pytest.approx(-float(wanted), rel=1e-5)


def test_last_words(model):
    text = byte_text()
    rows = [("l:1", {"text": "the cat sat on the mat"}), ("l:2", {"text": "one two three "})]
    found = evaluate(model, text, tasks.load("last_word"), rows)
    sums = [
        float(losses(model, text.encode(whole))[-size:].sum())
        for whole, size in (
            ("the cat sat on the mat", 4),
            ("one two three", len(text.encode(" three"))),
        )
    ]
    assert found.scores["perplexity"] == pytest.approx(math.exp(sum(sums) / 2), rel=1e-4)
    assert found.samples[1]["gold"] == "three"


def test_generated_answers_do_not_depend_on_the_batch(model):
    text = byte_text()
    prompts = [random_tokens(n, n) for n in (3, 30, 9, 1)]
    alone = [answers(model, text, [p], max_new_tokens=12)[0] for p in prompts]
    for batch_size in (2, 4):
        assert answers(model, text, prompts, max_new_tokens=12, batch_size=batch_size) == alone
    stop = alone[1][3]
    cropped = answers(model, text, prompts, max_new_tokens=12, stop=[stop], batch_size=4)
    assert cropped == [answer.split(stop)[0].strip() for answer in alone]


def test_chat_prompts_go_through_the_template():
    decoder = Decoder(Config(VOCAB, 16, 1, 2, max_positions=256)).eval()
    text = byte_text("<{% for m in messages %}{{ m['content'] }}{% endfor %}>")
    row = [("r:1", {"text": "fine", "label": "positive"})]
    task = tasks.load("sentiment")
    asked = evaluate(decoder, text, task, row).samples[0]["logprobs"]
    plain = evaluate(decoder, text, task, row, chat=False).samples[0]["logprobs"]
    assert asked != plain
    prompt = text.encode(f"<{task.fill_prompt(row[0][1])}>")
    pair = ev.score(decoder, [(prompt, text.encode("negative"))])[0]
    assert pair.logprob == pytest.approx(asked[0], rel=1e-6)
    with pytest.raises(ValueError, match="has no chat template"):
        evaluate(decoder, byte_text(), task, row, chat=True)


# ---- metrics -----------------------------------------------------------------------------------


def test_squad_metrics():
    assert metrics.normalize("The  Cat, a dog!") == "cat dog"
    assert metrics.exact_match(["The cat.", "dog"], [["cat"], ["cat", "a dog"]]) == {
        "exact_match": 1.0
    }
    # one of two words right, of three wanted: 2 * 1 / (2 + 3)
    assert metrics.word_f1("red car", "big red house") == pytest.approx(0.4)
    assert metrics.word_f1("", "the") == 1.0 and metrics.word_f1("", "x") == 0.0
    assert metrics.f1(["red car"], [["x", "red car"]]) == {"f1": 1.0}


def test_entities_count_whole():
    found = metrics.entity_f1(
        ["person: Ada; place: London; place: London", "none"],
        [["person: Ada; place: London"], ["person: Bob"]],
    )
    assert found == pytest.approx(
        {"entity_precision": 2 / 3, "entity_recall": 2 / 3, "entity_f1": 2 / 3}
    )
    assert metrics.entity_f1(["none"], [["none"]])["entity_f1"] == 1.0


def test_bleu_and_rouge_are_the_libraries():
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    same = ["the cat sat on the mat today"]
    assert metrics.bleu(same, [same]) == {"bleu": pytest.approx(100)}
    assert metrics.bleu(["a b c d e"], [["v w x y z", "u v w x y"]])["bleu"] < 20
    assert metrics.rouge(same, [["x", same[0]]])["rougeL"] == pytest.approx(1)


def test_stories_loss(data):
    """The figure that is known of this model on this text."""
    path = data / "models" / "stories260K" / "hf"
    sample = data / "tokenizers" / "bpe-train-reference" / "tinystories_sample.txt"
    if not path.is_dir() or not sample.is_file():
        pytest.skip("no stories260K")
    documents = [d.strip() for d in sample.read_text().split("<|endoftext|>")]
    found = ev.text_loss(
        Decoder.from_pretrained(path), tokenizer.load(path), [d for d in documents if d]
    )
    assert round(found.loss, 2) == 1.27
