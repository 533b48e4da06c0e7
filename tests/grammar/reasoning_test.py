# SPDX-License-Identifier: Apache-2.0
"""What a client asks of an answer begins where the model's reasoning ends."""

from __future__ import annotations

import functools
import json
import random
import re
from typing import Any, NamedTuple

import pytest
import tokenizers

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.grammar import compiler
from sarathi_jax.text import call_tags
from sarathi_jax.text import chats
from sarathi_jax.text import replies
from sarathi_jax.text import reply_formats
from sarathi_jax.text import reply_reader
from sarathi_jax.text import tokenizer as tokenizer_lib
from tests import tokenizer_fixture
from tests.grammar import call_tags_test
from tests.grammar import walks

Params = types.StructuredOutputsParams
SCHEMA = {
  'type': 'object',
  'properties': {'n': {'type': 'integer', 'minimum': 0, 'maximum': 99}},
  'required': ['n'],
  'additionalProperties': False,
}


class Kind(NamedTuple):
  """A way to ask for an answer: what is one, and what is none."""

  params: Params
  good: str
  bad: str


KINDS = {
  'json': Kind(Params(json=SCHEMA), '{"n": 42}', '{"m": 42}'),
  'compact': Kind(
    Params(json=SCHEMA, disable_any_whitespace=True), '{"n":4}', '{"n": 4}'
  ),
  'json_object': Kind(Params(json_object=True), '{"a": [1]}', '[1]'),
  'regex': Kind(Params(regex='[ab]{2}'), 'ab', 'ac'),
  'choice': Kind(Params(choice=('yes', 'n|o')), 'n|o', 'n'),
  'lark': Kind(Params(grammar='start: "x" y\ny: "1" | "2" y'), 'x21', 'x2y'),
  # Its first words begin marks of calls and of what is thought.
  'markup': Kind(
    Params(grammar='start: ("<" | "[" | "{") /[a-z]+/ (">" | "]" | "}")'),
    '<thunk>',
    '<think',
  ),
  'list': Kind(Params(json={'type': 'array'}), '["TOOL", {"n": 1}]', '{}'),
  'gbnf': Kind(Params(grammar='root ::= "x" ("1" | "2")+'), 'x12', 'x3'),
  'structural_tag': Kind(
    Params(
      structural_tag={
        'format': {
          'type': 'tag',
          'begin': '<f>',
          'content': {'type': 'json_schema', 'json_schema': SCHEMA},
          'end': '</f>',
        }
      }
    ),
    '<f>{"n": 4}</f>',
    '<f>{"m": 4}</f>',
  ),
}


def read(formats: reply_formats.Formats, end: str, text: str) -> types.Reply:
  """A reply that comes one character at a time."""
  reader = reply_reader.ReplyReader(formats, call_tags_test.SCHEMAS, end)
  return replies.merged(
    [reader.read(part) for part in text] + [reader.read('', True)]
  )


