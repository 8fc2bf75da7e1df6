"""Equal and nearly equal documents."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fastlm.data import DataError
from fastlm.data.dedup import MinHash, candidates, equal, jaccard, near_duplicates, run_hashes
from fastlm.data.sources import Reading, Sources


def find(texts, threshold=0.7, words=3, **options):
    hasher = MinHash(threshold, words, **options)
    keys = np.array([hasher.keys(hasher.runs(text)) for text in texts])
    rows = np.arange(len(texts))
    return {
        later: (earlier, similarity)
        for later, earlier, similarity in near_duplicates(keys, hasher, texts.__getitem__, rows)
    }


def edited(text, share, rng, words=()):
    """The text with a share of its words replaced."""
    parts = text.split(" ")
    for i in rng.sample(range(len(parts)), round(share * len(parts))):
        parts[i] = rng.choice(words or ["kumquat", "zither", "gnu", "axolotl"])
    return " ".join(parts)


def sets(text, words):
    import re

    found = re.findall(r"\w+", text.lower())
    count = max(1, len(found) - words + 1)
    return {" ".join(found[i : i + words]) for i in range(count)} if found else set()


@pytest.mark.parametrize("words", [1, 3, 5])
def test_runs_of_words_against_sets(words):
    rng = random.Random(1)
    names = ["a", "ab", "b", "ba", "élan", "Zug", "x1", "snake_case"]
    for length in (0, 1, 2, words, words + 1, 50):
        a = " ".join(rng.choice(names) for _ in range(length))
        b = edited(a, 0.2, rng, names) if a else "a, b!  \n AB"
        left, right = run_hashes(a, words), run_hashes(b, words)
        true_left, true_right = sets(a, words), sets(b, words)
        assert len(left) == len(true_left) and (np.diff(left.astype(object)) > 0).all()
        union = len(true_left | true_right)
        assert jaccard(left, right) == (len(true_left & true_right) / union if union else 0)


def test_runs_ignore_case_space_and_punctuation():
    a = run_hashes("The cat -- it sat, there.", 3)
    assert np.array_equal(a, run_hashes("the\ncat it  SAT there", 3))
    assert not np.array_equal(a, run_hashes("thecat it sat there", 3))


def test_long_texts_in_slices():
    rng = random.Random(0)
    text = " ".join(f"w{rng.randrange(10**6)}" for _ in range(60_000))
    whole = sets(text, 3)
    assert len(text) > 3 * (1 << 17)
    assert 0 <= len(whole) - len(run_hashes(text, 3)) <= 12


def test_characters_are_words_where_no_spaces_are():
    a = "天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏閏餘成歲律呂調陽"
    assert len(run_hashes(a, 3)) == len(a) - 2
    assert 1 in find([a, a.replace("暑", "春")])


def test_equal_names_the_first():
    digests = np.array([[5, 1], [2, 2], [5, 1], [5, 2], [2, 2], [5, 1]], np.uint64)
    assert list(equal(digests)) == [0, 1, 0, 3, 1, 0]
    assert list(equal(np.empty((0, 2), np.uint64))) == []


def test_candidates_pair_what_shares_a_band():
    keys = np.array([[1, 9], [2, 9], [3, 8], [1, 7], [0, 0], [0, 0]], np.uint64)
    assert candidates(keys, np.arange(6)).tolist() == [[0, 1], [0, 3]]
    assert candidates(keys, np.array([1, 2, 3])).tolist() == []
    assert candidates(keys[:0], np.arange(0)).shape == (0, 2)


def test_many_copies_cost_little_and_all_are_found():
    rng = random.Random(0)
    text = " ".join(f"w{i}" for i in range(200))
    texts = [edited(text, 0.02, rng) for _ in range(400)]
    found = find(texts)
    assert set(found) == set(range(1, 400))
    hasher = MinHash(0.7)
    keys = np.array([hasher.keys(hasher.runs(text)) for text in texts])
    assert len(candidates(keys, np.arange(400))) < 400 * 17 * hasher.bands


def test_no_chain_of_likenesses():
    """b is like a and c like b, but c is not like a: c stays, for b is gone."""
    rng = random.Random(3)
    a = " ".join(f"w{i}" for i in range(300))
    b = edited(a, 0.07, rng)
    c = edited(b, 0.07, rng)
    similar = [jaccard(run_hashes(x, 3), run_hashes(y, 3)) for x, y in ((a, b), (b, c), (a, c))]
    assert similar[0] > 0.65 < similar[1] and similar[2] < 0.65
    assert list(find([a, b, c], 0.65)) == [1]


def test_the_probability_of_a_candidate_is_as_promised():
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 1.0):
        hasher = MinHash(threshold)
        assert hasher.bands * hasher.rows <= 128
        assert 1 - (1 - threshold**hasher.rows) ** hasher.bands >= 0.99


def test_minhash_estimates_similarity():
    """The share of agreeing minima is the similarity: mean of a binomial, checked to 4 sigma."""
    rng = random.Random(0)
    hasher = MinHash(0.001, hashes=4096)
    assert hasher.rows == 1
    a = " ".join(f"w{rng.randrange(10**6)}" for _ in range(600))
    for share in (0.02, 0.1, 0.3):
        left, right = hasher.runs(a), hasher.runs(edited(a, share, rng))
        true = jaccard(left, right)
        estimate = float((hasher.keys(left) == hasher.keys(right)).mean())
        assert abs(estimate - true) < 4 * (true * (1 - true) / 4096) ** 0.5 + 0.002


def test_recall_on_real_reviews(data):
    reading = Reading(include=["*.txt"])
    source = Sources([data / "corpora" / "movie_reviews.zip"], reading).documents()
    texts = [document.text for document, _ in zip(source, range(500), strict=False)]
    rng = random.Random(0)
    vocabulary = " ".join(texts[:20]).split()
    before = find(texts)
    copies = {}
    for i in rng.sample(sorted(set(range(500)) - set(before)), 100):
        copies[len(texts) + len(copies)] = i
    texts += [edited(texts[i], rng.uniform(0.01, 0.06), rng, vocabulary) for i in copies.values()]
    found = find(texts)
    true = {
        copy
        for copy, i in copies.items()
        if jaccard(run_hashes(texts[copy], 3), run_hashes(texts[i], 3)) >= 0.7
    }
    assert len(true) > 60
    assert len(true & set(found)) >= 0.97 * len(true)
    assert set(found) - set(copies) == set(before), "no original is dropped for a copy"
    assert all(found[copy][0] == copies[copy] for copy in found if copy in copies)


@pytest.mark.parametrize("threshold", [0, -1, 1.1])
def test_wrong_thresholds(threshold):
    with pytest.raises(DataError, match=r"threshold must be in \(0, 1\]"):
        MinHash(threshold)
    with pytest.raises(DataError, match="words must be at least 1"):
        MinHash(0.5, 0)
