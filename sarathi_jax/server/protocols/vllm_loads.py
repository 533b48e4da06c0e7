# SPDX-License-Identifier: Apache-2.0
"""The engine's load, as VllmEngine tells it: when asked, and unasked.

Unasked it comes with each batch of what the cache holds. So a router that
follows the cache goes by the load of now; what it asked for seconds ago sends
all new chats to one server, and then old ones away from their pages. Imports no
JAX.
"""

from __future__ import annotations

import time

from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import common_pb2

from sarathi_jax.engine import state
from sarathi_jax.server import frontend as frontend_lib

_WINDOW_S = 1.0  # over which tokens are counted
_HALF_LIFE_S = 60.0


class Loads:
  """Makes the messages.

  Args:
    frontend: reaches the engine.
  """

  def __init__(self, frontend: frontend_lib.Frontend) -> None:
    self._frontend = frontend
    self._last = (time.monotonic(), 0)  # when, tokens generated until then
    self._throughput = 0.0

  async def ask(self) -> pb.SchedulerLoad:
    """Returns the load between two steps."""
    thread = self._frontend.engine_thread
    # Both on the thread that takes from the queue: else what it takes in
    # between would be in neither.
    load, num_queued = await thread.call(
      lambda engine: (engine.load(), thread.num_queued)
    )
    return self._message(load, num_queued)

  def _message(self, load: state.Load, num_queued: int) -> pb.SchedulerLoad:
    """Returns the message of a load, with what waits before the engine."""
    info = self._frontend.engine.info
    thread = self._frontend.engine_thread
    num_waiting = load.num_waiting + num_queued
    num_used = info.num_pages - load.num_free_pages
    return pb.SchedulerLoad(
      dp_rank=0,
      num_running_reqs=load.num_running,
      num_waiting_reqs=num_waiting,
      num_total_reqs=load.num_running + num_waiting,
      num_used_tokens=info.kv_tokens(num_used),
      max_total_num_tokens=info.kv_tokens(info.num_pages),
      token_usage=num_used / info.num_pages,
      gen_throughput=self._measure(load.num_generated),
      cache_hit_rate=load.num_found / max(1, load.num_looked_up),
      utilization=load.num_running / info.max_num_seqs,
      max_running_requests=info.max_num_seqs,
      num_waiting_uncached_tokens=thread.num_queued_tokens,
    )

  def record_of(self, load: state.Load, sample: int) -> common_pb2.EngineLoad:
    """Returns the same as what a batch of events has with it.

    Args:
      load: the engine's.
      sample: the number of the record in its stream.
    """
    of = self._message(load, self._frontend.engine_thread.num_queued)
    return common_pb2.EngineLoad(
      running_requests=of.num_running_reqs,
      waiting_requests=of.num_waiting_reqs,
      waiting_uncached_tokens=of.num_waiting_uncached_tokens,
      token_usage=of.token_usage,
      gen_throughput=of.gen_throughput,
      max_running_requests=of.max_running_requests,
      sample=sample,
      cache_hit_rate=of.cache_hit_rate,
      num_used_tokens=of.num_used_tokens,
      max_total_num_tokens=of.max_total_num_tokens,
    )

  def _measure(self, num_generated: int) -> float:
    """Returns the most tokens a second of late: what waiting work drains at.

    Not those of the last second: a server with little to do would look slow,
    and get less.
    """
    now = time.monotonic()
    then, before = self._last
    if (seconds := now - then) >= _WINDOW_S:
      self._throughput = max(
        (num_generated - before) / seconds,
        self._throughput * 0.5 ** (seconds / _HALF_LIFE_S),
      )
      self._last = (now, num_generated)
    return self._throughput
