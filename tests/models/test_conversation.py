"""A conversation: its cache changes nothing, its oldest turns go when it is too long."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastlm.hf import tokenizer
from fastlm.models import Decoder
from fastlm.models.chat import Chat
from fastlm.models.speculative import PromptLookup
from fastlm.models.text import complete

pytest.importorskip("jinja2")  # of the chat template

LETTERS = {"vocab_limit": 90}  # printable characters: their tokens are read back as they were


@pytest.fixture(scope="module")
def opened(byte_model):
    return Decoder.from_pretrained(byte_model), tokenizer.load(byte_model)


def say(chat: Chat, content: str) -> str:
    return "".join(chat.ask(content))


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0}, {"repetition_penalty": 1.3}, {"drafter": PromptLookup()}],
    ids=["greedy", "drawn", "penalised", "lookup"],
)
def test_answers_are_those_of_reading_everything(opened, options):
    model, text = opened
    chat = Chat(model, text, system="Be kind.", max_new_tokens=12, **LETTERS, **options)
    plain = {key: value for key, value in options.items() if key != "drafter"}
    known = 0
    for content in ("Hello", "And you?", "Good."):
        messages = [*chat.messages, {"role": "user", "content": content}]
        tokens = chat.render(messages)
        found = say(chat, content)
        assert found == complete(model, text, [tokens], 12, **LETTERS, **plain)[0].text
        assert chat.messages == [*messages, {"role": "assistant", "content": found}]
        assert chat.read == len(tokens) - known  # only what is new
        known = len(tokens) + 12 - 1  # the last token of an answer is read with the next message


def test_a_closed_answer_stays_and_the_next_turn_goes_on(opened):
    model, text = opened
    for count in (1, 2, 5):
        chat = Chat(model, text, max_new_tokens=30, **LETTERS, drafter=PromptLookup())
        say(chat, "First")
        known = len(chat.render([*chat.messages, {"role": "user", "content": "Hello"}]))
        pieces = chat.ask("Hello")
        begun = "".join(next(pieces) for _ in range(count))
        pieces.close()
        assert chat.messages[-1] == {"role": "assistant", "content": begun}
        tokens = chat.render([*chat.messages, {"role": "user", "content": "Go on"}])
        assert say(chat, "Go on") == complete(model, text, [tokens], 30, **LETTERS)[0].text
        assert chat.read == len(tokens) - (known + count - 1)


def test_the_oldest_turns_are_dropped_never_the_system_message(opened):
    model, text = opened
    chat = Chat(model, text, system="Rule", max_new_tokens=20, **LETTERS)
    dropped = 0
    for turn in range(12):
        found = say(chat, f"question {turn}")
        dropped += chat.dropped
        assert chat.system == "Rule" and len(found) == 20
        assert chat.messages[1]["role"] == "user"
        assert len(chat.messages) == 1 + 2 * (turn + 1) - dropped
        tokens = chat.render(chat.messages[:-1])
        assert found == complete(model, text, [tokens], 20, **LETTERS)[0].text
    assert dropped > 10


def test_a_message_that_is_too_long_is_refused_and_not_kept(opened):
    model, text = opened
    chat = Chat(model, text, max_new_tokens=20, **LETTERS)
    first = say(chat, "Hi")
    before = [*chat.messages]
    with pytest.raises(ValueError, match=r"chat: the message must fit 180 tokens .* got 2\d\d"):
        chat.ask("x" * 190)
    assert chat.messages == before
    chat.reset()
    assert chat.messages == [] and say(chat, "Hi") == first


def test_the_system_message_can_be_changed(opened):
    model, text = opened
    chat = Chat(model, text, max_new_tokens=8, **LETTERS)
    say(chat, "Hi")
    assert chat.system is None
    chat.system = "Rule"
    assert chat.system == "Rule" and [m["role"] for m in chat.messages][:2] == ["system", "user"]
    tokens = chat.render([*chat.messages, {"role": "user", "content": "Ho"}])
    assert say(chat, "Ho") == complete(model, text, [tokens], 8, **LETTERS)[0].text
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Rule"}]
    chat.system = None
    assert chat.messages == []


def test_plain_conversations_need_no_template(stories):
    model, text = Decoder.from_pretrained(stories), tokenizer.load(stories)
    with pytest.raises(ValueError, match="chat: this checkpoint has no chat template"):
        Chat(model, text)
    chat = Chat(model, text, system="A story.", plain=True, max_new_tokens=20)
    found = say(chat, "Hello")
    assert found and found == found.lstrip()
    rendered = text.decode(chat.render(chat.messages[:2]))
    assert rendered == "A story.\nUser: Hello\nAssistant:"
    assert torch.equal(torch.tensor(chat.render(chat.messages)[:4]), torch.tensor(chat._cached[:4]))


def test_a_plain_answer_ends_before_the_next_user(opened):
    model, text = opened
    chat = Chat(model, text, plain=True, max_new_tokens=20, stop=["!"], **LETTERS)
    assert chat.stop == ("!", "\nUser:")


def test_wrong_arguments_are_named(opened):
    model, text = opened
    with pytest.raises(ValueError, match="chat: max_new_tokens must be 1 or more, got 0"):
        Chat(model, text, max_new_tokens=0)
    refusing = replace(text, template="{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match="template: no system role"):
        Chat(model, refusing)
    with pytest.raises(ValueError, match="template: "):
        Chat(model, replace(text, template="{% if %}"))
