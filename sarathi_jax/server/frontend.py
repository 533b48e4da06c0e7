# SPDX-License-Identifier: Apache-2.0
"""What every protocol shares: a prompt in, a stream of deltas out.

Admits while the server serves, tokenizes off the event loop, checks, submits,
and sees to it that a request ends when its reader does. Imports no gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
import contextlib
import enum
import uuid

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import tokenizer as tokenizer_lib
from sarathi_jax.server import engine_thread as engine_thread_lib

Prompt = tokenizer_lib.Prompt

# Texts and token ids up to this length are prepared at once, which takes less
# than the way to another thread and back.
_INLINE_LEN = 1024


class State(enum.Enum):
  """The values are what clients are told."""

  LOADING = 'the model is being loaded'
  SERVING = 'serving'
  DRAINING = 'the server is shutting down'


class Frontend:
  """The event loop's side of an engine thread.

  `state` is the server's to set.
  """

  def __init__(self, engine_thread: engine_thread_lib.EngineThread) -> None:
    self.state = State.LOADING
    self._engine_thread = engine_thread
    self._engine: engine_lib.Engine | None = None
    self._num_open = 0
    self._streams: set[engine_thread_lib.Stream] = set()
    self._all_closed = asyncio.Event()
    self._all_closed.set()

  def serve(self, engine: engine_lib.Engine) -> None:
    """Admits requests from now on."""
    self._engine = engine
    self.state = State.SERVING

  @property
  def engine(self) -> engine_lib.Engine:
    """For what may be used of it on any thread: `info`, `tokenizer`.

    Raises:
      EngineDeadError: there is none yet.
    """
    if self._engine is None:
      raise errors.EngineDeadError(self.state.value)
    return self._engine

  @property
  def num_open(self) -> int:
    """Requests between admission and the end of their reader."""
    return self._num_open

  async def abort(self, request_ids: Sequence[str]) -> list[str]:
    """Ends requests; returns those that were running or waiting."""
    return await self._engine_thread.abort(request_ids)

  async def stats(self) -> engine_lib.EngineStats:
    """Returns what the engine does now."""
    return await self._engine_thread.call(lambda engine: engine.stats())

  async def drained(self) -> None:
    """Waits until no request is open."""
    await self._all_closed.wait()

  def cut_off(self) -> None:
    """Ends what is open at once, however long the engine's step takes."""
    for stream in self._streams:
      stream.put(engine_thread_lib.gone_error(None))

  @contextlib.asynccontextmanager
  async def open(
      self, prompt: Prompt, sampling: types.SamplingParams,
      request_id: str | None = None,
  ) -> AsyncIterator[engine_thread_lib.Stream]:
    """Submits a request; to leave the context is to abort what is left of it.

    Args:
      prompt: what to continue.
      sampling: how.
      request_id: None for one of the frontend's making.

    Raises:
      InvalidRequestError: the request can't be served.
      EngineDeadError: the server does not serve.
    """
    if self.state is not State.SERVING:
      raise errors.EngineDeadError(self.state.value)
    if request_id == '':
      raise errors.InvalidRequestError(
        'request_id=\'\': must not be empty; leave it out to have one made.')
    self._num_open += 1
    self._all_closed.clear()
    try:
      request = await self._prepare(
        prompt, sampling, request_id or uuid.uuid4().hex)
      with contextlib.closing(self._engine_thread.submit(request)) as stream:
        self._streams.add(stream)
        try:
          yield stream
        finally:
          self._streams.remove(stream)
    finally:
      self._num_open -= 1
      if not self._num_open:
        self._all_closed.set()

  async def _prepare(self, prompt: Prompt, sampling: types.SamplingParams,
                     request_id: str) -> types.Request:
    args = (self.engine, prompt, sampling, request_id, self.engine.clock())
    if isinstance(prompt, (str, tuple)) and len(prompt) <= _INLINE_LEN:
      return prepare(*args)
    return await asyncio.get_running_loop().run_in_executor(
      None, prepare, *args)


def prepare(engine: engine_lib.Engine, prompt: Prompt,
            sampling: types.SamplingParams, request_id: str,
            arrival_time: float) -> types.Request:
  """Tokenizes and checks; any thread.

  Raises:
    InvalidRequestError: the request can't be served.
  """
  if not len(prompt):  # else a tokenizer may make a lone BOS of it
    raise errors.InvalidRequestError(f'prompt={prompt!r}: must not be empty.')
  request = types.Request(
    request_id=request_id, sampling=sampling, arrival_time=arrival_time,
    prompt_token_ids=tokenizer_lib.encode_prompt(engine.tokenizer, prompt))
  engine.check(request)
  return request
