"""From files to shards: nothing lost, nothing on both sides, nothing half-written."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from fastlm.data import DataError, encode, sources
from fastlm.data import tokenizer as tokenizers
from fastlm.data.clean import Cleaning
from fastlm.data.dedup import jaccard, run_hashes
from fastlm.data.prepare import Selection, prepare
from fastlm.data.shards import TokenDataset
from fastlm.data.sources import Reading

WORDS = [f"{a}{b}" for a in ("lo", "ra", "mi", "tu", "se") for b in ("na", "k", "vim", "st", "o")]


def story(rng, words=60):
    return " ".join(rng.choice(WORDS) for _ in range(words)) + f". {rng.randrange(10**9)}\n"


def stories(folder, count=40, seed=0):
    rng = random.Random(seed)
    texts = [story(rng) for _ in range(count)]
    file = folder / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file, texts


def documents(out, split):
    opened = TokenDataset(out, split)
    text = tokenizers.open_tokenizer(out / "tokenizer")
    return [text.decode(opened.document(i)) for i in range(len(opened))]


def test_every_document_comes_back(tmp_path):
    file, texts = stories(tmp_path)
    manifest = prepare([file], tmp_path / "out", "byte", shard_tokens=1000)
    train, validation = (documents(tmp_path / "out", s) for s in ("train", "validation"))
    assert len(validation) == 4
    assert sorted(train + validation) == sorted(texts)
    assert train == [text for text in texts if text in train], "in the order of the source"
    for split, found in (("train", train), ("validation", validation)):
        opened = TokenDataset(tmp_path / "out", split)
        opened.verify()
        assert opened.eos == 256 and opened.vocab == 257
        assert all(opened.document(i)[-1] == 256 for i in range(len(opened)))
        facts = manifest["splits"][split]
        assert facts["bytes"] == facts["characters"] == sum(map(len, found))
        assert facts["tokens"] == sum(map(len, found)) + len(found) == len(opened.tokens)
    assert len(TokenDataset(tmp_path / "out", "train").manifest["splits"]["train"]["shards"]) > 1
    assert manifest["documents"] == {"read": 40, "kept": 40, "dropped": {}}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json", "tokenizer", "train", "validation",
    ]  # fmt: skip


def test_the_same_input_gives_the_same_files(tmp_path):
    file, _ = stories(tmp_path)
    for name in ("a", "b"):
        prepare([file], tmp_path / name, "char")
    prepare([file], tmp_path / "c", "char", selection=Selection(seed=1))
    a, b, c = (
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}
        for name in "abc"
        if (files := [path for path in (tmp_path / name).rglob("*") if path.is_file()])
    )
    assert a == b
    assert a["validation/00000.bin"] != c["validation/00000.bin"]


def test_gpt2_on_tinyshakespeare(data, tmp_path):
    """nanoGPT's published counts: 90/10 by characters, no end tokens."""
    source = data / "corpora" / "tinyshakespeare.txt"
    gpt2 = data / "tokenizers" / "gpt2"
    manifest = prepare([source], tmp_path / "out", gpt2, eos=False)
    counts = [manifest["splits"][split]["tokens"] for split in ("train", "validation")]
    assert counts == [301_966, 36_059]
    text = source.read_text()
    assert documents(tmp_path / "out", "train") == [text[: len(text) * 9 // 10]]
    assert documents(tmp_path / "out", "validation") == [text[len(text) * 9 // 10 :]]
    assert TokenDataset(tmp_path / "out", "train").eos is None


def test_the_tail_of_many_documents(tmp_path):
    file, texts = stories(tmp_path, 10)
    prepare([file], tmp_path / "out", "byte", selection=Selection(validation=0.25, split="tail"))
    train, validation = (documents(tmp_path / "out", s) for s in ("train", "validation"))
    assert "".join(train + validation) == "".join(texts)
    assert len("".join(train)) == int(len("".join(texts)) * 0.75)
    assert train[:7] == texts[:7] and validation[-1] == texts[-1]


@pytest.mark.parametrize("split", ["documents", "tail"])
def test_no_validation(tmp_path, split):
    file, texts = stories(tmp_path)
    prepare([file], tmp_path / "o", "byte", selection=Selection(validation=0, split=split))
    assert documents(tmp_path / "o", "train") == texts
    assert documents(tmp_path / "o", "validation") == []


def test_a_long_document_in_parts_is_one(tmp_path, monkeypatch):
    """The work is done in small parts; tokens and documents are those of the whole."""
    _, texts = stories(tmp_path, 12)
    (tmp_path / "long.txt").write_text("".join(texts))
    text = tokenizers.train_bpe(texts, 400)
    for name, longest in (("whole", 1 << 20), ("parts", 700)):
        monkeypatch.setattr(sources, "LONGEST", longest)
        prepare([tmp_path / "long.txt"], tmp_path / name, text)
    monkeypatch.undo()
    for split in ("train", "validation"):
        whole, parts = (TokenDataset(tmp_path / name, split) for name in ("whole", "parts"))
        assert len(parts) == len(whole) == 1
        # a cut at a line end may fall inside one token of the whole
        assert abs(len(parts.tokens) - len(whole.tokens)) <= 12
        assert documents(tmp_path / "whole", split) == documents(tmp_path / "parts", split)


def test_a_part_dropped_ends_its_document(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST", 100)
    long = "a b " * 30 + "\n" * 300
    for name, text in (("1.txt", long), ("2.txt", "second")):
        (tmp_path / name).write_text(text)
    prepare([tmp_path], tmp_path / "o", "byte", selection=Selection(validation=0, near=None))
    assert documents(tmp_path / "o", "train")[-1] == "second"


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "models/stories260K/hf"])
def test_pieces_have_the_tokens_of_the_whole(data, monkeypatch, name):
    text = tokenizers.open_tokenizer(data / name)
    sample = (data / "corpora" / "tinyshakespeare.txt").read_text()[:60_000]
    encoder = encode.Encoder(text)
    monkeypatch.setattr(encode, "_PIECE", 1000)
    pieces = list(encoder._pieces(sample))
    tokens = [encoder._tokenizer.encode(p, add_special_tokens=False).ids for p in pieces]
    assert [*itertools.chain(*tokens)] == text.encode(sample, special=False)
    assert (len(pieces) > 60) == (name == "tokenizers/gpt2"), "a begin mark cannot be cut"


def test_parts_of_one_text_are_not_compared(tmp_path, monkeypatch):
    verse = story(random.Random(0), 30)
    monkeypatch.setattr(sources, "LONGEST", len(verse))
    (tmp_path / "a.txt").write_text(verse * 9)
    (tmp_path / "b.txt").write_text("other words " * 3)
    (tmp_path / "c.txt").write_text(verse)
    prepare([tmp_path], tmp_path / "o", "byte", selection=Selection(validation=0))
    assert documents(tmp_path / "o", "train")[0].startswith(verse * 8)
    assert len(documents(tmp_path / "o", "train")) == 2


def test_special_tokens_in_a_text_stay_letters(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    (tmp_path / "b.txt").write_text("three")
    no_split = Selection(validation=0)
    manifest = prepare([tmp_path], tmp_path / "o", "byte", selection=no_split)
    tokens = TokenDataset(tmp_path / "o", "train").tokens
    assert (np.asarray(tokens) == 256).sum() == 2
    assert "in which <|endoftext|> stands as text: 1;" in manifest["notes"][0]


def test_begin_and_end_tokens(tmp_path, data):
    model = data / "models" / "stories260K" / "hf"
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two words"}\n')
    prepare([tmp_path / "a.jsonl"], tmp_path / "o", model, bos=True)
    opened = TokenDataset(tmp_path / "o", "train")
    assert opened.document(0)[0] == 1 and opened.document(0)[-1] == 2
    assert 1 not in opened.document(0)[1:]


def test_what_was_dropped_and_why(tmp_path):
    rng = random.Random(0)
    long = story(rng, 100)
    rows = [long, "", long, long.replace("lona", "LONA!"), "short", "12 " * 40, story(rng, 100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": r}) + "\n" for r in rows))
    cleaning = Cleaning(min_chars=10, min_letters=0.5)
    source = tmp_path / "a.jsonl"
    manifest = prepare([source], tmp_path / "o", "byte", cleaning=cleaning)
    dropped = manifest["documents"]["dropped"]
    assert {reason: entry["documents"] for reason, entry in dropped.items()} == {
        "empty": 1, "min_chars": 1, "min_letters": 1, "exact duplicate": 1, "near duplicate": 1,
    }  # fmt: skip
    assert manifest["documents"]["kept"] == 2 and manifest["documents"]["read"] == 7
    example = dropped["near duplicate"]["examples"][0]
    assert example["source"] == f"{source}:4" and example["why"] == f"1.00 like {source}:1"
    assert example["text"].startswith(long.replace("lona", "LONA!")[:50])
    assert dropped["exact duplicate"]["examples"][0]["why"] == f"equal to {source}:1"
    assert dropped["min_chars"]["characters"] == 5


def test_all_duplicates_stay_when_asked_and_on_one_side(tmp_path):
    file, texts = stories(tmp_path, 20)
    file.write_text(file.read_text() * 3)
    keep = Selection(exact=False, near=None, validation=0.2)
    prepare([file], tmp_path / "o", "byte", selection=keep)
    train, validation = (documents(tmp_path / "o", s) for s in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts * 3)
    assert not set(train) & set(validation) and len(validation) >= 12


def test_no_near_duplicate_crosses_the_split(tmp_path, data):
    """Edited copies of real reviews: every pair as similar as the threshold is on one side."""
    with zipfile.ZipFile(data / "corpora" / "movie_reviews.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".txt")][:240]
        texts = [archive.read(name).decode("latin-1") for name in names]
    rng = random.Random(0)
    rows = list(texts)
    for text in texts[:80]:
        words = text.split(" ")
        for i in rng.sample(range(len(words)), len(words) * rng.randrange(1, 5) // 100):
            words[i] = "zither"
        rows.append(" ".join(words))
    rng.shuffle(rows)
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    manifest = prepare([source], tmp_path / "o", "byte", selection=Selection(validation=0.5))
    dropped = manifest["documents"]["dropped"]
    gone = sum(entry["documents"] for entry in dropped.values())
    assert 70 <= gone <= 85
    sides = [
        [run_hashes(text, 3) for text in documents(tmp_path / "o", split)]
        for split in ("train", "validation")
    ]
    worst = max(jaccard(a, b) for a in sides[0] for b in sides[1])
    assert worst < 0.7


# ---- limits ------------------------------------------------------------------------------------


def python(code, folder):
    """Runs code in a process of its own that works in `folder`."""
    first = "import os, sys, fastlm.data.prepare; os.chdir(sys.argv[1])\n"
    command = [sys.executable, "-c", first + code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


MEASURED = """
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each thread's allocator holds some memory back
import json, random, resource, sys
from fastlm.data.prepare import prepare
def run(name, count):
    with open(name + ".jsonl", "w") as file:
        rng = random.Random(0)
        for _ in range(count):
            row = " ".join(str(rng.randrange(10**9)) for _ in range(400))
            file.write(json.dumps({"text": row}) + "\\n")
    prepare([name + ".jsonl"], name, "byte")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(run("small", 300), run("large", 1800))
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Peak memory after 1.2 MB of text and after 7 MB: a third of the difference at most."""
    done = python(MEASURED, tmp_path)
    assert done.returncode == 0, done.stderr
    small, large = (int(word) * 1024 for word in done.stdout.split())
    grown = (tmp_path / "large.jsonl").stat().st_size - (tmp_path / "small.jsonl").stat().st_size
    assert grown > 5.8e6
    assert large - small < grown / 3


KILLED = """
import os, random, signal, sys, time
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from fastlm.data.prepare import prepare
from fastlm.data.shards import TokenDataset
def run():
    prepare(["a.jsonl"], "out", "byte", overwrite=True)
run()  # what is loaded once
start = time.monotonic()
run()
took = time.monotonic() - start
rng, killed = random.Random(0), 0
for _ in range(12):
    child = os.fork()
    if child == 0:
        run()
        os._exit(0)
    time.sleep(rng.uniform(0, 1.2 * took))
    os.kill(child, signal.SIGKILL)
    killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    for split in ("train", "validation"):
        TokenDataset("out", split).verify()
    assert set(os.listdir()) <= {"a.jsonl", "out", ".out.partial"}, os.listdir()
run()
assert set(os.listdir()) == {"a.jsonl", "out"}, os.listdir()
print(killed)
"""


def test_killed_at_any_moment_the_folder_is_whole(tmp_path):
    stories(tmp_path, 200)
    (tmp_path / "stories.jsonl").rename(tmp_path / "a.jsonl")
    done = python(KILLED, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4


FULL = """
import resource, signal
from fastlm.data.prepare import prepare
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    prepare(["stories.jsonl"], "out", "byte", overwrite=True)
except ValueError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_folder(tmp_path):
    file, _ = stories(tmp_path, 200)
    prepare([file], tmp_path / "out", "byte")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    done = python(FULL, tmp_path)
    assert done.stdout.startswith("out: File too large; making it needs about"), done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "stories.jsonl"]
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_too_little_room_is_seen_first(tmp_path, monkeypatch):
    file, _ = stories(tmp_path)
    size = file.stat().st_size
    monkeypatch.setattr("shutil.disk_usage", lambda path: (0, 0, size - 1))
    with pytest.raises(DataError, match=f"needs {size:,} bytes at least; {size - 1:,} are free"):
        prepare([file], tmp_path / "deep" / "out", "byte")
    assert not (tmp_path / "deep").exists()


def test_what_cannot_be_prepared(tmp_path):
    file, _ = stories(tmp_path, 3)

    def refuse(match, *paths, tokenizer="byte", **options):
        with pytest.raises(DataError, match=match):
            prepare(paths or [file], tmp_path / "out", tokenizer, **options)
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "space.txt").write_text(" \n")
    (tmp_path / "one.txt").write_text("x")
    refuse("no text to keep; dropped: 2 empty", tmp_path / "empty.txt", tmp_path / "space.txt")
    refuse("dropped: 3 max_chars", cleaning=Cleaning(max_chars=5))
    refuse(
        "one document cannot be split", tmp_path / "one.txt", selection=Selection(split="documents")
    )
    refuse("a corpus of 1 characters has no end", tmp_path / "one.txt")
    refuse("no such file or folder", tokenizer=tmp_path / "no")
    refuse(r"it has no bos_token; leave out --bos", bos=True)
    refuse(r"it has no bos_token", tokenizer="char", bos=True, cleaning=Cleaning(max_chars=5))
    gap = tokenizers.byte_level(special=())
    refuse(r"it has no eos_token; --no-eos leaves it out", tokenizer=gap)
    file.write_text(file.read_text().splitlines()[0] + "\n" + '{"text": 1}')
    refuse("stories.jsonl:2: field 'text': expected a string, got int")
    file.write_text(3 * (json.dumps({"text": "same"}) + "\n"))
    refuse("all documents are equal", selection=Selection(exact=False, near=None))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"validation": 1}, r"validation must be in \[0, 1\), got 1"),
        ({"split": "half"}, "split must be auto, documents or tail, got 'half'"),
        ({"near": 0.0}, "threshold must be in"),
    ],
)
def test_wrong_selection(options, match):
    with pytest.raises(DataError, match=match):
        Selection(**options)


def test_the_pipeline_reads_as_it_is_told(tmp_path):
    (tmp_path / "a.txt").write_bytes("Caf\xe9|\xc0 LA".encode("latin-1"))
    options = {"reading": Reading(separator="|", encoding="latin-1")}
    options |= {"cleaning": Cleaning(lowercase=True), "selection": Selection(validation=0)}
    manifest = prepare([tmp_path / "a.txt"], tmp_path / "o", "char", **options)
    assert documents(tmp_path / "o", "train") == ["café", "à la"]
    assert manifest["options"]["encoding"] == "latin-1" and manifest["options"]["lowercase"]
