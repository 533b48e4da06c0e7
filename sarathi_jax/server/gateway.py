# SPDX-License-Identifier: Apache-2.0
"""The gateway `smg`, a child process in front of our gRPC port, or of several.

It speaks OpenAI's HTTP: it tokenizes, lays out chats, streams, retries, and
routes over replicas. It is started once we serve, and ended with us.
`background.Watch` starts it again if it ends, as it does if it gives no answer:
then it is killed. Nothing that it says or does is trusted: clients have a hand
in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
import contextlib
import importlib.util
import json
import os
import re
import secrets
import socket
import ssl
import sys
from typing import NamedTuple, NoReturn

from absl import logging

from sarathi_jax import errors
from sarathi_jax.server import background

NAME = 'gateway'

_READY_S = 60.0  # from its start to its first answer
_PROBE_S = 2.0  # between two questions
# It is ready as soon as it has a worker, and asks that for the tokenizer then:
# until it has it, it refuses texts with 503.
_TOKENIZE = '/v1/tokenize', '{"model": "any", "prompt": "a"}'
_ANSWER_S = 5.0
_MAX_MISSED = 2  # answers, one after the other
_STOP_S = 3.0  # for a clean end; requests have ended before
_TAIL_BYTES = 4096  # of what it said, for the log
_LINE_LEN = 300
_COLOURS = re.compile('\x1b\\[[0-9;]*m')
_KEY_BYTES = 32
_NO_ANSWER = (OSError, EOFError, ValueError, asyncio.LimitOverrunError)
_CHILD = ('-m', 'sarathi_jax.server.gateway_child')
# The gateway's flags that only the server may set -> the server's own flag.
_OURS = {'--host': 'host', '--port': 'gateway_port'}


class Gateway:
  """Runs the gateway; used on a running event loop.

  Args:
    host: address to listen at.
    port: port of HTTP.
    workers: addresses of gRPC servers, host:port, ours first.
    args: further arguments of `smg launch`; they win over ours.
    max_body_bytes: the longest body that it reads.
    on_change: told whether it serves, when that changes.

  Raises:
    ConfigError: the gateway is not installed, or the port can't be had.
  """

  def __init__(
    self,
    host: str,
    port: int,
    workers: Sequence[str],
    args: Sequence[str] = (),
    *,
    max_body_bytes: int = 16 << 20,
    on_change: Callable[[bool], object] = lambda _: None,
  ) -> None:
    if importlib.util.find_spec('smg') is None:
      raise errors.ConfigError(
        f'gateway_port={port}: needs the gateway, in the source tree: '
        'pip install -e ".[gateway]".'
      )
    for name, ours in _OURS.items():
      if any(arg.partition('=')[0] == name for arg in args):
        raise errors.ConfigError(
          f"gateway_args={' '.join(args)!r}: {name} is {ours}'s."
        )
    metrics_port = _port_beside(host, port)
    self._port, self._num_workers = port, len(workers)
    self._more_args = tuple(args)
    self._args: tuple[str, ...] = (
      '--host',
      host,
      '--port',
      str(port),
      '--prometheus-host',
      '127.0.0.1',
      '--prometheus-port',
      str(metrics_port),
      '--policy',
      # By what each of several holds, which they tell (`vllm_cache`).
      'cache_aware' if len(workers) > 1 else 'round_robin',
      '--log-level',
      'warn',
      '--health-check-interval-secs',
      '5',
      '--health-failure-threshold',
      '2',
      '--shutdown-grace-period-secs',
      '1',
      '--max-payload-size',
      str(max_body_bytes),
      '--worker-urls',
      *(f'grpc://{worker}' for worker in workers),
    )
    self._address = (
      {'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host),
      port,
      _accept_any() if any(a.startswith('--tls-c') for a in args) else None,
    )
    self._on_change = on_change
    self._process: asyncio.subprocess.Process | None = None
    self._task: asyncio.Task[str] | None = None
    self._tail = b''
    self.is_serving = False

  @property
  def pid(self) -> int | None:
    """The process id of the child that runs; None if none does."""
    process = self._process
    return (
      None
      if process is None or process.returncode is not None
      else (process.pid)
    )

  @property
  def as_background(self) -> background.Background:
    """The gateway as `background.Watch` takes it, once it is started."""
    return background.Background(
      NAME, self.why_ended, self.restart, lambda: self.is_serving
    )

  async def start(self, max_requests: int) -> bool:
    """Starts it and waits until it serves a model; False if it does not.

    Args:
      max_requests: how many requests one worker takes on. Beyond that of all
        workers, the gateway refuses at once, and says when to try again, as
        workers can't tell HTTP's clients.

    Raises:
      ConfigError: the gateway ended before that.
    """
    self._args += (
      '--max-concurrent-requests',
      str(max_requests * self._num_workers),
      '--queue-size',
      '0',
      *self._more_args,
    )
    self.restart()
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(_READY_S):
        while not self.is_serving:
          if (why := self.why_ended()) is not None:
            raise errors.ConfigError(
              f'gateway_port={self._port}: the gateway ended: {why}'
            )
          await asyncio.sleep(0.05)
        return True
    logging.error(
      'The gateway serves no model after %g s: %s', _READY_S, self._last_words()
    )
    return False

  async def stop(self) -> None:
    """Ends the gateway."""
    if self._task is not None:
      self._task.cancel()
      await asyncio.wait((self._task,))

  def why_ended(self) -> str | None:
    """Tells what ended it; None while it runs."""
    task = self._task
    if task is None or not task.done():
      return None
    if task.cancelled():
      return 'who listened to it was cancelled'
    return repr(error) if (error := task.exception()) else task.result()

  def restart(self) -> None:
    """Starts the gateway again."""
    if (process := self._process) is not None and process.returncode is None:
      process.kill()  # left by who listened to it: it has the port
    self._task = asyncio.create_task(self._run(), name=NAME)

  async def _run(self) -> str:
    """Runs one child to its end; returns how it ended."""
    self._tail = b''
    with contextlib.ExitStack() as stack:
      # Pipes of our own: asyncio's would be waited for, and whoever the child
      # has started may keep them.
      hears, says = _pipe(stack), _pipe(stack)
      self._tell(hears.write)
      process = self._process = await asyncio.create_subprocess_exec(
        sys.executable,
        *_CHILD,
        stdin=hears.read,
        stdout=says.write,
        stderr=says.write,
        start_new_session=True,
      )  # Ctrl-C is for us: it goes on as we drain
      tasks = [
        asyncio.create_task(work)
        for work in (
          process.wait(),
          self._ask(),
          self._listen(os.dup(says.read)),
        )
      ]
    ending, asking, listening = tasks
    is_lost = False
    try:
      await asyncio.wait((ending, asking), return_when='FIRST_COMPLETED')
      is_lost = not ending.done()
      if is_lost:
        return f'it gave no answer ({asking.exception()!r}), and was killed'
      await asyncio.wait((listening,), timeout=0.5)
      return f'with {process.returncode}, having said: {self._last_words()}'
    finally:
      self._set_serving(False)
      for task in tasks:
        task.cancel()
      await _end(process, at_once=is_lost)

  def _tell(self, pipe: int) -> None:
    """Writes to the child's pipe what no command line shall show."""
    told = (
      json.dumps(
        {
          'parent': os.getpid(),
          'args': self._args,
          'key': secrets.token_hex(_KEY_BYTES),
        }
      ).encode()
      + b'\n'
    )
    os.set_blocking(pipe, False)
    if os.write(pipe, told) < len(told):
      raise errors.ConfigError('gateway_args: are too long for a pipe.')

  async def _listen(self, pipe: int) -> None:
    """Keeps the end of the child's output, however much that is."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
      lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe, 'rb')
    )
    with contextlib.closing(transport):
      while said := await reader.read(1 << 16):
        self._tail = (self._tail + said)[-_TAIL_BYTES:]

  def _last_words(self) -> str:
    """Returns its last output, without what would move a terminal's cursor."""
    text = _COLOURS.sub('', self._tail.decode(errors='replace'))
    lines = [
      ''.join(
        c if c.isprintable() else ascii(c)[1:-1] for c in line[-_LINE_LEN:]
      )
      for line in text.splitlines()[-3:]
    ]
    return ' / '.join(lines) or 'nothing'

  async def _ask(self) -> NoReturn:
    """Asks the gateway for its health, again and again.

    Raises:
      one of _NO_ANSWER: it gave no answer for too long.
    """
    loop = asyncio.get_running_loop()
    start, num_missed, has_answered = loop.time(), 0, False
    with contextlib.closing(_Connection(*self._address)) as connection:
      while True:
        asked = loop.time()
        try:
          async with asyncio.timeout(_ANSWER_S):
            is_ready = await connection.ask('/readiness') == 200
            if is_ready and not self.is_serving:
              is_ready = await connection.ask(*_TOKENIZE) != 503
          has_answered, num_missed = True, 0
        except _NO_ANSWER:
          connection.close()
          is_ready = False
          # If we were late ourselves, that tells nothing.
          num_missed += loop.time() - asked < 2 * _ANSWER_S
          if (
            num_missed >= _MAX_MISSED
            if has_answered
            else loop.time() - start > _READY_S
          ):
            raise
        self._set_serving(is_ready)
        await asyncio.sleep(_PROBE_S if is_ready else 0.1)

  def _set_serving(self, is_serving: bool) -> None:
    if is_serving != self.is_serving:
      self.is_serving = is_serving
      self._on_change(is_serving)


