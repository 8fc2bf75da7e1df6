"""Tokenizers are made, opened and saved; transformers opens what was saved."""

from __future__ import annotations

import collections
import itertools
import json
import random
import subprocess
import sys

import pytest

from fastlm.data import DataError
from fastlm.data import tokenizer as tokenizers
from fastlm.hf.tokenizer import load

TEXTS = [
    "Hello, world!  It's 12345 o'clock.\n\n\tThe end ",
    " leading, e\u0301, 天地 👩\u200d👧 €",
    "",
    "<|endoftext|>",
]


def train(texts=("the cat sat on the mat, the cat sat",) * 3, size=300, **options):
    return tokenizers.train_bpe(texts, size, **options)


MAKE = {
    "byte": tokenizers.byte_level,
    "char": lambda: tokenizers.char_level("".join(TEXTS)),
    "bpe": train,
    "gpt4": lambda: train(split="gpt4", special=("<|endoftext|>", "<|user|>")),
}


@pytest.mark.parametrize("kind", MAKE)
def test_round_trip(kind):
    text = MAKE[kind]()
    assert tokenizers.vocabulary(text) == text.vocab
    for sample in TEXTS[:3]:
        tokens = text.encode(sample)
        assert text.decode(tokens) == sample
        stream = text.streamer()
        assert "".join(map(stream, tokens)) == sample.rstrip("\ufffd")
    assert text.encode("<|endoftext|>") == [tokenizers.token_of(text, "eos_token")]