@pytest.fixture(params=['letters', 'tokens'], autouse=True)
def marks_are(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
  """Has marks be tokens that are not special, as Qwen3's and R1's are."""
  if request.param == 'tokens':
    monkeypatch.setattr(call_tags_test, 'grammars', grammars_of_tokens)


@functools.cache
def grammars_of_tokens() -> compiler.Grammars:
  words = tokenizers.Tokenizer.from_str(tokenizer_fixture.make().to_str())
  marks = {
    mark
    for form in (
      *reply_formats.TOOLS.values(),
      *reply_formats.REASONING.values(),
    )
    for mark in form.marks
    if ' to=' not in mark
  }
  words.add_tokens(
    [tokenizers.AddedToken(m, normalized=False) for m in sorted(marks)]
  )
  return compiler.Grammars(tokenizer_lib.Tokenizer.copy_of(words), 380, (1,))


def _after(marks: reply_formats.ReasoningFormat) -> str:
  """What is between what was thought and the rest."""
  return marks.then or '\n\n'


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('row', reply_formats.REASONING)
def test_an_answer_comes_after_what_is_thought(row: str, kind: str) -> None:
  marks = reply_formats.REASONING[row]
  formats = reply_formats.Formats(reasoning=marks)
  params, plain, bad = KINDS[kind]
  good = f'{marks.answer}{marks.before}{plain}{marks.after}'
  thought = 'Is it {"m": 1}? [No], <b>.'
  for end, before in (
    (f'[assistant]{marks.begin}\n', f'{thought}\n{marks.end}{_after(marks)}'),
    ('[assistant]', f'{marks.begin}\n{thought}\n{marks.end}{_after(marks)}'),
    ('[assistant]', f'{marks.begin}{thought}{marks.end}{marks.then}'),
  ):
    outputs = call_tags.outputs_of(formats, None, end, params)
    assert call_tags_test.accepts(outputs, before + good), (end, before)
    other = f'{before}{marks.answer}{marks.before}{bad}'
    assert not call_tags_test.accepts(outputs, other)
    assert not call_tags_test.accepts(outputs, before + good + 'x')
    reply = read(formats, end, before + good)
    assert reply == types.Reply(plain, thought), reply
  # Where it was not asked to think, it need not; where it was, it must end it.
  outputs = call_tags.outputs_of(formats, None, '[assistant]', params)
  assert call_tags_test.accepts(outputs, marks.answer + plain)
  assert not call_tags_test.accepts(outputs, marks.answer + bad)
  outputs = call_tags.outputs_of(formats, None, marks.begin, params)
  assert not call_tags_test.accepts(outputs, plain)


@pytest.mark.parametrize('row', reply_formats.REASONING)
def test_an_answer_comes_at_once_where_nothing_is_thought(row: str) -> None:
  marks = reply_formats.REASONING[row]
  over = f'{marks.begin}\n\n{marks.end}{_after(marks)}{marks.answer}'
  for formats, end in (
    (reply_formats.Formats(reasoning=marks), over),
    (reply_formats.Formats(), f'[assistant]{marks.begin}'),
  ):
    for params, _, _ in KINDS.values():
      assert call_tags.outputs_of(formats, None, end, params) is params
  assert call_tags.outputs_of(formats, None, '[assistant]') is None


@pytest.mark.parametrize('kind', ['json', 'choice', 'lark'])
def test_drawn_at_random(kind: str) -> None:
  formats = reply_formats.Formats(reasoning=reply_formats.REASONING['qwen3'])
  params = KINDS[kind].params
  of = call_tags_test.grammars()
  tokenizer = of._tokenizer
  num_ended = 0
  for seed in range(12):
    thinks = seed % 2 == 0
    end = '<think>\n' if thinks else ''
    outputs = call_tags.outputs_of(formats, None, end, params)
    before = '' if thinks else '<think>'
    tokens, has_ended = walks.walk(
      of,
      outputs,  # type: ignore[arg-type]
      random.Random(seed),
      before=tokenizer.encode(
        f'{before}{seed}</think>', add_special_tokens=False
      ),
    )
    if not has_ended:
      continue
    num_ended += 1
    text = b''.join(map(tokenizer.bytes_of, tokens)).decode()
    reply = read(formats, end, text)
    assert reply.reasoning == f'{seed}'
    if kind == 'json':
      assert 0 <= json.loads(reply.content)['n'] <= 99
    else:
      assert re.fullmatch(r'yes|n\|o|x2*1', reply.content)
  assert num_ended > 3


TOOLS = [
  call_tags_test.tool('weather', parameters=call_tags_test.SCHEMA),
  call_tags_test.tool('now'),
]
STRICT = [
  call_tags_test.tool('weather', parameters=call_tags_test.SCHEMA, strict=True),
  call_tags_test.tool('now'),
]


call = call_tags_test.written


def chat(tools: Any = TOOLS, **options: Any) -> chats.Chat:
  return chats.Chat(messages=call_tags_test.MESSAGES, tools=tools, **options)


@pytest.mark.parametrize(
  'kind', ['json', 'json_object', 'list', 'regex', 'choice', 'lark', 'markup']
)
@pytest.mark.parametrize('reasoning', [None, 'qwen3'])
@pytest.mark.parametrize('name', reply_formats.TOOLS)
def test_a_reply_is_calls_or_the_answer(
  name: str, reasoning: str | None, kind: str
) -> None:
  form = reply_formats.TOOLS[name]
  formats = reply_formats.Formats(
    form, reply_formats.REASONING.get(reasoning or '')
  )
  params, good, bad = KINDS[kind]
  is_object = (
    form.bare is reply_formats.Bare.OBJECT and kind == 'json_object'
  )  # as any call is
  for tools in (TOOLS, STRICT):
    outputs = call_tags.outputs_of(formats, chat(tools), '', params)
    for before in ('', '<think>So.</think>\n') if reasoning else ('',):

      def accepts(text: str, before: str = before, of: Any = outputs) -> bool:
        return call_tags_test.accepts(of, before + text)

      assert accepts(good) and not accepts(bad)
      assert accepts(call(form, '{"city": "Pari"}', 'weather'))
      assert accepts(call(form, '{}', 'now'))
      assert accepts(call(form, '{}', 'other')) == is_object
      assert not accepts('I look.' + call(form, '{}', 'now'))
      any_arguments = call(form, '{"town": 1}', 'weather')
      assert accepts(any_arguments) == (tools is TOOLS or is_object)
      text = before + call(form, '{"city": "Pari"}', 'weather')
      (made,) = read(formats, '', text).tool_calls
      assert made[2:] == ('weather', '{"city": "Pari"}')
    # Where there must be calls, there is no answer that the format is of.
    outputs = call_tags.outputs_of(
      formats, chat(tools, tool_choice='required'), '', params
    )
    assert not call_tags_test.accepts(outputs, good)
    assert call_tags_test.accepts(
      outputs, call(form, '{"city": "Pari"}', 'weather')
    )
    # And without tools that may be called, no calls.
    outputs = call_tags.outputs_of(
      formats, chat(tools, tool_choice='none'), '', params
    )
    assert call_tags_test.accepts(outputs, good)
    assert is_object == call_tags_test.accepts(outputs, call(form, '{}', 'now'))


def test_a_structural_tag_says_itself_what_calls_are() -> None:
  formats = reply_formats.Formats(reply_formats.TOOLS['hermes'])
  params = KINDS['structural_tag'].params
  assert call_tags.outputs_of(formats, chat(), '', params) is params
  for asked in (chat(STRICT), chat(tool_choice='required')):
    with pytest.raises(errors.InvalidRequestError) as caught:
      call_tags.outputs_of(formats, asked, '', params)
    assert str(caught.value).startswith('tools: ')
    assert 'structured_outputs.structural_tag' in str(caught.value)


def test_what_is_wrong_is_named_by_whose_it_is() -> None:
  formats = reply_formats.Formats(
    reply_formats.TOOLS['hermes'], reply_formats.REASONING['qwen3']
  )
  of = call_tags_test.grammars()
  wrong = [call_tags_test.tool('f', parameters={'type': 'strin'}, strict=True)]
  for tools, params, field in (
    (None, Params(regex='('), 'structured_outputs.regex='),
    (TOOLS, Params(json={'type': 'strin'}), 'structured_outputs.json='),
    (wrong, Params(json=SCHEMA), 'tools='),
  ):
    outputs = call_tags.outputs_of(
      formats, chat(tools) if tools else None, '', params
    )
    with pytest.raises(errors.InvalidRequestError) as caught:
      of.compile(outputs)  # type: ignore[arg-type]
    assert str(caught.value).startswith(field), caught.value


def test_nobody_else_may_speak_of_the_answer() -> None:
  tag = {'format': {'type': 'answer'}}
  with pytest.raises(
    errors.UnsupportedError, match="'answer' is not supported"
  ):
    call_tags_test.grammars().compile(Params(structural_tag=tag))


def test_a_mark_of_a_clients_tag_may_be_a_token() -> None:
  tag = {
    'type': 'tag',
    'begin': '<tool_call>',
    'content': {'type': 'json_schema', 'json_schema': SCHEMA},
    'end': '</tool_call>',
  }
  outputs = Params(structural_tag={'format': tag})
  assert call_tags_test.accepts(outputs, '<tool_call>{"n": 4}</tool_call>')
  assert not call_tags_test.accepts(outputs, '<tool_call>{"m": 4}</tool_call>')


@pytest.mark.parametrize('name', reply_formats.TOOLS)
def test_what_a_schema_refers_to_is_in_it(name: str) -> None:
  """Though a call as a whole may be an object of a schema."""
  place = {
    'type': 'object',
    'properties': {
      'x': {'type': 'integer'},
      'in': {'$ref': '#/$defs/place'},
    },
    'required': ['x'],
    'additionalProperties': False,
  }
  parameters = {
    'type': 'object',
    'properties': {'at': {'$ref': '#/$defs/place'}},
    'required': ['at'],
    'additionalProperties': False,
    '$defs': {'place': place},
  }
  form = reply_formats.TOOLS[name]
  outputs = call_tags.outputs_of(
    reply_formats.Formats(form),
    chat([call_tags_test.tool('f', parameters=parameters, strict=True)]),
    '',
    KINDS['json'].params,
  )
  for arguments, is_one in (
    ('{"at": {"x": 1, "in": {"x": 2}}}', True),
    ('{"at": {"y": 1}}', False),
  ):
    text = call(form, arguments, 'f')
    assert call_tags_test.accepts(outputs, text) == is_one
