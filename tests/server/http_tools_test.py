# SPDX-License-Identifier: Apache-2.0
"""Calls of tools and reasoning over HTTP, with OpenAI's package and without."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import json
import re
from typing import Any, NamedTuple

import openai
import pydantic
import pytest

from sarathi_jax.server.guard import limits as limits_lib
from tests.offline import batch_files_test
from tests.server import fake
from tests.server import http_client
from tests.server import speaking

CHAT = '/v1/chat/completions'
WEATHER = {
  'type': 'function',
  'function': {
    'name': 'get_weather',
    'description': 'Tells the weather.',
    'parameters': {
      'type': 'object',
      'properties': {'city': {'type': 'string'}},
      'required': ['city'],
    },
  },
}
NOW = {'type': 'function', 'function': {'name': 'now'}}
BODY: dict[str, Any] = {
  'model': 'counting',
  'messages': [{'role': 'user', 'content': 'How is it in Paris?'}],
  'tools': [WEATHER, NOW],
}
PARIS = '{"city": "Paris"}'
# Templates of ours, with the words and the marks of models' own.
_TEMPLATE = (
  '{{% if tools %}}{words} {{{{ tools | tojson }}}}{{% endif %}}'
  '{{% for m in messages %}}[{{{{ m.role }}}}]{{{{ m.content }}}}'
  '{{% if m.reasoning_content %}}<r>{{{{ m.reasoning_content }}}}{{% endif %}}'
  '{{% for c in m.tool_calls or () %}}{{{{ c.function.name }}}}'
  '{{{{ c.function.arguments | tojson }}}}{{{{ c.id }}}}{{% endfor %}}'
  '{{% if m.tool_call_id %}}{{{{ m.tool_call_id }}}}{{% endif %}}'
  '{{% endfor %}}[assistant]{end}'
)


class Family(NamedTuple):
  """How a family writes: words of its template, its marks, and two calls."""

  words: str
  text: str
  special: tuple[str, ...] = ()
  end: str = ''


FAMILIES = {
  'qwen3': Family(
    '<tool_call> {{ "</think>" }}',
    '<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n{"name": "get_weather", '
    f'"arguments": {PARIS}}}\n</tool_call>\n<tool_call>\n{{"name": "now", '
    '"arguments": {}}\n</tool_call>',
  ),
  'r1': Family(
    '<tool_call>',
    'Hm.\n</think>\n\nI look.\n<tool_call>\n{"name": "get_weather", '
    f'"arguments": {PARIS}}}\n</tool_call>\n<tool_call>\n{{"name": "now", '
    '"arguments": {}}\n</tool_call>',
    ('<think>', '</think>'),
    "<think>\n{{ '' if true else '</think>' }}",
  ),
  'mistral': Family(
    '[TOOL_CALLS] {{ "[/THINK]" }}',
    f'[THINK]Hm.[/THINK]I look.\n[TOOL_CALLS]get_weather[ARGS]{PARIS}'
    '[TOOL_CALLS]now[CALL_ID]a1B2c3D4e[ARGS]{}',
    ('[TOOL_CALLS]', '[ARGS]', '[CALL_ID]', '[THINK]', '[/THINK]'),
  ),
}


class Served(NamedTuple):
  """A server that says what a test wants."""

  speaker: speaking.Speaker
  running: fake.RunningServer
  client: http_client.Client

  def openai(self) -> openai.OpenAI:
    return openai.OpenAI(
      base_url=f'http://127.0.0.1:{self.client.port}/v1',
      api_key='none',
      max_retries=0,
      timeout=fake.TIMEOUT_S,
    )


@contextlib.contextmanager
def served_by(folder: Any, family: Family, **config: Any) -> Iterator[Served]:
  template = _TEMPLATE.format(words=family.words, end=family.end)
  speaker = speaking.Speaker(folder, template, family.special)
  running = fake.RunningServer(speaker.make_engine, http_port=0, **config)
  with contextlib.closing(running):
    yield Served(speaker, running, http_client.Client.of(running))


@pytest.fixture(scope='module', params=FAMILIES)
def family(request: Any, tmp_path_factory: Any) -> Iterator[Any]:
  chosen = FAMILIES[request.param]
  with served_by(tmp_path_factory.mktemp('family'), chosen) as served:
    yield served, chosen


@pytest.fixture(scope='module')
def served(tmp_path_factory: Any) -> Iterator[Served]:
  with served_by(
    tmp_path_factory.mktemp('served'), FAMILIES['qwen3']
  ) as served:
    yield served


def collected(events: Any) -> dict[str, Any]:
  """What the deltas of a stream make together."""
  whole: dict[str, Any] = {'content': '', 'reasoning_content': ''}
  calls: list[Any] = []
  for event in events:
    (choice,) = event['choices']
    for key in ('content', 'reasoning_content'):
      whole[key] += choice['delta'].get(key) or ''
    for piece in choice['delta'].get('tool_calls', ()):
      if piece['index'] == len(calls):
        assert piece['id'] and piece['type'] == 'function'
        calls.append({'name': piece['function']['name'], 'arguments': ''})
      call = calls[piece['index']]
      call['arguments'] += piece['function']['arguments']
    whole['finish_reason'] = choice['finish_reason']
  return {**whole, 'calls': calls}


def test_calls_and_reasoning(family: Any) -> None:
  served, chosen = family
  served.speaker.say(chosen.text)
  _, whole = served.client.json(CHAT, BODY)
  (choice,) = whole['choices']
  message = choice['message']
  assert choice['finish_reason'] == 'tool_calls'
  assert message['reasoning_content'] == 'Hm.'
  assert message['content'] == 'I look.\n'
  calls = [call['function'] for call in message['tool_calls']]
  assert calls == [
    {'name': 'get_weather', 'arguments': PARIS},
    {'name': 'now', 'arguments': '{}'},
  ]
  events = served.client.events(CHAT, BODY)
  assert collected(events) == {
    'content': 'I look.\n',
    'reasoning_content': 'Hm.',
    'finish_reason': 'tool_calls',
    'calls': calls,
  }


def test_openais_client(family: Any) -> None:
  """Both ways, and with the answers of tools, back into the prompt."""
  served, chosen = family
  served.speaker.say(chosen.text)
  with served.openai() as client:
    create: Any = client.chat.completions.create
    whole = create(**BODY).choices[0].message
    assert [c.function.name for c in whole.tool_calls] == ['get_weather', 'now']
    with client.chat.completions.stream(**BODY) as stream:
      streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == 'tool_calls'
    assert [c.function.arguments for c in streamed.message.tool_calls] == [
      PARIS,
      '{}',
    ]
    assert streamed.message.content == whole.content
    served.speaker.say('It is sunny.')
    messages = [
      *BODY['messages'],
      whole.model_dump(exclude_none=True),
      *(
        {'role': 'tool', 'tool_call_id': call.id, 'content': 'sunny'}
        for call in whole.tool_calls
      ),
    ]
    answer = create(
      **{**BODY, 'messages': messages}, extra_body={'return_token_ids': True}
    )
  (choice,) = answer.choices
  assert choice.finish_reason == 'stop' and not choice.message.tool_calls
  assert 'It is sunny.' in (
    choice.message.content,
    choice.message.reasoning_content if chosen.end else '',
  )
  prompt = served.speaker.words.decode(
    answer.prompt_token_ids, skip_special_tokens=False
  )
  ids = [call.id for call in whole.tool_calls]
  assert prompt.endswith(
    f'<r>Hm.get_weather{PARIS}{ids[0]}now{{}}{ids[1]}'
    f'[tool]sunny{ids[0]}[tool]sunny{ids[1]}[assistant]'
    + ('<think>\n' if chosen.end else '')
  )
  assert json.dumps([WEATHER, NOW]) in prompt


class _Weather(pydantic.BaseModel):
  city: str
  degrees: int


def test_openais_client_parses_a_response_format(served: Served) -> None:
  """As its own `parse` asks: by a class, whole and streamed."""
  body: Any = {name: BODY[name] for name in ('model', 'messages')}
  paris = _Weather(city='Paris', degrees=21)
  with served.openai() as client:
    chats = client.chat.completions
    served.speaker.say(paris.model_dump_json())
    whole = chats.parse(**body, response_format=_Weather)
    assert whole.choices[0].message.parsed == paris
    with chats.stream(**body, response_format=_Weather) as stream:
      streamed = stream.get_final_completion()
    assert streamed.choices[0].message.parsed == paris
    plain = chats.create(**body, response_format={'type': 'json_object'})
    assert json.loads(plain.choices[0].message.content or '') == dict(paris)
    # A number, where the class has a string: another token is taken.
    served.speaker.say('{"city":7')
    with pytest.raises(openai.LengthFinishReasonError) as cut:
      chats.parse(**body, response_format=_Weather, max_tokens=9)
    (choice,) = cut.value.completion.choices
    assert re.match(r'{\s*"city"\s*:\s*($|")', choice.message.content or '')


def asked(served: Served, **more: Any) -> tuple[Any, str]:
  """The choice, and the prompt's text."""
  status, whole = served.client.json(
    CHAT, {**BODY, 'return_token_ids': True, **more}
  )
  assert status == 200, whole
  return whole['choices'][0], served.speaker.words.decode(
    whole['prompt_token_ids']
  )


