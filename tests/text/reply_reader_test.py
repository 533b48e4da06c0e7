# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001
"""What models write: content, reasoning and calls, cut wherever."""

from __future__ import annotations

from collections.abc import Iterable
import json
import time
from typing import Any

import pytest

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.text import replies
from sarathi_jax.text import reply_formats
from sarathi_jax.text import reply_reader

TOOLS: dict[str, dict[str, Any]] = {
  'get_weather': {
    'type': 'object',
    'properties': {
      'city': {'type': 'string'},
      'days': {'type': 'integer'},
      'in': {'anyOf': [{'type': 'string'}, {'type': 'null'}]},
    },
  },
  'add': {},
  'now': {},
}
PARIS = '{"city": "Paris, \\"FR\\"", "days": [1, 2.5e3, null], "s": {"k": ""}}'
ADD = '{"a":1,"b":-2}'
Calls = list[tuple[str, str]]


def read(
  pieces: Iterable[str],
  tool_parser: str = reply_formats.NONE,
  reasoning_parser: str = reply_formats.NONE,
  prompt_end: str = '',
  **options: Any,
) -> types.Reply:
  reader = reply_reader.ReplyReader(
    reply_formats.choose('', tool_parser, reasoning_parser),
    TOOLS,
    prompt_end,
    **options,
  )
  gained = [reader.read(piece) for piece in pieces]
  reply = replies.merged([*gained, reader.read('', is_last=True)])
  assert [call.number for call in reply.tool_calls] == list(
    range(len(reply.tool_calls))
  )
  assert reader.num_whole <= len(reply.tool_calls) or options
  return reply


def calls_of(reply: types.Reply) -> Calls:
  assert len({call.id for call in reply.tool_calls}) == len(reply.tool_calls)
  return [(call.name, call.arguments) for call in reply.tool_calls]


def same_however_cut(text: str, *parsers: str, **options: Any) -> types.Reply:
  """The reply, which must be the same for each cut in two, and for letters."""
  whole = read([text], *parsers, **options)
  for cuts in (
    list(text),
    *([text[:i], text[i:]] for i in range(1, len(text))),
  ):
    again = read(cuts, *parsers, **options)
    assert again[:2] == whole[:2] and calls_of(again) == calls_of(whole), cuts
  return whole


