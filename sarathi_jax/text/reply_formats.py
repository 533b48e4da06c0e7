# SPDX-License-Identifier: Apache-2.0
"""How models write calls of tools, and what they think: one table each.

No registry has a library for it that is kept and needs no torch. A format is
chosen by words of the checkpoint's chat template, which shows a model its own
earlier calls as it is to write them. Names are vLLM's. Sources: the chat
templates of the models that a row names.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
import re
from typing import NamedTuple

from sarathi_jax import errors
from sarathi_jax.text import incremental

AUTO, NONE = 'auto', 'none'
_MOST_NAME = 256
_MOST_KEY = 64
_MOST_ARGUMENTS_AS_TEXT = 2**20
_NAME = re.compile(r'[\w./:-]+')

MalformedError = incremental.MalformedError


class Caller:
  """What a format tells of the calls that it reads; see `reply_reader`."""

  def begin(self, name: str) -> None:
    """Begins a call; MalformedError if no such tool was offered."""
    raise NotImplementedError

  def add(self, arguments: str) -> None:
    """Adds to the arguments of the call."""
    raise NotImplementedError

  def end(self) -> None:
    """Ends the call: its arguments are whole."""
    raise NotImplementedError


Read = Callable[[incremental.Source, Caller, str], Generator[None, None, None]]


class ToolFormat(NamedTuple):
  """A way to write calls.

  Attributes:
    words: one of them is in the templates of those that write so.
    begins: marks that begin calls.
    read: reads the calls after one of the marks, and tells of them. It raises
      MalformedError, or stops, where what comes is none.
    others: marks that say nothing.
    is_bare: whether a reply that begins with '{' is one call or more.
    id_chars: characters of a call's id, if the template insists on some.
  """

  words: tuple[str, ...]
  begins: tuple[str, ...]
  read: Read
  others: tuple[str, ...] = ()
  is_bare: bool = False
  id_chars: int | None = None

  @property
  def marks(self) -> tuple[str, ...]:
    return (*self.begins, *self.others)


class ReasoningFormat(NamedTuple):
  """The marks around what a model thinks."""

  begin: str
  end: str


def _json_call(
  source: incremental.Source, caller: Caller, *, must_have_arguments: bool
) -> incremental.Waiting[None]:
  """Reads {"name": ..., "arguments": {...}}, its keys in any order."""
  if not (yield from source.literal('{')):
    raise MalformedError
  name: str | None = None
  early: list[str] = []  # arguments that came before the name
  has_begun = False
  while True:
    yield from source.space()
    key = yield from source.text(_MOST_KEY)
    yield from source.space()
    if not (yield from source.literal(':')):
      raise MalformedError
    yield from source.space()
    if key == 'name' and name is None:
      name = yield from source.text(_MOST_NAME)
      if early:
        caller.begin(name)
        caller.add(''.join(early))
        has_begun = True
    elif key in ('arguments', 'parameters') and not (early or has_begun):
      if name is None:
        yield from _arguments(source, early.append)
      else:
        known = name

        def out(text: str, known: str = known) -> None:
          nonlocal has_begun
          if not has_begun:
            caller.begin(known)
            has_begun = True
          caller.add(text)

        yield from _arguments(source, out)
    elif key in ('name', 'arguments', 'parameters'):
      raise MalformedError  # twice
    else:  # an id, a type
      yield from source.value(lambda text: None)
    yield from source.space()
    if (yield from source.literal('}')):
      break
    if not (yield from source.literal(',')):
      raise MalformedError
  if not has_begun:
    if name is None or must_have_arguments:
      raise MalformedError
    caller.begin(name)
    caller.add('{}')
  caller.end()


def _arguments(
  source: incremental.Source, out: incremental.Out
) -> incremental.Waiting[None]:
  """Reads arguments: an object, or one as a text, or null for an empty one."""
  char = yield from source.next()
  if char == '{':
    yield from source.value(out)
  elif char == '"':
    inner = incremental.Source()
    inner.feed((yield from source.text(_MOST_ARGUMENTS_AS_TEXT)).strip(), True)
    if (yield from inner.next()) != '{':
      raise MalformedError
    parts: list[str] = []
    yield from inner.value(parts.append)
    if (yield from inner.next()):
      raise MalformedError
    out(''.join(parts))
  elif (yield from source.literal('null')):
    out('{}')
  else:
    raise MalformedError


def _json_calls(
  source: incremental.Source, caller: Caller
) -> incremental.Waiting[None]:
  """Reads one call, or a list of calls."""
  yield from source.space()
  if not (yield from source.literal('[')):
    yield from _json_call(source, caller, must_have_arguments=False)
    return
  while True:
    yield from source.space()
    yield from _json_call(source, caller, must_have_arguments=False)
    yield from source.space()
    if (yield from source.literal(']')):
      return
    if not (yield from source.literal(',')):
      raise MalformedError


def _hermes(
  source: incremental.Source, caller: Caller, mark: str
) -> incremental.Waiting[None]:
  """Reads what is between <tool_call> and </tool_call>."""
  yield from _json_calls(source, caller)
  yield from source.space()
  yield from source.literal('</tool_call>')


def _mistral(
  source: incremental.Source, caller: Caller, mark: str
) -> incremental.Waiting[None]:
  """Reads [{"name": ..., "arguments": {...}}], or later ones' NAME[ARGS]{...}.

  The latter may have an id, NAME[CALL_ID]ID[ARGS]{...}.
  """
  yield from source.space()
  if (yield from source.next()) in ('[', '{'):
    yield from _json_calls(source, caller)
    return
  name = yield from source.run(_NAME, _MOST_NAME)
  if (yield from source.literal('[CALL_ID]')):
    yield from source.run(_NAME, _MOST_KEY)
  yield from source.literal('[ARGS]')
  yield from source.space()
  yield from _named(source, caller, name)


def _named(
  source: incremental.Source, caller: Caller, name: str
) -> incremental.Waiting[None]:
  """Reads the arguments of a call whose name is known."""
  if (yield from source.next()) != '{':
    raise MalformedError
  caller.begin(name)
  yield from source.value(caller.add)
  caller.end()


def _llama(
  source: incremental.Source, caller: Caller, mark: str
) -> incremental.Waiting[None]:
  """Reads {"name": ..., "parameters": {...}}; several have ; between them."""
  while True:
    yield from source.space()
    yield from _json_call(source, caller, must_have_arguments=True)
    yield from source.space()
    has_more = yield from source.literal(';')
    yield from source.space()
    if not has_more and (yield from source.next()) != '{':
      return


_SEP, _END = '<｜tool▁sep｜>', '<｜tool▁call▁end｜>'  # noqa: RUF001


def _deepseek(
  source: incremental.Source, caller: Caller, mark: str
) -> incremental.Waiting[None]:
  """Reads function SEP NAME, and JSON in a fence; or V3.1's NAME SEP {...}."""
  name = yield from source.run(_NAME, _MOST_NAME)
  if not (yield from source.literal(_SEP)):
    raise MalformedError
  if (yield from source.next()) == '{':
    yield from _named(source, caller, name)
  else:
    name = yield from source.run(_NAME, _MOST_NAME)
    if not (yield from source.literal('\n```json\n')):
      raise MalformedError
    yield from _named(source, caller, name)
    yield from source.space()
    yield from source.literal('```')
  yield from source.space()
  yield from source.literal(_END)


# In the order in which their words are looked for: templates of the later rows
# may be modelled on the earlier ones' models.
TOOLS: Mapping[str, ToolFormat] = {
  # DeepSeek-R1's distillations of Llama and Qwen2.
  'deepseek_v3': ToolFormat(
    (_SEP,),
    ('<｜tool▁call▁begin｜>',),  # noqa: RUF001
    _deepseek,
    ('<｜tool▁calls▁begin｜>', '<｜tool▁calls▁end｜>'),  # noqa: RUF001
  ),
  # Mistral 7B v0.3, Nemo, Small, Mixtral 8x22B, Devstral, Magistral.
  'mistral': ToolFormat(
    ('[TOOL_CALLS]',), ('[TOOL_CALLS]',), _mistral, id_chars=9
  ),
  # Qwen2.5, Qwen3, QwQ, Hermes, SmolLM2; lists of calls are xLAM's.
  'hermes': ToolFormat(('<tool_call>',), ('<tool_call>',), _hermes),
  # Llama 3.1, 3.2 and 3.3.
  'llama3_json': ToolFormat(
    (
      'respond with JSON for a function call',
      'respond with a JSON for a function call',
    ),
    ('<|python_tag|>',),
    _llama,
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
