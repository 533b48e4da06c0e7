# SPDX-License-Identifier: Apache-2.0
"""How requests end: by themselves, by their reader, by others.

However they do, what they got counts for whose turn it is. Imports no gRPC and
no JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import threading

from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server.queue import admission
from sarathi_jax.server.queue import delivery
from sarathi_jax.server.queue import outbox


class Endings:
  """Ends requests; only the engine's thread uses this.

  Args:
    waiting: the requests that wait.
    streams: the streams of the requests that the engine has.
    lock: guards `waiting`.
  """

  def __init__(
    self,
    waiting: admission.Queue,
    streams: delivery.Delivery,
    lock: threading.Condition,
  ) -> None:
    self._waiting = waiting
    self._streams = streams
    self._lock = lock

  def route(self, delta: types.OutputDelta) -> None:
    """Keeps a delta for its reader; it may be the last of an output."""
    stream = self._streams.route(delta)
    if stream is not None and delta.metrics is not None:
      self._charge(stream.request, delta.metrics.num_output_tokens)

  def drop(self, stream: outbox.Stream, engine: engine_lib.Engine) -> None:
    """Gives up a request whose reader has left."""
    if self._streams.remove(stream.request.key):
      self._forget(stream.request, engine)

  def abort(
    self, is_meant: Callable[[types.Request], bool], engine: engine_lib.Engine
  ) -> list[str]:
    """Ends requests with ABORT; returns their ids."""
    with self._lock:
      meant = [
        s for s in (*self._waiting, *self._streams) if is_meant(s.request)
      ]
      ended = [s for s in meant if self._waiting.remove(s.request.key)]
    ended += [s for s in meant if self._forget(s.request, engine)]
    for stream in ended:
      self._streams.remove(stream.request.key)
      self._streams.put(
        stream,
        types.OutputDelta(
          stream.request.key, '', (), (), types.FinishReason.ABORT
        ),
      )
    return [stream.request.request_id for stream in ended]

  def fail(self, keys: Iterable[str], fault: Exception) -> None:
    """Ends requests whose step failed; the engine has given them up."""
    for key in keys:
      if stream := self._streams.remove(key):
        self._streams.put(
          stream, delivery.step_error(stream.request.request_id, fault)
        )

  def _forget(self, request: types.Request, engine: engine_lib.Engine) -> bool:
    num_output = engine.num_output(request.key)
    is_here = engine.abort(request.key)
    if is_here:
      self._charge(request, num_output)
    return is_here

  def _charge(self, request: types.Request, num_output: int) -> None:
    with self._lock:
      self._waiting.charge(request, 0, num_output)
