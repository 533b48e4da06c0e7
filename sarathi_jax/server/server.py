# SPDX-License-Identifier: Apache-2.0
"""The server's life: bind, load, serve, drain, stop.

LOADING    bound, so that a port in use is found before minutes of loading;
           health says NOT_SERVING
SERVING    the engine is warm; health says SERVING
DRAINING   after SIGTERM or SIGINT: NOT_SERVING, new requests are refused,
           open ones get `drain_s` to finish
DEAD       the engine is gone: what is open ends with UNAVAILABLE, and then
           the process, with 1
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import socket
from typing import TYPE_CHECKING, Any

from absl import logging
import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from smg_grpc_proto import vllm_engine_pb2_grpc

from sarathi_jax import errors
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server import adapters
from sarathi_jax.server import background
from sarathi_jax.server import config as config_lib
from sarathi_jax.server import frontend as frontend_lib
from sarathi_jax.server import gateway
from sarathi_jax.server import open_inference_pb2_grpc
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.server import signals
from sarathi_jax.server.guard import auth
from sarathi_jax.server.guard import tls
from sarathi_jax.server.protocols import control_v1
from sarathi_jax.server.protocols import health
from sarathi_jax.server.protocols import malformed
from sarathi_jax.server.protocols import open_inference
from sarathi_jax.server.protocols import sarathi_v1
from sarathi_jax.server.protocols import vllm_cache
from sarathi_jax.server.protocols import vllm_engine
from sarathi_jax.server.protocols import vllm_loads
from sarathi_jax.server.queue import delivery
from sarathi_jax.server.queue import engine_thread as engine_thread_lib
from sarathi_jax.server.telling import kv_journal
from sarathi_jax.server.telling import telemetry as telemetry_lib

if TYPE_CHECKING:
  from sarathi_jax.server.http import listener

ServerConfig = config_lib.ServerConfig

_CHANNEL_OPTIONS = (
  # Else the kernel lets two servers share a port, and clients meet either.
  ('grpc.so_reuseport', 0),
  # Find clients that vanished without a word, and free their pages.
  ('grpc.keepalive_time_ms', 30_000),
  ('grpc.keepalive_timeout_ms', 10_000),
  # Let clients do the same, while they wait in the queue too.
  ('grpc.http2.min_recv_ping_interval_without_data_ms', 10_000),
  # Calls that come faster than they are begun: gRPC would cancel those beyond
  # 1,000 to 3,000, or that waited for 30 s, without a word; our queue tells
  # when to try again.
  ('grpc.server.max_pending_requests', 100_000),
  ('grpc.server.max_pending_requests_hard_limit', 100_000),
  ('grpc.server_max_unrequested_time_in_server', 24 * 3600),
)
# Methods and services whose requests must have no field that we don't know.
_STRICT = (
  f'/{sarathi_v1.NAME}/Generate',
  f'/{vllm_engine.NAME}/Generate',
  f'/{open_inference.NAME}/ModelInfer',
  f'/{open_inference.NAME}/ModelStreamInfer',
  f'/{control_v1.NAME}',
)

# For the last messages of streams that have just ended to be sent, and for a
# step under way to end.
_GRACE_S = 1.0


class Server:
  """Serves one engine; made and used on a running event loop.

  Args:
    config: where to serve, whom, and what to report.
    make_engine: makes the engine, warm; called on the engine's thread.
    hooks: what else the model can do.

  Raises:
    ConfigError: a file that `config` names can't be used.

  Attributes:
    port: the port where it listens.
    http_port: the port of OpenAI's HTTP; None without.
    fault: why it can't go on; None while it can.
    on_failed: called when it can't go on.
    on_left: called by `leave`.
  """

  def __init__(
    self,
    config: ServerConfig,
    make_engine: Callable[[], engine_lib.Engine],
    *,
    hooks: control_v1.Hooks | None = None,
  ) -> None:
    self.port = config.port
    self.fault: errors.EngineDeadError | None = None
    self.on_failed: Callable[[], object] = lambda: None
    self.on_left: Callable[[], object] = lambda: None
    self._config = config
    self._hooks = hooks or control_v1.Hooks()
    self._engine_thread = engine_thread_lib.EngineThread(
      make_engine, asyncio.get_running_loop(), self._on_death, config.limits
    )
    self.watch = background.Watch(self.fail)
    self.telemetry = telemetry_lib.Telemetry(
      config, self._engine_thread, self._hooks, self.watch
    )
    self.frontend = frontend_lib.Frontend(
      self._engine_thread, config.limits, self.telemetry.observers
    )
    self._loader = adapters.Loader(self.frontend, self._hooks.read_adapter)
    self.frontend.read_again = self._loader.read_again
    self._journal = (
      kv_journal.KvJournal(
        self._engine_thread,
        config.limits,
        # To administrators alone, then.
        tells_all=config.auth_tokens is not None,
      )
      if config.serves_kv_events
      else None
    )
    self._gateway: gateway.Gateway | None = None
    self._http: listener.Listener | None = None
    self.http_port = config.http_port
    self._services = self._make_services()
    self._health = health.HealthService(self._services)
    self._why_no_calls: Callable[[], str | None] = lambda: None
    self._is_broken = False  # gRPC is, when we stop
    self._grpc = grpc.aio.server(
      interceptors=self._interceptors(),
      options=(
        *_CHANNEL_OPTIONS,
        (
          'grpc.max_receive_message_length',
          round(config.limits.max_message_mib * 2**20),
        ),
      ),
    )

  def _make_services(self) -> dict[str, Callable[[grpc.aio.Server], None]]:
    """Makes the services: name -> what adds the service to a gRPC server."""

    def adder(add: Any, service: Any) -> Callable[[grpc.aio.Server], None]:
      return lambda server: add(service, server)

    loads = vllm_loads.Loads(self.frontend)
    services = {
      sarathi_v1.NAME: adder(
        sarathi_pb2_grpc.add_SarathiServicer_to_server,
        sarathi_v1.SarathiService(self.frontend),
      ),
      vllm_engine.NAME: adder(
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server,
        vllm_engine.VllmEngineService(
          self.frontend,
          vllm_cache.CacheCalls(
            self.frontend,
            self._journal,
            loads,
            may_flush=self._config.serves_control,
          ),
          loads,
        ),
      ),
      open_inference.NAME: adder(
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server,
        open_inference.OpenInferenceService(self.frontend),
      ),
    }
    if self._config.serves_control:
      services[control_v1.NAME] = adder(
        sarathi_pb2_grpc.add_ControlServicer_to_server,
        control_v1.ControlService(
          self.frontend,
          self._hooks,
          self._loader,
          self._set_draining,
          self._config.trace_dir,
        ),
      )
    return services

  def _interceptors(self) -> tuple[grpc.aio.ServerInterceptor, ...]:
    parse = malformed.Interceptor(self._config.limits, _STRICT)
    if self._config.auth_tokens is None:
      return (parse,)
    return (
      auth.Interceptor(
        auth.Tokens(self._config.auth_tokens),
        (health.NAME,),
        (
          control_v1.NAME,
          reflection.SERVICE_NAME,
          *vllm_engine.ADMIN_METHODS,
        ),
      ),
      parse,
    )

  async def start(self) -> None:
    """Listens, and begins to make the engine.

    Raises:
      ConfigError: an address can't be had.
    """
    for add in self._services.values():
      add(self._grpc)
    health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
    if self._config.reflection:
      reflection.enable_server_reflection(
        (*self._services, health.NAME, reflection.SERVICE_NAME), self._grpc
      )
    self.port = _bind(self._grpc, self._config)
    if self._config.http_port is not None:
      from sarathi_jax.server.http import listener  # takes 0.1 s to load

      loader = self._loader if self._config.serves_control else None
      self._http = listener.Listener(self._config, self.frontend, loader)
      self.http_port = self._http.port
      self._http.start()
      self.watch.add(self._http.as_background)
    if self._config.gateway_port is not None:
      host = self._config.host
      ours = '127.0.0.1' if host == '0.0.0.0' else self._config.address
      self._gateway = gateway.Gateway(
        host,
        self._config.gateway_port,
        (f'{ours}:{self.port}', *self._config.replicas),
        self._config.gateway_args,
        max_body_bytes=round(self._config.limits.max_message_mib * 2**20),
        on_change=lambda serves: self._health.set(serves, health.GATEWAY),
      )
      self._health.set(False, health.GATEWAY)
    self.telemetry.start()
    await self._grpc.start()
    self._why_no_calls = _why_no_calls(asyncio.all_tasks())
    self.watch.add(background.Background('grpc', self._why_no_calls))
    self._loading = self._engine_thread.start()
    self.watch.add(
      background.Background(
        'engine',
        self._engine_thread.why_ended,
        is_up=lambda: (
          self._engine_thread.why_ended() is None
          and self._engine_thread.step_s < self._config.max_step_s
        ),
        on_change=self._set_alive,
      )
    )
    self.watch.start()

  async def warm(self) -> None:
    """Waits until the engine is warm, then serves.

    Raises:
      ConfigError: the gateway ended at once.
      Exception: whatever make_engine raised.
    """
    engine = await self._loading
    await self.telemetry.observe_engine()
    if self._journal is not None:
      await self._journal.prepare()
    self.frontend.serve(engine)
    self._health.set(True)
    if self._gateway is not None:
      await self._gateway.start(
        engine.info.max_num_seqs + self._config.limits.max_waiting
      )
      self.watch.add(self._gateway.as_background)

  async def drain(self) -> None:
    """Refuses new requests and waits for open ones, `drain_s` at most."""
    self._set_draining(True)
    try:
      async with asyncio.timeout(self._config.drain_s):
        await self.frontend.drain()
    except errors.EngineDeadError:
      pass
    except TimeoutError:
      logging.warning(
        'Requests are cut off after %g s of draining.', self._config.drain_s
      )

  async def stop(self) -> None:
    """Cuts off the requests that are left, and stops."""
    await self.watch.stop()
    self.frontend.state = frontend_lib.State.DRAINING
    self._health.set(False)
    self._engine_thread.stop()
    self.frontend.cut_off()
    if self._journal is not None:
      self._journal.close()
    if self._gateway is not None:
      await self._gateway.stop()
    self._is_broken = self._why_no_calls() is not None
    if self._http is not None:
      await self._http.stop(_GRACE_S)
    if not self._is_broken:  # else it would never stop
      await self._grpc.stop(_GRACE_S)
    await asyncio.get_running_loop().run_in_executor(
      None, self._engine_thread.join, _GRACE_S
    )
    self.telemetry.stop()

  def fail(self, fault: errors.EngineDeadError) -> None:
    """Ends the engine, whatever it waits for, and `serve`; any thread."""
    self.fault = fault
    self._engine_thread.fail(fault)
    self.on_failed()

  def leave(self, process: int) -> None:
    """Ends as after a signal, as another of several processes got one."""
    logging.warning('Process %d was told to end, so all do.', process)
    self.on_left()

  @property
  def is_stuck(self) -> bool:
    """Whether something goes on after `stop`: the engine's thread in a long
    step, or gRPC, if it could not be stopped."""
    return not self._engine_thread.join(0) or self._is_broken

  def _set_draining(self, is_draining: bool) -> None:
    self.frontend.state = (
      frontend_lib.State.DRAINING if is_draining else frontend_lib.State.SERVING
    )
    self._health.set(not is_draining)

  def _set_alive(self, is_alive: bool) -> None:
    if self.frontend.state is frontend_lib.State.DEAD:
      return
    if not is_alive:
      logging.error(
        'A step has taken more than max_step_s=%g s.', self._config.max_step_s
      )
    self._health.set(is_alive, health.LIVENESS)

  def _on_death(self, fault: BaseException) -> None:
    self.frontend.state = frontend_lib.State.DEAD
    self._health.set(False)
    self._health.set(False, health.LIVENESS)
    self.fault = self.fault or delivery.gone_error(fault)
    self.on_failed()


def _bind(server: grpc.aio.Server, config: ServerConfig) -> int:
  """Binds the address; returns the port. ConfigError if it can't be had."""
  host, port = config.host, config.port
  address = f'{config.address}:{port}'
  try:
    # gRPC would not tell why, but log it.
    family, kind, protocol, _, location = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM
    )[0]
    with socket.socket(family, kind, protocol) as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      probe.bind(location)
    if config.tls is not None:
      return server.add_secure_port(address, tls.credentials(config.tls))
    return server.add_insecure_port(address)
  except (OSError, RuntimeError) as error:
    reason = getattr(error, 'strerror', None) or str(error)
    raise errors.ConfigError(
      f"port={port}: can't listen at {address}: {reason}. Is another server "
      'running there? Then choose another --port.'
    ) from error


