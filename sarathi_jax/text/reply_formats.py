# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001
"""How models write calls of tools, and what they think: one table each.

No registry has a library for it that is kept and needs no torch. A format is
chosen by words of the checkpoint's chat template, which shows a model its own
earlier calls as it is to write them. Names are vLLM's, where it has one.
Sources: the chat templates and cards of the models that a row names, which
README lists as well.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
import enum
from typing import NamedTuple

from sarathi_jax import errors
from sarathi_jax.text import call_arguments
from sarathi_jax.text import call_readers
from sarathi_jax.text import incremental
from sarathi_jax.text import tags

AUTO, NONE = 'auto', 'none'


Read = Callable[
  [incremental.Source, call_readers.Caller, str], Generator[None, None, None]
]


class Bare(enum.Enum):
  """What a reply that is a call begins with, where no mark does."""

  OBJECT = '{'
  NAME = 'name'


class Frame(NamedTuple):
  """How calls are written that must be: what is around them, and in them.

  A call is `begin`, its name, `middle`, its arguments, `end`.

  Attributes:
    begin, middle, end: see above.
    separator: between two; None where there is only ever one.
    before, after: all calls.
    arguments: how they are written; see `call_arguments`.
  """

  begin: str
  middle: str
  end: str
  separator: str | None = ''
  before: str = ''
  after: str = ''
  arguments: Callable[[call_arguments.Schema], tags.Format] = (
    call_arguments.as_json
  )


class ToolFormat(NamedTuple):
  """A way to write calls.

  Attributes:
    models: who writes so.
    words: one of them is in the templates of those that write so.
    begins: marks that begin calls.
    read: reads the calls after one of the marks, and tells of them. It raises
      MalformedError, or stops, where what comes is none.
    frame: how calls are written.
    others: marks that say nothing.
    inner: marks that are in calls.
    bare: what makes a reply without a mark a call, or several; None: nothing.
    id_chars: characters of a call's id, if the template insists on some.
  """

  models: str
  words: tuple[str, ...]
  begins: tuple[str, ...]
  read: Read
  frame: Frame
  others: tuple[str, ...] = ()
  inner: tuple[str, ...] = ()
  bare: Bare | None = None
  id_chars: int | None = None

  @property
  def marks(self) -> tuple[str, ...]:
    """All of them."""
    return (*self.begins, *self.others, *self.inner)


class ReasoningFormat(NamedTuple):
  """The marks around what a model thinks.

  Attributes:
    models: who writes so.
    begin, end: what it thinks.
    before, after: the answer then.
    words: one of them is in the templates of those that write so; if there are
      none, a mark.
    then: what is between it and whatever comes next.
    answer: what an answer begins with, whether or not it thought.
    others: marks that say nothing, of replies whose parts are all marked: these
      may think several times.
    tokens: special tokens that marks are made of, if they are no tokens.
  """

  models: str
  begin: str
  end: str
  before: str = ''
  after: str = ''
  words: tuple[str, ...] = ()
  then: str = ''
  answer: str = ''
  others: tuple[str, ...] = ()
  tokens: tuple[str, ...] = ()

  @property
  def marks(self) -> tuple[str, ...]:
    """All of them, or what they are made of."""
    if self.tokens:
      return self.tokens
    marks = (self.begin, self.end, self.before, self.after)
    return tuple(filter(None, marks))

  def is_of(self, template: str) -> bool:
    """Whether a chat template shows it."""
    # Some templates only begin it, others only take it out again.
    return any(word in template for word in self.words or self.marks)

  def is_begun(self, prompt_end: str) -> bool:
    """Whether a prompt that ends so has it think."""
    return prompt_end.rstrip().endswith(self.begin)

  def is_over(self, prompt_end: str) -> bool:
    """Whether a prompt that ends so has it think no more."""
    if self.answer:
      return prompt_end.endswith(self.answer)
    return prompt_end.rstrip().endswith(self.end)


# In the order in which their words are looked for: templates of the later rows
# may be modelled on the earlier ones' models.
TOOLS: Mapping[str, ToolFormat] = {
  'deepseek_v3': ToolFormat(
    "DeepSeek-R1's distillations of Llama and Qwen2",
    (call_readers.SEP,),
    ('<｜tool▁call▁begin｜>',),
    call_readers.deepseek,
    Frame(
      '<｜tool▁call▁begin｜>function<｜tool▁sep｜>',
      '\n```json\n',
      f'\n```{call_readers.END}',
      '\n',
      '<｜tool▁calls▁begin｜>',
      '<｜tool▁calls▁end｜>',
    ),
    ('<｜tool▁calls▁begin｜>', '<｜tool▁calls▁end｜>'),
    (call_readers.SEP, call_readers.END),
  ),
  'mistral_args': ToolFormat(
    'Mistral Small from 3.2 on, Devstral, Magistral, Ministral 3',
    ('[ARGS]',),
    ('[TOOL_CALLS]',),
    call_readers.mistral,
    Frame('[TOOL_CALLS]', '[ARGS]', ''),
    inner=('[ARGS]', '[CALL_ID]'),
    id_chars=9,
  ),
  'mistral': ToolFormat(
    'Mistral 7B v0.3, Nemo, Mixtral 8x22B, Ministral, Mistral Small to 3.1',
    ('[TOOL_CALLS]',),
    ('[TOOL_CALLS]',),
    call_readers.mistral,
    Frame('{"name": "', '", "arguments": ', '}', ', ', '[TOOL_CALLS][', ']'),
    inner=('[ARGS]', '[CALL_ID]'),
    id_chars=9,
  ),
  'qwen3_coder': ToolFormat(
    'Qwen3-Coder',
    ('<function=',),
    ('<tool_call>',),
    call_readers.qwen3_coder,
    Frame(
      '<tool_call>\n<function=',
      '>\n',
      '</function>\n</tool_call>',
      '\n',
      arguments=call_arguments.as_elements,
    ),
    inner=('</tool_call>',),
  ),
  'glm45': ToolFormat(
    'GLM-4.5, GLM-4.6',
    ('<arg_key>',),
    ('<tool_call>',),
    call_readers.glm45,
    Frame(
      '<tool_call>',
      '\n',
      '</tool_call>',
      '\n',
      arguments=call_arguments.as_pairs,
    ),
    inner=('</tool_call>',),
  ),
  'hermes': ToolFormat(
    'Qwen2.5, Qwen3, Qwen3-MoE, QwQ, SmolLM2 and 3, Hermes, xLAM',
    ('<tool_call>',),
    ('<tool_call>',),
    call_readers.hermes,
    Frame(
      '<tool_call>\n{"name": "', '", "arguments": ', '}\n</tool_call>', '\n'
    ),
    inner=('</tool_call>',),
  ),
  'granite': ToolFormat(
    'Granite 3.0 to 3.3',
    ('<|tool_call|> followed by a JSON list',),
    ('<|tool_call|>',),
    call_readers.granite,
    Frame('{"name": "', '", "arguments": ', '}', ', ', '<|tool_call|>[', ']'),
  ),
  'phi4_mini_json': ToolFormat(
    "Phi-4-mini, where a template asks for vLLM's form",
    ('functools[',),
    ('functools',),
    call_readers.granite,
    Frame('{"name": "', '", "arguments": ', '}', ', ', 'functools[', ']'),
  ),
  'phi4_mini': ToolFormat(
    'Phi-4-mini',
    ('<|/tool|>',),
    ('<|tool_call|>',),
    call_readers.phi4_mini,
    Frame(
      '{"name": "',
      '", "arguments": ',
      '}',
      ', ',
      '<|tool_call|>[',
      ']<|/tool_call|>',
    ),
    inner=('<|/tool_call|>',),
  ),
  'olmo3': ToolFormat(
    'OLMo-3',
    ('<function_calls>',),
    ('<function_calls>',),
    call_readers.olmo3,
    Frame(
      '',
      '(',
      ')',
      '\n',
      '<function_calls>',
      '</function_calls>',
      call_arguments.as_python,
    ),
    inner=('</function_calls>',),
  ),
  'glm4': ToolFormat(
    'GLM-4',
    ('在调用上述函数时，请使用 Json 格式表示调用的参数',),
    (),
    call_readers.glm4,
    Frame('', '\n', '', None),
    bare=Bare.NAME,
  ),
  'llama3_json': ToolFormat(
    'Llama 3.1, 3.2 and 3.3',
    (
      'respond with JSON for a function call',
      'respond with a JSON for a function call',
    ),
    ('<|python_tag|>',),
    call_readers.llama,
    Frame('{"name": "', '", "parameters": ', '}', None),
    bare=Bare.OBJECT,
  ),
  # OpenAI's harmony format.
  'openai': ToolFormat(
    'gpt-oss',
    ('<|channel|>commentary',),
    (
      '<|channel|>commentary to=functions.',
      '<|channel|>analysis to=functions.',
      ' to=functions.',
    ),
    call_readers.harmony,
    Frame(
      '<|channel|>commentary to=functions.',
      ' <|constrain|>json<|message|>',
      '',
      None,
    ),
  ),
}
REASONING: Mapping[str, ReasoningFormat] = {
  'granite': ReasoningFormat(
    'Granite 3.2',
    'Here is my thought process:',
    'Here is my response:',
  ),
  'granite_response': ReasoningFormat(
    'Granite 3.3',
    '<think>',
    '</think>',
    '<response>',
    '</response>',
    ('<response></response>',),
  ),
  'deepseek_r1': ReasoningFormat(
    "DeepSeek-R1's distillations", '<think>', '</think>'
  ),
  'qwen3': ReasoningFormat(
    'Qwen3, Qwen3-MoE, QwQ, SmolLM3, OLMo-3 Think, GLM-Z1, GLM-4.5',
    '<think>',
    '</think>',
  ),
  'mistral': ReasoningFormat(
    "Magistral, Ministral 3's Reasoning", '[THINK]', '[/THINK]'
  ),
  # Messages on channels, each begun as the prompt began the first.
  'openai_gptoss': ReasoningFormat(
    'gpt-oss',
    '<|channel|>analysis<|message|>',
    '<|end|>',
    words=('<|channel|>analysis<|message|>',),
    then='<|start|>assistant',
    answer='<|channel|>final<|message|>',
    others=(
      '<|channel|>final<|message|>',
      '<|channel|>commentary<|message|>',
      '<|start|>assistant',
      '<|end|>',
      '<|return|>',
    ),
    tokens=(
      '<|channel|>',
      '<|constrain|>',
      '<|message|>',
      '<|start|>',
      '<|end|>',
      '<|call|>',
      '<|return|>',
    ),
  ),
}


class Formats(NamedTuple):
  """How a model writes: None where that is not known, or not parsed."""

  tools: ToolFormat | None = None
  reasoning: ReasoningFormat | None = None


def choose(
  template: str, tool_parser: str = AUTO, reasoning_parser: str = AUTO
) -> Formats:
  """Returns how a model writes.

  Args:
    template: its chat template, which is searched where a parser is AUTO.
    tool_parser: a key of TOOLS, AUTO or NONE.
    reasoning_parser: a key of REASONING, AUTO or NONE.

  Raises:
    ConfigError: there is no such parser.
  """
  for name, value, table in (
    ('tool_parser', tool_parser, TOOLS),
    ('reasoning_parser', reasoning_parser, REASONING),
  ):
    if value not in (AUTO, NONE, *table):
      raise errors.ConfigError(
        f'{name}={errors.shown(value)}: must be one of '
        f'{", ".join((AUTO, NONE, *table))}.'
      )
  tools = TOOLS.get(tool_parser)
  if tool_parser == AUTO:
    tools = next(
      (
        row
        for row in TOOLS.values()
        if any(word in template for word in row.words)
      ),
      None,
    )
  reasoning = REASONING.get(reasoning_parser)
  if reasoning_parser == AUTO:
    reasoning = next(
      (row for row in REASONING.values() if row.is_of(template)), None
    )
  return Formats(tools, reasoning)
