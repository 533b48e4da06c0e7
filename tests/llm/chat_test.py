# SPDX-License-Identifier: Apache-2.0
"""Chats with an LLM inside a JAX program: tools, reasoning."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import following
from sarathi_jax.text import chat as chat_lib
from sarathi_jax.text import tokenizer as tokenizer_lib
from tests import tokenizer_fixture
from tests.llm import common

GREEDY = common.GREEDY
CHAT = [{'role': 'user', 'content': 'a fox'}]
NOW = {'type': 'function', 'function': {'name': 'now'}}
TEMPLATE = (
  '{% for tool in tools or () %}{{ tool.function.name }}{% endfor %}'
  '{# <tool_call> </think> #}{{ messages[0].content }}{{ style }}'
)


@pytest.fixture
def tokenizer(llm: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
  made = tokenizer_lib.Tokenizer.copy_of(
    tokenizer_fixture.make(), chat_lib.ChatTemplate(TEMPLATE, {})
  )
  monkeypatch.setattr(llm.engine, 'tokenizer', made)
  return made


def test_a_chat_is_a_prompt_with_a_reply(llm: Any) -> None:
  (plain,) = llm.generate(CHAT, GREEDY)
  (done,) = llm.chat(CHAT, GREEDY)
  assert plain.reply is None
  assert dataclasses.replace(done, reply=None).token_ids == plain.token_ids
  assert done.reply == types.Reply(content=done.text)
  assert [d.token_ids for d in llm.chat([CHAT, CHAT], GREEDY)] == (
    [plain.token_ids] * 2
  )
  assert llm.chat([]) == []
  with pytest.raises(errors.UnsupportedError, match='no place for tools'):
    llm.chat(CHAT, tools=[NOW])


@pytest.mark.parametrize(
  'messages', [CHAT[0], None, 5, 'hi', [5], ['hi'], [None], [CHAT, 5], {}]
)
def test_what_is_no_chat(llm: Any, messages: Any) -> None:
  with pytest.raises(errors.InvalidRequestError, match='messages'):
    llm.chat(messages, GREEDY)


def test_tools_and_reasoning(
  llm: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
  text = '<think>Hm.</think><tool_call>{"name": "now"}</tool_call>'
  generate = llm.generate

  def say(*args: Any, **named: Any) -> list[types.Completion]:
    return [dataclasses.replace(d, text=text) for d in generate(*args, **named)]

  monkeypatch.setattr(llm, 'generate', say)
  (done,) = llm.chat(
    CHAT, GREEDY, tools=[NOW], chat_template_kwargs={'style': '!'}
  )
  prompt = tokenizer.decode(done.prompt_token_ids)
  assert prompt == 'nowa fox!'
  assert done.reply.reasoning == 'Hm.' and done.reply.content == ''
  (call,) = done.reply.tool_calls
  assert call[2:] == ('now', '{}') and call.id.startswith('call_')
  (done,) = llm.chat(CHAT, GREEDY)
  assert done.reply.content == text.removeprefix('<think>Hm.</think>')
  with pytest.raises(errors.InvalidRequestError, match='tool_choice'):
    llm.chat(CHAT, tool_choice='odd')


def test_parsers_are_the_engines(make_llm: Any, params: Any) -> None:
  """What they are is told before anything is compiled."""
  for name in ('tool_parser', 'reasoning_parser'):
    with pytest.raises(errors.ConfigError, match=f"{name}='x': must be one"):
      make_llm(params, **{name: 'x'})


def test_an_answer_begins_after_the_reasoning(
  llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Which this template opens, and which this model does not end."""
  made = tokenizer_lib.Tokenizer.copy_of(
    tokenizer_fixture.make(),
    chat_lib.ChatTemplate('{{ messages[0].content }}</think><think>', {}),
  )
  monkeypatch.setattr(llm.engine, 'tokenizer', made)
  monkeypatch.setattr(
    llm.engine, '_following', following.Following(made, llm.engine.info)
  )
  yes = types.SamplingParams(
    temperature=0, max_tokens=4, structured_outputs={'regex': 'yes+'}
  )
  (done,) = llm.chat(CHAT, yes)
  assert done.reply.content == '' and len(done.token_ids) == 4
  assert not done.text.startswith('yes')
  (done,) = llm.generate(['a fox<think>'], yes)
  assert done.text.startswith('yes')
