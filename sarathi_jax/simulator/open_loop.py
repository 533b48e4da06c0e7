# SPDX-License-Identifier: Apache-2.0
"""An open-loop client: sends requests when they are due, and times the tokens.

A request is sent at its time whether or not earlier ones are done, so a server
that falls behind is not spared. What is measured is what a user would see:

- TTFT, the time to the first token, is from when the request was to come, not
  from when a late client sent it.
- TBT, the time between tokens, has a value for each token but the first. Of
  tokens that come in one message the first one has waited for all of them, and
  the others not at all: their gaps are 0. So a server that sends less often has
  the same mean, and longer tails; `Seen.tokens_per_message` tells which do.
- Where a run is cut, what has been waited for so far counts as if it had come.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
import contextlib
import dataclasses
import math
import time
from typing import NamedTuple, Protocol

import grpc
import numpy as np

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import metrics as metrics_lib
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.simulator import workload as workload_lib

_LOOK_S = 1.0  # between two looks of `stop_when`


class RequestError(errors.SarathiError):
  """A server refused a request, or broke off its answer; says why."""


class Request(NamedTuple):
  """What a server is asked for, greedily.

  Attributes:
    arrives_s: when it is to be sent, seconds from the start.
    token_ids: the prompt.
    max_tokens: the output's length; ends of sequence are ignored.
    tier: see `types.Request`; only sarathi.v1 has them.
  """

  arrives_s: float
  token_ids: Sequence[int]
  max_tokens: int
  tier: str = types.TIERS[0]


class Message(NamedTuple):
  """What a server sent at once.

  Attributes:
    token_ids: tokens of the output; zeros where a server tells no ids.
    scheduling_delay_s: how long the request waited for its first step, as the
      server may say in the last message.
  """

  token_ids: Sequence[int]
  scheduling_delay_s: float | None = None


Ask = Callable[[Request], AsyncIterator[Message]]


class Target(Protocol):
  """A server that is asked by some protocol."""

  def open(self) -> contextlib.AbstractAsyncContextManager[Ask]:
    """Returns what asks the server, in an event loop; raises RequestError."""


@dataclasses.dataclass(slots=True)
class Outcome:
  """What became of a request. Times are seconds.

  Attributes:
    error: '' if it was served.
    late_s: by how much it was sent too late.
    token_ids: tokens of the output.
    num_messages: number of messages that these came in.
    ttft_s: see above; None before there was a token.
    longest_gap_s: the longest time between two tokens.
    e2e_s: time from its arrival to its last token; None before that.
    scheduling_delay_s: what the server says about it.
    is_cut: whether the run ended first; the times are what they were by then.
  """

  error: str = ''
  late_s: float = 0.0
  token_ids: list[int] = dataclasses.field(default_factory=list)
  num_messages: int = 0
  ttft_s: float | None = None
  longest_gap_s: float = 0.0
  e2e_s: float | None = None
  scheduling_delay_s: float | None = None
  is_cut: bool = False

  def meets(self, ttft_s: float, tbt_s: float) -> bool:
    """Says whether it was served within limits."""
    return (
      not self.error
      and not self.is_cut
      and self.ttft_s is not None
      and self.ttft_s <= ttft_s
      and self.longest_gap_s <= tbt_s
    )


@dataclasses.dataclass(slots=True)
class Seen:
  """What a run saw.

  Attributes:
    outcomes: one for each request, in their order.
    tbt_s: gaps between tokens of interactive requests, which the SLO is for.
    seconds: time from the start to the last answer.
    is_stopped: whether it was ended early.
  """

  outcomes: list[Outcome]
  tbt_s: metrics_lib.Quantiles = dataclasses.field(
    default_factory=metrics_lib.Quantiles
  )
  seconds: float = 0.0
  is_stopped: bool = False

  def quantiles(self, name: str) -> metrics_lib.Quantiles:
    """Returns quantiles of a time of outcomes, by its name; None left out."""
    found = metrics_lib.Quantiles()
    found.add(
      value
      for outcome in self.outcomes
      if (value := getattr(outcome, name)) is not None
    )
    return found

  @property
  def num_tokens(self) -> int:
    return sum(len(o.token_ids) for o in self.outcomes)

  @property
  def tokens_per_message(self) -> float:
    return self.num_tokens / max(sum(o.num_messages for o in self.outcomes), 1)

  @property
  def errors(self) -> list[str]:
    """The distinct errors."""
    return sorted({o.error for o in self.outcomes if o.error})


def requests(
  workload: workload_lib.Workload, vocab_size: int, seed: int = 0
) -> list[Request]:
  """Makes a workload's requests, with random prompts.

  No two begin alike, so that no server has one in its cache.

  Raises:
    ConfigError: the workload has chats, whose turns wait for answers.
  """
  if workload.chats is not None:
    raise errors.ConfigError(
      'workload: chats (turns > 1, or system_len) can only be simulated.'
    )
  rng = np.random.default_rng([seed, vocab_size])
  return [
    Request(
      float(workload.arrived_at[i]),
      rng.integers(vocab_size, size=workload.prompt_lens[i]).tolist(),
      int(workload.output_lens[i]),
      workload.tier(i),
    )
    for i in range(len(workload))
  ]


async def run(
  target: Target,
  asked: Sequence[Request],
  *,
  limit_s: float = math.inf,
  stop_when: Callable[[Seen], bool] = lambda seen: False,
) -> Seen:
  """Sends every request at its time and records what comes back when.

  Args:
    target: the server to send them to.
    asked: the requests.
    limit_s: when to cut off requests that go on, seconds from the start.
    stop_when: called once a second; the run ends when it is true.

  Raises:
    RequestError: the server can't be reached. A refusal is an outcome.
  """
  seen = Seen([Outcome() for _ in asked])
  last_s = [request.arrives_s for request in asked]  # of its tokens
  async with target.open() as ask:
    began = time.monotonic()

    async def one(i: int) -> None:
      request, outcome = asked[i], seen.outcomes[i]
      await asyncio.sleep(began + request.arrives_s - time.monotonic())
      outcome.late_s = time.monotonic() - began - request.arrives_s
      try:
        async for message in ask(request):
          if message.token_ids:
            now = time.monotonic() - began
            _note(
              seen, request, outcome, now - last_s[i], len(message.token_ids)
            )
            outcome.e2e_s = now - request.arrives_s
            outcome.token_ids += message.token_ids
            outcome.num_messages += 1
            last_s[i] = now
          if message.scheduling_delay_s is not None:
            outcome.scheduling_delay_s = message.scheduling_delay_s
        if len(outcome.token_ids) != request.max_tokens:
          outcome.error = (
            f'{len(outcome.token_ids)} of {request.max_tokens} tokens came'
          )
      except RequestError as error:
        outcome.error = str(error)

    tasks = {asyncio.create_task(one(i)): i for i in range(len(asked))}
    left = set(tasks)
    try:
      while left and not seen.is_stopped:
        until = min(_LOOK_S, began + limit_s - time.monotonic())
        if until <= 0:
          break
        done, left = await asyncio.wait(left, timeout=until)
        for task in done:
          task.result()
        seen.is_stopped = stop_when(seen)
    finally:
      seen.seconds = time.monotonic() - began
      for task in left:
        task.cancel()
      await asyncio.gather(*left, return_exceptions=True)
  for task in left:
    i = tasks[task]
    seen.outcomes[i].is_cut = True
    if seen.seconds > asked[i].arrives_s:
      _note(seen, asked[i], seen.outcomes[i], seen.seconds - last_s[i], 1)
  return seen


def _note(
  seen: Seen,
  request: Request,
  outcome: Outcome,
  waited_s: float,
  num_tokens: int,
) -> None:
  """Takes note of tokens that came at once, after a wait."""
  if outcome.ttft_s is None:
    outcome.ttft_s = waited_s
    gaps = [0.0] * (num_tokens - 1)
  else:
    outcome.longest_gap_s = max(outcome.longest_gap_s, waited_s)
    gaps = [waited_s] + [0.0] * (num_tokens - 1)
  if request.tier == types.TIERS[0]:
    seen.tbt_s.add(gaps)


class GrpcTarget:
  """A server of sarathi.v1 at HOST:PORT."""

  def __init__(self, address: str) -> None:
    self._address = address

  def info(self, timeout_s: float) -> pb.GetModelInfoResponse:
    """Returns what the server says about itself, once it is there.

    Raises:
      RequestError: it gives no answer in time.
    """
    with grpc.insecure_channel(self._address) as channel:
      stub = sarathi_pb2_grpc.SarathiStub(channel)  # type: ignore[no-untyped-call]
      try:
        info: pb.GetModelInfoResponse = stub.GetModelInfo(
          pb.GetModelInfoRequest(), timeout=timeout_s, wait_for_ready=True
        )
        return info
      except grpc.RpcError as error:
        raise RequestError(error.details()) from error

  @contextlib.asynccontextmanager
  async def open(self) -> AsyncIterator[Ask]:
    async with grpc.aio.insecure_channel(self._address) as channel:
      stub = sarathi_pb2_grpc.SarathiStub(channel)  # type: ignore[no-untyped-call]
      try:
        await stub.GetModelInfo(pb.GetModelInfoRequest())
      except grpc.RpcError as error:
        raise _refusal(error) from error

      async def ask(request: Request) -> AsyncIterator[Message]:
        call = stub.Generate(
          pb.GenerateRequest(
            tier=request.tier,
            token_ids=pb.TokenIds(ids=request.token_ids),
            sampling=pb.SamplingParams(
              temperature=0, ignore_eos=True, max_tokens=request.max_tokens
            ),
          )
        )
        try:
          async for response in call:
            delay_s = None
            if response.HasField('finished'):
              timing = response.finished.timing
              if timing.HasField('scheduling_delay_s'):
                delay_s = timing.scheduling_delay_s
            yield Message(response.token_ids, delay_s)
        except grpc.RpcError as error:
          raise _refusal(error) from error

      yield ask


def _refusal(error: grpc.RpcError) -> RequestError:
  assert isinstance(error, grpc.aio.AioRpcError)
  return RequestError(f'{error.code().name}: {error.details()}')