def _why_no_calls(tasks: set[asyncio.Task[Any]]) -> Callable[[], str | None]:
  """Returns what tells if the one of `tasks` that takes gRPC's calls ended."""
  # gRPC shows it to nobody, and says nothing if it is cancelled.
  loops = [task for task in tasks if '._server_main_loop' in repr(task)]
  return lambda: (
    'it takes no more calls' if any(task.done() for task in loops) else None
  )


async def serve(
  server: Server,
  on_ready: Callable[[engine_lib.EngineInfo, int, int | None], None],
) -> int:
  """Serves until a signal; a second one cuts the draining short.

  Args:
    server: not yet started.
    on_ready: told what is served, at which port, and at which one HTTP.

  Returns:
    An exit code for the process: 0 after a drain, 1 if the server can't go
    on, else 128 + the signal.

  Raises:
    ConfigError: the address can't be had.
    Exception: whatever make_engine raised.
  """
  heard = signals.Signals()
  server.on_failed, server.on_left = heard.tellers()
  await server.start()
  try:
    if cut := await heard.until(server.warm()):
      return signals.exit_code(cut)
    on_ready(server.frontend.engine.info, server.port, server.http_port)
    if (number := await heard.get()) == signals.FAILED:
      return signals.exit_code(number)
    if cut := await heard.until(server.drain()):
      return signals.exit_code(cut)
    return 0
  finally:
    await server.stop()
