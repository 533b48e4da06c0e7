# SPDX-License-Identifier: Apache-2.0
"""Chat templates, against what transformers makes of them."""

from __future__ import annotations

import json
import pathlib

import pytest
import transformers

from sarathi_jax import errors
from sarathi_jax.text import chat
from tests import tokenizer_fixture
from tests.text import template_manners as manners

MESSAGES = manners.MESSAGES

TEMPLATES = {
  'plain': '{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>'
  "{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
  '{% if add_generation_prompt %}<|assistant|>{% endif %}',
  'blocks': '{%- for message in messages %}\n'
  '  {%- if loop.index0 == 1 %}{% continue %}{% endif %}\n'
  '    {{- message | tojson }}\n{% endfor %}\n',
  'generation': "{% for m in messages %}{% if m.role == 'assistant' %}"
  '{% generation %}{{ m.content }}{% endgeneration %}'
  '{% else %}{{ m.content }}{% endif %}{% endfor %}',
}


def _write(folder: pathlib.Path, template: str, **more: object) -> None:
  tokenizer_fixture.write(folder)
  (folder / 'tokenizer_config.json').write_text(
    json.dumps(
      {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'bos_token': '<s>',
        'eos_token': '</s>',
        'chat_template': template,
        **more,
      }
    )
  )


@pytest.mark.parametrize('name', TEMPLATES)
def test_renders_as_transformers_does(tmp_path, name):
  _write(tmp_path, TEMPLATES[name])
  theirs = transformers.AutoTokenizer.from_pretrained(
    tmp_path
  ).apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
  template = chat.ChatTemplate.from_folder(tmp_path)
  assert template is not None
  assert template.render(MESSAGES) == theirs


TOOLS = [
  {
    'type': 'function',
    'function': {
      'name': 'f',
      'parameters': {'type': 'object', 'properties': {'a<b': {}}},
    },
  }
]
# Of a model whose chats with tools have a template of their own.
_NAMED = [
  {'name': 'default', 'template': 'plain {{ tools }}'},
  {'name': 'tool_use', 'template': 'with {{ tools | tojson }} {{ odd }}'},
]


@pytest.mark.parametrize(
  'template',
  [
    '{% if tools %}{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}'
    "{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}",
    _NAMED,
  ],
)
@pytest.mark.parametrize('as_files', [False, True])
def test_tools_are_written_as_transformers_does(tmp_path, template, as_files):
  if as_files and isinstance(template, list):
    _write(tmp_path, 'old')
    (tmp_path / chat.FILE).write_text(template[0]['template'])
    (tmp_path / chat.MORE_FILES).mkdir()
    (tmp_path / chat.MORE_FILES / 'tool_use.jinja').write_text(
      template[1]['template']
    )
  else:
    _write(tmp_path, template)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ours = chat.ChatTemplate.from_folder(tmp_path)
  assert ours is not None and ours.takes('tools') and not ours.takes('x')
  for tools in ([], TOOLS):
    assert ours.render(MESSAGES, tools) == theirs.apply_chat_template(
      MESSAGES, tools=tools or None, tokenize=False
    )
  if isinstance(template, list):
    assert ours.render(MESSAGES, TOOLS, {'odd': 3}).endswith(' 3')
    assert 'with {{' in ours.words and 'plain' in ours.words


@pytest.mark.parametrize('manner', manners.TEMPLATES)
def test_makers_manners_are_rendered_as_transformers_does(tmp_path, manner):
  _write(tmp_path, manners.TEMPLATES[manner])
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ours = chat.ChatTemplate.from_folder(tmp_path)
  for variables in ({}, {'enable_thinking': False}, {'thinking': True}):
    if not all(map(ours.takes, variables)):
      continue
    assert ours.render(
      manners.CALLED, TOOLS, variables
    ) == theirs.apply_chat_template(
      manners.CALLED,
      tools=TOOLS,
      tokenize=False,
      add_generation_prompt=True,
      **variables,
    )


@pytest.mark.parametrize(
  'template, text',
  [
    # Phi-4-mini's card: the functions' JSON in the system's message.
    (
      "{% for m in messages %}{% if 'tools' in m and m['tools'] is not none %}"
      "{{ m['content'] + '<|tool|>' + m['tools'] + '<|/tool|>' }}"
      "{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
      '<|tool|>'
      + json.dumps([tool['function'] for tool in TOOLS])
      + '<|/tool|>',
    ),
    # The first GLM-4's: it goes through them.
    (
      "{% for m in messages %}{% if m['tools'] is defined %}"
      "{% set tools = m['tools'] %}{% for tool in tools %}"
      "{% if tool['type'] == 'function' %}{{ tool['function'] | tojson }}"
      '{% endif %}{% endfor %}{% endif %}{{ m.content }}{% endfor %}',
      json.dumps(TOOLS[0]['function']),
    ),
    # SmolLM3's card: by another name.
    (
      '{% for t in xml_tools or [] %}{{ t.function | tojson }}{% endfor %}'
      '{% for m in messages %}{{ m.content }}{% endfor %}',
      json.dumps(TOOLS[0]['function']),
    ),
  ],
)
def test_tools_are_where_a_maker_has_them(template, text):
  """Which transformers leaves to who calls it."""
  ours = chat.ChatTemplate(template, {})
  assert ours.takes_tools
  assert text in ours.render(MESSAGES, TOOLS)
  assert ours.render([MESSAGES[1]], TOOLS).startswith(text)
  assert text not in ours.render(MESSAGES)
  assert not chat.ChatTemplate('{{ messages }}', {}).takes_tools


