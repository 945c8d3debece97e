"""Prompts that are conversations, as tokens."""

from __future__ import annotations

import pytest
from tiny_text import tokenizer

from mmrl.errors import UserError
from mmrl.text.config import PromptConfig
from mmrl.text.loading import Room, encode
from mmrl.types import Prompt

TALK = (
    {"role": "user", "content": "go up"},
    {"role": "assistant", "content": "and down ?"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "not"}, {"type": "text", "text": "down"}],
    },
)
SYSTEM = {"role": "system", "content": "add"}


def words(messages, text="not down", **config):
    """What the model reads."""
    names = tokenizer()
    prompt = Prompt(id="p", text=text, messages=messages)
    return names.decode(encode(names, [prompt], PromptConfig(**config), Room(99, ""))["p"].ids)


def test_messages_go_into_the_template():
    expected = "user : go up <end> assistant : and down ? <end> user : not down <end> assistant :"
    assert words(TALK) == expected
    assert words(TALK, system="add") == f"system : add <end> {expected}"


def test_their_own_system_message_stays_alone():
    assert words((SYSTEM, *TALK), system="two").startswith("system : add <end> user : go up")


def test_one_message_is_the_same_as_its_text():
    one = ({"role": "user", "content": "go up"},)
    assert words(one, "go up") == words((), "go up")
    assert words(one, "go up", chat=False) == "go up"


def test_a_conversation_needs_a_template():
    with pytest.raises(UserError, match=r"'not down' has 3 messages, which need a chat template"):
        words(TALK, chat=False)


def test_a_text_model_reads_text_only():
    part = {"type": "image", "image": "a.png"}
    with pytest.raises(UserError, match="has a part of type 'image'"):
        words(({"role": "user", "content": [part, {"type": "text", "text": "sky"}]},), "sky")