def test_which_tools(served: Served) -> None:
  text = f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}'
  served.speaker.say(text + '</tool_call>' + text)
  choice, prompt = asked(served)
  assert len(choice['message']['tool_calls']) == 2
  assert choice['message']['content'] is None and 'get_weather' in prompt
  choice, _ = asked(served, parallel_tool_calls=False, tool_choice='auto')
  assert len(choice['message']['tool_calls']) == 1
  for none in ({'tool_choice': 'none'}, {'tools': []}, {'tools': None}):
    choice, prompt = asked(served, **none)
    assert 'get_weather' not in prompt
    assert choice['message']['content'].startswith(text)
    assert choice['finish_reason'] == 'stop'
  choice, _ = asked(served, tools=[NOW])  # a call of no tool is content
  assert choice['message']['content'].startswith(text)


def test_cut_off(served: Served) -> None:
  served.speaker.say(
    f'<think>So.</think><tool_call>{{"name": "now", "arguments": {PARIS}}}'
  )
  choice, _ = asked(served, max_tokens=3)
  assert choice['finish_reason'] == 'length'
  assert choice['message'] == {
    'role': 'assistant',
    'content': None,
    'refusal': None,
  } | {'content': '<think'[: len(choice['message']['content'])]}
  for num in range(1, 60):
    choice, _ = asked(served, max_tokens=num)
    assert choice['finish_reason'] in ('length', 'tool_calls')
    for call in choice['message'].get('tool_calls', ()):
      assert PARIS.startswith(call['function']['arguments'])


