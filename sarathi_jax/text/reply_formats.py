# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001
"""How models write calls of tools, and what they think: one table each.

No registry has a library for it that is kept and needs no torch. A format is
chosen by words of the checkpoint's chat template, which shows a model its own
earlier calls as it is to write them. Names are vLLM's. Sources: the chat
templates of the models that a row names.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import NamedTuple

from sarathi_jax import errors
from sarathi_jax.text import call_readers
from sarathi_jax.text import incremental

AUTO, NONE = 'auto', 'none'


Read = Callable[
  [incremental.Source, call_readers.Caller, str], Generator[None, None, None]
]


class Frame(NamedTuple):
  """How calls are written that must be: what is around them, and in them.

  A call is `begin`, its name, `middle`, its arguments, `end`.

  Attributes:
    before, after: all calls.
    separator: between two; None where there is only ever one.
  """

  begin: str
  middle: str
  end: str
  separator: str | None = ''
  before: str = ''
  after: str = ''


class ToolFormat(NamedTuple):
  """A way to write calls.

  Attributes:
    words: one of them is in the templates of those that write so.
    begins: marks that begin calls.
    read: reads the calls after one of the marks, and tells of them. It raises
      MalformedError, or stops, where what comes is none.
    frame: how calls are written.
    others: marks that say nothing.
    inner: marks that are in calls.
    is_bare: whether a reply that begins with '{' is one call or more.
    id_chars: characters of a call's id, if the template insists on some.
  """

  words: tuple[str, ...]
  begins: tuple[str, ...]
  read: Read
  frame: Frame
  others: tuple[str, ...] = ()
  inner: tuple[str, ...] = ()
  is_bare: bool = False
  id_chars: int | None = None

  @property
  def marks(self) -> tuple[str, ...]:
    """All of them."""
    return (*self.begins, *self.others, *self.inner)


class ReasoningFormat(NamedTuple):
  """The marks around what a model thinks."""

  begin: str
  end: str

  def is_begun(self, prompt_end: str) -> bool:
    """Whether a prompt that ends so has it think."""
    return prompt_end.rstrip().endswith(self.begin)

  def is_over(self, prompt_end: str) -> bool:
    """Whether a prompt that ends so has it think no more."""
    return prompt_end.rstrip().endswith(self.end)


# In the order in which their words are looked for: templates of the later rows
# may be modelled on the earlier ones' models.
TOOLS: Mapping[str, ToolFormat] = {
  # DeepSeek-R1's distillations of Llama and Qwen2.
  'deepseek_v3': ToolFormat(
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
  # Mistral Small from 3.1 on, Devstral, Magistral.
  'mistral_args': ToolFormat(
    ('[ARGS]',),
    ('[TOOL_CALLS]',),
    call_readers.mistral,
    Frame('[TOOL_CALLS]', '[ARGS]', ''),
    inner=('[ARGS]', '[CALL_ID]'),
    id_chars=9,
  ),
  # Mistral 7B v0.3, Nemo, Mixtral 8x22B.
  'mistral': ToolFormat(
    ('[TOOL_CALLS]',),
    ('[TOOL_CALLS]',),
    call_readers.mistral,
    Frame('{"name": "', '", "arguments": ', '}', ', ', '[TOOL_CALLS][', ']'),
    inner=('[ARGS]', '[CALL_ID]'),
    id_chars=9,
  ),
  # Qwen2.5, Qwen3, QwQ, Hermes, SmolLM2; lists of calls are xLAM's.
  'hermes': ToolFormat(
    ('<tool_call>',),
    ('<tool_call>',),
    call_readers.hermes,
    Frame(
      '<tool_call>\n{"name": "', '", "arguments": ', '}\n</tool_call>', '\n'
    ),
    inner=('</tool_call>',),
  ),
  # Granite 3.1 to 3.3.
  'granite': ToolFormat(
    ('<|tool_call|> followed by a JSON list',),
    ('<|tool_call|>',),
    call_readers.granite,
    Frame('{"name": "', '", "arguments": ', '}', ', ', '<|tool_call|>[', ']'),
  ),
  # Llama 3.1, 3.2 and 3.3.
  'llama3_json': ToolFormat(
    (
      'respond with JSON for a function call',
      'respond with a JSON for a function call',
    ),
    ('<|python_tag|>',),
    call_readers.llama,
    Frame('{"name": "', '", "parameters": ', '}', None),
    is_bare=True,
  ),
}
# Words of templates whose calls look like a row's, but are others.
_NOT_OURS = ('<function=', '<arg_key>')
_THINK = ReasoningFormat('<think>', '</think>')
REASONING: Mapping[str, ReasoningFormat] = {
  'deepseek_r1': _THINK,  # its distillations
  'qwen3': _THINK,  # and QwQ
  'mistral': ReasoningFormat('[THINK]', '[/THINK]'),  # Magistral
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
  if tool_parser == AUTO and not any(w in template for w in _NOT_OURS):
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
      (row for row in REASONING.values() if row.end in template), None
    )
  return Formats(tools, reasoning)
