"""Rows to tokens and masks: the three shapes, templates with traps, rows that teach nothing."""

from __future__ import annotations

import json

import pytest
from byte_text import byte_text

from fastlm.data import DataError, rows
from fastlm.data.chat import Conversations, RowError, messages_of
from fastlm.data.template import CHATML, TemplateError, answer_spans, render
from fastlm.hf.tokenizer import Text

MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}"
    "{% endif %}\n{% endfor %}"
)
# as those models have them
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|head|>' + message['role'] + '<|/head|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = '<s>' + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<turn>' + role + '\\n' + message['content'] | trim + '</turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "Hello there"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]


def learnt(text: Text, messages, template=None) -> str:
    """What has a loss, decoded with its special tokens."""
    tokens, mask = Conversations(text, template).encode(messages)
    kept = [token for token, wanted in zip(tokens, mask, strict=True) if wanted]
    return text.tokenizer.decode(kept, skip_special_tokens=False)


@pytest.mark.parametrize(
    "template, expected",
    [
        (CHATML, "Hello there<|im_end|>So long<|im_end|>"),
        (MARKED, "Hello there</s>So long</s>"),
        (LLAMA3, "Hello there<|eot_id|>So long<|eot_id|>"),
        (MISTRAL, "Hello there</s>So long</s>"),
        (GEMMA, "Hello there</turn>\nSo long</turn>\n"),
        # the prompt ends with white space that the conversation does not have
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}</s>{% endfor %}"
            "{% if add_generation_prompt %}assistant:\n{% endif %}",
            "Hello there</s>So long</s>",
        ),
        # the prompt says more than the conversation: an empty thought
        (
            CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif"),
            "Hello there<|im_end|>So long<|im_end|>",
        ),
    ],
)
def test_only_answers_are_learnt(template, expected):
    assert learnt(byte_text(), TALK, template) == expected


def test_a_token_across_the_boundary_is_split_as_when_the_model_is_asked():
    """ "A: " + "Hello" is one piece with " H" to the tokenizer, but the prompt ends in a space."""
    text = byte_text("{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}{% endfor %}"
                     "{% if add_generation_prompt %}a: {% endif %}")  # fmt: skip
    conversations = Conversations(text)
    tokens, mask = conversations.encode(TALK[:2])
    prompt = conversations.prompt(TALK[:1])
    assert tokens[: len(prompt)] == prompt and mask == [False] * len(prompt) + [True] * (
        len(tokens) - len(prompt)
    )
    assert text.tokenizer.decode(tokens) == "u: assistanta: Hello there"
    assert tokens[len(prompt)] == text.tokenizer.token_to_id("He")


def test_a_character_of_several_tokens_is_learnt_whole():
    assert learnt(byte_text(CHATML), [TALK[0], {"role": "assistant", "content": "é 😀"}]) == (
        "é 😀<|im_end|>"
    )


def test_a_template_that_rewrites_answers_is_refused():
    forgets = "{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% endif %}|{% endfor %}"
    with pytest.raises(TemplateError, match="message 2 is rendered differently"):
        answer_spans(forgets, TALK)
    with pytest.raises(TemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", TALK)
    with pytest.raises(TemplateError):
        render("{% if %}", TALK)
    # the sandbox: a template reaches no attribute that leads out of it
    with pytest.raises(TemplateError, match="unsafe"):
        render("{{ ''.__class__.__mro__ }}", TALK)


def test_without_a_template_texts_are_joined_and_end():
    row = {"prompt": "Q: 1+1\nA:", "completion": " 2"}
    assert learnt(byte_text(), messages_of("f:1", row)) == " 2</s>"


def test_shapes_of_rows():
    wanted = [{"role": "user", "content": "Add\n\n1, 2"}, {"role": "assistant", "content": "3"}]
    alpaca = {"instruction": "Add", "input": "1, 2", "output": "3"}
    assert messages_of("f:1", alpaca) == wanted
    assert messages_of("f:1", {"prompt": "Add\n\n1, 2", "response": "3"}) == wanted
    assert messages_of("f:1", {"messages": wanted}) == wanted
    plain = messages_of("f:1", alpaca, plain=True)[0]["content"]
    assert plain.startswith("Below is an instruction that describes a task, paired with an input")
    assert plain.endswith("### Instruction:\nAdd\n\n### Input:\n1, 2\n\n### Response:\n")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "?"}, "got question"),
        ({"messages": []}, "must be a list of at least one"),
        ({"messages": TALK[:1]}, "holds no answer"),
        ({"messages": [{"role": "robot", "content": ""}]}, "message 1: role must be one of"),
        ({"messages": [{"role": "user"}]}, "message 1 must have a role and a content"),
        ({"prompt": "a", "completion": " \n"}, "an answer is empty"),
        ({"prompt": "a", "completion": 3}, "message 2: content must be a text"),
        ({"prompt": "a" * 100, "completion": "b"}, "begins at token"),
    ],
)
def test_rows_that_teach_nothing_are_named(row, message):
    conversations = Conversations(byte_text(CHATML), max_length=60)
    good = ("f:1", {"prompt": "a", "completion": "b"})
    with pytest.raises(RowError, match="f:2: .*" + message):
        conversations.examples([good, ("f:2", row)])
    dropping = Conversations(byte_text(CHATML), max_length=60, drop_bad_rows=True)
    assert len(dropping.examples([good, ("f:2", row)])) == 1
    assert len(dropping.bad) == 1 and message in dropping.bad[0]