def test_template_kwargs(tmp_path: Any) -> None:
  family = FAMILIES['qwen3']._replace(
    end='{% if enable_thinking is false %}<think></think>{% endif %}'
  )
  with served_by(tmp_path, family) as served:
    served.speaker.say('Yes.')
    kwargs = {'chat_template_kwargs': {'enable_thinking': False}}
    _, prompt = asked(served, **kwargs)
    assert prompt.endswith('<think></think>')
    assert not asked(served)[1].endswith('<think></think>')
    body = {'messages': BODY['messages'], 'tools': [NOW], **kwargs}
    _, told = served.client.json('/tokenize', body)
    prompt = served.speaker.words.decode(told['tokens'])
    assert 'now' in prompt and prompt.endswith('<think></think>')
    for odd in ('messages', 'nothing', 'bos_token'):
      status, message, param = served.client.refused(
        CHAT, {**BODY, 'chat_template_kwargs': {odd: 1}}
      )
      assert (status, param) == (400, 'chat_template_kwargs'), message


def test_other_answers(served: Served) -> None:
  """Log-probabilities and ids of all tokens, those of marks, too."""
  served.speaker.say(FAMILIES['qwen3'].text)
  more = {'logprobs': True, 'return_token_ids': True}
  choice, _ = asked(served, **more)
  assert len(choice['logprobs']['content']) == len(choice['token_ids'])
  events = served.client.events(CHAT, {**BODY, **more})
  assert choice['token_ids'] == [
    t for event in events for t in event['choices'][0]['token_ids']
  ]