@pytest.mark.parametrize("kind", MAKE)
def test_transformers_opens_what_was_saved(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    text = MAKE[kind]()
    text.template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizers.save(text, tmp_path)
    ours, theirs = load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.special == text.special and ours.template == text.template
    assert theirs.eos_token == "<|endoftext|>" and len(theirs) == text.vocab
    for sample in [*TEXTS, "x<|endoftext|>y ."]:
        tokens = theirs(sample).input_ids
        assert tokens == ours.encode(sample) == text.encode(sample)
        assert theirs.decode(tokens, skip_special_tokens=True) == ours.decode(tokens)
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "hi"


def test_bytes_are_their_own_numbers():
    text = tokenizers.byte_level()
    sample = "aä€\n\0"
    assert text.encode(sample) == list(sample.encode())
    assert text.vocab == 257 and tokenizers.token_of(text, "eos_token") == 256
    assert [text.decode([i]) for i in range(128)] == [chr(i) for i in range(128)]


def test_characters_in_order():
    text = tokenizers.char_level("banana\n")
    assert text.encode("ab\nn") == [1, 2, 0, 3]
    assert (text.vocab, tokenizers.token_of(text, "eos_token")) == (6, 4)
    assert text.encode("axxb") == [1, 5, 5, 2]
    assert tokenizers.token_of(text, "unk_token") == 5
    with pytest.raises(DataError, match="at least one character"):
        tokenizers.char_level("")


def invented():
    rng = random.Random(0)
    return " ".join("".join(rng.choices("abcdeé", k=rng.randint(1, 6))) for _ in range(3000))


def test_training_is_deterministic():
    """In another process too, where hashes are seeded otherwise."""
    here = tokenizers.train_bpe([invented()], 600)
    code = "import sys; from fastlm.data.tokenizer import train_bpe;"
    code += "print(train_bpe([sys.stdin.read()], 600).tokenizer.to_str())"
    there = subprocess.run(
        [sys.executable, "-c", code], input=invented(), capture_output=True, text=True, check=True
    )
    assert there.stdout == here.tokenizer.to_str() + "\n"
    assert len(merges_of(here)) == 600 - 257


def merges_of(text):
    return [tuple(pair) for pair in json.loads(text.tokenizer.to_str())["model"]["merges"]]


def words_of(text, sample):
    pieces = text.tokenizer.pre_tokenizer.pre_tokenize_str(sample)
    return collections.Counter(tuple(word) for word, _ in pieces)


def test_every_merge_was_the_commonest_pair():
    """Against plain counting, merge by merge."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcde", k=rng.randint(1, 7))) for _ in range(400)]
    sample = " ".join(rng.choice(words) for _ in range(2000))
    text = tokenizers.train_bpe([sample], 340, min_frequency=1)
    counts = words_of(text, sample)
    for merge in merges_of(text):
        pairs = collections.Counter()
        for word, count in counts.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        assert pairs[merge] == max(pairs.values())
        counts = collections.Counter({joined(word, merge): count for word, count in counts.items()})


def joined(word, merge):
    out = []
    for letter in word:
        # a pair is joined from the left, and a letter is used once
        if out and out[-1] == merge[0] and letter == merge[1]:
            out[-1] = merge[0] + merge[1]
            out.append(None)  # the new token takes no part in this merge
        else:
            out.append(letter)
    return tuple(letter for letter in out if letter is not None)


def test_against_the_course_reference(data):
    """Same corpus, same size: the same merges but where two pairs are equally common."""
    folder = data / "tokenizers" / "bpe-train-reference"
    lines = (folder / "train-bpe-reference-merges.txt").read_text(encoding="utf-8").splitlines()
    reference = [tuple(line.split(" ")) for line in lines]
    sample = (folder / "corpus.en").read_text(encoding="utf-8")
    text = tokenizers.train_bpe([sample], 257 + len(reference), min_frequency=1)
    ours = merges_of(text)
    assert len(ours) == len(reference)
    assert ours[:20] == reference[:20]
    assert len(set(ours) & set(reference)) >= 0.95 * len(reference)


def test_min_frequency_and_a_small_corpus():
    text = train(["ab ab ab cd cd x"], 1000, min_frequency=3)
    assert merges_of(text) == [("a", "b"), ("Ġ", "ab")][: len(merges_of(text))]
    assert text.vocab < 260


def test_numbers_in_threes():
    long = ["year 1234567 " * 50] * 3
    pieces = []
    for split in ("gpt2", "gpt4"):
        text = tokenizers.train_bpe(long, 400, split=split)
        pieces.append([text.decode([token]) for token in text.encode(long[0][:13])])
        assert text.decode(text.encode(long[0])) == long[0]
    assert pieces == [["year", " 1234567", " "], ["year", " ", "123", "456", "7", " "]]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"size": 256}, "at least 257, 256 bytes and 1 special tokens, got 256"),
        ({"split": "gpt9"}, "split must be one of gpt2, gpt4, got 'gpt9'"),
        ({"min_frequency": 0}, "min frequency must be at least 1, got 0"),
    ],
)
def test_wrong_training(options, match):
    with pytest.raises(DataError, match=match):
        train(**options)


def test_gpt2_from_its_own_files(data, tmp_path):
    for path in ("gpt2", "gpt2/vocab.json"):
        text = tokenizers.open_tokenizer(data / "tokenizers" / path)
        assert text.encode("Hello world<|endoftext|>") == [15496, 995, 50256]
        assert (text.vocab, tokenizers.token_of(text, "eos_token")) == (50257, 50256)
    tokenizers.save(text, tmp_path)
    again = tokenizers.open_tokenizer(tmp_path / "tokenizer.json")
    assert again.encode("Hello world") == [15496, 995] and again.special == text.special


def test_a_tokenizer_of_another_model(data):
    text = tokenizers.open_tokenizer(data / "models" / "stories260K" / "hf")
    assert tokenizers.vocabulary(text) == 512
    assert tokenizers.token_of(text, "eos_token") == 2


def test_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", "</s>"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_eos_token_id(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = tokenizers.open_tokenizer(tmp_path / "m.gguf")
    assert text.encode("aba") == [2, 0] and text.special == {"eos_token": "</s>"}
    tokenizers.save(text, tmp_path / "out")
    assert load(tmp_path / "out").encode("ab</s>") == [2, 3]


def test_a_name_from_the_hubs_cache(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    snapshot = tmp_path / "models--who--what" / "snapshots" / "abc"
    tokenizers.save(tokenizers.byte_level(), snapshot)
    (tmp_path / "models--who--what" / "refs").mkdir()
    (tmp_path / "models--who--what" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **options: _download(name, cache_dir=str(tmp_path), **options),
    )
    assert tokenizers.open_tokenizer("who/what").vocab == 257
    with pytest.raises(DataError, match="who/other: no such file or folder, and no model of that"):
        tokenizers.open_tokenizer("who/other")


def _download(name, **options):
    from huggingface_hub._snapshot_download import snapshot_download

    return snapshot_download(name, local_files_only=True, **options)


def test_what_cannot_be_opened(tmp_path):
    def refuse(path, match):
        with pytest.raises(DataError, match=match):
            tokenizers.open_tokenizer(path)

    refuse(tmp_path / "no", "no: no such file or folder")
    refuse(tmp_path, r"there is no tokenizer\.json and no vocab\.json and no merges\.txt")
    (tmp_path / "vocab.json").write_text("{}")
    refuse(tmp_path, r"no tokenizer\.json and no merges\.txt")
    (tmp_path / "merges.txt").write_text("a b\n")
    refuse(tmp_path, r"vocab\.json and merges\.txt do not fit")
    (tmp_path / "tokenizer.json").write_text("{}")
    refuse(tmp_path, "not a tokenizer")
    (tmp_path / "other.json").write_text("[]")
    refuse(tmp_path / "other.json", r"other\.json: not a tokenizer")


def test_a_vocabulary_with_gaps():
    from tokenizers import Tokenizer, models

    gap = Tokenizer(models.BPE(vocab={"a": 0, "b": 9}, merges=[]))
    assert tokenizers.vocabulary(tokenizers.Text(gap)) == 10
