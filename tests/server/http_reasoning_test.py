# SPDX-License-Identifier: Apache-2.0
"""Formats of answers beside reasoning and tools, over each way to ask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pydantic
import pytest
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc

from sarathi_jax.server import sarathi_pb2 as pb
from tests.offline import batch_files_test
from tests.server import fake
from tests.server import http_tools_test
from tests.server import speaking

CHAT = http_tools_test.CHAT
BODY = {name: http_tools_test.BODY[name] for name in ('model', 'messages')}
TOOLS: Any = http_tools_test.BODY['tools']
FAMILIES = http_tools_test.FAMILIES
PARIS = http_tools_test.PARIS
ANSWER = '{"city": "Paris", "degrees": 21}'
# What they think before they answer, as they write it.
THOUGHTS = {
  'qwen3': '<think>\nHm. {"a"}\n</think>\n\n',
  'r1': 'Hm. {"a"}\n</think>\n\n',
  'mistral': '[THINK]Hm. {"a"}[/THINK]',
}


class Weather(pydantic.BaseModel):
  city: str
  degrees: int


def format_of(kind: type[pydantic.BaseModel]) -> Any:
  schema = kind.model_json_schema()
  return {
    'type': 'json_schema',
    'json_schema': {'name': 'weather', 'schema': schema},
  }


@pytest.fixture(scope='module', params=FAMILIES)
def family(request: Any, tmp_path_factory: Any) -> Iterator[Any]:
  with http_tools_test.served_by(
    tmp_path_factory.mktemp('family'), FAMILIES[request.param]
  ) as served:
    yield served, THOUGHTS[request.param]


def test_openais_client_parses_what_comes_after_reasoning(family: Any) -> None:
  served, thought = family
  served.speaker.say(thought + ANSWER)
  paris = Weather(city='Paris', degrees=21)
  with served.openai() as client:
    parse: Any = client.chat.completions.parse
    message = parse(**BODY, response_format=Weather).choices[0].message
    assert message.parsed == paris and message.content == ANSWER
    assert message.reasoning_content == 'Hm. {"a"}'
    stream: Any = client.chat.completions.stream
    with stream(**BODY, response_format=Weather) as events:
      streamed = events.get_final_completion().choices[0].message
    assert streamed.parsed == paris


@pytest.mark.parametrize(
  'asked, says, content',
  [
    ({'response_format': {'type': 'json_object'}}, '{"a": 1}', '{"a": 1}'),
    ({'structured_outputs': {'regex': '[0-9]{3}'}}, '123', '123'),
    ({'structured_outputs': {'choice': ['yes', 'no']}}, 'no', 'no'),
    ({'structured_outputs': {'grammar': 'start: "ab" "c"?'}}, 'ab', 'ab'),
    # Another token is taken where the format rules out what is said.
    ({'structured_outputs': {'choice': ['yes']}}, 'no', 'yes'),
    ({'structured_outputs': {'regex': 'yes'}}, '\n\n\nno', 'yes'),
  ],
)
def test_each_kind_of_format(
  family: Any, asked: Any, says: str, content: str
) -> None:
  served, thought = family
  served.speaker.say(thought + says)
  status, whole = served.client.json(CHAT, {**BODY, **asked})
  assert status == 200, whole
  (choice,) = whole['choices']
  assert choice['message']['content'] == content
  assert choice['message']['reasoning_content'] == 'Hm. {"a"}'
  assert choice['finish_reason'] == 'stop'
  events = served.client.events(CHAT, {**BODY, **asked})
  assert http_tools_test.collected(events) == {
    'content': content,
    'reasoning_content': 'Hm. {"a"}',
    'finish_reason': 'stop',
    'calls': [],
  }


def test_a_reply_is_calls_or_of_the_format(family: Any) -> None:
  """As agents ask that have both: they could never act, else."""
  served, thought = family
  strict = [
    {**tool, 'function': {**tool['function'], 'strict': True}} for tool in TOOLS
  ]
  asked = {**BODY, 'response_format': format_of(Weather)}
  made = (
    f'{{"name": "get_weather", "arguments": {PARIS}}}',
    '{"name": "now", "arguments": {}}',
  )
  calls = (
    f'[TOOL_CALLS][{", ".join(made)}]'
    if '[' in thought
    else '\n'.join(f'<tool_call>\n{one}\n</tool_call>' for one in made)
  )
  for tools in (TOOLS, strict):
    for more in ({}, {'tool_choice': 'required'}):
      served.speaker.say(thought + calls)
      status, whole = served.client.json(
        CHAT, {**asked, 'tools': tools, **more}
      )
      assert status == 200, whole
      (choice,) = whole['choices']
      assert choice['finish_reason'] == 'tool_calls', choice
      assert choice['message']['content'] is None
      assert [
        one['function']['name'] for one in choice['message']['tool_calls']
      ] == ['get_weather', 'now']
    served.speaker.say(thought + ANSWER)
    _, whole = served.client.json(CHAT, {**asked, 'tools': tools})
    (choice,) = whole['choices']
    assert choice['finish_reason'] == 'stop'
    assert choice['message']['content'] == ANSWER
    # Neither: another token is taken, of either.
    served.speaker.say(thought + 'I look.')
    _, whole = served.client.json(
      CHAT, {**asked, 'tools': tools, 'max_tokens': len(thought) + 9}
    )
    content = whole['choices'][0]['message']['content'] or ''
    assert not content.startswith('I')


def test_calls_in_two_ways_are_refused(family: Any) -> None:
  served, _ = family
  tag = {'type': 'structural_tag', 'format': {'type': 'any_text'}}
  for more in (
    {'response_format': tag},
    {'structured_outputs': {'structural_tag': {'format': tag['format']}}},
  ):
    status, message, param = served.client.refused(
      CHAT, {**BODY, 'tools': TOOLS, 'tool_choice': 'required', **more}
    )
    assert (status, param) == (400, 'tools'), message
    assert f'exclude {next(iter(more))}' in message, message


def test_gateways_say_where_their_constraints_begin(family: Any) -> None:
  served, thought = family
  stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(served.running.channel)
  opens = not thought.startswith(('<', '['))
  prompt = 'a<think>\n' if opens else 'a'

  def answer(**fields: Any) -> str:
    (response,) = stub.Generate(
      vllm.GenerateRequest(
        tokenized=vllm.TokenizedInput(
          original_text=prompt,
          input_ids=served.speaker.words.encode(prompt).ids,
        ),
        sampling_params=vllm.SamplingParams(
          max_tokens=99, regex='yes', **fields
        ),
      ),
      timeout=fake.TIMEOUT_S,
    )
    text: str = served.speaker.words.decode(
      response.complete.output_ids, skip_special_tokens=False
    )
    return text.removesuffix('</s>')

  served.speaker.say(thought + 'no')
  for fields in ({}, {'grammar_from_first_token': False}):
    text = answer(**fields)
    assert text.startswith(thought) and 'yes' in text[len(thought) :], text
  assert answer(grammar_from_first_token=True).startswith('yes')


def test_chats_over_grpc(family: Any) -> None:
  """Their text has the marks, though other special tokens are left out."""
  served, thought = family
  served.speaker.say(thought + 'no')
  text = ''.join(
    response.text
    for response in served.running.generate(
      chat=pb.Chat(messages=[pb.ChatMessage(role='user', content='a')]),
      sampling={
        'max_tokens': 99,
        'structured_outputs': pb.StructuredOutputs(regex='yes'),
      },
    )
  )
  assert text.startswith(thought) and 'yes' in text[len(thought) :], text


def test_texts_are_no_chats(family: Any) -> None:
  """Nothing is told apart in what follows them."""
  served, thought = family
  served.speaker.say(thought + 'no')
  body = {'prompt': 'a', 'structured_outputs': {'regex': 'yes'}}
  _, whole = served.client.json('/v1/completions', body)
  assert whole['choices'][0]['text'] == 'yes'


@pytest.mark.parametrize('name', FAMILIES)
def test_batch_files_and_lines(tmp_path: Any, name: str) -> None:
  family, thought = FAMILIES[name], THOUGHTS[name]
  template = http_tools_test._TEMPLATE.format(
    words=family.words, end=family.end
  )
  speaker = speaking.Speaker(tmp_path, template, family.special)
  engine = speaker.make_engine()
  speaker.say(thought + 'no')
  outputs = {'structured_outputs': {'choice': ['yes']}}
  by_file, by_line, with_tools = batch_files_test.results_of(
    engine,
    batch_files_test.batch_line('a', CHAT, {**BODY, **outputs}),
    {
      'messages': BODY['messages'],
      'sampling': {'max_tokens': 99, **outputs},
    },
    {
      'messages': BODY['messages'],
      'sampling': {'max_tokens': 99, **outputs},
      'tools': TOOLS,
    },
  )
  (choice,) = by_file['response']['body']['choices']
  for message in (
    choice['message'],
    by_line['message'],
    with_tools['message'],
  ):
    assert message['content'] == 'yes', message
    assert message['reasoning_content'] == 'Hm. {"a"}'


def test_nothing_is_left(family: Any) -> None:
  served, _ = family
  fake.wait_until(served.running.all_pages_are_free)
