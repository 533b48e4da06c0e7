# SPDX-License-Identifier: Apache-2.0
"""Calls that must be: whatever is drawn of their grammars, is read as calls."""

from __future__ import annotations

import functools
import itertools
import json
import random
from typing import Any

import jsonschema
import pytest
import tokenizers

from sarathi_jax.grammar import compiler
from sarathi_jax.text import call_arguments
from sarathi_jax.text import call_tags
from sarathi_jax.text import chats
from sarathi_jax.text import reply_formats
from sarathi_jax.text import reply_reader
from sarathi_jax.text import tokenizer as tokenizer_lib
from tests import tokenizer_fixture
from tests.grammar import walks

SCHEMA = {
  'type': 'object',
  'properties': {
    'city': {'type': 'string', 'maxLength': 4},
    'n': {'type': 'integer', 'minimum': 0, 'maximum': 99},
  },
  'required': ['city'],
  'additionalProperties': False,
}
MESSAGES = [{'role': 'user', 'content': 'a'}]
HARMONY = reply_formats.REASONING['openai_gptoss']


def tool(name: str, **more: Any) -> dict[str, Any]:
  return {'type': 'function', 'function': {'name': name, **more}}


TOOLS = [tool('weather', parameters=SCHEMA), tool('now')]
SCHEMAS = {
  'weather': SCHEMA,
  'now': {'type': 'object', 'additionalProperties': False},
}


@functools.cache
def grammars() -> compiler.Grammars:
  words = tokenizers.Tokenizer.from_str(tokenizer_fixture.make().to_str())
  marks = {mark for form in reply_formats.TOOLS.values() for mark in form.marks}
  marks = {m for m in marks if 'tool_call>' not in m and ' to=' not in m}
  words.add_special_tokens(sorted(marks | {*HARMONY.tokens}))
  return compiler.Grammars(tokenizer_lib.Tokenizer.copy_of(words), 360, (1,))


def written(form: reply_formats.ToolFormat, arguments: str, name: str) -> str:
  """A call of a tool as a model writes it, whose arguments are this JSON."""
  frame, values = form.frame, json.loads(arguments)
  if frame.arguments is call_arguments.as_python:
    arguments = ', '.join(f'{k}={json.dumps(v)}' for k, v in values.items())
  elif frame.arguments is call_arguments.as_elements:
    arguments = ''.join(
      f'<parameter={k}>\n{v if isinstance(v, str) else json.dumps(v)}'
      '\n</parameter>\n'
      for k, v in values.items()
    )
  elif frame.arguments is call_arguments.as_pairs:
    arguments = ''.join(
      f'<arg_key>{k}</arg_key>\n<arg_value>'
      f'{v if isinstance(v, str) else json.dumps(v)}</arg_value>\n'
      for k, v in values.items()
    )
  return (
    f'{frame.before}{frame.begin}{name}{frame.middle}{arguments}{frame.end}'
    f'{frame.after}'
  )


def drawn(formats: reply_formats.Formats, chat: Any, seed: int) -> Any:
  """The reply that a random output of a chat is; None if it has no end."""
  outputs = call_tags.outputs_of(formats, chat, '')
  assert outputs is not None
  tokenizer = grammars()._tokenizer
  thought = ''
  if (form := formats.reasoning) is not None:
    thought = f'{form.begin}{seed}{form.end}{form.then}'
  tokens, has_ended = walks.walk(
    grammars(),
    outputs,
    random.Random(seed),
    most=400,
    before=tokenizer.encode(thought, add_special_tokens=False),
  )
  if not has_ended:
    return None
  text = b''.join(map(tokenizer.bytes_of, tokens)).decode(errors='replace')
  reader = reply_reader.ReplyReader(formats, chat.callable, '')
  return text, reader.read(text, is_last=True), reader.num_whole


