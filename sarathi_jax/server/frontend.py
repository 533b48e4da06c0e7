# SPDX-License-Identifier: Apache-2.0
"""What every protocol shares: a prompt in, a stream of deltas out.

Admits while the server serves, tokenizes off the event loop, checks, submits,
and sees to it that a request ends when its reader does. Imports no gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
  AsyncIterator,
  Awaitable,
  Callable,
  Collection,
  Iterator,
  Mapping,
  Sequence,
)
import contextlib
import dataclasses
import enum
import itertools
import time
import uuid

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import state
from sarathi_jax.server import prompts
from sarathi_jax.server.protocols import messages
from sarathi_jax.server.queue import admission
from sarathi_jax.server.queue import delivery
from sarathi_jax.server.queue import engine_thread as engine_thread_lib
from sarathi_jax.server.queue import outbox
from sarathi_jax.text import prompts as prompts_lib

Prompt = prompts_lib.Prompt
_LEAST_CHAT = 2048  # bytes that reading one is taken for
# What compiling a grammar is taken for: so many bytes, and so many a character.
_LEAST_GRAMMAR, _GRAMMAR_CHAR = 2048, 4


class State(enum.Enum):
  """What the server does now; the values are what clients are told."""

  LOADING = 'the model is being loaded'
  SERVING = 'serving'
  DRAINING = 'the server is shutting down'
  DEAD = 'the engine stopped after a fault'


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
  """Where a request comes from.

  Attributes:
    tenant: the name of its token; without one, its address. Tenants share the
      server fairly, and a tenant may abort all requests of its own.
    client: the tenant, and what the client calls itself. Clients of a tenant
      share its part fairly.
    min_priority: the smallest priority that its requests may have; None for
      any.
    cache_scope: the name of its token; only requests of the same one share
      pages of the KV cache. '' without one.
    is_admin: whether it may abort anybody's requests.
    timeout_s: seconds until its deadline; None without one.
    trace: its W3C trace context.
  """

  tenant: str = ''
  client: str = ''
  min_priority: int | None = None
  cache_scope: str = ''
  is_admin: bool = False
  timeout_s: float | None = None
  trace: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True, kw_only=True)
class Ended:
  """How a request ended, for logs and traces.

  Attributes:
    request_id: the request's id.
    caller: who asked.
    protocol: the protocol that it came by.
    started: when it came, seconds since the epoch.
    request: what was asked; None if that was refused before it was whole.
    stream: its output; None if it never waited.
    error: the exception that ended it, asyncio.CancelledError if the client
      left; None if it finished.
  """

  request_id: str
  caller: Caller
  protocol: str
  started: float
  request: types.Request | None = None
  stream: outbox.Stream | None = None
  error: BaseException | None = None

  @property
  def last(self) -> types.OutputDelta | None:
    """The last delta that the reader got, if any."""
    return None if self.stream is None else self.stream.last

  @property
  def num_tokens(self) -> int:
    """Tokens that the reader got."""
    return 0 if self.stream is None else sum(self.stream.num_tokens)


class Frontend:
  """The event loop's side of an engine thread.

  `state` and `read_again` are the server's to set.

  Args:
    engine_thread: runs the engine; for what must happen between two steps.
    limits: the most that requests may ask for.
    observers: told how each request ended; they must be quick.

  Attributes:
    engine_thread, limits: see above.
    num_open: requests between admission and the end of their reader.
    last_arrival: when the last request came, seconds since the epoch.
    read_again: returns the adapter of a name that went for others.
  """

  read_again: Callable[[str], Awaitable[types.Adapter | None]]

  def __init__(
    self,
    engine_thread: engine_thread_lib.EngineThread,
    limits: admission.Limits | None = None,
    observers: Sequence[Callable[[Ended], None]] = (),
  ) -> None:
    self.state = State.LOADING
    self.last_arrival = 0.0
    self.engine_thread = engine_thread
    self.limits = limits or admission.Limits()
    self._observers = observers
    self._engine: engine_lib.Engine | None = None
    self.num_open = 0
    self._num_preparing = 0  # outputs of those that are not yet submitted
    self._keys = itertools.count()
    # (tenant, request id) -> what its reader has not left.
    self._streams: dict[tuple[str, str], outbox.Stream] = {}
    self._all_closed = asyncio.Event()
    self._all_closed.set()

  def serve(self, engine: engine_lib.Engine) -> None:
    """Admits requests from now on."""
    self._engine = engine
    self.state = State.SERVING

  @property
  def engine(self) -> engine_lib.Engine:
    """The engine, of which any thread may use `info` and `tokenizer`.

    Raises:
      EngineDeadError: there is no engine yet.
    """
    if self._engine is None:
      raise errors.EngineDeadError(self.state.value)
    return self._engine

  @property
  def is_serving(self) -> bool:
    return self.state is State.SERVING

  async def abort(
    self, request_ids: Collection[str], caller: Caller
  ) -> list[str]:
    """Aborts requests that are the caller's to end.

    Returns:
      The ids of those that were running or waiting.
    """
    return await self.engine_thread.abort(
      request_ids, None if caller.is_admin else caller.tenant
    )

  async def stats(self) -> state.EngineStats:
    """Returns what the engine does now, and counts our queue as waiting."""
    thread = self.engine_thread
    # Both on the thread that takes from the queue, so that each is counted.
    stats, num_queued = await thread.call(
      lambda engine: (engine.stats(), thread.num_queued)
    )
    return dataclasses.replace(
      stats, num_waiting=stats.num_waiting + num_queued
    )

  def check_room(self, num_outputs: int) -> None:
    """Raises CapacityError if requests of so many more could not wait."""
    self.engine_thread.check_room(self._num_preparing + num_outputs)

  async def drain(self) -> None:
    """Ends requests that could not begin, and waits until none is open.

    Raises:
      EngineDeadError: the engine has stopped.
    """
    await self.engine_thread.drain()
    await self._all_closed.wait()

  def cut_off(self) -> None:
    """Ends all open requests at once, however long the engine's step takes."""
    for stream in self._streams.values():
      stream.put(delivery.gone_error(None))

  @contextlib.asynccontextmanager
  async def open(
    self,
    prompt: Prompt,
    sampling: types.SamplingParams,
    request_id: str | None = None,
    *,
    priority: int = 0,
    tier: str = types.TIERS[0],
    cache_salt: str = '',
    adapter: str | None = None,
    caller: Caller,
    protocol: str,
    size: int | None = None,
  ) -> AsyncIterator[outbox.Stream]:
    """Submits a request, and aborts what is left of it on leaving the context.

    Args:
      prompt: what to continue.
      sampling: how to choose the tokens.
      request_id: the request's id; None for one of the frontend's making.
      priority, tier: see `types.Request`.
      cache_salt: see `types.Request`; beside `caller.cache_scope`.
      adapter: the name of one; None for the model as it is.
      caller: who asks.
      protocol: the protocol's name, for logs.
      size: bytes that the prompt came in, where that is known; else the
        characters of a chat are counted here, on the event loop.

    Raises:
      InvalidRequestError: the request can't be served.
      NotFoundError: there is no such adapter.
      ForbiddenError: the caller may not ask for this priority.
      CapacityError: too many wait, or the reader is too slow.
      DeadlineError: the request can't be served in time.
      StepError: a step that it was in failed.
      EngineDeadError: the server does not serve.
    """
    if self.state is not State.SERVING:
      raise errors.EngineDeadError(self.state.value)
    if request_id == '':
      raise errors.InvalidRequestError(
        "request_id='': must not be empty; leave it out to have one made."
      )
    self.limits.check_name('request_id', request_id or '')
    self.limits.check_name('x-client-id', caller.client)
    self.limits.check_name('cache_salt', cache_salt)
    if caller.min_priority is not None and priority < caller.min_priority:
      raise errors.ForbiddenError(
        f'priority={priority}: must be >= {caller.min_priority} with the '
        f'token of {caller.tenant}.'
      )
    adapters = self.engine.adapters
    away = adapter if adapters.away(adapter) else None
    now = self.engine.clock()
    self.last_arrival = time.time()
    draft = types.Request(
      request_id=request_id or uuid.uuid4().hex,
      prompt_token_ids=(),
      sampling=sampling,
      arrival_time=now,
      tenant=caller.tenant,
      client=caller.client,
      priority=priority,
      tier=tier,
      # Names of tokens have no spaces, so no two of these are alike.
      cache_salt=f'{caller.cache_scope} {cache_salt}'
      if caller.cache_scope or cache_salt
      else '',
      adapter=None if away else adapters.find(adapter),
      key=str(next(self._keys)),
      deadline=(None if caller.timeout_s is None else now + caller.timeout_s),
    )
    self.num_open += 1
    self._all_closed.clear()
    end = Ended(
      request_id=draft.request_id,
      caller=caller,
      protocol=protocol,
      started=self.last_arrival,
    )
    try:
      end.request = await self._prepare(prompt, draft, size, away)
      with self._submitted(end.request) as end.stream:
        try:
          yield end.stream
        except asyncio.CancelledError:
          end.stream.raise_overflow()
          raise
    except BaseException as error:
      end.error = error
      raise
    finally:
      self.num_open -= 1
      if not self.num_open:
        self._all_closed.set()
      for observe in self._observers:
        observe(end)

  @contextlib.contextmanager
  def _submitted(self, request: types.Request) -> Iterator[outbox.Stream]:
    """Submits a request; closes its stream once it has no reader."""
    named = request.tenant, request.request_id
    live = self._streams.get(named)
    if live is not None and not live.is_closed:
      raise errors.InvalidRequestError(
        f'request_id={errors.shown(request.request_id)}: a request of this id '
        'is running or waiting; ids must be unique.'
      )
    with contextlib.closing(self.engine_thread.submit(request)) as stream:
      self._streams[named] = stream
      try:
        yield stream
      finally:
        if self._streams.get(named) is stream:  # else another had its id
          del self._streams[named]

  async def _prepare(
    self,
    prompt: Prompt,
    draft: types.Request,
    size: int | None,
    away: str | None,
  ) -> types.Request:
    self.limits.check_sampling(draft.sampling)
    self.limits.check_logprobs(draft.sampling, self.engine.info.max_model_len)
    # Before anything is tokenized; those that are being count as well.
    self.check_room(draft.sampling.n)
    if size is None:
      size = prompts.num_chars(prompt)
    # No chat at once, however short: what its template does is its own affair.
    if prompts_lib.is_chat(prompt):
      size = max(_LEAST_CHAT, size)
    size += sum(map(len, draft.sampling.bad_words))
    outputs = draft.sampling.structured_outputs
    if outputs is not None:
      size += _LEAST_GRAMMAR + _GRAMMAR_CHAR * outputs.num_chars
    self._num_preparing += draft.sampling.n
    try:
      if away is not None:
        draft = dataclasses.replace(draft, adapter=await self.read_again(away))
      return await messages.read(
        size, lambda: prompts.prepare(self.engine, prompt, draft, self.limits)
      )
    finally:
      self._num_preparing -= draft.sampling.n