def _function(**fields: Any) -> dict[str, Any]:
  return {'type': 'function', 'function': {'name': 'f', **fields}}


def _deep(levels: int) -> Any:
  return {'a': _deep(levels - 1)} if levels else {}


BAD: tuple[tuple[dict[str, Any], str], ...] = (
  ({'tools': {}}, 'tools={}: must be a list'),
  ({'tools': [1]}, 'tools[0]=1: must be an object'),
  ({'tools': [{'type': 'custom', 'custom': {}}]}, 'tools[0]='),
  ({'tools': [_function(name='')]}, "tools[0].function.name='': must be"),
  ({'tools': [_function(name='a"b')]}, 'tools[0].function.name='),
  ({'tools': [_function(name=3)]}, 'tools[0].function.name=3'),
  ({'tools': [NOW, _function(parameters=[])]}, 'tools[1].function.parameters='),
  ({'tools': [_function(description=3)]}, 'tools[0].function.description=3'),
  ({'tools': [NOW, NOW]}, "tools[1].function.name='now': an earlier one"),
  ({'tools': [NOW] * 129}, 'tools: has 129 tools of a chat: must be at most'),
  ({'tools': [_function(description='x' * 2**19)]}, 'tools: has 524,'),
  ({'tools': [_function(parameters=_deep(70))]}, 'tools: has 7'),
  ({'tool_choice': 'any'}, "tool_choice='any': must be auto"),
  ({'tool_choice': {}}, 'tool_choice={}: must be'),
  ({'tool_choice': {'type': 'function', 'function': 'now'}}, 'tool_choice='),
  (
    {'tool_choice': {'type': 'function', 'function': {'name': 'odd'}}},
    "tool_choice: names 'odd', which is none of tools",
  ),
  ({'tools': [], 'tool_choice': 'required'}, 'tool_choice='),
  ({'parallel_tool_calls': 1}, 'parallel_tool_calls=1: must be true'),
  ({'chat_template_kwargs': []}, 'chat_template_kwargs=[]: must be an object'),
  ({'functions': [{}]}, 'functions='),
  ({'function_call': {'name': 'f'}}, 'function_call='),
)


def test_what_is_refused(served: Served) -> None:
  for more, words in BAD:
    for path, body in (
      (CHAT, {**BODY, **more}),
      ('/v1/completions', {'prompt': 'a', **more}),
    ):
      status, message, param = served.client.refused(path, body)
      assert status == 400 and param in more, (more, message)
      assert path != CHAT or message.startswith(words), message


def test_templates_without_tools(tmp_path: Any) -> None:
  for name, template, words in (
    ('no_place', '{{ messages[0].content }}', 'has no place for tools'),
    ('unknown', '{{ tools }}', "can't be told from its chat template"),
  ):
    (folder := tmp_path / name).mkdir()
    speaker = speaking.Speaker(folder, template)
    with contextlib.closing(
      fake.RunningServer(speaker.make_engine, http_port=0)
    ) as running:
      client = http_client.Client.of(running)
      status, message, param = client.refused(CHAT, BODY)
      assert (status, param) == (400, 'tools') and words in message
      speaker.say('<think>No.</think> <tool_call>')
      _, whole = client.json(CHAT, {**BODY, 'tool_choice': 'none'})
      said = whole['choices'][0]['message']['content']
      assert said == '<think>No.</think> <tool_call>'