# As models write them, by their chat templates and cards.
WRITTEN: tuple[tuple[str, str, str, Calls], ...] = (
  # Qwen2.5, Qwen3, Hermes.
  (
    'hermes',
    f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n'
    '</tool_call>',
    '',
    [('get_weather', PARIS)],
  ),
  (
    'hermes',
    'I ask.\n\n<tool_call>\n{"name": "add", "arguments": '
    + ADD
    + '}\n</tool_call>\n<tool_call>\n{"arguments": '
    + PARIS
    + ', "name": "get_weather"}\n</tool_call>',
    'I ask.\n\n',
    [('add', ADD), ('get_weather', PARIS)],
  ),
  ('hermes', '<tool_call>{"name": "now"}</tool_call>', '', [('now', '{}')]),
  (
    'hermes',
    '<tool_call>{"name": "now", "arguments": null}</tool_call> Done.',
    ' Done.',
    [('now', '{}')],
  ),
  # The end is missing, or the arguments are a text.
  (
    'hermes',
    f'\n<tool_call>{{"name": "add", "arguments": {json.dumps(ADD)}}}',
    '',
    [('add', ADD)],
  ),
  # xLAM, SmolLM2: a list.
  (
    'hermes',
    f'<tool_call>[\n{{"name": "add", "arguments": {ADD}}},\n'
    f'{{"name": "now", "arguments": {{}}}}\n]</tool_call>',
    '',
    [('add', ADD), ('now', '{}')],
  ),
  # Granite 3.1 to 3.3.
  (
    'granite',
    f'<|tool_call|>[{{"name": "add", "arguments": {ADD}}}, '
    f'{{"name": "now", "arguments": {{}}}}]',
    '',
    [('add', ADD), ('now', '{}')],
  ),
  # Phi-4-mini: by its special tokens, or as vLLM's template has it.
  (
    'phi4_mini',
    f'<|tool_call|>[{{"name": "add", "arguments": {ADD}}}, {{"name": "now", '
    '"arguments": {}}]<|/tool_call|>',
    '',
    [('add', ADD), ('now', '{}')],
  ),
  ('phi4_mini', '<|tool_call|>{"name": "now"}', '', [('now', '{}')]),
  (
    'phi4_mini_json',
    f'functools[{{"name": "add", "arguments": {ADD}}}]',
    '',
    [('add', ADD)],
  ),
  # GLM-4: a name on the first line.
  ('glm4', f'get_weather\n{PARIS}', '', [('get_weather', PARIS)]),
  ('glm4', f'\nadd\n{ADD}\n', '', [('add', ADD)]),
  # OLMo-3: Python, whose values are JSON in its template.
  (
    'olmo3',
    f'I ask. <function_calls>get_weather(city="Paris", s={PARIS})\n'
    'now()</function_calls>',
    'I ask. ',
    [
      ('get_weather', f'{{"city": "Paris", "s": {PARIS}}}'),
      ('now', '{}'),
    ],
  ),
  (
    'olmo3',
    "<function_calls>\nadd(a='it\\'s \\x41\\q\n', b=[True, (None, -1e3,)], "
    'c="\\ud83d\\ude00\\u00e9", )\n</function_calls>',
    '',
    [
      (
        'add',
        '{"a": "it\'s A\\\\q\\n", "b": [true, [null, -1e3]], '
        '"c": "\\ud83d\\ude00é"}',
      )
    ],
  ),
  # Qwen3-Coder: texts as they are, others as JSON or as Python prints them.
  (
    'qwen3_coder',
    'So.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis, "FR"\n'
    '<b>\n</parameter>\n<parameter=days>\n2\n</parameter>\n<parameter=in>\nnull\n'
    '</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n'
    '</function>\n</tool_call>',
    'So.\n',
    [
      (
        'get_weather',
        '{"city": "Paris, \\"FR\\"\\n<b>", "days": 2, "in": null}',
      ),
      ('now', '{}'),
    ],
  ),
  (
    'qwen3_coder',
    '<tool_call><function=add><parameter=a>True</parameter><parameter=b>\n'
    '[1, {"c": 2}]\n</parameter><parameter=d>\nNaN, not JSON\n</parameter>'
    '</function></tool_call>',
    '',
    [('add', '{"a": true, "b": [1, {"c": 2}], "d": "NaN, not JSON"}')],
  ),
  # GLM-4.5: elements of keys and of values; GLM-4.7's without lines.
  (
    'glm45',
    'So.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris, '
    '"FR"\n<b></arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n'
    '<arg_key>in</arg_key>\n<arg_value>null</arg_value>\n</tool_call>\n'
    '<tool_call>now\n</tool_call>',
    'So.\n',
    [
      (
        'get_weather',
        '{"city": "Paris, \\"FR\\"\\n<b>", "days": 2, "in": null}',
      ),
      ('now', '{}'),
    ],
  ),
  (
    'glm45',
    '<tool_call>add<arg_key>a</arg_key><arg_value>True</arg_value><arg_key>b'
    '</arg_key><arg_value>\n[1, {"c": 2}]</arg_value></tool_call>',
    '',
    [('add', '{"a": true, "b": [1, {"c": 2}]}')],
  ),
  # Llama 3.1 to 3.3.
  (
    'llama3_json',
    f'{{"name": "get_weather", "parameters": {PARIS}}}',
    '',
    [('get_weather', PARIS)],
  ),
  (
    'llama3_json',
    f'{{"type": "function", "name": "add", "parameters": {ADD}}}; '
    f'{{"type": "function", "name": "now", "parameters": {{}}}}',
    '',
    [('add', ADD), ('now', '{}')],
  ),
  (
    'llama3_json',
    f'Well: <|python_tag|>{{"name": "add", "parameters": {ADD}}}',
    'Well: ',
    [('add', ADD)],
  ),
  # Mistral 7B v0.3, Nemo, Mixtral 8x22B; with ids of its own.
  (
    'mistral',
    f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}, '
    '"id": "VvvODy9mT"}, {"name": "now", "arguments": {}, "id": "b"}]',
    '',
    [('get_weather', PARIS), ('now', '{}')],
  ),
  (
    'mistral',
    f'[TOOL_CALLS][{{"arguments": {ADD}, "name": "add"}}]',
    '',
    [('add', ADD)],
  ),
  # Mistral Small 3.2, Magistral, Devstral.
  (
    'mistral_args',
    f'Sure.[TOOL_CALLS]add[ARGS]{ADD}[TOOL_CALLS]now[CALL_ID]a1B2c3D4e[ARGS]{{}}',
    'Sure.',
    [('add', ADD), ('now', '{}')],
  ),
  # DeepSeek-R1's distillations, and V3.1.
  (
    'deepseek_v3',
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n'
    f'```json\n{PARIS}\n```<｜tool▁call▁end｜>\n'
    f'<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{ADD}\n```'
    '<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    '',
    [('get_weather', PARIS), ('add', ADD)],
  ),
  (
    'deepseek_v3',
    'Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>'
    f'{ADD}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    'Hm.',
    [('add', ADD)],
  ),
  # gpt-oss: the name is behind the role, or behind the channel.
  (
    'openai',
    f' to=functions.add<|channel|>commentary json<|message|>{ADD}<|call|>',
    '',
    [('add', ADD)],
  ),
  (
    'openai',
    '<|channel|>commentary to=functions.get_weather <|constrain|>json'
    f'<|message|>{PARIS}',
    '',
    [('get_weather', PARIS)],
  ),
  (
    'openai',
    f'<|channel|>analysis to=functions.add code<|message|>{ADD}<|call|>',
    '',
    [('add', ADD)],
  ),
)