class _Connection:
  """HTTP over one connection, opened anew if it was closed.

  It is kept, as who can't connect to a server that is flooded says nothing
  about whether it lives.
  """

  def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
    self._host, self._port, self._tls = host, port, tls
    self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = (
      None
    )

  async def ask(self, path: str, body: str = '') -> int:
    """Gets a path, or posts a JSON body to it; returns the HTTP status.

    Raises:
      one of _NO_ANSWER: it gave no answer.
    """
    if self._streams is None:
      self._streams = await asyncio.open_connection(
        self._host, self._port, ssl=self._tls
      )
    reader, writer = self._streams
    method = 'POST' if body else 'GET'
    writer.write(
      f'{method} {path} HTTP/1.1\r\nhost: gateway\r\ncontent-type: '
      f'application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}'.encode()
    )
    first, *fields = (
      (await reader.readuntil(b'\r\n\r\n')).decode('latin-1').splitlines()
    )
    headers = {
      name.lower(): value.strip()
      for name, _, value in (field.partition(':') for field in fields)
    }
    await reader.readexactly(int(headers.get('content-length', 0)))
    return int(first.split()[1])

  def close(self) -> None:
    if self._streams is not None:
      self._streams[1].close()
      self._streams = None


class _Pipe(NamedTuple):
  read: int
  write: int


