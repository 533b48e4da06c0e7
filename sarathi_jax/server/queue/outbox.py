# SPDX-License-Identifier: Apache-2.0
"""The output of one request that its reader has not yet taken.

What waits is merged, so a reader that falls behind gets more tokens at a time
and costs less; one that falls far behind is ended. Imports no gRPC and no JAX.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.scheduler import sequence


class Stream:
  """The output of one request, in order; read by one task of the event loop.

  Iteration ends after the delta that ends the request. It raises what the
  request was refused with, StepError or EngineDeadError. Where the request has
  several outputs, each of these is in order.

  Args:
    request: whose output it is.
    abandon: called when the reader leaves before the end.
    max_waiting: deltas of each output that may wait for the reader; with more
      the request is aborted, and the reader's task cancelled, as it may be
      stuck in a write: see `raise_overflow`. Not in the first one: gRPC can't
      end a call while it sends the metadata that go with that, and never would.
    interval_s: the least time between two deltas of an output.

  Attributes:
    request: see above.
    num_tokens: tokens that the reader took, of each output.
    num_cached: tokens of the prompt that were found in the KV cache, once it
      took the last delta of the first output.
    last: the last delta that it took.
    looked_for: while it waits to begin, what is looked for in the cache.
    num_passed: requests that came later and began first; see `passing`.
  """

  def __init__(
    self,
    request: types.Request,
    abandon: Callable[[Stream], None],
    max_waiting: int = 1 << 30,
    interval_s: float = 0.0,
  ) -> None:
    self.request = request
    num = request.sampling.n
    self.num_tokens = [0] * num
    self.num_cached = 0
    self.last: types.OutputDelta | None = None
    self.looked_for: sequence.Sequence | None = None
    self.num_passed = 0
    self._open = set(range(num))  # outputs whose last delta is not put
    self._num_left = num  # whose last delta is not taken
    self._num_taken = 0  # deltas
    self._merged: deque[types.OutputDelta] = deque()  # next to be taken
    self._abandon = abandon
    self._max_waiting = max_waiting * num
    self._interval_s = interval_s
    self._not_before = 0.0
    self._deltas: list[types.OutputDelta] = []
    self._error: Exception | None = None
    self._waiter: asyncio.Future[None] | None = None
    self._reader: asyncio.Task[object] | None = None
    self._has_overflowed = False
    self._ended = False

  def put(self, item: types.OutputDelta | Exception) -> None:
    """Adds a delta, or the error that ends the stream; on the event loop."""
    if self._error is not None or self._ended:
      return
    if isinstance(item, Exception):
      self._error = item
    elif item.finish_reason is None:
      self._deltas.append(item)
    else:
      self._add_last(item)
    if len(self._deltas) > self._max_waiting:
      self._overflow()
    if self._waiter is not None and not self._waiter.done():
      self._waiter.set_result(None)

  def __aiter__(self) -> Stream:
    return self

  async def __anext__(self) -> types.OutputDelta:
    if self._ended:
      raise StopAsyncIteration
    if self._merged:
      return self._take()
    if self._interval_s:
      loop = asyncio.get_running_loop()
      await asyncio.sleep(max(self._not_before - loop.time(), 0))
      self._not_before = loop.time() + self._interval_s
    if not self._deltas and self._error is None:
      if self._reader is None:
        self._reader = asyncio.current_task()
      self._waiter = asyncio.get_running_loop().create_future()
      await self._waiter
    if self._deltas:
      self._merged.extend(merge_each(self._deltas))
      self._deltas = []
      return self._take()
    self._ended = True
    assert self._error is not None
    raise self._error

  def _add_last(self, delta: types.OutputDelta) -> None:
    """Adds an output's last; that of an abort is of all that went on."""
    ended = {delta.output_index}
    if delta.finish_reason is types.FinishReason.ABORT:
      ended = self._open
    self._deltas += [delta._replace(output_index=i) for i in sorted(ended)]
    self._open = self._open - ended

  def _take(self) -> types.OutputDelta:
    delta = self._merged.popleft()
    if delta.finish_reason is not None:
      self._num_left -= 1
      self._ended = not self._num_left
      if delta.num_left != self._num_left:  # as others were merged after it
        delta = delta._replace(num_left=self._num_left)
    self.num_tokens[delta.output_index] += len(delta.token_ids)
    if delta.metrics is not None:
      self.num_cached += delta.metrics.num_cached_tokens
    self._num_taken += 1
    self.last = delta
    return delta

  def close(self) -> None:
    """Aborts the request unless it has ended. May be called again."""
    if not self._ended:
      self._ended = True
      self._abandon(self)

  @property
  def is_closed(self) -> bool:
    """Whether its reader needs no more of it."""
    return self._ended

  def raise_overflow(self) -> None:
    """Raises CapacityError if the reader's task was cancelled for it."""
    if self._has_overflowed:
      assert self._reader is not None and self._error is not None
      self._reader.uncancel()
      raise self._error

  def _overflow(self) -> None:
    self._error = errors.CapacityError(
      f'{self.request.request_id}: more than {self._max_waiting} pieces of '
      'output wait for the client, who reads too slowly.'
    )
    self._deltas = []
    self._merged.clear()
    self._abandon(self)
    if self._reader is not None and self._num_taken > 1:
      self._has_overflowed = True
      self._reader.cancel()


def merge(deltas: Sequence[types.OutputDelta]) -> types.OutputDelta:
  """Merges consecutive deltas of one output, at least one, into one."""
  last = deltas[-1]
  if len(deltas) == 1:
    return last
  return last._replace(
    text=''.join(delta.text for delta in deltas),
    token_ids=tuple(t for delta in deltas for t in delta.token_ids),
    logprobs=tuple(p for delta in deltas for p in delta.logprobs),
    told=tuple(t for delta in deltas for t in delta.told),
    prompt_logprobs=deltas[0].prompt_logprobs,
    versions=(
      types.versions_of(deltas) if any(d.versions for d in deltas) else ()
    ),
  )


def merge_each(
  deltas: Sequence[types.OutputDelta],
) -> list[types.OutputDelta]:
  """Merges consecutive deltas of a request into one of each of its outputs."""
  if len(deltas) == 1:
    return list(deltas)
  by_index: dict[int, list[types.OutputDelta]] = {}
  for delta in deltas:
    by_index.setdefault(delta.output_index, []).append(delta)
  return [merge(by_index[index]) for index in sorted(by_index)]
