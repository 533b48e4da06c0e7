# SPDX-License-Identifier: Apache-2.0
"""The server's life: bind, load, serve, drain, stop.

  LOADING    bound, so that a port in use is found before minutes of loading;
             health says NOT_SERVING
  SERVING    the engine is warm; health says SERVING
  DRAINING   after SIGTERM or SIGINT: NOT_SERVING, new requests are refused,
             open ones get `drain_s` to finish
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
import dataclasses
import signal
import socket
from typing import Any

from absl import logging
import grpc
from grpc_health.v1 import health
from grpc_health.v1 import health_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server import engine_thread as engine_thread_lib
from sarathi_jax.server import frontend as frontend_lib
from sarathi_jax.server import malformed
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.server import service

_CHANNEL_OPTIONS = (
  # Else the kernel lets two servers share a port, and clients meet either.
  ('grpc.so_reuseport', 0),
  # Find clients that vanished without a word, and free their pages.
  ('grpc.keepalive_time_ms', 30_000),
  ('grpc.keepalive_timeout_ms', 10_000),
  # Let clients do the same, while they wait in the queue too.
  ('grpc.http2.min_recv_ping_interval_without_data_ms', 10_000),
)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HEALTH_NAMES = ('', service.NAME)
# For the last messages of streams that have just ended to be sent, and for a
# step under way to end.
_GRACE_S = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
  """Where to serve.

  Attributes:
    host: address to listen at.
    port: 0 for any that is free.
    drain_s: how long open requests may go on after SIGTERM, seconds.
  """

  host: str = '127.0.0.1'
  port: int = 50051
  drain_s: float = 30.0

  def __post_init__(self) -> None:
    config_lib.check(0 <= self.port < 2**16, 'port', self.port,
                     'must be in [0, 65535]')
    config_lib.check(self.drain_s >= 0, 'drain_s', self.drain_s,
                     'must be >= 0')


class Server:
  """Serves one engine; made and used on a running event loop.

  Args:
    config: where.
    make_engine: makes the engine, warm; called on the engine's thread.
  """

  def __init__(self, config: ServerConfig,
               make_engine: Callable[[], engine_lib.Engine]) -> None:
    self.port = config.port
    self._config = config
    self._engine_thread = engine_thread_lib.EngineThread(
      make_engine, asyncio.get_running_loop(), self._on_death)
    self.frontend = frontend_lib.Frontend(self._engine_thread)
    self._health = health.aio.HealthServicer()
    self._grpc = grpc.aio.server(
      interceptors=(malformed.Interceptor(),), options=_CHANNEL_OPTIONS)
    self._tasks: set[asyncio.Task[None]] = set()

  async def start(self) -> None:
    """Listens, and begins to make the engine.

    Raises:
      ConfigError: the address can't be had.
    """
    await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
    sarathi_pb2_grpc.add_SarathiServicer_to_server(  # type: ignore[no-untyped-call]
      service.SarathiService(self.frontend), self._grpc)
    health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
    reflection.enable_server_reflection(
      (service.NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)
    self.port = _bind(self._grpc, self._config)
    await self._grpc.start()
    self._loading = self._engine_thread.start()

  async def warm(self) -> None:
    """Waits for the engine, then serves.

    Raises:
      Exception: whatever make_engine raised.
    """
    engine = await self._loading
    self.frontend.serve(engine)
    await self._set_health(health_pb2.HealthCheckResponse.SERVING)

  async def drain(self) -> None:
    """Refuses new requests and waits for open ones, `drain_s` at most."""
    self.frontend.state = frontend_lib.State.DRAINING
    await self._health.enter_graceful_shutdown()
    try:
      await asyncio.wait_for(self.frontend.drained(), self._config.drain_s)
    except TimeoutError:
      logging.warning('Requests are cut off after %g s of draining.',
                      self._config.drain_s)

  async def stop(self) -> None:
    """Cuts off what is left."""
    self.frontend.state = frontend_lib.State.DRAINING
    self._engine_thread.stop()
    self.frontend.cut_off()
    await self._grpc.stop(_GRACE_S)
    await asyncio.get_running_loop().run_in_executor(
      None, self._engine_thread.join, _GRACE_S)

  @property
  def is_stuck(self) -> bool:
    """Whether the engine's thread goes on after `stop`, in a long step."""
    return not self._engine_thread.join(0)

  def _on_death(self, fault: BaseException) -> None:
    del fault  # logged where it was caught
    task = asyncio.create_task(
      self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING))
    self._tasks.add(task)  # the loop itself holds tasks weakly
    task.add_done_callback(self._tasks.discard)

  async def _set_health(self, status: int) -> None:
    for name in _HEALTH_NAMES:
      await self._health.set(name, status)


def _bind(server: grpc.aio.Server, config: ServerConfig) -> int:
  """Returns the port; ConfigError if the address can't be had."""
  host, port = config.host, config.port
  address = f'[{host}]:{port}' if ':' in host else f'{host}:{port}'
  try:
    # gRPC would not tell why, but log it.
    family, kind, protocol, _, location = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      probe.bind(location)
    return server.add_insecure_port(address)
  except (OSError, RuntimeError) as error:
    reason = getattr(error, 'strerror', None) or str(error)
    raise errors.ConfigError(
      f'port={port}: can\'t listen at {address}: {reason}. Is another server '
      'running there? Then choose another --port.') from error


async def serve(server: Server,
                on_ready: Callable[[engine_lib.EngineInfo, int], None]) -> int:
  """Serves until a signal; a second one cuts the draining short.

  Args:
    server: not yet started.
    on_ready: told what is served, and at which port.

  Returns:
    An exit code for the process: 0 after a drain, else 128 + the signal.

  Raises:
    ConfigError: the address can't be had.
    Exception: whatever make_engine raised.
  """
  signals: asyncio.Queue[int] = asyncio.Queue()
  for number in _SIGNALS:
    asyncio.get_running_loop().add_signal_handler(
      number, signals.put_nowait, number)
  await server.start()
  try:
    if cut := await _until_signal(server.warm(), signals):
      return 128 + cut
    on_ready(server.frontend.engine.info, server.port)
    await signals.get()
    if cut := await _until_signal(server.drain(), signals):
      return 128 + cut
    return 0
  finally:
    await server.stop()


async def _until_signal(work: Coroutine[Any, Any, None],
                        signals: asyncio.Queue[int]) -> int:
  """Runs `work`, or as much of it as a signal, which is returned, leaves."""
  tasks = (asyncio.create_task(work), asyncio.create_task(signals.get()))
  done, undone = await asyncio.wait(
    tasks, return_when=asyncio.FIRST_COMPLETED)
  for task in undone:
    task.cancel()
  if tasks[0] in done:
    await tasks[0]
    return 0
  return tasks[1].result()
