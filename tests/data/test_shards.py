"""Token shards: what is written is read back; what was damaged is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from fastlm.data import DataError
from fastlm.data.shards import SplitWriter, TokenDataset, read_manifest, write_manifest


def write(folder, documents, vocab=300, shard_tokens=1 << 20, validation=((7, 8),)):
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    splits = {}
    for split, texts in (("train", documents), ("validation", validation)):
        writer = SplitWriter(folder, split, vocab, shard_tokens)
        for text in texts:
            writer.append(text)
        splits[split] = writer.close()
    write_manifest(folder, splits=splits, vocab=vocab, eos=0, note="ä")


def documents(count=20, vocab=300, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab, random.integers(0, 30)) for _ in range(count)]


@pytest.mark.parametrize("vocab", [300, 65536, 65537])
@pytest.mark.parametrize("shard_tokens", [1, 7, 1 << 20])
def test_round_trip(tmp_path, vocab, shard_tokens):
    texts = documents(vocab=vocab)
    texts[3][:1] = vocab - 1
    write(tmp_path, texts, vocab, shard_tokens)
    data = TokenDataset(tmp_path, "train")
    flat = np.concatenate(texts)
    assert data.tokens.dtype == (np.uint16 if vocab <= 65536 else np.uint32)
    assert len(data) == len(texts) and len(data.tokens) == len(flat)
    for i, text in enumerate(texts):
        np.testing.assert_array_equal(data.document(i), text)
    np.testing.assert_array_equal(data.document(-1), texts[-1])
    np.testing.assert_array_equal(data.offsets, np.cumsum([0, *map(len, texts)]))
    assert data.offsets.dtype == np.int64
    assert (data.eos, data.vocab, data.manifest["note"]) == (0, vocab, "ä")
    assert (data.tokenizer / "tokenizer.json").is_file()
    np.testing.assert_array_equal(TokenDataset(tmp_path, "validation").tokens[:], [7, 8])
    data.verify()


def test_shards_index_like_one_array(tmp_path):
    texts = documents(30)
    flat = np.concatenate(texts)
    write(tmp_path, texts, shard_tokens=11)
    tokens = TokenDataset(tmp_path, "train").tokens
    assert tokens.shape == flat.shape
    shards = read_manifest(tmp_path)["splits"]["train"]["shards"]
    assert len(shards) == -(-len(flat) // 11)
    random = np.random.default_rng(1)
    for _ in range(200):
        a, b = random.integers(-len(flat) - 5, len(flat) + 5, 2)
        step = [1, 2, -1, -3][random.integers(4)]
        np.testing.assert_array_equal(tokens[a:b:step], flat[a:b:step])
        i = random.integers(-len(flat), len(flat), (2, 3))
        np.testing.assert_array_equal(tokens[i], flat[i])
        assert tokens[int(i[0, 0])] == flat[i[0, 0]]
    np.testing.assert_array_equal(np.asarray(tokens), flat)
    np.testing.assert_array_equal(tokens[:], flat)
    for bad in (len(flat), -len(flat) - 1, np.array([len(flat)])):
        with pytest.raises(IndexError):
            tokens[bad]
    with pytest.raises(TypeError):
        tokens[np.array([True])]
    view = tokens[1:5]
    assert view.base is not None, "a slice inside a shard is a view"


def test_a_document_in_pieces(tmp_path):
    writer = SplitWriter(tmp_path, "train", 10)
    writer.append([1, 2], ends=False)
    writer.append([3])
    writer.append([])
    facts = writer.close()
    offsets = np.fromfile(tmp_path / "train" / "offsets.bin", "<i8")
    assert (facts["documents"], facts["tokens"], list(offsets)) == (2, 3, [0, 3, 3])


@pytest.mark.parametrize("bad", [-1, 10])
def test_tokens_beyond_the_vocabulary_are_refused(tmp_path, bad):
    with pytest.raises(DataError, match=rf"must be in \[0, 10\), got {bad}"):
        SplitWriter(tmp_path, "train", 10).append([1, bad, 2])


def test_an_empty_split(tmp_path):
    write(tmp_path, [[1, 2]], validation=())
    data = TokenDataset(tmp_path, "validation")
    assert len(data) == len(data.tokens) == 0
    with pytest.raises(IndexError, match="document"):
        data.document(0)
    with pytest.raises(DataError, match=r"train holds 2 tokens; a block of 2 needs 3"):
        TokenDataset(tmp_path, "train").require(2)
    TokenDataset(tmp_path, "train").require(1)


def damage_size(folder):
    with open(folder / "train" / "00000.bin", "ab") as file:
        file.truncate(10)
    return r"train/00000.bin: expected \d+ bytes, got 10"


def damage_end(folder):
    with open(folder / "train" / "00000.bin", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    return "train/00000.bin: not the file that was written"


def damage_offsets(folder):
    shutil.copy(folder / "validation" / "offsets.bin", folder / "train" / "offsets.bin")
    return "train/offsets.bin: expected"


def damage_missing(folder):
    (folder / "train" / "00000.bin").unlink()
    return "train/00000.bin: the file is missing"


def damage_manifest(folder):
    (folder / "manifest.json").write_text('{"format": 1')
    return "manifest.json: not a manifest"


def damage_version(folder):
    manifest = read_manifest(folder) | {"version": 9}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "expected format fastlm-tokens version 1"


def damage_count(folder):
    manifest = read_manifest(folder)
    manifest["splits"]["train"]["documents"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "should hold 21 documents"


def damage_entry(folder):
    manifest = read_manifest(folder)
    del manifest["splits"]["train"]["shards"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "an entry is missing: KeyError"


def no_manifest(folder):
    (folder / "manifest.json").unlink()
    return "not a folder that `fastlm prepare` wrote"


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", [*DAMAGES, no_manifest])
def test_damage_is_named(tmp_path, damage):
    write(tmp_path, documents())
    text = damage(tmp_path)
    with pytest.raises(DataError, match=text):
        TokenDataset(tmp_path, "train")


def test_verify_reads_everything(tmp_path):
    write(tmp_path, [np.arange(100_000) % 300])
    with open(tmp_path / "train" / "00000.bin", "r+b") as file:
        file.seek(100_000)
        file.write(b"\xff")
    data = TokenDataset(tmp_path, "train")
    with pytest.raises(DataError, match=r"00000.bin: not the file"):
        data.verify()


def test_wrong_calls(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        TokenDataset(tmp_path / "no", "train")
    with pytest.raises(DataError, match="split must be one of train, validation"):
        TokenDataset(tmp_path, "test")