@pytest.mark.parametrize('parser, text, content, calls', WRITTEN)
def test_what_models_write(
  parser: str, text: str, content: str, calls: Calls
) -> None:
  reply = same_however_cut(text, parser)
  assert (reply.content, calls_of(reply)) == (content, calls)
  for call in reply.tool_calls:
    json.loads(call.arguments)
    length = 9 if 'mistral' in parser else 29
    assert len(call.id) == length


@pytest.mark.parametrize('parser', reply_formats.TOOLS)
@pytest.mark.parametrize(
  'text',
  [
    '',
    ' \n',
    '  Hello <b>[world]</b> | {"a": 1}\n',
    '{"city": "Paris"}',
    '[1, 2]',
    '{"name": "Bob", "parameters": {"a": 1}}',  # no tool
    '{"name": "now", "age": 5}',
    '{',
    '<tool_call',
    '[TOOL_CALLS',
    '<|python_tag|>brave_search.call(query="x")',
    '<think>no</think>',
    'now',
    'now\n',
    'now\nand then {}',
    'other\n{"a": 1}',
    '<function_calls>other(a=1)</function_calls>',
    '<function_calls></function_calls>',
    '<function_calls>1 + 1</function_calls>',
    '<tool_call>\n<function=other>\n</function>\n</tool_call>',
    'functools.partial(now)',
  ],
)
def test_what_is_no_call_is_content(parser: str, text: str) -> None:
  assert same_however_cut(text, parser) == (text, '', ())


_CALL = '<tool_call>{"name": "add", "arguments": '
MALFORMED: tuple[tuple[str, str, Calls], ...] = (
  # Not begun: all is content.
  *(
    (text, text, [])
    for text in (
      '<tool_call>',
      '<tool_call>\nadd(1, 2)\n</tool_call>',
      '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
      '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
      '<tool_call>{"arguments": {}}</tool_call>',
      '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
      '<tool_call>{"name": "add", "arguments": "x"}</tool_call>',
      '<tool_call>{"name": "add", "arguments": "{} {}"}</tool_call>',
      "<tool_call>{'name': 'add'}</tool_call>",
      '<tool_call>{"name": "add" "arguments": {}}</tool_call>',
      '<tool_call>{"name": "add", "na',
      '<tool_call>[]</tool_call>',
      '<tool_call>{}</tool_call>',
      '<tool_call>{"' + 'k' * 70 + '": 1, "name": "now"}</tool_call>',
      '<tool_call>{"name": "' + 'n' * 300 + '"}',
      '<tool_call>{"id": tru, "name": "now"}',
    )
  ),
  # Begun: the call has what was written of it, the rest is content.
  (_CALL + '{"a": 1', '', [('add', '{"a": 1')]),
  (_CALL + '{"a": "x', '', [('add', '{"a": "x')]),
  (_CALL + '{"a": oops}}</tool_call>', '}}</tool_call>', [('add', '{"a": ')]),
  (_CALL + '{"a" 1}}', '1}}', [('add', '{"a" ')]),
  (_CALL + '{"a": "\\x"}}', '\\x"}}', [('add', '{"a": "')]),
  (_CALL + '{"a": "\\u12', '\\u12', [('add', '{"a": "')]),
  (_CALL + '{"a": 01}}', '}}', [('add', '{"a": ')]),
  (_CALL + '{"a": 1,}}', '}}', [('add', '{"a": 1,')]),
  (
    _CALL + '{}] <tool_call>{"name": "now"}</tool_call>',
    '] ',
    [('add', '{}'), ('now', '{}')],
  ),
  # What must be escaped in JSON, is; models write lines into strings.
  (
    _CALL + '{"a": "1\n\t2"}}</tool_call>',
    '',
    [('add', '{"a": "1\\n\\t2"}')],
  ),
  # A call that is none does not hide the next.
  (
    '<tool_call>no<tool_call>{"name": "now"}</tool_call>',
    '<tool_call>no',
    [('now', '{}')],
  ),
)


