# SPDX-License-Identifier: Apache-2.0
"""The port of OpenAI's HTTP: uvicorn, on the event loop that runs already.

Starlette and uvicorn, as they are what Python's HTTP servers are made of, and
small: a router and a parser of HTTP, with what goes wrong with clients already
found by others. grpc.aio has no HTTP/1.1, and http.server no event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
import contextlib
import socket
import ssl
from typing import Any

import uvicorn

from sarathi_jax import errors
from sarathi_jax.server import adapters as adapters_lib
from sarathi_jax.server import background
from sarathi_jax.server import config as config_lib
from sarathi_jax.server import frontend as frontend_lib
from sarathi_jax.server.guard import auth
from sarathi_jax.server.guard import tls
from sarathi_jax.server.http import app as app_lib
from sarathi_jax.server.http import connection

NAME = 'http'
_KEEP_S = 75  # that a connection may be idle: longer than proxies keep theirs


class Listener:
  """Serves OpenAI's HTTP; made and used on a running event loop.

  Args:
    config: has an `http_port`.
    frontend: serves the requests.

  Raises:
    ConfigError: the port can't be had, or a file can't be used.

  Attributes:
    port: where it listens.
  """

  def __init__(
    self,
    config: config_lib.ServerConfig,
    frontend: frontend_lib.Frontend,
    loader: adapters_lib.Loader | None = None,
  ) -> None:
    assert config.http_port is not None
    tokens = (
      None if config.auth_tokens is None else auth.Tokens(config.auth_tokens)
    )
    self._limits = config.limits
    self._contexts = None if config.tls is None else tls.contexts(config.tls)
    self._socket = _bind(config.host, config.http_port)
    self.port: int = self._socket.getsockname()[1]
    self._app = app_lib.make(frontend, tokens, loader)
    self._server: uvicorn.Server | None = None
    self._task: asyncio.Task[None] | None = None

  @property
  def as_background(self) -> background.Background:
    """It, as `background.Watch` takes it, once it is started."""
    return background.Background(NAME, self.why_ended, self.start)

  def start(self) -> None:
    """Begins to serve, or begins again."""
    self._end_listening()
    self._server = _Server(self._make_config())
    # A copy of the socket: uvicorn closes what it got.
    self._task = asyncio.create_task(
      self._server.serve([self._socket.dup()]), name=NAME
    )

  def why_ended(self) -> str | None:
    """Tells what ended it; None while it runs."""
    task = self._task
    if task is None or not task.done():
      return None
    if task.cancelled():
      return 'who served it was cancelled'
    return repr(task.exception() or 'it returned')

  async def stop(self, grace_s: float) -> None:
    """Lets responses end, for so long, and stops."""
    if self._server is not None and self._task is not None:
      self._server.should_exit = True
      self._server.config.timeout_graceful_shutdown = max(round(grace_s), 1)
      await asyncio.wait((self._task,))
    self._end_listening()
    self._socket.close()

  def _end_listening(self) -> None:
    """Closes what a uvicorn that was cancelled has left open."""
    for server in getattr(self._server, 'servers', ()):
      server.close()

  def _make_config(self) -> uvicorn.Config:
    limits, contexts = self._limits, self._contexts

    class Connection(connection.Connection):
      most_connections = limits.max_connections
      most_pipelined = limits.max_pipelined
      most_body = round(limits.max_message_mib * 2**20)

    return uvicorn.Config(
      self._app,
      http=Connection,
      ws='none',
      lifespan='off',
      log_config=None,
      log_level='critical',  # what it says, clients would fill logs with
      access_log=False,
      proxy_headers=False,  # a client could take another's address
      server_header=False,
      timeout_keep_alive=_KEEP_S,
      ssl_context_factory=(
        None if contexts is None else lambda *_: _Renewed.of(contexts)
      ),
    )


class _Server(uvicorn.Server):
  """uvicorn's, which leaves signals to who began the event loop."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    yield


class _Renewed(ssl.SSLContext):
  """Makes each connection by the files as they are then."""

  _contexts: Callable[[], ssl.SSLContext]

  @classmethod
  def of(cls, contexts: Callable[[], ssl.SSLContext]) -> _Renewed:
    made = cls(ssl.PROTOCOL_TLS_SERVER)
    made._contexts = contexts
    return made

  def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
    return self._contexts().wrap_bio(*args, **kwargs)


def _bind(host: str, port: int) -> socket.socket:
  """Listens; ConfigError if the address can't be had."""
  try:
    family, _, _, _, location = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM
    )[0]
    made = socket.create_server(location[:2], family=family)
  except OSError as error:
    raise errors.ConfigError(
      f"http_port={port}: can't listen at {host}: {error.strerror}."
    ) from error
  made.setblocking(False)
  return made
