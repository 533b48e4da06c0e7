# SPDX-License-Identifier: Apache-2.0
"""Lines for where there is no terminal: a minute apart."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
import threading

import pytest
import rich.console

from sarathi_jax.in_process import progress
from tests import source_tree


@pytest.mark.parametrize(
  'is_terminal,expected', [(False, '[5]\n[65]\n[125]\n'), (True, '')]
)
def test_a_line_a_minute(is_terminal: bool, expected: str) -> None:
  now = 0
  out = io.StringIO()
  lines = progress.Lines(
    rich.console.Console(file=out, force_terminal=is_terminal), lambda: now
  )
  for now in range(130):
    lines.tell(f'[{now}]'.strip)
  assert out.getvalue() == expected


def test_a_count_is_told_where_it_takes_long(
  capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(progress, 'FIRST_LINE_S', 0.0)
  with progress.counted('Compiling steps') as tell:
    tell(1, 3)
  assert 'Compiling steps: 1 of 3' in capsys.readouterr().err


# It goes on in a thread while the process is told to end.
SERVER = """
from sarathi_jax.server import main, server

def make():
  with progress.counted('Compiling steps'):
    os.write(1, b'Shown\\n')  # Beside the bar, which print is not.
    threading.Event().wait()

main.serve(server.ServerConfig(port=0), make)
"""
HOST = """
import signal
from sarathi_jax.runner import ends

signal.signal(signal.SIGINT, signal.SIG_IGN)  # It ends by itself.
with progress.counted('Compiling steps'):
  os.write(1, b'Shown\\n')  # Beside the bar, which print is not.
  ends.exit_at_once(128 + 2)
"""


@pytest.mark.parametrize('script', [SERVER, HOST])
def test_a_process_that_ends_beside_a_bar_shows_the_cursor_again(
  script: str,
) -> None:
  ours, terminal = pty.openpty()
  drawn = b''

  def read() -> None:  # A terminal that is not read stops who writes.
    nonlocal drawn
    with contextlib.suppress(OSError):  # its end, on Linux
      while more := os.read(ours, 4096):
        drawn += more
    os.close(ours)

  reader = threading.Thread(target=read, daemon=True)
  reader.start()
  with subprocess.Popen(
    [
      sys.executable,
      '-c',
      'import os, threading\n'
      'from sarathi_jax.in_process import progress\n' + script,
    ],
    cwd=source_tree.ROOT,
    env={**os.environ, 'TERM': 'xterm'},
    stdout=subprocess.PIPE,
    stderr=terminal,
  ) as process:
    os.close(terminal)
    assert process.stdout is not None
    assert process.stdout.readline() == b'Shown\n'
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
  reader.join(60)
  assert b'Compiling steps' in drawn
  assert drawn.rfind(b'\x1b[?25h') > drawn.rfind(b'\x1b[?25l') > -1, drawn
