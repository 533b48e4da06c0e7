# SPDX-License-Identifier: Apache-2.0
"""Who waits, who is next, and who is turned away.

Requests wait here, not in the scheduler, which is given what a step could
begin. Those of the smallest `priority` go first; among these, the tenant that
was served least so far, counted in tokens, as the Virtual Token Counter does
(Sheng et al., OSDI 2024); of its clients, again the one that was served least;
the requests of one client in order of arrival, but for those that may pass its
others, as more of them is in the cache (`scheduler/passing.py`). So one
client's thousand prompts do not hold up another's one, and a tenant gains
nothing by more clients.
Imports no gRPC and no JAX.
"""

from __future__ import annotations

from collections import Counter
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
import math

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.scheduler import passing
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.queue import outbox

# Price of a generated token, in tokens of a prompt, as in the paper.
_OUTPUT_WEIGHT = 2.0
_MAX_KNOWN = 10_000  # names that are remembered though nobody uses them
_LEAST_URGENT = 2**31 - 1  # of protocols' priorities, so that all are ahead


Limits = limits_lib.Limits


class _Shares:
  """How many tokens each name was served, and which names wait."""

  def __init__(self) -> None:
    self.waiting: Counter[str] = Counter()  # name -> its requests
    self._served: dict[str, float] = {}
    self._last = 0.0  # of who began last

  def enter(self, name: str) -> None:
    """Counts a request of `name` that begins to wait."""
    if name not in self.waiting:
      # Who comes back gets no credit for the time in which it was away.
      others = (self._served[n] for n in self.waiting)
      self._served[name] = max(
        self._served.get(name, 0.0), min(others, default=self._last)
      )
    self.waiting[name] += 1

  def leave(self, name: str) -> None:
    """Counts a request of `name` that waits no more."""
    self.waiting[name] -= 1
    if not self.waiting[name]:
      del self.waiting[name]

  def least(self, names: Iterable[str]) -> str:
    """Returns the waiting name that was served least."""
    return min(names, key=self._served.__getitem__)

  def begin(self, name: str) -> None:
    """Notes that a request of `name` begins."""
    self._last = self._served[name]

  def charge(self, name: str, num_tokens: float) -> None:
    """Counts tokens that a name was served."""
    self._served[name] = self._served.get(name, self._last) + num_tokens
    if len(self._served) > _MAX_KNOWN:
      self._served = {n: self._served[n] for n in {*self.waiting, name}}

  def __contains__(self, name: str) -> bool:
    return name in self._served