@pytest.mark.parametrize('text, content, calls', MALFORMED)
def test_malformed_calls(text: str, content: str, calls: Calls) -> None:
  reply = same_however_cut(text, 'hermes')
  assert (reply.content, calls_of(reply)) == (content, calls)


@pytest.mark.parametrize(
  'name, text, calls',
  [
    ('olmo3', '<function_calls>add(a="x', [('add', '{"a": "x')]),
    ('olmo3', '<function_calls>add(a=1, b', [('add', '{"a": 1')]),
    ('glm4', 'add\n{"a": 1', [('add', '{"a": 1')]),
    (
      'qwen3_coder',
      '<tool_call><function=get_weather><parameter=city>\nPar',
      [('get_weather', '{"city": "Par')],
    ),
    (
      'qwen3_coder',
      '<tool_call><function=get_weather><parameter=days>\n[1, 2',
      [('get_weather', '{"days": [1, 2')],
    ),
    (
      'glm45',
      '<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Par',
      [('get_weather', '{"city": "Par')],
    ),
  ],
)
def test_what_is_cut_off_is_told_so_far(
  name: str, text: str, calls: Calls
) -> None:
  reply = same_however_cut(text, name)
  assert (reply.content, calls_of(reply)) == ('', calls)


def test_names_come_first_and_arguments_in_pieces() -> None:
  reader = reply_reader.ReplyReader(
    reply_formats.choose('', 'hermes'), TOOLS, ''
  )
  text = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}'
  gained = [c for letter in text for c in reader.read(letter).tool_calls]
  first, *more = gained
  assert first.name == 'get_weather' and first.id and first.arguments == '{'
  assert len(more) > 20
  assert {call[:3] for call in more} == {(0, '', '')}
  assert first.arguments + ''.join(c.arguments for c in more) == PARIS


def test_only_one_call_where_they_may_not_be_parallel() -> None:
  text = _CALL + '{}}</tool_call>' + _CALL + '{}}</tool_call> So.'
  reply = same_however_cut(text, 'hermes', parallel=False)
  assert calls_of(reply) == [('add', '{}')] and reply.content == ' So.'


def test_without_tools_calls_are_content() -> None:
  reader = reply_reader.ReplyReader(reply_formats.choose('', 'hermes'), {}, '')
  text = _CALL + '{}}</tool_call>'
  assert reader.read(text, is_last=True).content == text


NUM = 2**20