def test_calls_that_must_be(served: Served) -> None:
  """Whatever the model would write: the grammar is its own way to call."""
  call = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}'
  named = {'type': 'function', 'function': {'name': 'get_weather'}}
  strict = {**WEATHER, 'function': {**WEATHER['function'], 'strict': True}}
  for more in (
    {'tool_choice': 'required'},
    {'tool_choice': named},
    {'tools': [strict, NOW]},
  ):
    served.speaker.say(f'{call}\n</tool_call>')
    choice, prompt = asked(served, **more)
    assert choice['finish_reason'] == 'tool_calls', choice
    (made,) = choice['message']['tool_calls']
    assert made['function']['arguments'] == PARIS and 'now' in prompt
    # Without "city", which is required: another token is taken.
    served.speaker.say('<tool_call>\n{"name": "get_weather", "arguments": {}')
    choice, _ = asked(served, **more, max_tokens=60)
    (made,) = choice['message']['tool_calls']
    assert re.match(r'{\s*"city"', made['function']['arguments']), made
  served.speaker.say('Yes.')
  for more in ({'tool_choice': 'required'}, {'tool_choice': named}):
    choice, _ = asked(served, **more, max_tokens=9)
    text = served.speaker.words.decode(choice['token_ids'])
    assert text[0] == '<', text
  served.speaker.say('<think>Hm.</think>\n' + call + '\n</tool_call>')
  choice, _ = asked(served, tool_choice='required')
  assert choice['message']['reasoning_content'] == 'Hm.'
  assert choice['finish_reason'] == 'tool_calls'
  assert asked(served, tools=[strict])[0]['finish_reason'] == 'tool_calls'
  served.speaker.say('No.')
  assert asked(served, tools=[strict])[0]['message']['content'] == 'No.'


def test_schemas_that_are_none(served: Served) -> None:
  bad = _function(parameters={'type': 'strin'})
  more = {'tools': [bad], 'tool_choice': 'required'}
  status, message, param = served.client.refused(CHAT, {**BODY, **more})
  assert (status, param) == (400, 'tools') and 'strin' in message, message
  assert asked(served, tools=[bad])  # of which nobody makes a grammar


def test_too_large_a_grammar_is_told_by_the_field(tmp_path: Any) -> None:
  limits = limits_lib.Limits(max_grammar_chars=100)
  with served_by(tmp_path, FAMILIES['qwen3'], limits=limits) as served:
    schema = {'type': 'object', 'description': 'x' * 100}
    response_format = {
      'type': 'json_schema',
      'json_schema': {'name': 'a', 'schema': schema},
    }
    for more in (
      {'tool_choice': 'required'},
      {'tools': [], 'response_format': response_format},
      {'tools': [], 'structured_outputs': {'json': schema}},
    ):
      *_, name = more
      name = 'tools' if name == 'tool_choice' else name
      status, message, param = served.client.refused(CHAT, {**BODY, **more})
      assert status == 400 and 'max_grammar_chars=100' in message, message
      assert param == name, message


def test_batch_files_and_lines(tmp_path: Any) -> None:
  template = _TEMPLATE.format(words=FAMILIES['qwen3'].words, end='')
  speaker = speaking.Speaker(tmp_path, template)
  engine = speaker.make_engine()
  speaker.say(FAMILIES['qwen3'].text)
  (result,) = batch_files_test.results_of(
    engine, batch_files_test.batch_line('a', CHAT, BODY)
  )
  (choice,) = result['response']['body']['choices']
  assert choice['finish_reason'] == 'tool_calls'
  assert choice['message']['reasoning_content'] == 'Hm.'
  line = {'messages': BODY['messages'], 'tools': BODY['tools']}
  sampling = {'sampling': {'max_tokens': 999}}
  done, must, alone, *bad = batch_files_test.results_of(
    engine,
    line | sampling,
    line | sampling | {'tool_choice': 'required'},
    {'messages': line['messages']} | sampling,
    line | {'tool_choice': 'odd'},
    {'prompt': 'a', 'tools': []},
    {'prompt': 'a', 'tools': [NOW]},
  )
  assert {**done['message'], 'tool_calls': None} == {
    'role': 'assistant',
    'content': 'I look.\n',
    'reasoning_content': 'Hm.',
    'tool_calls': None,
  }
  assert must['message']['tool_calls'] and must['finish_reason'] == 'stop'
  assert must['message']['content'] is None
  assert done['text'] == FAMILIES['qwen3'].text
  assert [c['function'] for c in done['message']['tool_calls']] == [
    {'name': 'get_weather', 'arguments': PARIS},
    {'name': 'now', 'arguments': '{}'},
  ]
  assert alone['message']['content'].startswith('I look.\n<tool_call>')
  assert [b['error'].partition(':')[0] for b in bad] == [
    "tool_choice='odd'",
    'tools',
    'tools',
  ]


def test_nothing_is_left(served: Served) -> None:
  fake.wait_until(served.running.all_pages_are_free)
