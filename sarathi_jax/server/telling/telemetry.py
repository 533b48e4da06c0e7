# SPDX-License-Identifier: Apache-2.0
"""Starts and stops the telemetry that a server's configuration asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import contextlib

from sarathi_jax import errors
from sarathi_jax.engine import trace
from sarathi_jax.server import background
from sarathi_jax.server import config as config_lib
from sarathi_jax.server import frontend
from sarathi_jax.server.guard import auth
from sarathi_jax.server.protocols import control_v1
from sarathi_jax.server.queue import engine_thread as engine_thread_lib
from sarathi_jax.server.telling import metrics
from sarathi_jax.server.telling import request_log
from sarathi_jax.server.telling import spans
from sarathi_jax.server.telling import trace_file

Observer = Callable[[frontend.Ended], None]


class Telemetry:
  """The request log, the trace, the metrics and the spans.

  Args:
    watch: looks after their threads.

  Attributes:
    observers: told of requests that ended.
    metrics_port: the port of the metrics, once it is started; None without.

  Raises:
    ConfigError: a file can't be opened, or a package is missing.
  """

  def __init__(
    self,
    config: config_lib.ServerConfig,
    engine_thread: engine_thread_lib.EngineThread,
    hooks: control_v1.Hooks,
    watch: background.Watch,
  ) -> None:
    self._watch = watch
    self._engine_thread = engine_thread
    self._closing = contextlib.ExitStack()
    self._trace: trace.ChromeTrace | None = None
    observers: list[Observer] = []
    if config.request_log is not None:
      log = request_log.RequestLog(
        config.request_log, with_prompts=config.log_prompts
      )
      self._closing.callback(log.close)
      observers.append(log)
    if config.trace_dir is not None:
      try:
        file = trace_file.TraceFile(config.trace_dir)
      except OSError as error:
        raise errors.ConfigError(
          f"trace_dir={str(config.trace_dir)!r}: can't be written: "
          f'{error.strerror}.'
        ) from error
      self._closing.callback(file.close)
      watch.add(file.thread.as_background)
      self._trace = trace.ChromeTrace(file.emit)
    if config.otlp_endpoint is not None:
      otlp = spans.Spans(config.otlp_endpoint)
      self._closing.callback(otlp.stop)
      watch.add(otlp.as_background)
      observers.append(otlp)
    self._collector: metrics.Collector | None = None
    if config.metrics_port is not None:
      self._collector = metrics.Collector(
        config.metrics_prefix,
        engine_thread,
        asyncio.get_running_loop(),
        watch,
        hooks.num_compiled,
      )
      observers.append(self._collector.count)
    self._config = config
    self.metrics_port = config.metrics_port
    self.observers: tuple[Observer, ...] = tuple(observers)

  def start(self) -> None:
    """Listens for scrapers.

    Raises:
      ConfigError: the port can't be had.
    """
    if self._collector is not None and self.metrics_port is not None:
      config = self._config
      tokens = (
        None if config.auth_tokens is None else auth.Tokens(config.auth_tokens)
      )
      server = metrics.MetricsServer(
        self._collector, config.host, self.metrics_port, tokens, config.tls
      )
      self._closing.callback(server.stop)
      self._watch.add(server.thread.as_background)
      self.metrics_port = server.port

  async def observe_engine(self) -> None:
    """Begins the trace, once there is an engine."""
    if (observer := self._trace) is not None:
      await self._engine_thread.call(lambda engine: engine.observe(observer))

  def stop(self) -> None:
    """Writes what is left."""
    self._closing.close()