class Queue:
  """Streams of the requests that wait to begin. Not thread-safe.

  Args:
    limits: the most that may wait.

  Attributes:
    num_outputs: outputs of the requests that wait; a request may have several.
    num_tokens: tokens of the prompts that wait.
    has_room: whether more may begin, as far as is known.
    num_missing: returns the tokens of a request's prompt to compute; all until
      an engine says what it has of them.
  """

  def __init__(self, limits: Limits) -> None:
    self._limits = limits
    # Priority -> tenant -> client -> its streams.
    self._lines: dict[int, dict[str, dict[str, deque[outbox.Stream]]]] = {}
    self._streams: dict[str, outbox.Stream] = {}  # by key
    self._tenants = _Shares()
    self._clients: dict[str, _Shares] = {}  # of each tenant that is known
    self._step_s = 0.0  # what a step takes lately
    self._token_budget = 1  # of these
    self.num_outputs = 0
    self.num_tokens = 0
    self.has_room = True
    self.num_missing: Callable[[types.Request], int] = lambda request: len(
      request.prompt_token_ids
    )

  def __len__(self) -> int:
    return len(self._streams)

  def __iter__(self) -> Iterator[outbox.Stream]:
    return iter(self._streams.values())

  def check_room(self, num_outputs: int, num_tokens: int = 0) -> None:
    """Refuses requests that there is no room for.

    Args:
      num_outputs: how many those that are to be pushed have.
      num_tokens: tokens of their prompts.

    Raises:
      CapacityError: too many wait.
    """
    limits = self._limits
    max_tokens = limits.max_waiting_tokens or math.inf
    full = ''
    if self.num_outputs + num_outputs > limits.max_waiting:
      full = f'{self.num_outputs} requests: max_waiting={limits.max_waiting}'
    elif self._streams and self.num_tokens + num_tokens > max_tokens:
      full = (
        f'{self.num_tokens} tokens of prompts: '
        f'max_waiting_tokens={limits.max_waiting_tokens}'
      )
    if full:
      seconds = self._retry_after_s()
      # In words, too: a gateway may pass on the message alone.
      raise errors.CapacityError(
        f'the queue is full, with {full}; try again in {seconds:.2g} s.',
        seconds,
      )

  def push(self, stream: outbox.Stream) -> None:
    """Adds the stream of a request that has just arrived.

    Raises:
      CapacityError: too many wait.
      DeadlineError: its answer can't begin before its deadline.
    """
    request = stream.request
    if error := self._late(request, request.arrival_time):
      raise error
    num_tokens = len(request.prompt_token_ids)
    self.check_room(request.sampling.n, num_tokens)
    tenant, client = request.tenant, request.client
    self._tenants.enter(tenant)
    self._clients.setdefault(tenant, _Shares()).enter(client)
    self._lines.setdefault(request.priority, {}).setdefault(
      tenant, {}
    ).setdefault(client, deque()).append(stream)
    self._streams[request.key] = stream
    self.num_outputs += request.sampling.n
    self.num_tokens += num_tokens

  def line(self) -> Sequence[outbox.Stream]:
    """Returns the streams of the client whose turn it is, in order."""
    if not self._streams:
      return ()
    tenants = self._lines[min(self._lines)]
    tenant = self._tenants.least(tenants)
    client = self._clients[tenant].least(tenants[tenant])
    return tenants[tenant][client]

  def pop(self, engine: engine_lib.Engine | None = None) -> outbox.Stream:
    """Takes out the stream that begins next, and counts its prompt.

    Args:
      engine: knows what is in the cache; None: in order of arrival.
    """
    window = engine.cache_aware_window if engine else 1
    few = passing.first_few(self.line(), window)
    stream = few[0]
    if len(few) > 1:
      assert engine is not None
      for waiting in few:
        if waiting.looked_for is None:
          waiting.looked_for = engine.looked_for(waiting.request)
      most = engine.most_found(s.looked_for for s in few if s.looked_for)
      stream = next(s for s in few if s.looked_for is most)
      passing.note(few, stream)
    stream.looked_for = None
    request = stream.request
    self._tenants.begin(request.tenant)
    self._clients[request.tenant].begin(request.client)
    self.remove(request.key)
    self.charge(request, len(request.prompt_token_ids), 0)
    return stream

  def begin(
    self,
    engine: engine_lib.Engine,
  ) -> list[tuple[outbox.Stream, Exception | None]]:
    """Takes out the requests that a step could begin; others keep their order.

    Args:
      engine: has to get these requests before this is called again.

    Returns:
      Each stream that waits no more, and the error that refuses its request;
      None if that is to begin.
    """
    now = engine.clock()
    self.num_missing = engine.num_missing
    priority: int | None = None
    taken: list[tuple[outbox.Stream, Exception | None]] = []
    num_outputs = num_tokens = 0  # of those that are to begin
    while line := self.line():
      if line[0].request.priority != priority:
        priority = line[0].request.priority
        room = engine.room(priority)
      if room[0] <= num_outputs or room[1] <= num_tokens:
        break
      stream = self.pop(engine)
      request = stream.request
      error = self._late(request, now)
      taken.append((stream, error))
      if error is None:
        num_outputs += request.sampling.n
        num_tokens += self.num_missing(request)
    room = engine.room(_LEAST_URGENT)
    self.has_room = room[0] > num_outputs and room[1] > num_tokens
    return taken

  def remove(self, key: str) -> outbox.Stream | None:
    """Takes out a stream that was given up; None if it is not here."""
    stream = self._streams.pop(key, None)
    if stream is None:
      return None
    request = stream.request
    self.num_outputs -= request.sampling.n
    self.num_tokens -= len(request.prompt_token_ids)
    self._tenants.leave(request.tenant)
    self._clients[request.tenant].leave(request.client)
    tenants = self._lines[request.priority]
    clients = tenants[request.tenant]
    clients[request.client].remove(stream)
    if not clients[request.client]:
      del clients[request.client]
    if not clients:
      del tenants[request.tenant]
    if not tenants:
      del self._lines[request.priority]
    return stream

  def take_all(self) -> list[outbox.Stream]:
    """Takes out all streams, as none will begin any more."""
    streams = list(self)
    for stream in streams:
      self.remove(stream.request.key)
    return streams

  def charge(
    self, request: types.Request, num_prompt: int, num_output: int
  ) -> None:
    """Counts tokens that a request was served since it began."""
    num_tokens = num_prompt + _OUTPUT_WEIGHT * num_output
    self._tenants.charge(request.tenant, num_tokens)
    self._clients.setdefault(request.tenant, _Shares()).charge(
      request.client, num_tokens
    )
    if len(self._clients) > _MAX_KNOWN:
      self._clients = {
        tenant: shares
        for tenant, shares in self._clients.items()
        if tenant in self._tenants
      }

  def observe_step(self, step_s: float, token_budget: int) -> None:
    """Learns how long a step took, seconds, and the most tokens of a step."""
    self._step_s += (step_s - self._step_s) * (0.1 if self._step_s else 1)
    self._token_budget = token_budget

  def _late(
    self, request: types.Request, now: float
  ) -> errors.DeadlineError | None:
    """Returns the error for a request that is too late; None if it is not."""
    if request.deadline is None:
      return None
    left_s = request.deadline - now
    # What was found of a prompt is looked up only where it would be too long.
    wait_s = self._prefill_s(len(request.prompt_token_ids))
    if left_s <= wait_s:
      wait_s = self._prefill_s(self.num_missing(request))
    if left_s > wait_s:
      return None
    return errors.DeadlineError(
      f'{request.request_id}: its deadline is in {max(left_s, 0):.3g} s; '
      f'its prompt alone takes {wait_s:.3g} s.'
    )

  def _prefill_s(self, num_tokens: int) -> float:
    return math.ceil(num_tokens / self._token_budget) * self._step_s

  def _retry_after_s(self) -> float:
    """Estimates in how many seconds half of what waits will have begun."""
    if not self._step_s:
      return 1.0
    tokens_per_s = self._token_budget / self._step_s
    return min(max(self.num_tokens / 2 / tokens_per_s, 0.1), 60.0)
