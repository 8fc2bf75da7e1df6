"""The tasks that come with the package, on rows like those they are for."""

from __future__ import annotations

import json

import pytest

from fastlm import tasks
from fastlm.data.chat import messages_of
from fastlm.data.rows import sample, sentence, split
from fastlm.tasks import TaskError

ROWS = {
    "arc_easy": {"query": "Question: Why?", "choices": ["a", "b"], "gold": 1},
    "article": {"title": "Rain", "text": "It fell."},
    "blimp": {"sentence_good": "He was.", "sentence_bad": "He were."},
    "chat": {"instruction": "Add", "input": "1, 2", "output": "3"},
    "choice": {"query": "So", "choices": ["a", "b"], "gold": 0},
    "code": {"prompt": "def f():", "canonical_solution": "\n    return 1"},
    "copa": {"query": "So", "choices": ["a", "b"], "gold": 0},
    "entities": sentence(["Ada", "saw", "New", "York"], ["B-person", "O", "B-place", "I-place"]),
    "last_word": {"text": "on the mat"},
    "question_answering": {"context": "C", "question": "Q", "answers": ["x", "y"], "answer": "x"},
    "sentiment": {"text": "good ", "label": "positive"},
    "story": {"text": "Once there was a cat. It slept."},
    "summary": {"article": "Long.", "highlights": "Short."},
    "translation": {"source": "Go.", "target": "Va !"},
}
COMPLETIONS = {
    "entities": "person: Ada; place: New York",
    "sentiment": "positive",
    "story": "It slept.",
    "last_word": "mat",
    "summary": "Short.",
    "arc_easy": "b",
}


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_can_be_asked_and_learnt(name):
    task, row = tasks.load(name), ROWS[name]
    assert task.description
    if task.kind == "choice":
        assert 0 <= task.right(row) < len(task.options_of(row))
    if task.kind == "generate":
        assert task.metrics and all(task.right_texts(row))
    if task.completion:
        messages = messages_of("r:1", task.example(row, plain=True), plain=True)
        assert messages[-1]["content"].startswith(task.separator)
        learnt = task.example(row, plain=False)["completion"]
        assert learnt == COMPLETIONS.get(name, learnt) and learnt in messages[-1]["content"]


def test_prompts_hold_the_row_and_not_the_answer():
    row = ROWS["translation"]
    prompt = tasks.load("translation").fill_prompt(row)
    assert prompt.endswith("English: Go.\n\nFrench:") and "Va" not in prompt
    assert tasks.load("question_answering").right_texts(ROWS["question_answering"]) == ["x", "y"]
    assert tasks.load("sentiment").right(ROWS["sentiment"]) == 1


def test_files_of_questions_are_recognised():
    for name in ("blimp", "last_word"):
        assert tasks.for_rows(ROWS[name], "f").name == name
    assert tasks.for_rows(ROWS["copa"], "f").name == "choice"
    with pytest.raises(TaskError, match="f: expected the columns query, choices and gold"):
        tasks.for_rows({"x": 1}, "f")


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "not a JSON object"),
        ('{"kind": "choice", "color": 1}', "unknown keys color"),
        ('{"kind": "guess"}', "kind must be one of choice"),
        ('{"kind": "generate", "metrics": ["luck"]}', "metrics must be among .*'luck'"),
    ],
)
def test_a_broken_task_is_refused(tmp_path, content, message):
    file = tmp_path / "mine.json"
    file.write_text(content)
    with pytest.raises(TaskError, match=message):
        tasks.load(file)


def test_unknown_names_and_answers():
    with pytest.raises(TaskError, match="task must be one of arc_easy"):
        tasks.load("poetry")
    with pytest.raises(TaskError, match="no such task file"):
        tasks.load("no/such.json")
    task = tasks.load("sentiment")
    with pytest.raises(TaskError, match="gold must be one of negative, positive"):
        task.right({"text": "x", "label": "meh"})
    with pytest.raises(TaskError, match="no list in the column 'choices'"):
        tasks.load("copa").options_of({"query": "x"})


def test_a_split_depends_on_the_rows_alone():
    rows = [(f"f:{i}", {"text": str(i % 400)}) for i in range(600)]
    training, held = split(rows, 0.2)
    assert 60 < len(held) < 180 and len(training) + len(held) == 600
    again = split(rows[::-1], 0.2)[1]
    assert sorted(held) == sorted(again)
    assert not {json.dumps(r) for _, r in training} & {json.dumps(r) for _, r in held}
    assert split(rows, 0.2, seed=1)[1] != held
    drawn = sample(rows, 10)
    assert len(drawn) == 10 and drawn == sample(rows, 10) != sample(rows, 10, seed=1)


def test_raw_data(data):
    """Each corpus gives rows that its task can be asked about."""
    for name, file, count, needle in [
        ("sentiment", "corpora/sentence_polarity.zip", 10662, "Review: "),
        ("sentiment", "corpora/movie_reviews.zip", 2000, "Review: "),
        ("entities", "tasks/emerging.dev.conll", 1009, "Text: "),
        ("question_answering", "tasks/xquad.en.json", 886, "Question: "),
        ("translation", "tasks/eng-fra-5000.txt", 5000, "French:"),
        ("chat", "tasks/instruction-data.json", 1100, ""),
        ("chat", "tasks/dolly_hhrlhf_train_small.jsonl", 1000, "### Response"),
    ]:
        if not (data / file).exists():
            pytest.skip(f"no {file}")
        task = tasks.load(name)
        rows = [*task.read(data / file)]
        assert len(rows) == count, file
        for _, row in rows[:: count // 20]:
            example = task.example(row, plain=False)
            assert needle in example["prompt"] and example["completion"].strip(), (file, row)
            if task.kind == "choice":
                task.right(row)
