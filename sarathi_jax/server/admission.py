# SPDX-License-Identifier: Apache-2.0
"""Who waits, who is next, and who is turned away.

Requests wait here, not in the scheduler, which is given what a step could
begin. Those of the smallest `priority` go first; among these, the client that
was served least so far, counted in tokens, as the Virtual Token Counter does
(Sheng et al., OSDI 2024); the requests of one client in order of arrival. So
one client's thousand prompts do not hold up another's one. Imports no gRPC
and no JAX.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
import dataclasses
import math

from sarathi_jax import errors
from sarathi_jax import types

# What a generated token costs a client, in tokens of a prompt: the paper's.
_OUTPUT_WEIGHT = 2.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
  """What one server takes on. Beyond it, requests are refused at once.

  Attributes:
    max_waiting: requests that wait to begin.
    max_waiting_tokens: tokens of their prompts; None for any number.
    max_prompt_tokens: of one prompt; None for what the model takes.
    max_outbox: pieces of output that may wait for one slow client.
    stream_interval_ms: the least time between two messages of a stream; what
      comes between is merged. 0: a message a step, unless the client or the
      server is slower. Most of a token's cost is its message.
  """

  max_waiting: int = 1024
  max_waiting_tokens: int | None = None
  max_prompt_tokens: int | None = None
  max_outbox: int = 4096
  stream_interval_ms: int = 0

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      least = 0 if field.name == 'stream_interval_ms' else 1
      if value is not None and value < least:
        raise errors.ConfigError(
          f'{field.name}={value!r}: must be >= {least}.')


class Queue:
  """Requests that wait to begin. Not thread-safe."""

  def __init__(self, limits: Limits) -> None:
    self._limits = limits
    self._lines: dict[int, dict[str, deque[types.Request]]] = {}
    self._by_id: dict[str, types.Request] = {}
    self._served: dict[str, float] = {}  # client -> tokens, of those known
    self.num_tokens = 0

  def __len__(self) -> int:
    return len(self._by_id)

  def __contains__(self, request_id: str) -> bool:
    return request_id in self._by_id

  def __iter__(self) -> Iterator[types.Request]:
    return iter(self._by_id.values())

  def push(self, request: types.Request, tokens_per_s: float | None) -> None:
    """Takes on a request.

    Args:
      request: its id is not in the queue.
      tokens_per_s: at which prompts are computed lately, for the hint when
        to try again; None if that is not known.

    Raises:
      CapacityError: too many wait.
    """
    limits, num_tokens = self._limits, len(request.prompt_token_ids)
    max_tokens = limits.max_waiting_tokens or math.inf
    full = ''
    if len(self) >= limits.max_waiting:
      full = f'{len(self)} requests: max_waiting={limits.max_waiting}'
    elif self._by_id and self.num_tokens + num_tokens > max_tokens:
      full = (f'{self.num_tokens} tokens of prompts: '
              f'max_waiting_tokens={limits.max_waiting_tokens}')
    if full:
      raise errors.CapacityError(
        f'the queue is full, with {full}; try again later.',
        self._retry_after_s(tokens_per_s))
    line = self._lines.setdefault(request.priority, {})
    if request.client not in line:
      if not any(request.client in other for other in self._lines.values()):
        self._lift(request.client)
      line[request.client] = deque()
    line[request.client].append(request)
    self._by_id[request.request_id] = request
    self.num_tokens += num_tokens

  def peek(self) -> types.Request | None:
    """The next one to begin."""
    if not self._by_id:
      return None
    clients = self._lines[min(self._lines)]
    return clients[min(clients, key=lambda c: self._served[c])][0]

  def pop(self) -> types.Request:
    """Takes out the next one to begin, and counts its prompt."""
    request = self.peek()
    assert request is not None
    self._remove(request)
    self.charge(request.client, len(request.prompt_token_ids), 0)
    return request

  def remove(self, request_id: str) -> bool:
    """Takes out one that has left; False if it is not here."""
    request = self._by_id.get(request_id)
    if request is not None:
      self._remove(request)
    return request is not None

  def charge(self, client: str, num_prompt: int, num_output: int) -> None:
    """Counts what a client was served."""
    self._served[client] = (
      self._served.get(client, 0.0) + num_prompt + _OUTPUT_WEIGHT * num_output)
    if len(self._served) > 10_000:  # names that nobody uses any more
      waiting = {r.client for r in self} | {client}
      self._served = {c: self._served[c] for c in waiting}

  def _lift(self, client: str) -> None:
    """Gives who comes back no credit for the time in which it was away."""
    others = [self._served[c] for line in self._lines.values() for c in line]
    self._served[client] = max(
      self._served.get(client, 0.0), min(others, default=0.0))

  def _remove(self, request: types.Request) -> None:
    del self._by_id[request.request_id]
    self.num_tokens -= len(request.prompt_token_ids)
    clients = self._lines[request.priority]
    clients[request.client].remove(request)
    if not clients[request.client]:
      del clients[request.client]
    if not clients:
      del self._lines[request.priority]

  def _retry_after_s(self, tokens_per_s: float | None) -> float:
    """When a half of what waits will have begun, roughly."""
    if not tokens_per_s:
      return 1.0
    return min(max(self.num_tokens / 2 / tokens_per_s, 0.1), 60.0)
