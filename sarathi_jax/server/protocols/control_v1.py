# SPDX-License-Identifier: Apache-2.0
"""The service sarathi.v1.Control, for who administers the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
import concurrent.futures
import contextlib
import dataclasses
import gzip
import io
import json
import math
import pathlib
import time
from typing import Any

import grpc

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import state
from sarathi_jax.engine import trace
from sarathi_jax.scheduler import sequence
from sarathi_jax.server import adapters as adapters_lib
from sarathi_jax.server import frontend as frontend_lib
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.server.protocols import status
from sarathi_jax.server.queue import pausing

NAME = pb.DESCRIPTOR.services_by_name['Control'].full_name
Context = grpc.aio.ServicerContext[Any, Any]

_PAUSE_MODES = {
  pb.PAUSE_MODE_KEEP: pausing.PauseMode.KEEP,
  pb.PAUSE_MODE_WAIT: pausing.PauseMode.WAIT,
  pb.PAUSE_MODE_ABORT: pausing.PauseMode.ABORT,
}
_ON_UPDATE = {
  pb.ON_UPDATE_RECOMPUTE: 'recompute',
  pb.ON_UPDATE_KEEP: 'keep',
}
_REQUEST_STATE = tuple(
  field.name for field in pb.RequestState.DESCRIPTOR.fields
)
_MAX_TRACE_EVENTS = 1_000_000
_EVENTS_AT_ONCE = 1000
_CHUNK_BYTES = 64 * 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
  """What the server can have its model do, beside serving.

  Attributes:
    load_weights: reads the weights of a checkpoint; any thread.
    update_weights: has the model use them; on the engine's thread, which ends
      where it raises EngineDeadError: the old ones are gone then.
    start_profile: begins to record the device into a folder.
    stop_profile: ends the recording.
    num_compiled: counts the programs compiled so far.
    read_adapter: reads a LoRA adapter of a name and a path; any thread.
  """

  load_weights: Callable[[str], Any] | None = None
  update_weights: Callable[[Any, str], None] | None = None
  start_profile: Callable[[str], None] | None = None
  stop_profile: Callable[[], None] | None = None
  num_compiled: Callable[[], int] | None = None
  read_adapter: adapters_lib.Read | None = None


class ControlService(sarathi_pb2_grpc.ControlServicer):
  """Serves sarathi.v1.Control; sarathi.proto says what the calls do.

  Args:
    frontend: admits requests and reaches the engine.
    hooks: what the model can do.
    loader: of adapters.
    set_draining: tells health and the frontend that the server drains.
    trace_dir: where profiles go; None to refuse them.
  """

  def __init__(
    self,
    frontend: frontend_lib.Frontend,
    hooks: Hooks,
    loader: adapters_lib.Loader,
    set_draining: Callable[[bool], None],
    trace_dir: pathlib.Path | None,
  ) -> None:
    self._frontend = frontend
    self._thread = frontend.engine_thread
    self._hooks = hooks
    self._loader = loader
    self._set_draining = set_draining
    self._trace_dir = trace_dir
    self._updating = asyncio.Lock()
    self._profiling = asyncio.Lock()

  async def Pause(
    self, request: pb.PauseRequest, context: Context
  ) -> pb.PauseResponse:
    async with self._checked(context):
      if request.mode not in _PAUSE_MODES:
        raise errors.InvalidRequestError(
          f'mode={request.mode}: is not a PauseMode.'
        )
      await self._thread.pause(_PAUSE_MODES[request.mode])
      return pb.PauseResponse()

  async def Resume(
    self, request: pb.ResumeRequest, context: Context
  ) -> pb.ResumeResponse:
    async with self._checked(context):
      await self._thread.resume()
      self._set_draining(False)
      return pb.ResumeResponse()

  async def Drain(
    self, request: pb.DrainRequest, context: Context
  ) -> pb.DrainResponse:
    async with self._checked(context):
      self._set_draining(True)
      await self._frontend.drain()
      return pb.DrainResponse()

  async def UpdateWeights(
    self, request: pb.UpdateWeightsRequest, context: Context
  ) -> pb.UpdateWeightsResponse:
    async with self._checked(context):
      load, update = self._hooks.load_weights, self._hooks.update_weights
      if load is None or update is None:
        raise errors.UnsupportedError(
          "UpdateWeights: this server can't read weights."
        )
      if not request.path:
        raise errors.InvalidRequestError("path='': must name a checkpoint.")
      if request.on_update not in _ON_UPDATE:
        raise errors.InvalidRequestError(
          f'on_update={request.on_update}: is not an OnUpdate.'
        )
      on_update = _ON_UPDATE[request.on_update]
      async with self._updating:
        weights = await asyncio.get_running_loop().run_in_executor(
          None, load, request.path
        )
        start = time.monotonic()

        def use(engine: engine_lib.Engine) -> int:
          update(weights, on_update)
          return engine.weight_version

        version = await self._thread.call(use)
        return pb.UpdateWeightsResponse(
          pause_s=time.monotonic() - start, version=version
        )

  async def ResetCache(
    self, request: pb.ResetCacheRequest, context: Context
  ) -> pb.ResetCacheResponse:
    async with self._checked(context):
      await self._thread.call(lambda engine: engine.invalidate_cache())
      return pb.ResetCacheResponse()

  async def SetTokenBudget(
    self, request: pb.SetTokenBudgetRequest, context: Context
  ) -> pb.SetTokenBudgetResponse:
    async with self._checked(context):
      await self._thread.call(
        lambda engine: engine.set_token_budget(request.token_budget)
      )
      return pb.SetTokenBudgetResponse()

  async def Profile(
    self, request: pb.ProfileRequest, context: Context
  ) -> pb.ProfileResponse:
    async with self._checked(context):
      start, stop = self._hooks.start_profile, self._hooks.stop_profile
      if start is None or stop is None or self._trace_dir is None:
        raise errors.UnsupportedError(
          'Profile: this server has no profiler, or no --trace_dir.'
        )
      if request.num_steps < 1:
        raise errors.InvalidRequestError(
          f'num_steps={request.num_steps}: must be >= 1.'
        )
      self._frontend.limits.check(
        'max_profile_steps', request.num_steps, 'num_steps'
      )
      if self._profiling.locked():
        raise errors.CapacityError('Profile: one is being made already.')
      async with self._profiling:
        folder = self._trace_dir / f'profile-{int(time.time())}'
        folder.mkdir(parents=True, exist_ok=True)
        steps = _Steps(request.num_steps)
        await self._thread.call(lambda engine: start(str(folder)))
        try:
          async with self._observing(steps):
            await asyncio.wrap_future(steps.done)
        finally:
          await self._thread.call(lambda engine: stop())
        return pb.ProfileResponse(folder=str(folder))

  async def Trace(self, request: pb.TraceRequest, context: Context) -> None:
    async with self._checked(context):
      longest_s = self._frontend.limits.max_trace_s
      if not (
        math.isfinite(request.seconds) and 0 < request.seconds <= longest_s
      ):
        raise errors.InvalidRequestError(
          f'seconds={request.seconds}: must be in (0, {longest_s:g}].'
        )
      events: list[trace.Event] = list(trace.HEADER)

      def emit(event: trace.Event) -> None:
        if len(events) < _MAX_TRACE_EVENTS:
          events.append(event)

      async with self._observing(trace.ChromeTrace(emit)):
        await asyncio.sleep(request.seconds)
      data = await asyncio.get_running_loop().run_in_executor(
        None, _zipped, events
      )
      for i in range(0, len(data), _CHUNK_BYTES):
        await context.write(pb.TraceChunk(data=data[i : i + _CHUNK_BYTES]))

  async def ListRequests(
    self, request: pb.ListRequestsRequest, context: Context
  ) -> pb.ListRequestsResponse:
    async with self._checked(context):
      states = await self._thread.call(lambda engine: engine.requests())
      return pb.ListRequestsResponse(
        requests=[
          pb.RequestState(**{n: getattr(s, n) for n in _REQUEST_STATE})
          for s in states
        ]
      )

  async def LoadAdapter(
    self, request: pb.LoadAdapterRequest, context: Context
  ) -> pb.LoadAdapterResponse:
    async with self._checked(context):
      await self._loader.load(
        request.name,
        request.path,
        replace=request.replace,
        fields=('name', 'path'),
      )
      return pb.LoadAdapterResponse()

  async def UnloadAdapter(
    self, request: pb.UnloadAdapterRequest, context: Context
  ) -> pb.UnloadAdapterResponse:
    async with self._checked(context):
      await self._loader.unload(request.name)
      return pb.UnloadAdapterResponse()

  async def ListAdapters(
    self, request: pb.ListAdaptersRequest, context: Context
  ) -> pb.ListAdaptersResponse:
    async with self._checked(context):
      states = await self._thread.call(lambda engine: engine.adapter_states())
      return pb.ListAdaptersResponse(
        adapters=[pb.Adapter(**one._asdict()) for one in states]
      )

  @contextlib.asynccontextmanager
  async def _observing(self, observer: state.Observer) -> Any:
    await self._thread.call(lambda engine: engine.observe(observer))
    try:
      yield
    finally:
      await self._thread.call(lambda engine: engine.observe(observer, on=False))

  @contextlib.asynccontextmanager
  async def _checked(self, context: Context) -> Any:
    async with status.reported(context):
      yield self._frontend.engine  # Raises while there is none.


def _zipped(events: Sequence[trace.Event]) -> bytes:
  """Returns zipped JSON; made in pieces, as encoding one lets no thread run."""
  data = io.BytesIO()
  with gzip.open(data, 'wt', encoding='utf-8') as file:
    for i in range(0, len(events), _EVENTS_AT_ONCE):
      file.write('[' if not i else ',')
      file.write(json.dumps(events[i : i + _EVENTS_AT_ONCE])[1:-1])
    file.write(']')
  return data.getvalue()


class _Steps:
  """A `state.Observer` that waits for some steps."""

  def __init__(self, num_steps: int) -> None:
    self._num_left = num_steps
    self.done: concurrent.futures.Future[None] = concurrent.futures.Future()

  def on_step(
    self,
    batch: types.ScheduledBatch,
    num_rows: int,
    launched: float,
    started: float,
    completed: float,
  ) -> None:
    self._num_left -= 1
    if not self._num_left:
      self.done.set_result(None)

  def on_finished(
    self,
    seq: sequence.Sequence,
    metrics: types.RequestMetrics,
    reason: types.FinishReason,
    now: float,
  ) -> None:
    """Does nothing: only steps count."""
