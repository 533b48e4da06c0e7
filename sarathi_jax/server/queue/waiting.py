# SPDX-License-Identifier: Apache-2.0
"""From the queue into the engine: who may begin, and by when.

Imports no gRPC and no JAX.
"""

from __future__ import annotations

from collections.abc import Iterator
import math

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server.queue import admission
from sarathi_jax.server.queue import outbox

_LEAST_URGENT = 2**31 - 1  # of protocols' priorities, so that all are ahead


class Waiting:
  """The streams of the requests that wait to begin. Not thread-safe.

  Args:
    limits: of what waits.
  """

  def __init__(self, limits: admission.Limits) -> None:
    self._queue = admission.Queue(limits)
    self._streams: dict[str, outbox.Stream] = {}
    self._step_s = 0.0  # what a step takes lately
    self._token_budget = 1
    self.has_room = True  # for more to begin, as far as is known

  def __len__(self) -> int:
    return len(self._queue)

  def __contains__(self, key: str) -> bool:
    return key in self._queue

  def __iter__(self) -> Iterator[types.Request]:
    return iter(self._queue)

  @property
  def num_tokens(self) -> int:
    """Tokens of the prompts that wait."""
    return self._queue.num_tokens

  def push(self, stream: outbox.Stream) -> None:
    """Takes on the stream of a request that has just arrived.

    Raises:
      CapacityError: too many wait.
      DeadlineError: it can't begin to answer before its deadline.
    """
    request = stream.request
    self._check_deadline(request, request.arrival_time)
    self._queue.push(request, self._tokens_per_s)
    self._streams[request.key] = stream

  def check_room(self, num_requests: int) -> None:
    """Raises CapacityError if so many more may not wait."""
    self._queue.check_room(num_requests, 0, self._tokens_per_s)

  @property
  def _tokens_per_s(self) -> float | None:
    return self._token_budget / self._step_s if self._step_s else None

  def remove(self, key: str) -> outbox.Stream | None:
    """Takes out one that has left; None if it is not here."""
    self._queue.remove(key)
    return self._streams.pop(key, None)

  def drop(self, stream: outbox.Stream) -> bool:
    """Takes out this very stream, not another of its key; False if it is not
    here."""
    key = stream.request.key
    is_here = self._streams.get(key) is stream
    if is_here:
      self.remove(key)
    return is_here

  def take_all(self) -> list[outbox.Stream]:
    """Takes out all that wait, as none will begin any more."""
    return [stream for request in list(self._queue)
            if (stream := self.remove(request.key)) is not None]

  def begin(self, engine: engine_lib.Engine,
            ) -> Iterator[tuple[outbox.Stream, Exception | None]]:
    """Hands the engine what a step could begin; the rest keeps its order.

    Yields:
      Each stream that waits no more, and why its request was refused; None
      if the engine has it now.
    """
    self._token_budget = engine.info.token_budget
    now = engine.clock()
    priority: int | None = None
    while (request := self._queue.peek()) is not None:
      if request.priority != priority:
        priority = request.priority
        num_requests, num_tokens = engine.room(priority)
      if min(num_requests, num_tokens) <= 0:
        break
      self._queue.pop()
      stream = self._streams.pop(request.key)
      try:
        self._check_deadline(request, now)
        engine.add(request)
      except Exception as error:
        yield stream, error
      else:
        yield stream, None
        num_requests -= 1
        num_tokens -= len(request.prompt_token_ids)
    self.has_room = min(engine.room(_LEAST_URGENT)) > 0

  def charge(self, request: types.Request, num_output: int) -> None:
    """Counts the tokens that were generated for a request."""
    self._queue.charge(request, 0, num_output)

  def observe_step(self, step_s: float) -> None:
    """Learns what a step took, in seconds."""
    self._step_s += (step_s - self._step_s) * (0.1 if self._step_s else 1)

  def _check_deadline(self, request: types.Request, now: float) -> None:
    if request.deadline is None:
      return
    num_steps = math.ceil(len(request.prompt_token_ids) / self._token_budget)
    wait_s, left_s = num_steps * self._step_s, request.deadline - now
    if left_s <= wait_s:
      raise errors.DeadlineError(
        f'{request.request_id}: its deadline is in {max(left_s, 0):.3g} s; '
        f'its prompt alone takes {wait_s:.3g} s.')
