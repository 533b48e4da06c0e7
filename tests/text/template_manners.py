# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001
"""Templates that do what makers' chat templates do, each in a maker's manner.

They are not theirs, but shorter, and have what these have of Jinja.
"""

MESSAGES = [
  {'role': 'system', 'content': 'Be brief.'},
  {'role': 'user', 'content': 'Say "<é & 日本>"'},
  {'role': 'assistant', 'content': 'No.'},
  {'role': 'user', 'content': 'Why?'},
]
CALLED = [
  *MESSAGES,
  {
    'role': 'assistant',
    'content': '<think>\nHm.\n</think>\n\nI look.',
    'tool_calls': [
      {
        'id': 'abcdefghi',
        'type': 'function',
        'function': {'name': 'f', 'arguments': {'a<b': ['é', None], 'c': True}},
      }
    ],
  },
  {'role': 'tool', 'content': '{"x": 1}', 'tool_call_id': 'abcdefghi'},
  {'role': 'tool', 'content': 'more', 'tool_call_id': 'abcdefghi'},
]
TEMPLATES = {
  # Qwen3: what was thought is left out, results of tools are the user's.
  'qwen3': """{%- set ns = namespace(last=0) %}
{%- for m in messages[::-1] %}
  {%- if ns.last == 0 and m.role == 'user' and m.content is string
      and not(m.content.startswith('<r>') and m.content.endswith('</r>')) %}
    {%- set ns.last = messages|length - 1 - loop.index0 %}
  {%- endif %}
{%- endfor %}
{%- for m in messages %}
  {%- if m.role == 'tool' %}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<u>
    {%- endif %}
    {{- '\\n<r>' + m.content + '</r>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}</u>
    {%- endif %}
  {%- elif m.tool_calls %}
    {{- m.content.split('</think>')[-1].lstrip('\\n') }}
    {%- for call in m.tool_calls %}
      {%- if call.function %}{% set call = call.function %}{% endif %}
      {{- '<c>{"name": "' }}{{ call.name }}{{ '", "arguments": ' }}
      {%- if call.arguments is string %}{{ call.arguments }}
      {%- else %}{{ call.arguments | tojson }}{% endif %}}</c>
    {%- endfor %}
  {%- else %}{{ ns.last ~ m.role + '\\n' + m.content }}{% endif %}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>
{%- endif %}{{ tools | tojson }}""",
  # Qwen3-Coder: schemas as elements.
  'qwen3_coder': """{% macro rest(of, done) %}
  {%- for key in of if key not in done %}
    {{- '<' ~ key ~ '>' ~ (of[key] | string) ~ '</' ~ key ~ '>' }}
  {%- endfor %}
{% endmacro %}
{%- for tool in tools %}{{ rest(tool.function, ['name']) }}
  {%- for name, field in tool.function.parameters.properties|items %}
    {{- name ~ (field | tojson | safe) }}
  {%- endfor %}
{%- endfor %}
{%- for m in messages %}
  {%- for call in m.tool_calls or [] %}
    {%- for name, value in call.function.arguments|items %}
      {{- name }}
      {{- value | tojson | safe if value is sequence and value is not string
          else value | string }}
    {%- endfor %}
  {%- endfor %}
  {%- if loop.previtem and loop.previtem.role != 'tool' %}{{ m.content }}
  {%- endif %}
  {%- if not loop.last and loop.nextitem.role != 'tool' %}|{% endif %}
{%- endfor %}""",
  # OLMo-3: calls as Python writes them.
  'olmo3': """{{ bos_token }}{% for m in messages %}
{%- set made = namespace(parts=[]) %}
{%- for call in m.tool_calls if m.tool_calls is defined %}
  {%- for key, value in call.function.arguments.items() %}
    {%- set made.parts = made.parts + [key ~ '=' ~ (value | tojson)] %}
  {%- endfor %}
  {{- '<function_calls>' + call.function.name + '(' }}
  {{- made.parts | join(', ') + ')' }}
{%- endfor %}
{{- m.get('content', none) }}
{%- endfor %}{{ '<functions>' }}{{- tools | tojson }}""",
  # GLM-4.5: calls as elements, thoughts before the last question left out.
  'glm45': """[gMASK]<sop>
{%- if tools -%}<|system|>
{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}<tool_call>{function-name}
<arg_key>{arg-key-1}</arg_key>{%- endif -%}
{%- macro shown(content) -%}
{%- if content is string %}{{ content }}{%- elif content is iterable -%}
{%- for item in content if item.type == 'text' -%}{{ item.text }}{%- endfor -%}
{%- endif -%}{%- endmacro -%}
{%- set ns = namespace(last=-1) %}
{%- for m in messages -%}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 -%}{%- endif %}
{%- endfor %}
{% for m in messages %}<|{{ m.role }}|>
{%- set content = shown(m.content) %}
{%- if m.role == 'assistant' and '</think>' in content %}
{%- set thought = ((content.split('</think>')|first).split('<think>')|last) %}
{%- set content = (content.split('</think>')|last).strip() %}
{%- endif %}
{%- if loop.index0 > ns.last and thought -%}
{{ '\\n<think>' + thought.strip() + '</think>' }}
{%- endif %}{{ content.strip() }}
{%- for call in m.tool_calls or [] %}
{%- if call.function %}{%- set call = call.function %}{%- endif %}
{{ '\\n<tool_call>' + call.name }}
{% for k, v in call.arguments.items() %}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}
{%- endfor %}
{%- endfor %}
{%- endfor -%}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>
{%- endif -%}""",
  # GLM-4: schemas as lines, in Chinese.
  'glm4': """[gMASK]<sop>{%- if tools -%}<|system|>
# 可用工具
{% for tool in tools %}
## {{ tool.function.name }}

{{ tool.function | tojson(indent=4, ensure_ascii=False) }}
在调用上述函数时，请使用 Json 格式表示调用的参数。
{%- endfor %}{%- endif -%}
{%- for m in messages -%}<|{{ m.role }}|>{{ m.metadata if m.metadata else '' }}
{%- if m.tool_calls is defined -%}
{%- for call in m.tool_calls -%}
{{ call.function.name }}
{{ call.function.arguments | tojson(ensure_ascii=False) }}
{%- endfor -%}{%- endif -%}
{%- if m.content is string and m.content | trim %}
{{ m.content }}{%- endif -%}
{%- endfor -%}""",
  # Granite: roles as tokens, a date, schemas indented.
  'granite': """{%- set now = strftime_now('%Y') %}
{%- if messages[0]['role'] == 'system' %}
  {%- set first = messages[0]['content'] %}
  {%- set loop_messages = messages[1:] %}
{%- endif %}
{{- '<|r|>' + first + now }}
{%- if thinking %}{{ " Write <think></think> <response></response>." }}
{%- endif %}
{%- if tools %}{{- tools | tojson(indent=4) + '<|e|>\\n' }}{%- endif %}
{%- for m in loop_messages %}
  {{- '<|r|>' + m['role'] + '<|e|>' + m['content'] }}
  {%- if loop.last and add_generation_prompt %}
    {{- '<|r|>assistant' }}
    {%- if controls %}{{- ' ' + controls | tojson() }}{% endif %}
  {%- endif %}
{%- endfor %}""",
  # Mistral: turns are counted, ids insisted on.
  'mistral': """{{ bos_token }}{%- set turns = [] %}
{%- for m in messages[1:] %}
  {%- if m['role'] not in ['tool', 'x'] and not m.get('tool_calls') %}
    {%- set turns = turns + [m] %}
  {%- endif %}
{%- endfor %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages[1:] %}
  {%- if m['role'] == 'user' and m == users[-1] %}[T]{% for tool in tools %}
    {%- for key, value in tool.function.items() if key != 'return' %}
      {%- if value is string %}{{ '"' + key + '": "' + value + '"' }}
      {%- else %}{{ '"' + key + '": ' + value|tojson }}{% endif %}
      {%- if not loop.last %}, {% endif %}
    {%- endfor %}{% endfor %}[/T]
  {%- elif m.tool_calls is defined %}
    {%- for call in m.tool_calls %}
      {{- (call.function|tojson)[:-1] + ', "id": "' + call.id[-9:] + '"}' }}
      {%- if call.id|length < 9 %}{{ raise_exception('ids!') }}{% endif %}
    {%- endfor %}
  {%- else %}{{ m['content']|string }}{% endif %}
{%- endfor %}{{ eos_token }}""",
  # SmolLM3: Python's own texts of schemas; blocks may be marked as generated.
  'smollm3': """{%- set mode = '/think' if enable_thinking|default(true)
  else '/no_think' -%}
{%- if messages[0].role == 'system' -%}
  {%- set said = messages[0].content.replace('/no_think', '').rstrip() -%}
{%- endif -%}
{{ said }}{{ mode }}
{%- set ns = namespace(text='<tools>') -%}
{%- for tool in tools[:] -%}
  {%- set ns.text = ns.text ~ (tool | string) ~ '\\n' -%}
{%- endfor -%}{{ ns.text }}
{%- for m in messages[1:] -%}
  {%- set content = m.content if m.content is string else '' -%}
  {%- if m.role == 'assistant' -%}
    {%- generation -%}{{ content.lstrip('\\n') }}{%- endgeneration -%}
  {%- else -%}{{ content }}{%- endif -%}
{%- endfor -%}""",
  # Gemma: the system's text is the first user's; roles by other names.
  'gemma': """{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}
  {%- if messages[0]['content'] is string -%}
    {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
  {%- else -%}{%- set prefix = messages[0]['content'][0]['text'] -%}
  {%- endif -%}
{%- endif -%}
{%- for m in messages[1:] -%}
  {%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}
  {{ '<t>' + role + '\\n' + (prefix if loop.first else '') }}
  {%- if m['content'] is string -%}{{ m['content'] | trim }}
  {%- elif m['content'] is iterable -%}
    {%- for item in m['content'] -%}
      {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
    {%- endfor -%}
  {%- else -%}{{ raise_exception('no') }}{%- endif -%}
{%- endfor -%}{{ tools }}""",
}
