# SPDX-License-Identifier: Apache-2.0
"""Chats that replicas are measured by: each turn has all before it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from sarathi_jax.benchmarks import replicas
from sarathi_jax.benchmarks import servers
from tests import absl_flags
from tests import source_tree

# Its server is a shell that says who it is, and never answers.
_COMMAND = """
import runpy, sys
sys.executable = sys.argv.pop(1)
runpy.run_module('sarathi_jax.benchmarks.replicas', run_name='__main__')
"""


@pytest.fixture(autouse=True)
def _flags() -> Iterator[None]:
  with absl_flags.defined(replicas.define_flags):
    yield


class FakeTarget:
  """A server that finds all but the last message of each chat."""

  def __init__(self) -> None:
    self.asked: list[list[str]] = []
    self.most_at_once = self._num = 0

  async def json(self, method: str, path: str, body: Any) -> Any:
    assert (method, path) == ('POST', '/v1/chat/completions')
    self._num += 1
    self.most_at_once = max(self.most_at_once, self._num)
    await asyncio.sleep(0)
    self._num -= 1
    texts = [message['content'] for message in body['messages']]
    self.asked.append(texts)
    return {
      'choices': [{'message': {'content': f'answer {len(texts)}'}}],
      'usage': {
        'prompt_tokens': 10 * len(texts),
        'prompt_tokens_details': {'cached_tokens': 10 * (len(texts) - 1)},
      },
    }


def test_chats_go_on_and_what_was_found_is_counted() -> None:
  absl_flags.parse('--turns=3', '--at_once=2')
  target: Any = FakeTarget()
  had: list[None] = []
  found = asyncio.run(replicas.have_chats(target, 5, lambda: had.append(None)))
  assert len(had) == 5 and target.most_at_once == 2
  assert (found.num_tokens, found.num_found) == (5 * 90, 5 * 60)
  by_len = {n: [a for a in target.asked if len(a) == n] for n in (1, 3, 5)}
  assert [len(asked) for asked in by_len.values()] == [5, 5, 5]
  assert {tuple(a[:3]) for a in by_len[5]} == {tuple(a) for a in by_len[3]}
  assert len({a[0] for a in by_len[1]}) == 5  # Each is another chat.
  assert {a[1] for a in by_len[5]} == {'answer 1'}


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_its_servers_end_with_it(
  number: signal.Signals, tmp_path: pathlib.Path
) -> None:
  said, server = tmp_path / 'pid', tmp_path / 'server'
  server.write_text(f'#!/bin/sh\necho $$ > {said}\nexec sleep 60\n')
  server.chmod(0o755)
  process = subprocess.Popen(
    [sys.executable, '-c', _COMMAND, str(server), '--setups=one'],
    cwd=source_tree.ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  while not (said.exists() and said.read_text().endswith('\n')):
    assert process.poll() is None
    time.sleep(0.02)
  process.send_signal(number)
  assert process.wait(60) == 128 + number
  with pytest.raises(ProcessLookupError):
    os.kill(int(said.read_text()), 0)


def test_no_signal_leaves_a_server_that_just_started(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  started: list[subprocess.Popen[bytes]] = []

  class Signalled(subprocess.Popen[bytes]):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
      super().__init__(*args, **kwargs)
      started.append(self)
      signal.raise_signal(signal.SIGINT)

  monkeypatch.setattr(subprocess, 'Popen', Signalled)
  target: Any = FakeTarget()
  with (
    pytest.raises(KeyboardInterrupt),
    servers.running(['sleep', '60'], os.environ, target),
  ):
    pass
  (server,) = started
  assert server.returncode == -signal.SIGTERM
