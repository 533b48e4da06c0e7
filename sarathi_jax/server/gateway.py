# SPDX-License-Identifier: Apache-2.0
"""OpenAI's HTTP: the gateway `smg`, a child process in front of our gRPC port.

It tokenizes, lays out chats, streams, retries, and routes over replicas. It
is started once we serve, started again if it ends, and ended with us.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
import contextlib
import importlib.util
import socket
import sys
import time
import urllib.error
import urllib.request

from absl import logging

from sarathi_jax import errors

_READY_S = 60.0
_STOP_S = 3.0  # for a clean end; requests have ended before
_MAX_PAUSE_S = 30.0
_STEADY_S = 60.0  # a gateway that ran so long is started again at once
# Ends with us even if we are killed: PR_SET_PDEATHSIG, SIGTERM.
_CHILD = '''\
import ctypes, os, sys
if sys.platform == 'linux':
  ctypes.CDLL(None).prctl(1, 15)
os.execv(sys.executable, [sys.executable, '-m', 'smg', *sys.argv[1:]])
'''


class Gateway:
  """Runs the gateway; used on a running event loop.

  Args:
    host: to listen at.
    port: of HTTP.
    workers: addresses of gRPC servers, host:port, ours first.
    args: further arguments of `smg launch`; they win over ours.

  Raises:
    ConfigError: the gateway is not installed, or the port can't be had.
  """

  def __init__(self, host: str, port: int, workers: Sequence[str],
               args: Sequence[str] = ()) -> None:
    if importlib.util.find_spec('smg') is None:
      raise errors.ConfigError(
        f'http_port={port}: needs the gateway, in the source tree: '
        'pip install -e ".[gateway]".')
    _check_port(host, port)
    self._host, self._port = host, port
    self._args = (
      'launch', '--host', host, '--port', str(port),
      '--prometheus-host', '127.0.0.1', '--prometheus-port', str(_free_port()),
      '--policy', 'round_robin', '--log-level', 'warn',
      '--health-check-interval-secs', '5', '--health-failure-threshold', '2',
      '--shutdown-grace-period-secs', '1',
      '--worker-urls', *(f'grpc://{worker}' for worker in workers), *args)
    self._process: asyncio.subprocess.Process | None = None
    self._task: asyncio.Task[None] | None = None
    self._last_lines: deque[str] = deque(maxlen=5)
    self.num_starts = 0

  @property
  def pid(self) -> int | None:
    """Of the child that runs, if one does."""
    process = self._process
    return None if process is None or process.returncode is not None else (
      process.pid)

  async def start(self) -> bool:
    """Starts it and waits until it serves a model; False if it does not."""
    self._task = asyncio.create_task(self._supervise())
    deadline = time.monotonic() + _READY_S
    loop = asyncio.get_running_loop()
    while time.monotonic() < deadline:
      if await loop.run_in_executor(None, self._serves):
        return True
      await asyncio.sleep(0.1)
    logging.error('The gateway serves no model after %g s: %s', _READY_S,
                  ' / '.join(self._last_lines))
    return False

  async def stop(self) -> None:
    """Ends it."""
    if self._task is not None:
      self._task.cancel()
      with contextlib.suppress(asyncio.CancelledError):
        await self._task

  def _serves(self) -> bool:
    host = '127.0.0.1' if self._host in ('0.0.0.0', '::') else self._host
    host = f'[{host}]' if ':' in host else host
    try:
      with urllib.request.urlopen(
          f'http://{host}:{self._port}/v1/models', timeout=2) as reply:
        return b'"id"' in reply.read()
    except (OSError, urllib.error.URLError):
      return False

  async def _supervise(self) -> None:
    pause_s = 1.0
    while True:
      start = time.monotonic()
      code = await self._run()
      if time.monotonic() - start > _STEADY_S:
        pause_s = 1.0
      logging.error(
        'The gateway ended with %s; it is started again in %g s. It said: %s',
        code, pause_s, ' / '.join(self._last_lines) or 'nothing')
      await asyncio.sleep(pause_s)
      pause_s = min(2 * pause_s, _MAX_PAUSE_S)

  async def _run(self) -> int:
    """Runs one child to its end, which comes with ours at the latest."""
    process = self._process = await asyncio.create_subprocess_exec(
      sys.executable, '-c', _CHILD, *self._args,
      stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
      stderr=asyncio.subprocess.STDOUT)
    self.num_starts += 1
    self._last_lines.clear()
    assert process.stdout is not None
    try:
      while line := await process.stdout.readline():
        self._last_lines.append(line.decode(errors='replace').strip())
      return await process.wait()
    finally:
      if process.returncode is None:
        process.terminate()
        try:
          async with asyncio.timeout(_STOP_S):
            await process.wait()
        except TimeoutError:
          process.kill()
          await process.wait()


def _check_port(host: str, port: int) -> None:
  try:
    with socket.create_server((host, port)):
      pass
  except OSError as error:
    raise errors.ConfigError(
      f'http_port={port}: can\'t listen at {host}: {error.strerror}.'
    ) from error


def _free_port() -> int:
  with socket.create_server(('127.0.0.1', 0)) as probe:
    port: int = probe.getsockname()[1]
    return port