@pytest.mark.parametrize(
  ('name', 'reasoning'),
  [
    *itertools.product(reply_formats.TOOLS, [None, 'qwen3']),
    ('openai', 'openai_gptoss'),
  ],
)
def test_what_must_be_called_is(name: str, reasoning: str | None) -> None:
  formats = reply_formats.Formats(
    reply_formats.TOOLS[name], reply_formats.REASONING.get(reasoning or '')
  )
  for choice, parallel in (
    ('required', True),
    ('required', False),
    ({'type': 'function', 'function': {'name': 'weather'}}, True),
  ):
    chat = chats.Chat(
      messages=MESSAGES,
      tools=TOOLS,
      tool_choice=choice,
      parallel_tool_calls=parallel,
    )
    ended = 0
    for seed in range(6):
      found = drawn(formats, chat, seed)
      if found is None:
        continue
      ended += 1
      text, reply, num_whole = found
      assert reply.tool_calls and num_whole == len(reply.tool_calls), text
      assert not reply.content.strip(), text
      assert reply.reasoning == (f'{seed}' if reasoning else ''), text
      if chat.named or not parallel:
        assert num_whole == 1, text
      for call in reply.tool_calls:
        assert call.name in chat.callable
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    assert ended, (name, choice)


@pytest.mark.parametrize('name', reply_formats.TOOLS)
def test_strict_tools_are_called_by_their_schema(name: str) -> None:
  """And any text may be written instead."""
  reasoning = HARMONY if name == 'openai' else None
  formats = reply_formats.Formats(reply_formats.TOOLS[name], reasoning)
  chat = chats.Chat(
    messages=MESSAGES,
    tools=[tool('weather', parameters=SCHEMA, strict=True), tool('now')],
  )
  outputs = call_tags.outputs_of(formats, chat, '')
  assert outputs is not None
  form = reply_formats.TOOLS[name]

  def is_allowed(text: str) -> bool:
    return accepts(outputs, text)

  def call(arguments: str, tool: str = 'weather') -> str:
    return written(form, arguments, tool)

  mark = reasoning.answer if reasoning else ''
  assert is_allowed(f'{mark}It is sunny in [Paris] {{today}}.')
  assert is_allowed(call('{"city": "Pari"}'))
  assert is_allowed(call('{"a": 1}', 'now'))
  assert not is_allowed(call('{"town": "Pari"}'))
  # A name of no tool is text, where nothing else begins a call.
  is_text = form.bare is reply_formats.Bare.NAME
  assert is_allowed(call('{}', 'other')) == is_text
  if reasoning is not None:
    thought = f'{reasoning.begin}Hm.{reasoning.end}'
    assert is_allowed(f'{thought}{reasoning.then}{mark}Yes.')
    assert is_allowed(thought + reasoning.then + call('{}', 'now'))
    assert not is_allowed(f'{thought}{mark}Yes.')


def test_an_answer_is_behind_its_mark() -> None:
  """And what it has to be is asked of it alone."""
  outputs = call_tags.outputs_of(
    reply_formats.Formats(None, HARMONY),
    None,
    '<|start|>assistant',
    walks.types.StructuredOutputsParams(choice=('yes', 'no')),
  )
  thought = f'{HARMONY.begin}maybe{HARMONY.end}{HARMONY.then}'
  for text, is_one in (
    (f'{HARMONY.answer}yes', True),
    (f'{thought}{HARMONY.answer}no', True),
    (f'{thought}{HARMONY.answer}maybe', False),
    (f'{thought}no', False),
    ('yes', False),
  ):
    assert accepts(outputs, text) == is_one, text


def accepts(outputs: Any, text: str) -> bool:
  params = walks.types.SamplingParams(structured_outputs=outputs)
  matcher = grammars().compile(outputs).matchers(params)[0]
  tokenizer = grammars()._tokenizer
  for token in tokenizer.encode(text, add_special_tokens=False):
    (mask,) = grammars().masks([matcher])
    if matcher.is_over or token not in walks.allowed(
      mask, grammars()._vocab_size
    ):
      return False
    matcher.consume([token])
  if matcher.is_over:
    return True
  (mask,) = grammars().masks([matcher])
  return walks.EOS in walks.allowed(mask, grammars()._vocab_size)


def test_nothing_has_to_be_where_nothing_must_be_called() -> None:
  formats = reply_formats.Formats(reply_formats.TOOLS['hermes'])
  for options in (
    {'tools': TOOLS},
    {'tools': TOOLS, 'tool_choice': 'none'},
    {},
  ):
    chat = chats.Chat(messages=MESSAGES, **options)  # type: ignore[arg-type]
    assert call_tags.outputs_of(formats, chat, '') is None
