# SPDX-License-Identifier: Apache-2.0
"""Lines of OpenAI's batch files, as our HTTP would answer them. No JAX.

A line has `custom_id`, `method`, `url` and `body`. The code that reads the body
and words the answer is that of HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar
import uuid

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.cli import prompt_lines
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server import prompts
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.http import answers
from sarathi_jax.server.http import body as body_lib
from sarathi_jax.server.http import chat
from sarathi_jax.server.http import completions
from sarathi_jax.server.http import errors as http_errors
from sarathi_jax.server.http import forms

KEYS = {'custom_id', 'method', 'url', 'body'}
_FORMS: Mapping[str, forms.Form] = {
  form.path: form for form in (chat.FORM, completions.FORM)
}
_LIMITS = limits_lib.without()  # Whoever runs a file bounds it.
_BOM = b'\xef\xbb\xbf'
_ID = 'batch_req_'


@dataclasses.dataclass(frozen=True, slots=True)
class Line(prompt_lines.Line):
  """A line of a batch file; its `request_id` is the `custom_id`.

  Attributes:
    call: what its body asks for; None if it is refused.
    answer: to the call.
    texts: what the choices of each prompt begin with, as echoes do.
    names: the fields that its body has, of which errors may name one.
  """

  ID_KEY: ClassVar[str] = 'custom_id'

  answer: answers.Answer | None = None
  texts: tuple[str, ...] = ()
  names: frozenset[str] = frozenset()

  def result(self, done: Sequence[types.Completion]) -> dict[str, Any]:
    """Returns what to write once its requests are done, or it is refused."""
    error: errors.SarathiError | None = self.error
    if any(d.finish_reason is types.FinishReason.ERROR for d in done):
      error = answers.not_finite(str(self.request_id))
    if error is not None:
      told = http_errors.of(error, self.names)
      return self._written(told.status, told.body)
    assert self.answer is not None
    for completion in done:
      num_prompt = 0 if completion.index else len(completion.prompt_token_ids)
      self.answer.count(
        num_prompt,
        completion.metrics.num_cached_tokens,
        len(completion.token_ids),
      )
    call = self.answer.call
    choices = [
      self.answer.choice(
        i,
        call.prompts[i // call.asked.sampling.n],
        completion.prompt_token_ids,
        self.texts[i // call.asked.sampling.n],
      ).add(completion)
      or {}
      for i, completion in enumerate(done)
    ]
    return self._written(200, self.answer.whole(choices))

  def _written(self, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    return {
      'id': f'{_ID}{self.number}',
      'custom_id': self.request_id,
      'response': {
        'status_code': status,
        'request_id': f'req_{uuid.uuid4().hex}',
        'body': body,
      },
      'error': None,
    }


def parse(
  number: int,
  text: bytes,
  defaults: Mapping[str, Any],
  seed: int,
  engine: engine_lib.Engine,
  adapter: str | None = None,
) -> Line:
  """Makes requests of a line, or says what is wrong with it.

  Args:
    number: of the line, from 1.
    text: the line.
    defaults: sampling fields for what a body leaves open.
    seed: of the run; see `prompt_lines.seeded`.
    engine: what is served.
    adapter: the name of one, for a body that names no model.
  """
  line = Line(number, f'line-{number}', (), None)
  try:
    fields = body_lib.parse(text.removeprefix(_BOM), _LIMITS)
    custom_id = fields.get('custom_id')
    if not isinstance(custom_id, str) or not custom_id:
      raise errors.InvalidRequestError(
        f'custom_id={errors.shown(custom_id)}: must be a text that is not '
        'empty.'
      )
    line = dataclasses.replace(line, request_id=custom_id)
    if odd := fields.keys() - KEYS:
      raise errors.InvalidRequestError(
        f'{errors.cut(min(odd))}: unknown key; known: '
        f'{", ".join(sorted(KEYS))}.'
      )
    form, body = _asked(fields)
    line = dataclasses.replace(line, names=frozenset(body))
    if adapter is not None and body.get('model') is None:
      body['model'] = adapter
    return _prepared(line, form, body, defaults, seed, engine)
  except errors.InvalidRequestError as error:
    return dataclasses.replace(line, error=error)


def _asked(fields: Mapping[str, Any]) -> tuple[forms.Form, dict[str, Any]]:
  """Returns the form that a line asks for, and the body that it has."""
  method, url, body = (fields.get(key) for key in ('method', 'url', 'body'))
  if method != 'POST':
    raise errors.InvalidRequestError(
      f"method={errors.shown(method)}: must be 'POST'."
    )
  if not isinstance(url, str) or url not in _FORMS:
    raise errors.InvalidRequestError(
      f'url={errors.shown(url)}: must be one of {", ".join(_FORMS)}.'
    )
  if not isinstance(body, dict):
    raise errors.InvalidRequestError(
      f'body={errors.shown(body)}: must be an object.'
    )
  return _FORMS[url], body


def _prepared(
  line: Line,
  form: forms.Form,
  body: Mapping[str, Any],
  defaults: Mapping[str, Any],
  seed: int,
  engine: engine_lib.Engine,
) -> Line:
  """Returns the line with the requests that its body asks for."""
  info = engine.info
  call = form.read(
    body,
    dataclasses.replace(
      info, default_sampling={**info.default_sampling, **defaults}
    ),
    _LIMITS,
  )
  if call.asked.stream:
    raise errors.UnsupportedError('stream=True: a file has no streams.')
  several = len(call.prompts) > 1
  requests = []
  for i, prompt in enumerate(call.prompts):
    named = f'{line.request_id}-{i}' if several else str(line.request_id)
    draft = types.Request(
      request_id=named,
      prompt_token_ids=(),
      sampling=prompt_lines.seeded(call.asked.sampling, seed, named),
      arrival_time=engine.clock(),
      client=call.asked.user,
      priority=call.asked.priority,
      tier=call.asked.tier,
      cache_salt=call.asked.cache_salt,
      adapter=engine.adapters.find(call.asked.adapter),
      key=f'{line.number}-{i}',
    )
    requests.append(prompts.prepare(engine, prompt, draft, _LIMITS))
  return dataclasses.replace(
    line,
    requests=tuple(requests),
    answer=answers.Answer(form, call, engine, uuid.uuid4().hex),
    texts=tuple(
      answers.echo(prompt, engine) if call.echo else ''
      for prompt in call.prompts
    ),
  )


def has_failed(result: Mapping[str, Any]) -> bool:
  """Whether a result of ours tells of an error."""
  return bool(result['response']['status_code'] != 200)


def add_written(
  result: Mapping[str, Any], ids: set[str], lines: set[int]
) -> None:
  """Notes what a result of ours stands for: an id, or a refused line.

  Raises:
    ValueError, KeyError, TypeError: it is none of ours.
  """
  if 400 <= result['response']['status_code'] < 500:
    lines.add(int(result['id'].removeprefix(_ID)))
  else:
    ids.add(str(result['custom_id']))