# In the manner of gpt-oss's.
HARMONY = """
{%- macro system() -%}
  {%- if reasoning_effort is not defined %}
    {%- set reasoning_effort = "medium" %}
  {%- endif %}
  {{- "Date: " + strftime_now("%Y-%m-%d") + "\\n" }}
  {{- "Reasoning: " + reasoning_effort + "\\n" }}
{%- endmacro -%}
{{- "<|start|>system<|message|>" + system() + "<|end|>" }}
{%- if tools %}
  {{- "<|start|>developer<|message|>namespace functions {\\n" }}
  {%- for tool in tools %}
    {{- "type " + tool.function.name + " = (_: " }}
    {{- tool.function.parameters.properties.keys() | join(", ") + ")" }}
  {%- endfor %}
  {{- "}<|end|>" }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for message in messages %}
  {%- if message.role == "assistant" and "tool_calls" in message %}
    {%- if "thinking" in message %}
      {{- "<|start|>assistant<|channel|>analysis<|message|>" }}
      {{- message.thinking + "<|end|>" }}
    {%- endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- "<|start|>assistant to=functions." + call.name }}
    {{- "<|channel|>commentary json<|message|>" }}
    {{- call.arguments | tojson + "<|call|>" }}
    {%- set last.name = call.name %}
  {%- elif message.role == "tool" %}
    {{- "<|start|>functions." + last.name + " to=assistant" }}
    {{- "<|channel|>commentary<|message|>" + message.content | tojson }}
    {{- "<|end|>" }}
  {%- else %}
    {{- "<|start|>" + message.role + "<|message|>" + message.content }}
    {{- "<|end|>" }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start|>assistant" }}{%- endif %}"""


def test_harmony_is_rendered_as_transformers_does(tmp_path):
  """What a model thought before a call is told by the template's own name."""
  _write(tmp_path, HARMONY)
  call = {'name': 'f', 'arguments': {'a': 'é', 'b': [1]}}

  def chat_of(arguments: object, **thought: str) -> list[dict[str, object]]:
    made = dict(call, arguments=arguments)
    return [
      {'role': 'user', 'content': 'Why?'},
      {
        'role': 'assistant',
        'content': '',
        'tool_calls': [{'type': 'function', 'id': 'x', 'function': made}],
        **thought,
      },
      {'role': 'tool', 'content': '"so"'},
    ]

  tool = {'type': 'function', 'function': {'name': 'f', 'description': 'd'}}
  tool['function']['parameters'] = {'properties': {'a': {}, 'b': {}}}
  theirs = transformers.AutoTokenizer.from_pretrained(
    tmp_path
  ).apply_chat_template(
    chat_of(call['arguments'], thinking='Hm.'),
    tools=[tool],
    tokenize=False,
    add_generation_prompt=True,
    reasoning_effort='high',
  )
  ours = chat.ChatTemplate.from_folder(tmp_path)
  assert ours is not None and 'Reasoning: high' in theirs
  assert '<|message|>Hm.<|end|>' in theirs
  for arguments in (call['arguments'], json.dumps(call['arguments'])):
    assert theirs == ours.render(
      chat_of(arguments, reasoning_content='Hm.'),
      [tool],
      {'reasoning_effort': 'high'},
    )
  plain = ours.render([{'role': 'user', 'content': 'Why?'}])
  assert 'Reasoning: medium' in plain and plain.endswith('<|start|>assistant')


def test_a_template_that_sets_its_tools_takes_them():
  """As Mistral's and Llama 3.1's do, where there are none."""
  template = chat.ChatTemplate(
    '{% if not tools is defined %}{% set tools = none %}{% endif %}'
    '{% for m in messages %}{{ tools | tojson }}{% endfor %}',
    {},
  )
  assert template.takes('tools')
  assert template.render([MESSAGES[1]], TOOLS) == json.dumps(TOOLS)


