# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server for scrapers, which asks for tokens and never blocks.

prometheus_client's own server does TLS handshakes on the thread that accepts,
so a client that connects and says nothing ends metrics for all. Nor does it
know tokens.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import socket
import socketserver
import ssl
import threading
import time
from typing import Any
from wsgiref import simple_server

from sarathi_jax.server.guard import auth

_SILENCE_S = 10.0  # after which a connection is closed
_LONGEST_S = 30.0  # of a connection, however often it says a little
_MAX_CONNECTIONS = 32  # at once; more are closed

App = Callable[[dict[str, Any], Any], Any]  # WSGI's


class WebServer(socketserver.ThreadingMixIn, simple_server.WSGIServer):
  """Answers each connection on a thread of its own.

  Args:
    app: the WSGI application that answers.
    host, port: where it listens.
    context: makes each connection's TLS context; None for plain text.

  Raises:
    OSError: the port can't be had.
  """

  daemon_threads = True

  def __init__(
    self,
    app: App,
    host: str,
    port: int,
    context: Callable[[], ssl.SSLContext] | None = None,
  ) -> None:
    self.address_family, _, _, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM
    )[0]
    super().__init__((str(address[0]), port), _Handler)
    self.set_app(app)
    self._context = context
    self._free = threading.Semaphore(_MAX_CONNECTIONS)
    self._due: dict[socket.socket, float] = {}  # when each is to be over

  def process_request(self, request: Any, client_address: Any) -> None:
    if self._free.acquire(blocking=False):
      try:
        super().process_request(request, client_address)
      except BaseException:  # there is no thread for it
        self._free.release()
        raise
    else:
      self.shutdown_request(request)

  def process_request_thread(self, request: Any, client_address: Any) -> None:
    try:
      super().process_request_thread(request, client_address)
    finally:
      self._free.release()

  def finish_request(self, request: Any, client_address: Any) -> None:
    request.settimeout(_SILENCE_S)
    if self._context is None:
      self._answer(request, client_address)
      return
    with self._context().wrap_socket(request, server_side=True) as wrapped:
      self._answer(wrapped, client_address)

  def _answer(self, connection: socket.socket, client_address: Any) -> None:
    self._due[connection] = time.monotonic() + _LONGEST_S
    try:
      super().finish_request(connection, client_address)
    finally:
      del self._due[connection]

  def service_actions(self) -> None:
    """Ends connections that take too long; twice a second, and after each."""
    now = time.monotonic()
    for connection, due in list(self._due.items()):
      if now > due:
        with contextlib.suppress(OSError):
          connection.shutdown(socket.SHUT_RDWR)

  def handle_error(self, request: Any, client_address: Any) -> None:
    """Does nothing: an error is one connection's; its client hears of it."""


class _Handler(simple_server.WSGIRequestHandler):
  """A handler that logs nothing and looks up no host names."""

  def log_message(self, format: str, *args: Any) -> None:
    """Logs nothing."""

  def address_string(self) -> str:
    return str(self.client_address[0])


def guarded(app: App, tokens: auth.Tokens) -> App:
  """Wraps an application so that it answers only those who have a token."""

  def answer(environ: dict[str, Any], start_response: Any) -> Any:
    if tokens.of_header(environ.get('HTTP_AUTHORIZATION', '')) is not None:
      return app(environ, start_response)
    start_response(
      '401 Unauthorized',
      [('WWW-Authenticate', 'Bearer'), ('Content-Type', 'text/plain')],
    )
    return [b'needs a token that the server knows.\n']

  return answer