def _pipe(stack: contextlib.ExitStack) -> _Pipe:
  """Makes a pipe, whose ends in this process are closed with `stack`."""
  pipe = _Pipe(*os.pipe())
  for end in pipe:
    stack.callback(os.close, end)
  return pipe


async def _end(process: asyncio.subprocess.Process, *, at_once: bool) -> None:
  for end in (process.kill,) if at_once else (process.terminate, process.kill):
    if process.returncode is None:
      with contextlib.suppress(ProcessLookupError, TimeoutError):
        end()
        async with asyncio.timeout(_STOP_S):
          await process.wait()


def _accept_any() -> ssl.SSLContext:
  """Makes a context for our own child, whose certificate has another name."""
  context = ssl.create_default_context()
  context.check_hostname = False
  context.verify_mode = ssl.CERT_NONE
  return context


def _port_beside(host: str, port: int) -> int:
  """Returns a port for smg's metrics that is not the one it serves at.

  Raises:
    ConfigError: it can't listen at `port`.
  """
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  try:
    with (
      socket.create_server((host, port), family=family),
      socket.create_server(('127.0.0.1', 0)) as probe,
    ):
      free: int = probe.getsockname()[1]
      return free
  except OSError as error:
    raise errors.ConfigError(
      f"gateway_port={port}: can't listen at {host}: {error.strerror}."
    ) from error
