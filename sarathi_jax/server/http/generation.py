# SPDX-License-Identifier: Apache-2.0
"""Brings the prompts of a call to the frontend, and their output back.

Each prompt is a request of its own, in a task of its own. Nothing is answered
before all of them wait or run, so what is refused is refused as a whole; the
first output begins the response, so what fails before has its status.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
import functools
from typing import Any
import uuid

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.server import frontend as frontend_lib
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.http import answers
from sarathi_jax.server.http import exchange as exchange_lib
from sarathi_jax.server.http import forms
from sarathi_jax.server.protocols import messages
from sarathi_jax.server.queue import outbox
from sarathi_jax.text import tokenizer as tokenizer_lib

_DONE = b'data: [DONE]\n\n'


async def answer(
  exchange: exchange_lib.Exchange,
  frontend: frontend_lib.Frontend,
  form: forms.Form,
) -> None:
  """Answers a request of a form.

  Raises:
    HttpError: its body can't be read.
    SarathiError: it is refused, or was given up.
  """
  if not frontend.is_serving:  # before a body is read
    raise errors.EngineDeadError(frontend.state.value)
  info = frontend.engine.info
  body, size = await exchange.read(frontend.limits)
  call = await messages.read(
    size, lambda: form.read(body, info, frontend.limits)
  )
  frontend.check_room(len(call.prompts) * call.asked.sampling.n)
  least = _num_echoed(form, call)
  frontend.limits.check('max_echoed_chars', least, 'prompt')
  async with exchange.while_connected():
    await _Answer(exchange, frontend, form, call, size).run()


def _num_echoed(form: forms.Form, call: forms.Call) -> int:
  """Counts what is told of prompts, as far as it is known at once."""
  n = call.asked.sampling.n if form.has_prompt_by_choice else 1
  num = 0
  for prompt in call.prompts:
    ids: Any = prompt if isinstance(prompt, (list, tuple)) else ()
    text = prompt if call.echo and isinstance(prompt, str) else ''
    num += n * answers.num_of_prompt(call, ids, text)
  return num


class _Answer:
  """The response to one call."""

  def __init__(
    self,
    exchange: exchange_lib.Exchange,
    frontend: frontend_lib.Frontend,
    form: forms.Form,
    call: forms.Call,
    size: int,
  ) -> None:
    self._exchange, self._frontend = exchange, frontend
    self._form, self._call, self._size = form, call, size
    self._id = exchange.request_id or uuid.uuid4().hex
    self._answer = answers.Answer(form, call, frontend.engine, self._id)
    frontend.limits.check_name('user', call.asked.user)
    self._caller = exchange.caller(call.asked.user)
    self._num_left = len(call.prompts)  # that do not wait yet
    self._all_wait = asyncio.Event()
    self._choices: list[dict[str, Any]] = [{}] * (
      len(call.prompts) * call.asked.sampling.n
    )
    self._num_chars = 0  # of the choices so far, about
    self._num_told = 0  # log-probabilities, at most
    self._num_echoed = 0  # characters of prompts, about

  async def run(self) -> None:
    """Answers."""
    try:
      async with asyncio.TaskGroup() as group:
        for i, prompt in enumerate(self._call.prompts):
          group.create_task(self._one(i, prompt))
    except BaseExceptionGroup as errors_of_tasks:
      raise errors_of_tasks.exceptions[0] from None
    if self._call.asked.stream:
      last = b''
      if self._call.asked.include_usage:
        last = _event(
          self._answer.head | {'choices': [], 'usage': self._answer.usage}
        )
      await self._exchange.write(last + _DONE, is_last=True)
      return
    whole = self._answer.whole(self._choices)
    size = len(self._choices) * 64 + self._num_chars
    data = await messages.read(size, lambda: exchange_lib.encode(whole, size))
    await self._exchange.reply_bytes(data)

  async def _one(self, index: int, prompt: tokenizer_lib.Prompt) -> None:
    """Takes one prompt to its end."""
    asked = self._call.asked
    several = len(self._call.prompts) > 1
    async with self._frontend.open(
      prompt,
      asked.sampling,
      f'{self._id}-{index}' if several else self._id,
      priority=asked.priority,
      tier=asked.tier,
      cache_salt=asked.cache_salt,
      adapter=asked.adapter,
      caller=self._caller,
      protocol=self._form.protocol,
      size=self._size,
    ) as stream:
      echo = await self._echo(prompt)
      self._count(stream.request, echo)
      self._num_left -= 1
      if not self._num_left:
        self._all_wait.set()
      await self._all_wait.wait()
      prompt_ids = stream.request.prompt_token_ids
      n = asked.sampling.n
      choices = [
        self._answer.choice(index * n + i, prompt, prompt_ids, echo)
        for i in range(n)
      ]
      if asked.stream:
        await self._write(choices, stream)
      else:
        deltas = [delta async for delta in stream]
        for whole in outbox.merge_each(deltas):
          if whole.finish_reason is types.FinishReason.ERROR:
            raise answers.not_finite(stream.request.request_id)
          of_output = choices[whole.output_index]
          num = of_output.num_chars(whole)
          self._num_chars += num
          choice: dict[str, Any] | None = await messages.read(
            num, functools.partial(of_output.add, whole)
          )
          self._choices[index * n + whole.output_index] = choice or {}
      self._answer.count(
        len(prompt_ids), stream.num_cached, sum(stream.num_tokens)
      )

  async def _echo(self, prompt: tokenizer_lib.Prompt) -> str:
    """Returns what the text of a prompt's choices begins with."""
    if not self._call.echo:
      return ''
    size: Any = prompt if isinstance(prompt, (list, tuple)) else ()
    return await messages.read(
      len(size), lambda: answers.echo(prompt, self._frontend.engine)
    )

  def _count(self, request: types.Request, echo: str) -> None:
    """Refuses prompts of which one response would tell too much together.

    Args:
      request: of one of the prompts.
      echo: what its choices begin with.

    Raises:
      InvalidRequestError: of all so far it would.
    """
    self._num_echoed += (
      request.sampling.n if self._form.has_prompt_by_choice else 1
    ) * answers.num_of_prompt(self._call, request.prompt_token_ids, echo)
    self._frontend.limits.check('max_echoed_chars', self._num_echoed, 'prompt')
    if self._call.asked.stream:
      return  # Each is told of as it comes.
    room = self._frontend.engine.info.max_model_len
    room -= len(request.prompt_token_ids)
    self._num_told += limits_lib.num_logprobs(request.sampling, room)
    self._num_told += limits_lib.num_prompt_logprobs(request)
    self._frontend.limits.check('max_logprobs', self._num_told, 'logprobs')

  async def _write(
    self, choices: Sequence[answers.Choice], stream: outbox.Stream
  ) -> None:
    """Writes the events of one prompt's choices."""
    async for delta in stream:
      choice = choices[delta.output_index]
      size = choice.num_chars(delta)
      event = await messages.read(
        size, functools.partial(_piece, choice, delta, size)
      )
      if event:
        await self._exchange.write(event)
      if delta.finish_reason is types.FinishReason.ERROR:
        raise answers.not_finite(stream.request.request_id)


def _piece(
  choice: answers.Choice, delta: types.OutputDelta, size: int
) -> bytes:
  """Returns the event of a delta; b'' if it has none."""
  event = choice.event(delta)
  return b'' if event is None else _event(event, size)


def event_of_error(body: Mapping[str, Any]) -> bytes:
  """Returns the event that ends a stream with an error."""
  return _event(body)


def _event(content: Mapping[str, Any], size: int = 0) -> bytes:
  return b'data: ' + exchange_lib.encode(content, size) + b'\n\n'
