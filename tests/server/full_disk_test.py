# SPDX-License-Identifier: Apache-2.0
"""What the server writes, on a disk that fills up, and is emptied again."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import io
import json
import os
import pathlib

import pytest

from sarathi_jax.server.telling import whole_lines
from tests.server import fake


class Disk:
  """Some room for all files together, in bytes."""

  def __init__(self) -> None:
    self.room = 1 << 30
    self.num_refused = 0

  def open(self, path: str, mode: str, buffering: int) -> io.FileIO:
    assert buffering == 0
    disk = self

    class File(io.FileIO):
      """Writes what there is room for, as the kernel does."""

      def write(self, data: bytes) -> int:
        if not disk.room:
          disk.num_refused += 1
          raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        num_bytes = min(disk.room, len(data))
        disk.room -= num_bytes
        return super().write(bytes(data[:num_bytes]))

    return File(path, mode)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
  made = Disk()
  monkeypatch.setattr(whole_lines, 'open', made.open, raising=False)
  return made


def test_a_line_is_whole_or_not_there(
  disk: Disk, tmp_path: pathlib.Path
) -> None:
  file = whole_lines.WholeLines(tmp_path / 'log')
  file.write(b'first\n')
  disk.room = 3  # of the second, which is longer
  with pytest.raises(OSError, match='No space'):
    file.write(b'second\n')
  assert (tmp_path / 'log').read_bytes() == b'first\n'
  disk.room = 100
  file.write(b'third\n')
  file.close()
  assert (tmp_path / 'log').read_bytes() == b'first\nthird\n'


def test_what_can_not_be_taken_back_spoils_no_other_line(
  disk: Disk, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def refuse(*args: int) -> None:
    raise OSError(errno.EINVAL, 'a pipe')

  monkeypatch.setattr(os, 'ftruncate', refuse)
  file = whole_lines.WholeLines(tmp_path / 'log')
  disk.room = 3
  with pytest.raises(OSError):
    file.write(b'second\n')
  disk.room = 100
  file.write(b'third\n')
  file.close()
  assert (tmp_path / 'log').read_bytes() == b'sec\nthird\n'


def _ids(text: str) -> list[str]:
  return [json.loads(line)['request_id'] for line in text.splitlines()]


def _generate(running: fake.RunningServer, request_id: str) -> None:
  list(
    running.generate(
      token_ids=[1], request_id=request_id, sampling={'max_tokens': 2}
    )
  )


def test_the_request_log_goes_on_when_there_is_room(
  disk: Disk, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  log = tmp_path / 'log'
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, request_log=str(log))
  ) as running:
    _generate(running, 'before')
    disk.room = 9
    _generate(running, 'cut')
    _generate(running, 'missing')
    fake.wait_until(lambda: disk.num_refused == 2)
    disk.room = 1 << 20
    _generate(running, 'after')
    assert running.is_alive()
  assert _ids(log.read_text())[:2] == ['before', 'after']
  assert 'The request log misses 1 lines: [Errno 28]' in caplog.text
  assert 'The request log goes on; 2 lines are missing.' in caplog.text


@pytest.mark.parametrize('option', ['request_log', 'trace_dir'])
def test_a_disk_that_stays_full_does_not_spoil_the_end(
  option: str, disk: Disk, tmp_path: pathlib.Path
) -> None:
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, **{option: tmp_path / 'x'})
  ) as running:
    disk.room = 0
    _generate(running, 'missing')
    fake.wait_until(lambda: disk.num_refused > 0)
    assert running.is_alive()
  # `close` would have raised.


def _events(folder: pathlib.Path) -> Iterator[dict[str, str]]:
  for file in sorted(folder.glob('trace-*.json')):
    text = file.read_text().rstrip().rstrip(',') + ']'  # as viewers read it
    yield from json.loads(text)


def test_the_trace_goes_on_when_there_is_room(
  disk: Disk, tmp_path: pathlib.Path
) -> None:
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, trace_dir=tmp_path)
  ) as running:
    _generate(running, 'before')
    fake.wait_until(lambda: 'before' in _names(tmp_path))
    disk.room = 9
    _generate(running, 'cut')
    fake.wait_until(lambda: disk.num_refused > 0)
    disk.room = 1 << 20
    fake.wait_until(lambda: _is_traced(running, tmp_path))
  names = _names(tmp_path)
  assert {'before', 'after'} <= names


def _names(folder: pathlib.Path) -> set[str]:
  return {event['name'] for event in _events(folder)}


def _is_traced(running: fake.RunningServer, folder: pathlib.Path) -> bool:
  _generate(running, 'after')
  return 'after' in _names(folder)


def test_a_device_that_is_always_full_is_no_reason_to_end() -> None:
  """As the kernel has it, not as the fake above."""
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, request_log='/dev/full')
  ) as running:
    _generate(running, 'a')
    assert running.is_alive()