def test_variables_that_a_template_does_not_take():
  template = chat.ChatTemplate('{{ a }}{{ bos_token }}', {'bos_token': 'b'})
  assert template.render(MESSAGES, (), {'a': 1}) == '1b'
  for name in ('bos_token', 'messages', 'b'):
    with pytest.raises(errors.UnsupportedError, match=f"has '{name}'"):
      template.render(MESSAGES, (), {name: 1})


def test_a_file_of_its_own_takes_precedence(tmp_path):
  _write(tmp_path, 'old')
  (tmp_path / 'chat_template.jinja').write_text('new')
  template = chat.ChatTemplate.from_folder(tmp_path)
  assert template is not None
  assert template.render(MESSAGES) == 'new'


@pytest.mark.parametrize(
  'template',
  [
    [
      {'name': 'tool_use', 'template': 'no'},
      {'name': 'default', 'template': '[{{ bos_token }}]'},
    ],
    {'default': '[{{ bos_token }}]', 'tool_use': 'no'},
    '[{{ bos_token }}]',
  ],
)
@pytest.mark.parametrize(
  'decoder',
  [{}, {'added_tokens_decoder': {'0': {'content': '<s>', 'special': True}}}],
  ids=['old', 'new'],
)
@pytest.mark.parametrize(
  ('config', 'special'),
  [
    ({'bos_token': None}, {'bos_token': '<s>'}),
    ({}, {'bos_token': '<s>'}),
    ({'bos_token': '</s>'}, {'bos_token': {'content': '<s>'}}),
    ({'bos_token': '<s>'}, {'eos_token': '</s>'}),
    ({'bos_token': '<s>'}, {'bos_token': None}),
  ],
)
def test_which_file_says_what_special_tokens_are(
  config, special, decoder, template, tmp_path
):
  """And in which of its shapes the template is."""
  tokenizer_fixture.write(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text(
    json.dumps(
      {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'chat_template': template,
        **config,
        **decoder,
      }
    )
  )
  (tmp_path / 'special_tokens_map.json').write_text(json.dumps(special))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ours = chat.ChatTemplate.from_folder(tmp_path)
  assert ours is not None
  if isinstance(template, dict):
    theirs.chat_template = template['default']  # which this transformers lacks
  assert ours.render(MESSAGES) == theirs.apply_chat_template(
    MESSAGES, tokenize=False
  )


def test_a_template_in_an_old_file_of_json(tmp_path):
  tokenizer_fixture.write(tmp_path, chat_template=None)
  (tmp_path / 'chat_template.json').write_text('{"chat_template": "old"}')
  template = chat.ChatTemplate.from_folder(tmp_path)
  assert template is not None and template.render(MESSAGES) == 'old'


@pytest.mark.parametrize(
  'template', [3, [3], [{'name': 'default'}], {'default': 3}]
)
def test_a_template_of_no_known_shape(tmp_path, template):
  _write(tmp_path, template)
  with pytest.raises(errors.CheckpointError, match='chat_template: must be'):
    chat.ChatTemplate.from_folder(tmp_path)


def test_a_template_that_is_no_text(tmp_path):
  (tmp_path / 'chat_template.jinja').write_bytes(b'\xff')
  with pytest.raises(errors.CheckpointError, match=r'template\.jinja: can'):
    chat.ChatTemplate.from_folder(tmp_path)


@pytest.mark.parametrize('token', [3, {'lstrip': True}, {'content': None}])
def test_a_special_token_without_a_text_is_none(token, tmp_path):
  _write(tmp_path, '[{{ bos_token }}]', bos_token=token)
  template = chat.ChatTemplate.from_folder(tmp_path)
  assert template is not None and template.render(MESSAGES) == '[]'


def test_there_may_be_none(tmp_path):
  assert chat.ChatTemplate.from_folder(tmp_path) is None


LLAMA_3 = (
  "{% for m in messages %}{{ '<|' + m['role'] + '|>' "
  "+ m['content'] | trim + '<|end|>' }}{% endfor %}"
)
CALL = {
  'id': 'call_1',
  'type': 'function',
  'function': {'name': 'f', 'arguments': '{"a": [1]}'},
}


def rendered(template: str, *messages: object) -> str:
  return chat.ChatTemplate(template, {}).render(messages)  # type: ignore


@pytest.mark.parametrize(
  'template',
  [
    LLAMA_3,
    '{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}',
  ],
)
def test_parts_and_null_are_texts_to_a_template(template):
  """Joined as vLLM and the gateway do; null says nothing."""
  parts = [{'type': 'text', 'text': 'What does'}, {'text': 'len do?'}]
  assert rendered(
    template,
    {'role': 'user', 'content': parts},
    {'role': 'assistant', 'content': None, 'tool_calls': [CALL]},
    {'role': 'assistant', 'tool_calls': [CALL]},
    {'role': 'tool', 'content': ['sunny'], 'tool_call_id': 'call_1'},
  ) == (
    '<|user|>What does\nlen do?<|end|><|assistant|><|end|>'
    '<|assistant|><|end|><|tool|>sunny<|end|>'
  )


@pytest.mark.parametrize('kind', ['text', 'input_text', 'output_text'])
def test_parts_of_other_names_are_texts(kind):
  assert rendered(
    LLAMA_3,
    {
      'role': 'user',
      'content': [
        {'type': kind, 'text': 'a'},
        {'type': 'refusal', 'refusal': 'b'},
      ],
    },
  ) == ('<|user|>a\nb<|end|>')


LOOP = (
  "{%% for m in messages %%}%s{%% for part in %s %%}<{{ part['type'] }}:"
  "{{ part['text'] }}>{%% endfor %%}%s{%% endfor %%}"
)


@pytest.mark.parametrize(
  'template,of_text',
  [
    (LOOP % ('', "m['content']", ''), '<text:b>'),
    (LOOP % ('{% set content = m.content %}', 'content', ''), '<text:b>'),
    (
      LOOP
      % (
        '{% if m.content is string %}{{ m.content }}{% else %}',
        'm.content',
        '{% endif %}',
      ),
      'b',
    ),
  ],
)
def test_a_template_that_takes_parts_gets_parts(template, of_text):
  assert (
    rendered(
      template,
      {'role': 'user', 'content': [{'type': 'text', 'text': 'a'}]},
      {'role': 'user', 'content': 'b'},
    )
    == f'<text:a>{of_text}'
  )


def test_null_is_none_to_a_template_that_asks():
  """As DeepSeek's does, to find calls of tools."""
  message = {'role': 'assistant', 'content': None}
  for template, expected in (
    ('{{ messages[0].content is none }}', 'True'),
    ('{{ messages[0].content is not none }}', 'False'),
    ('{{ messages[0].content == none }}', 'True'),
    ('{{ messages[0].content != none }}', 'False'),
    ("{{ messages[0].content == '' }}", 'True'),
    ('{% if messages[0].content %}a{% else %}b{% endif %}', 'b'),
  ):
    assert rendered(template, message) == expected


@pytest.mark.parametrize(
  'template,expected',
  [
    ('{{ a | tojson }}', '{"a": [1]}'),
    ("{{ '<' + a + '>' }}", '<{"a": [1]}>'),
    ('{{ a }}', '{"a": [1]}'),
    ('{% for k, v in a.items() %}{{ k }}={{ v[0] }}{% endfor %}', 'a=1'),
  ],
)
def test_arguments_of_a_call_are_an_object_and_a_text(template, expected):
  source = (
    '{% set a = messages[0].tool_calls[0].function.arguments %}' + template
  )
  assert rendered(source, {'role': 'assistant', 'tool_calls': [CALL]}) == (
    expected
  )


@pytest.mark.parametrize(
  'message,words',
  [
    ('x', "messages[0]='x': must be an object"),
    ({'content': 'x'}, 'messages[0].role=None: must be a text'),
    ({'role': '', 'content': 'x'}, "messages[0].role='': must be a text"),
    ({'role': 'user', 'content': 5}, 'messages[0].content=5: must be a text'),
    ({'role': 'user', 'content': {'text': 'x'}}, 'must be a text, null, or a'),
    ({'role': 'user', 'content': [5]}, 'messages[0].content[0]=5: must be a'),
    (
      {'role': 'user', 'content': [{'type': 'text'}]},
      'messages[0].content[0].text=None: must be a text',
    ),
    (
      {'role': 'user', 'content': ['a', {'type': 'image_url'}]},
      "messages[0].content[1]: type='image_url': only parts that are text",
    ),
    ({'role': 'assistant', 'tool_calls': 5}, 'messages[0].tool_calls=5'),
    ({'role': 'assistant', 'tool_calls': [{}]}, 'with a function'),
    (
      {'role': 'assistant', 'tool_calls': [{'function': {'arguments': '{'}}]},
      "messages[0].tool_calls[0].function.arguments='{': must be a JSON object",
    ),
  ],
)
def test_messages_that_are_none_are_told_by_field(message, words):
  with pytest.raises(errors.InvalidRequestError) as caught:
    rendered(LLAMA_3, message)
  assert words in str(caught.value)


def test_what_a_template_refuses_is_told():
  template = chat.ChatTemplate("{{ raise_exception('user must begin') }}", {})
  with pytest.raises(errors.InvalidRequestError, match='user must begin'):
    template.render(MESSAGES)


def test_templates_can_not_reach_python():
  template = chat.ChatTemplate(
    '{{ messages.__class__.__mro__[1].__subclasses__() }}', {}
  )
  with pytest.raises(errors.InvalidRequestError, match='unsafe'):
    template.render(MESSAGES)


def test_a_damaged_template_is_refused():
  with pytest.raises(errors.CheckpointError, match='chat template'):
    chat.ChatTemplate('{% for %}', {})
