# SPDX-License-Identifier: Apache-2.0
"""What models that reason write: reasoning, then content and calls."""

from __future__ import annotations

import pytest

from sarathi_jax.text import reply_formats
from sarathi_jax.text import reply_reader
from tests.text import reply_reader_test as reader_test

THINKING: tuple[tuple[str, str, str, str], ...] = (
  # Qwen3 writes the mark itself; R1's template does, in the prompt.
  ('', '<think>\nHm.\n\n  So.\n</think>\n\nYes. ', 'Hm.\n\n  So.', 'Yes. '),
  ('<think>\n', 'Hm.\n</think>\n\nYes.', 'Hm.', 'Yes.'),
  ('<think>\n', '\nHm. <think> </thin', 'Hm. <think> </thin', ''),
  ('<think>\n', '</think>Yes.', '', 'Yes.'),
  ('<think>\n\n</think>\n\n', 'Yes.', '', 'Yes.'),
  ('', ' Yes <think>no</think>', '', ' Yes <think>no</think>'),
  ('', ' \n<thin', '', ' \n<thin'),
  ('', '<think>', '', ''),
  ('<think>', '  ', '', ''),
  ('', '', '', ''),
)


@pytest.mark.parametrize('prompt_end, text, reasoning, content', THINKING)
def test_reasoning(
  prompt_end: str, text: str, reasoning: str, content: str
) -> None:
  reply = reader_test.same_however_cut(
    text, 'none', 'qwen3', prompt_end=prompt_end
  )
  assert reply == (content, reasoning, ())


@pytest.mark.parametrize(
  'row, text, reasoning, content',
  [
    (
      'granite',
      'Here is my thought process: Hm. Here is my response: Yes.',
      'Hm.',
      'Yes.',
    ),
    ('granite', 'Here is my thought: no.', '', 'Here is my thought: no.'),
    (
      'granite_response',
      '<think>Hm.</think>\n<response> Yes. </response>',
      'Hm.',
      'Yes. ',
    ),
    ('granite_response', '<think>Hm.</think>\n\nYes.', 'Hm.', 'Yes.'),
    ('granite_response', '<response>Yes.', '', '<response>Yes.'),
  ],
)
def test_reasoning_of_granite(
  row: str, text: str, reasoning: str, content: str
) -> None:
  assert reader_test.same_however_cut(text, 'none', row) == (
    content,
    reasoning,
    (),
  )


# gpt-oss, after '<|start|>assistant': text, reasoning, content and calls.
ANALYSIS, FINAL = (
  '<|channel|>analysis<|message|>',
  '<|channel|>final<|message|>',
)
NEXT = '<|end|><|start|>assistant'
CHANNELS: tuple[tuple[str, str, str, reader_test.Calls], ...] = (
  (f'{ANALYSIS}Hm. So.{NEXT}{FINAL}Yes. <b> ', 'Hm. So.', 'Yes. <b> ', []),
  (f'{FINAL}Yes.<|return|>', '', 'Yes.', []),
  (f'{ANALYSIS}Hm', 'Hm', '', []),
  (f'{ANALYSIS}A{NEXT}{ANALYSIS}B{NEXT}{FINAL}C', 'A\nB', 'C', []),
  (
    f'{ANALYSIS}A.{NEXT}<|channel|>commentary<|message|>I ask.{NEXT}'
    f'{ANALYSIS}B.{NEXT} to=functions.add<|channel|>commentary '
    f'<|constrain|>json<|message|>{reader_test.ADD}<|call|>',
    'A.\nB.',
    'I ask.',
    [('add', reader_test.ADD)],
  ),
  (
    f'{ANALYSIS}A{NEXT}<|channel|>commentary to=functions.get_weather '
    f'<|constrain|>json<|message|>{reader_test.PARIS}',
    'A',
    '',
    [('get_weather', reader_test.PARIS)],
  ),
  # No tool that was offered.
  (
    f'{ANALYSIS}A{NEXT}<|channel|>commentary to=functions.other json'
    '<|message|>{}',
    'A',
    '<|channel|>commentary to=functions.other json<|message|>{}',
    [],
  ),
  ('It goes to=functions.', '', 'It goes to=functions.', []),
)


@pytest.mark.parametrize('text, reasoning, content, calls', CHANNELS)
def test_channels(
  text: str, reasoning: str, content: str, calls: reader_test.Calls
) -> None:
  reply = reader_test.same_however_cut(text, 'openai', 'openai_gptoss')
  assert (reply.reasoning, reply.content) == (reasoning, content)
  assert reader_test.calls_of(reply) == calls


def test_channels_without_tools() -> None:
  reader = reply_reader.ReplyReader(
    reply_formats.choose('', 'none', 'openai_gptoss'), {}, '<|start|>assistant'
  )
  reply = reader.read(f'{ANALYSIS}Hm.{NEXT}{FINAL}Yes.', is_last=True)
  assert reply == ('Yes.', 'Hm.', ())


def test_reasoning_then_calls() -> None:
  reply = reader_test.same_however_cut(
    '<think>\nMaybe <tool_call>{"name": "now"}.\n</think>\n\n'
    '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>',
    'hermes',
    'qwen3',
  )
  assert reply.reasoning == 'Maybe <tool_call>{"name": "now"}.'
  assert (reply.content, reader_test.calls_of(reply)) == ('', [('add', '{}')])
  reply = reader_test.same_however_cut(
    '[THINK]Hm.[/THINK][TOOL_CALLS]add[ARGS]{}', 'mistral', 'mistral'
  )
  assert reply.reasoning == 'Hm.' and reader_test.calls_of(reply) == [
    ('add', '{}')
  ]
