# SPDX-License-Identifier: Apache-2.0
"""Makes lines of a file of prompts into requests. No JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import itertools
import random
from typing import Any, ClassVar, Self

from sarathi_jax import errors
from sarathi_jax import json_file
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.text import chats
from sarathi_jax.text import prompts as prompts_lib
from sarathi_jax.text import replies
from sarathi_jax.text import reply_reader

# Of a chat, beside its messages; see `chats.Chat`.
_CHAT_KEYS = (
  'chat_template_kwargs',
  'parallel_tool_calls',
  'tool_choice',
  'tools',
)
# The largest seed drawn here. It never changes, so that results repeat.
_MAX_DRAWN_SEED = 2**31 - 1
_PROMPT_KEYS = ('prompt', 'prompt_token_ids', 'messages')
_KEYS = {'request_id', 'sampling', 'adapter', *_PROMPT_KEYS, *_CHAT_KEYS}


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
  """A line of the input: requests, or what is wrong with it.

  Attributes:
    number: from 1.
    request_id: as it is given.
    requests: those that it asks for, with keys of their own; none if it is
      refused.
    error: what is wrong with it.
    readers: of each reply to a chat; none if they are content alone.
  """

  ID_KEY: ClassVar[str] = 'request_id'

  number: int
  request_id: str | int
  requests: tuple[types.Request, ...]
  error: errors.InvalidRequestError | None
  readers: tuple[reply_reader.ReplyReader, ...] = ()

  def refused(self, error: errors.InvalidRequestError) -> Self:
    """Returns the line with an error instead of its requests."""
    return dataclasses.replace(self, requests=(), error=error)

  def result(self, done: Sequence[types.Completion]) -> dict[str, Any]:
    """Returns what to write once its requests are done, or it is refused."""
    if self.error is not None:
      return {
        'request_id': self.request_id,
        'line': self.number,
        'error': str(self.error),
      }
    outputs = [
      _output(completion, reader)
      for completion, reader in itertools.zip_longest(done, self.readers)
    ]
    return {
      'request_id': self.request_id,
      'prompt_token_ids': done[0].prompt_token_ids,
      **({'outputs': outputs} if len(outputs) > 1 else outputs[0]),
    }


def _output(
  completion: types.Completion, reader: reply_reader.ReplyReader | None
) -> dict[str, Any]:
  message = {}
  if reader is not None:
    reply = reader.read(completion.text, is_last=True)
    message = {'message': replies.message(reply)}
  return {
    'token_ids': completion.token_ids,
    'logprobs': completion.logprobs,
    'text': completion.text,
    **message,
    'finish_reason': completion.finish_reason.value,
    'stop_reason': completion.stop_reason,
    'metrics': dataclasses.asdict(completion.metrics),
    **{
      name: [at.plain() for at in told]
      for name in ('told', 'prompt_logprobs')
      if (told := getattr(completion, name))
    },
  }


def decode(text: bytes) -> dict[str, Any]:
  """Returns the JSON object that a line is.

  Raises:
    InvalidRequestError: it is none.
  """
  try:
    return json_file.parse(text)
  except ValueError as error:
    raise errors.InvalidRequestError(f'{error}.') from error


def parse(
  number: int,
  fields: Mapping[str, Any],
  defaults: Mapping[str, Any],
  seed: int,
  engine: engine_lib.Engine,
  adapter: str | None = None,
) -> Line:
  """Makes a request of a line, or says what is wrong with it.

  Args:
    number: of the line, from 1.
    fields: the line.
    defaults: sampling fields for what it leaves open.
    seed: of the run; see `seeded`.
    engine: what is served.
    adapter: the name of one, where the line says nothing of it.
  """
  line = Line(number, f'line-{number}', (), None)
  try:
    if unknown := fields.keys() - _KEYS:
      raise errors.InvalidRequestError(
        f'{errors.cut(min(unknown))}: unknown key; known: '
        f'{", ".join(sorted(_KEYS))}.'
      )
    given_id = fields.get('request_id', line.request_id)
    if type(given_id) not in (str, int) or given_id == '':
      raise errors.InvalidRequestError(
        f'request_id={errors.shown(given_id)}: must be a text that is not '
        'empty, or an integer.'
      )
    line = dataclasses.replace(line, request_id=given_id)
    prompt = _prompt(fields)
    draft = types.Request(
      request_id=str(given_id),
      prompt_token_ids=(),
      sampling=seeded(
        _sampling(
          fields,
          functools.partial(engine.info.sampling, defaults=defaults),
        ),
        seed,
        str(given_id),
      ),
      arrival_time=engine.clock(),
      adapter=engine.adapters.find(fields.get('adapter', adapter)),
      key=str(number),
    )
    request = prompts_lib.with_prompt(draft, engine.tokenizer, prompt)
    engine.check(request)
  except errors.InvalidRequestError as error:
    return line.refused(error)
  readers: list[reply_reader.ReplyReader] = []
  for _ in range(request.sampling.n):
    if engine.tokenizer and (
      reader := engine.tokenizer.reply_reader(prompt, request.prompt_token_ids)
    ):
      readers.append(reader)
  return dataclasses.replace(line, requests=(request,), readers=tuple(readers))


def seeded(
  sampling: types.SamplingParams, seed: int, request_id: str
) -> types.SamplingParams:
  """Returns sampling with a seed, made of the run's if it has none."""
  if sampling.seed is not None:
    return sampling
  drawn = random.Random(f'{seed} {request_id!r}').randint(0, _MAX_DRAWN_SEED)
  return dataclasses.replace(sampling, seed=drawn)


def _sampling(
  fields: Mapping[str, Any],
  make: Callable[[Mapping[str, Any]], types.SamplingParams],
) -> types.SamplingParams:
  given = fields.get('sampling')
  if not isinstance(given, dict | None):
    raise errors.InvalidRequestError(
      f'sampling={errors.shown(given)}: must be an object of sampling fields.'
    )
  return make(given or {})


def _prompt(fields: Mapping[str, Any]) -> prompts_lib.Prompt:
  keys = [key for key in _PROMPT_KEYS if key in fields]
  if len(keys) != 1:
    raise errors.InvalidRequestError(
      f'must have one of {", ".join(_PROMPT_KEYS)}; has '
      f'{", ".join(keys) or "none"}.'
    )
  key, value = keys[0], fields[keys[0]]
  is_right, rule = {
    'prompt': (isinstance(value, str), 'a text'),
    'prompt_token_ids': (_are_all(int, value), 'a list of integers'),
    'messages': (
      _are_all(dict, value) and value,
      'a list of objects with role and content',
    ),
  }[key]
  if not is_right:
    raise errors.InvalidRequestError(
      f'{key}={errors.shown(value)}: must be {rule}.'
    )
  more = {k: fields[k] for k in _CHAT_KEYS if fields.get(k) is not None}
  if key == 'messages':
    return chats.Chat(messages=value, **more)
  if more:
    raise errors.InvalidRequestError(f'{min(more)}: is for messages.')
  prompt: prompts_lib.Prompt = value
  return prompt


def _are_all(kind: type, values: Any) -> bool:
  return isinstance(values, list) and all(type(v) is kind for v in values)