def test_a_template_without_the_answer_is_refused():
    silent = "{% for m in messages %}{% generation %}{% endgeneration %}{% endfor %}"
    with pytest.raises(RowError, match="nothing to learn"):
        Conversations(byte_text(), silent).examples([("f:1", {"messages": TALK})])


def test_a_long_answer_is_cut_and_counted():
    conversations = Conversations(byte_text(CHATML), max_length=40)
    row = {"prompt": "a", "completion": "b" * 100}
    (example,) = conversations.examples([("f:1", row)])
    assert len(example.tokens) == 40 and conversations.cut == 1 and example.answers > 10


# ---- files -------------------------------------------------------------------------------------


def test_readers(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [*rows.read(lines)] == [(f"{lines}:1", {"a": 1}), (f"{lines}:3", {"a": 2})]
    table = tmp_path / "a.tsv"
    table.write_text("en\tfr\nGo.\tVa !\n")
    assert [*rows.read(table)] == [(f"{table}:2", {"en": "Go.", "fr": "Va !"})]
    tagged = tmp_path / "a.conll"
    tagged.write_text("Ada B-person\nKing I-person\nand O\nLondon B-place\n\t\nno O\n")
    first, second = [row for _, row in rows.read(tagged)]
    assert first["entities"] == [("Ada King", "person"), ("London", "place")]
    assert first["text"] == "Ada King and London" and second["entities"] == []
    squad = tmp_path / "a.json"
    answers = [{"text": "blue", "answer_start": 0}]
    paragraph = {"context": "blue sky", "qas": [{"question": "Colour?", "answers": answers}]}
    squad.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    ((_, row),) = rows.read(squad)
    assert row["answers"] == ["blue"] and row["question"] == "Colour?"


def test_labels_come_from_file_names(tmp_path):
    import zipfile

    labels = {"*.pos": "good", "*/neg/*": "bad"}
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/rt.pos", "one\n\ntwo caf\xe9".encode("cp1252"))
        archive.writestr("x/neg/1.txt", "three\nfour")
        archive.writestr("x/README", "no")
    found = [(row["text"], row["label"])
             for _, row in rows.read(file, labels=labels, fallback="cp1252")]  # fmt: skip
    assert found == [("three\nfour", "bad"), ("one", "good"), ("two café", "good")]
    with pytest.raises(DataError, match=r"rt\.pos:3: not utf-8 text"):
        [*rows.read(file, labels=labels)]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: expected a JSON object, got list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}', "a.jsonl:2: not utf-8 text"),
        ("a.json", b'{"a": 1}', "expected a list of objects, got dict"),
        ("a.json", b'{"data": [{"paragraphs": [{}]}]}', "question 0: not as in SQuAD"),
        ("a.json", b"[", "a.json:1: not JSON"),
        ("a.tsv", b"a\tb\nx\n", "a.tsv:2: expected 2 columns"),
        ("a.conll", b"word\n", "a.conll:1: expected a word and its tag"),
        ("a.bin", b"x", "the format is not known"),
        ("a.zip", b"x", "expected a folder or a zip"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        [*rows.read(tmp_path / name, labels={"*": "x"})]