@pytest.mark.parametrize(
  'text',
  [
    _CALL + '{"a": ' + '[' * NUM,
    _CALL + '{"a": ' * (NUM // 6),
    _CALL + '{"a": "' + 'x' * NUM,
    _CALL + '{"a": "' + '\\' * NUM,
    _CALL + '{"a": "' + '\n' * (NUM // 2),
    _CALL + '{"a": [' + '0,' * (NUM // 2),
    _CALL + '{' + ' ' * NUM,
    '<tool_call>' * (NUM // 11),
    '<tool_call>{"' + 'n' * NUM,
    '<tool_call>{"id": ' + '[' * NUM,
    '<tool_call>' + ' ' * NUM,
    '<' * NUM,
    '\n' * NUM,
    '<think>' + '\n' * NUM,
    '<think>' + 'a\n' * (NUM // 2),
    '<tool_call>{"arguments": {"a": "' + 'x' * NUM,
    '<tool_call>{"name": "add", "arguments": "{' + '\\"' * (NUM // 2),
  ],
  ids=range(17),
)
@pytest.mark.parametrize('size', [32, NUM * 2])
def test_hostile_outputs(text: str, size: int) -> None:
  _is_read_in_time(text, size, 'hermes')


_ELEMENT = '<tool_call><function=get_weather><parameter='
_PAIR = '<tool_call>get_weather<arg_key>'


@pytest.mark.parametrize(
  'name, text',
  [
    ('olmo3', '<function_calls>add(a=' + '[' * NUM),
    ('olmo3', '<function_calls>add(a="' + '\\' * NUM),
    ('olmo3', "<function_calls>add(a='" + '\\n' * (NUM // 2)),
    ('olmo3', "<function_calls>add(a='" + 'x' * NUM),
    ('olmo3', '<function_calls>add(' + ' ' * NUM),
    ('olmo3', '<function_calls>' * (NUM // 16)),
    ('qwen3_coder', _ELEMENT + 'city>' + '\n' * NUM),
    ('qwen3_coder', _ELEMENT + 'days>' + '[' * NUM),
    ('qwen3_coder', _ELEMENT + 'k' * NUM),
    ('qwen3_coder', '<tool_call><function=' * (NUM // 20)),
    ('glm45', '<tool_call>now<arg_key>' + 'k' * NUM),
    ('glm45', _PAIR + 'city</arg_key><arg_value>' + '<' * NUM),
    ('glm45', _PAIR + 'days</arg_key><arg_value>' + '[' * NUM),
    ('glm4', 'n' * NUM),
    ('glm4', 'now\n' + ' ' * NUM),
    ('phi4_mini_json', 'functools' * (NUM // 9)),
  ],
  ids=range(16),
)
@pytest.mark.parametrize('size', [32, NUM * 2])
def test_hostile_outputs_of_others(name: str, text: str, size: int) -> None:
  _is_read_in_time(text, size, name)


def _is_read_in_time(text: str, size: int, name: str) -> None:
  """A megabyte of anything takes time by its length, and loses nothing."""
  if size == 32:
    text = text[: NUM // 4]  # which takes its time by the piece
  pieces = [text[i : i + size] for i in range(0, len(text), size)]
  start = time.process_time()
  reply = read(pieces, name, 'qwen3')
  seconds = time.process_time() - start
  assert seconds < 20, seconds  # by its square: minutes
  if name != 'hermes':
    return
  kept = sum(len(t) for t in (reply.content, reply.reasoning)) + sum(
    len(call.arguments) for call in reply.tool_calls
  )
  if '<think>' not in text:
    assert kept >= len(text) - len(_CALL)


def test_formats_are_chosen_by_templates() -> None:
  choose = reply_formats.choose
  table, thinking = reply_formats.TOOLS, reply_formats.REASONING
  for template, tools, reasoning in (
    ('{{ messages }}', None, None),
    ('... <tool_call>\\n{"name": <function-name>}', 'hermes', None),
    ('<tool_call> ... </think>', 'hermes', 'qwen3'),
    ('<tool_call>\n<function=f>', 'qwen3_coder', None),
    ('<tool_call>{name}\n<arg_key> </think>', 'glm45', 'qwen3'),
    ('<function_calls> <|im_start|>assistant\n<think>', 'olmo3', 'deepseek_r1'),
    ("'<|tool|>' + message['tools'] + '<|/tool|>'", 'phi4_mini', None),
    ('calls: functools[...] <|/tool|>', 'phi4_mini_json', None),
    ('在调用上述函数时，请使用 Json 格式表示调用的参数。', 'glm4', None),
    ("after 'Here is my thought process:' and", None, 'granite'),
    ('<think></think> <response></response>', None, 'granite_response'),
    (
      'respond only with <|tool_call|> followed by a JSON list of tools used',
      'granite',
      None,
    ),
    ('"[TOOL_CALLS]" [THINK]x[/THINK]', 'mistral', 'mistral'),
    ('[TOOL_CALLS] [ARGS]', 'mistral_args', None),
    ('please respond with JSON for a function call.', 'llama3_json', None),
    ('<｜tool▁sep｜> </think>', 'deepseek_v3', 'deepseek_r1'),
    (
      "'<|channel|>analysis<|message|>' '<|channel|>commentary '",
      'openai',
      'openai_gptoss',
    ),
  ):
    found = choose(template)
    assert found.tools is table.get(tools or ''), template
    row = thinking.get(reasoning or '')
    assert (found.reasoning and found.reasoning.marks) == (row and row.marks)
  assert choose('<tool_call></think>', 'none', 'none') == (None, None)
  assert choose('', 'mistral', 'qwen3') == (
    table['mistral'],
    thinking['qwen3'],
  )
  for name in ('tool_parser', 'reasoning_parser'):
    with pytest.raises(errors.ConfigError, match=f"{name}='x': must be one of"):
      choose('', **{name: 'x'})
