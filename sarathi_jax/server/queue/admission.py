# SPDX-License-Identifier: Apache-2.0
"""Who waits, who is next, and who is turned away.

Requests wait here, not in the scheduler, which is given what a step could
begin. Those of the smallest `priority` go first; among these, the tenant that
was served least so far, counted in tokens, as the Virtual Token Counter does
(Sheng et al., OSDI 2024); of its clients, again the one that was served least;
the requests of one client in order of arrival. So one client's thousand prompts
do not hold up another's one, and a tenant gains nothing by more clients.
Imports no gRPC and no JAX.
"""

from __future__ import annotations

from collections import Counter
from collections import deque
from collections.abc import Iterable, Iterator
import math

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.server.guard import limits as limits_lib

# What a generated token costs a client, in tokens of a prompt: the paper's.
_OUTPUT_WEIGHT = 2.0
_MAX_KNOWN = 10_000  # names that are remembered though nobody uses them


Limits = limits_lib.Limits


class _Shares:
  """What each of some names was served, in tokens, and which of them wait."""

  def __init__(self) -> None:
    self.waiting: Counter[str] = Counter()  # name -> its requests
    self._served: dict[str, float] = {}
    self._last = 0.0  # of who began last

  def enter(self, name: str) -> None:
    """A request of `name` waits."""
    if name not in self.waiting:
      # Who comes back gets no credit for the time in which it was away.
      others = (self._served[n] for n in self.waiting)
      self._served[name] = max(
        self._served.get(name, 0.0), min(others, default=self._last))
    self.waiting[name] += 1

  def leave(self, name: str) -> None:
    """A request of `name` waits no more."""
    self.waiting[name] -= 1
    if not self.waiting[name]:
      del self.waiting[name]

  def least(self, names: Iterable[str]) -> str:
    """Of names that wait, the one that was served least."""
    return min(names, key=self._served.__getitem__)

  def begin(self, name: str) -> None:
    """A request of `name` begins."""
    self._last = self._served[name]

  def charge(self, name: str, num_tokens: float) -> None:
    """Counts what was served."""
    self._served[name] = self._served.get(name, self._last) + num_tokens
    if len(self._served) > _MAX_KNOWN:
      self._served = {
        n: self._served[n] for n in {*self.waiting, name}}

  def __contains__(self, name: str) -> bool:
    return name in self._served


class Queue:
  """Requests that wait to begin. Not thread-safe."""

  def __init__(self, limits: Limits) -> None:
    self._limits = limits
    # Priority -> tenant -> client -> its requests.
    self._lines: dict[int, dict[str, dict[str, deque[types.Request]]]] = {}
    self._by_key: dict[str, types.Request] = {}
    self._tenants = _Shares()
    self._clients: dict[str, _Shares] = {}  # of each tenant that is known
    self.num_tokens = 0

  def __len__(self) -> int:
    return len(self._by_key)

  def __contains__(self, key: str) -> bool:
    return key in self._by_key

  def __iter__(self) -> Iterator[types.Request]:
    return iter(self._by_key.values())

  def check_room(self, num_requests: int, num_tokens: int,
                 tokens_per_s: float | None) -> None:
    """Refuses what there is no room for.

    Args:
      num_requests: that are to be pushed.
      num_tokens: of their prompts.
      tokens_per_s: at which prompts are computed lately, for the hint when
        to try again; None if that is not known.

    Raises:
      CapacityError: too many wait.
    """
    limits = self._limits
    max_tokens = limits.max_waiting_tokens or math.inf
    full = ''
    if len(self) + num_requests > limits.max_waiting:
      full = f'{len(self)} requests: max_waiting={limits.max_waiting}'
    elif self._by_key and self.num_tokens + num_tokens > max_tokens:
      full = (f'{self.num_tokens} tokens of prompts: '
              f'max_waiting_tokens={limits.max_waiting_tokens}')
    if full:
      raise errors.CapacityError(
        f'the queue is full, with {full}; try again later.',
        self._retry_after_s(tokens_per_s))

  def push(self, request: types.Request, tokens_per_s: float | None) -> None:
    """Takes on a request, whose key is not in the queue; see `check_room`."""
    num_tokens = len(request.prompt_token_ids)
    self.check_room(1, num_tokens, tokens_per_s)
    tenant, client = request.tenant, request.client
    self._tenants.enter(tenant)
    self._clients.setdefault(tenant, _Shares()).enter(client)
    self._lines.setdefault(request.priority, {}).setdefault(
      tenant, {}).setdefault(client, deque()).append(request)
    self._by_key[request.key] = request
    self.num_tokens += num_tokens

  def peek(self) -> types.Request | None:
    """The next one to begin."""
    if not self._by_key:
      return None
    tenants = self._lines[min(self._lines)]
    tenant = self._tenants.least(tenants)
    client = self._clients[tenant].least(tenants[tenant])
    return tenants[tenant][client][0]

  def pop(self) -> types.Request:
    """Takes out the next one to begin, and counts its prompt."""
    request = self.peek()
    assert request is not None
    self._tenants.begin(request.tenant)
    self._clients[request.tenant].begin(request.client)
    self._remove(request)
    self.charge(request, len(request.prompt_token_ids), 0)
    return request

  def remove(self, key: str) -> bool:
    """Takes out one that has left; False if it is not here."""
    request = self._by_key.get(key)
    if request is not None:
      self._remove(request)
    return request is not None

  def charge(self, request: types.Request, num_prompt: int,
             num_output: int) -> None:
    """Counts what was served of a request that has begun."""
    num_tokens = num_prompt + _OUTPUT_WEIGHT * num_output
    self._tenants.charge(request.tenant, num_tokens)
    self._clients.setdefault(request.tenant, _Shares()).charge(
      request.client, num_tokens)
    if len(self._clients) > _MAX_KNOWN:
      self._clients = {
        tenant: shares for tenant, shares in self._clients.items()
        if tenant in self._tenants}

  def _remove(self, request: types.Request) -> None:
    del self._by_key[request.key]
    self.num_tokens -= len(request.prompt_token_ids)
    self._tenants.leave(request.tenant)
    self._clients[request.tenant].leave(request.client)
    tenants = self._lines[request.priority]
    clients = tenants[request.tenant]
    clients[request.client].remove(request)
    if not clients[request.client]:
      del clients[request.client]
    if not clients:
      del tenants[request.tenant]
    if not tenants:
      del self._lines[request.priority]

  def _retry_after_s(self, tokens_per_s: float | None) -> float:
    """When a half of what waits will have begun, roughly."""
    if not tokens_per_s:
      return 1.0
    return min(max(self.num_tokens / 2 / tokens_per_s, 0.1), 60.0)
