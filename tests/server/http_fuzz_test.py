# SPDX-License-Identifier: Apache-2.0
"""Nonsense through smg, and to our own HTTP; see `http_fuzzing`."""

from __future__ import annotations

from collections.abc import Collection
import contextlib
import functools
import pathlib
import signal

import psutil
import pytest

from sarathi_jax.benchmarks import hostile
from tests.server import behind_smg
from tests.server import fake
from tests.server import http_client
from tests.server import http_fuzzing
from tests.server import process_test
from tests.server.http_fuzzing import SEED
from tests.server.http_fuzzing import Bodies

# Ours has no responses API.
_OURS = ('/v1/completions', '/v1/chat/completions')


def test_the_same_seed_makes_the_same_bodies() -> None:
  first, again, other = Bodies(1), Bodies(1), Bodies(2)
  made = [first.make() for _ in range(50)]
  assert made == [again.make() for _ in range(50)]
  assert made != [other.make() for _ in range(50)]


def test_nonsense_through_smg(chat_folder: pathlib.Path) -> None:
  with behind_smg.serve(chat_folder) as (running, client):
    gateway = running.server._gateway
    assert gateway is not None
    pid = gateway.pid
    http_fuzzing.fuzz(running, client, 400, Bodies(SEED).make)
    assert gateway.pid == pid


def test_nonsense(chat_folder: pathlib.Path) -> None:
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(fake.make_engine, tokenizer_folder=chat_folder),
      http_port=0,
    )
  ) as running:
    client = http_client.Client.of(running)
    http_fuzzing.fuzz(running, client, 400, Bodies(SEED, paths=_OURS).make)
    running.assert_nothing_is_left()


def _measure(
  *args: str,
  model: str,
  http_port: int,
  seed: int,
  num_groups: int,
  num_bodies: int,
  paths: Collection[str] = tuple(http_fuzzing.TYPES),
) -> None:
  """Holds each group of bodies to the bound, before one server."""
  process = process_test.Process(*args)
  try:
    port = int(process.read_until(r'Serving \S+ at 127\.0\.0\.1:(\d+)\.')[1])
    children = psutil.Process(process.process.pid).children()
    with (
      http_fuzzing.beside(hostile.watch, port) as watcher,
      http_fuzzing.beside(
        http_fuzzing.send_when_asked, http_port, seed, model, paths
      ) as sender,
    ):
      lengthened = http_fuzzing.Lengthened(watcher, sender)
      for _ in range(num_groups):
        assert (
          lengthened.by(num_bodies, http_fuzzing.MAX_REPEATS)
          <= http_fuzzing.MAX_LENGTHENED_S
        )
      print(dict(lengthened.statuses))
      assert lengthened.statuses[200] and lengthened.statuses[400]
    assert all(child.is_running() for child in children)
    process.process.send_signal(signal.SIGTERM)
    assert process.end()[0] == 0
  finally:
    process.close()


@pytest.mark.parametrize('field', ['gateway_port', 'http_port'])
def test_nonsense_hardly_lengthens_others_gaps(
  chat_folder: pathlib.Path, field: str
) -> None:
  port = fake.free_port()
  _measure(
    'tests/server/fake.py',
    '0',
    '1',
    str(chat_folder),
    f'{field}={port}',
    model='counting',
    http_port=port,
    seed=SEED,
    num_groups=2,
    num_bodies=100,
    **({'paths': _OURS} if field == 'http_port' else {}),
  )


@pytest.mark.soak
@pytest.mark.parametrize('field', ['gateway_port', 'http_port'])
def test_much_nonsense(field: str) -> None:
  port = fake.free_port()
  _measure(
    '-m',
    'sarathi_jax.server',
    '--port=0',
    f'--{field}={port}',
    '--max_model_len=128',
    '--drain_s=1',
    model='quickstart',
    http_port=port,
    seed=SEED + 1,
    num_groups=10,
    num_bodies=500,
    **({'paths': _OURS} if field == 'http_port' else {}),
  )
