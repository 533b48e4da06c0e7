# SPDX-License-Identifier: Apache-2.0
"""What the output of a request has to be. No JAX; standard library only.

Names, defaults and meanings are vLLM's (`StructuredOutputsParams`). What is
said is kept as text, so that two that say the same are equal, and grammars are
found again by it (`grammar.Compiler`).
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json as json_lib
from typing import Any, ClassVar

from sarathi_jax import errors

# Of any field. What is larger takes milliseconds to be read alone.
MOST_CHARS = 2**18
# In a structural tag of `ReplyParams`: its `answer`.
ANSWER: Mapping[str, Any] = {'type': 'answer'}
# The fields of which exactly one says what the output has to be.
KINDS = ('json', 'regex', 'choice', 'grammar', 'json_object', 'structural_tag')

_FLAG = 'must be true or false'
_SIZE = f'must have at most {MOST_CHARS:,} characters'


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StructuredOutputsParams:
  """What the output of a request has to be: exactly one of the first six.

  Attributes:
    json: a JSON schema; an object, or the text of one. The output is JSON of
      it, with properties in the schema's order.
    regex: a regular expression, of Rust's syntax, that all of the output
      matches.
    choice: texts of which the output is one.
    grammar: a grammar, in Lark's syntax as llguidance has it, or in GBNF.
    json_object: true: the output is a JSON object.
    structural_tag: a structural tag of either of vLLM's forms; an object, or
      the text of one.
    disable_any_whitespace: whether JSON has no space but within its strings;
      else there may be any.
    disable_additional_properties: whether objects have none but the schema's
      properties, where the schema says nothing of others.
    whitespace_pattern: a regular expression for the space of JSON.

  Raises:
    InvalidRequestError: none of them is said, or several are, or not so.
  """

  # How errors name fields, where clients know them by other names.
  NAMES: ClassVar[Mapping[str, str]] = {}
  # Whether the model may reason before it, though its prompt is no chat.
  AFTER_REASONING: ClassVar[bool] = False

  json: str | None = None
  regex: str | None = None
  choice: tuple[str, ...] | None = None
  grammar: str | None = None
  json_object: bool | None = None
  structural_tag: str | None = None
  disable_any_whitespace: bool = False
  disable_additional_properties: bool = False
  whitespace_pattern: str | None = None

  def __post_init__(self) -> None:
    if isinstance(self.choice, list):
      object.__setattr__(self, 'choice', tuple(self.choice))
    self._check(
      self.json_object is None or isinstance(self.json_object, bool),
      'json_object',
      _FLAG,
    )
    object.__setattr__(self, 'json_object', self.json_object or None)
    for name in (*KINDS, 'whitespace_pattern'):
      self._check(_is_small(getattr(self, name)), name, _SIZE)
    for name in ('json', 'structural_tag'):
      object.__setattr__(self, name, self._object(name))
    texts: Any = self.choice
    self._check(
      texts is None
      or (
        isinstance(texts, tuple)
        and bool(texts)
        and all(isinstance(text, str) for text in texts)
      ),
      'choice',
      'must be a list of texts, at least one',
    )
    for name in ('regex', 'grammar', 'whitespace_pattern'):
      value = getattr(self, name)
      self._check(
        value is None or isinstance(value, str), name, 'must be a text'
      )
    for name in ('disable_any_whitespace', 'disable_additional_properties'):
      self._check(isinstance(getattr(self, name), bool), name, _FLAG)
    said = [name for name in KINDS if getattr(self, name) is not None]
    if len(said) != 1:
      raise errors.InvalidRequestError(
        f'structured_outputs={errors.shown(said)}: must have exactly one of '
        f'{", ".join(KINDS)}.'
      )

  def shown(self, field: str) -> str:
    """Returns a field and its value, for an error."""
    return f'{self.named(field)}={errors.shown(getattr(self, field))}'

  def named(self, field: str) -> str:
    """Returns what the client calls a field."""
    return self.NAMES.get(field, f'structured_outputs.{field}')

  def _check(self, ok: bool, field: str, rule: str) -> None:
    if not ok:
      raise errors.InvalidRequestError(f'{self.shown(field)}: {rule}.')

  def _object(self, field: str) -> str | None:
    """Returns the text of a field that is an object, as JSON writes it."""
    value: Any = getattr(self, field)
    if value is None:
      return None
    rule = 'must be an object of JSON, or the text of one'
    try:
      found = json_lib.loads(value) if isinstance(value, str) else value
      text = json_lib.dumps(found, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
      self._check(False, field, f'{rule}: {errors.cut(str(error))}')
    self._check(isinstance(found, dict), field, rule)
    return text

  def __eq__(self, other: object) -> bool:
    """Whether both say the same, whatever errors call it."""
    if not isinstance(other, StructuredOutputsParams):
      return NotImplemented
    return self._said() == other._said()

  def __hash__(self) -> int:
    return hash(self._said())

  def _said(self) -> tuple[Any, ...]:
    return tuple(
      getattr(self, field.name)
      for field in dataclasses.fields(StructuredOutputsParams)
    )

  @property
  def kind(self) -> str:
    """Which of `KINDS` it is."""
    return next(name for name in KINDS if getattr(self, name) is not None)

  @property
  def num_chars(self) -> int:
    """The characters of all that a grammar is made of."""
    value = getattr(self, self.kind)
    texts = value if isinstance(value, tuple) else (str(value),)
    return sum(map(len, texts)) + len(self.whitespace_pattern or '')

  @classmethod
  def of(cls, value: Any) -> StructuredOutputsParams:
    """Returns the same, or makes it of decoded JSON.

    Raises:
      InvalidRequestError: it is no object of these fields.
    """
    if isinstance(value, cls):
      return value
    if not isinstance(value, Mapping):
      raise errors.InvalidRequestError(
        f'structured_outputs={errors.shown(value)}: must be an object.'
      )
    known = {field.name for field in dataclasses.fields(cls)}
    if not known.issuperset(value):
      raise errors.InvalidRequestError(
        f'structured_outputs={errors.shown(value)}: has an unknown field; '
        f'known are {", ".join(sorted(known))}.'
      )
    defaults: dict[str, Any] = {
      field.name: field.default for field in dataclasses.fields(cls)
    }
    return cls(
      **{
        name: defaults[name] if said is None else said
        for name, said in value.items()
      }
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplyParams(StructuredOutputsParams):
  """What a whole reply has to be, by a structural tag that is ours.

  Attributes:
    answer: what a client asks for, which stands in the tag as `ANSWER`; None if
      it asks for nothing.
    has_calls: whether there may be calls; then errors name the tools.
  """

  answer: StructuredOutputsParams | None = None
  has_calls: bool = False

  def shown(self, field: str) -> str:
    if self.answer is None or self.has_calls:
      return StructuredOutputsParams.shown(self, field)
    return self.answer.shown(self.answer.kind)

  def named(self, field: str) -> str:
    if self.answer is None or self.has_calls:
      return 'tools'
    return self.answer.named(self.answer.kind)

  @property
  def num_chars(self) -> int:
    num = len(self.structural_tag or '')
    return num + (0 if self.answer is None else self.answer.num_chars)

  def _said(self) -> tuple[Any, ...]:
    return *StructuredOutputsParams._said(self), self.answer


def _is_small(value: Any) -> bool:
  """Whether a value is none too large to be read, or written, as a whole."""
  num, parts = 0, [value]
  while parts and num <= MOST_CHARS:
    part = parts.pop()
    num += len(part) if isinstance(part, str) else 1
    if isinstance(part, Mapping):
      num += sum(len(key) for key in part if isinstance(key, str))
      parts.extend(part.values())
    elif isinstance(part, list | tuple):
      parts.extend(part)
  return num <= MOST_CHARS
