# SPDX-License-Identifier: Apache-2.0
"""smg before two servers: chats go where their beginnings are."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import pathlib
import random
from typing import Any
import urllib.request

import pytest

from tests.server import fake
from tests.server import http_client

Servers = tuple[list[fake.RunningServer], http_client.Client]


@contextlib.contextmanager
def behind_smg(
  folder: pathlib.Path, num: int, *gateway_args: str
) -> Iterator[Servers]:
  """So many servers; the last one starts smg before all."""
  make = functools.partial(
    fake.make_engine,
    tokenizer_folder=folder,
    token_budget=64,
    max_model_len=256,
    num_pages=128,  # For half of what all chats come to.
  )
  port = fake.free_port()
  with contextlib.ExitStack() as stack:
    servers: list[fake.RunningServer] = []
    for index in range(num):
      more: dict[str, Any] = {}
      if index == num - 1:
        others = tuple(f'127.0.0.1:{s.server.port}' for s in servers)
        more = dict(
          gateway_port=port, replicas=others, gateway_args=gateway_args
        )
      servers.append(
        stack.enter_context(
          contextlib.closing(fake.RunningServer(make, **more))
        )
      )
    yield servers, http_client.Client(port)


def have_chats(client: http_client.Client) -> float:
  """Has chats in turns; returns the part of their prompts that was found."""
  rng = random.Random(0)
  # As many at once as one server has room for; the next begin as these end.
  num_found = num_tokens = 0
  for _ in range(4):
    chats = [[rng.randrange(64) for _ in range(20)] for _ in range(5)]
    for _ in range(5):
      for chat in chats:
        status, whole = client.json(
          '/v1/completions',
          {
            'model': 'counting',
            'prompt': ' '.join(f't{token}' for token in chat),
            'max_tokens': 8,
            'temperature': 0,
          },
        )
        assert status == 200, whole
        usage = whole['usage']
        num_tokens += usage['prompt_tokens']
        num_found += usage['prompt_tokens_details']['cached_tokens']
        words = whole['choices'][0]['text'].split()
        chat += [int(word[1:]) for word in words]
        chat += [rng.randrange(64) for _ in range(6)]
  return num_found / num_tokens


def kv_metrics(running: fake.RunningServer) -> dict[str, float]:
  """Sums of smg's counters of KV events, by their names."""
  args = running.server._gateway._args  # type: ignore[union-attr]
  port = args[args.index('--prometheus-port') + 1]
  with urllib.request.urlopen(f'http://127.0.0.1:{port}/metrics') as reply:
    lines = reply.read().decode().splitlines()
  sums: dict[str, float] = {}
  for line in lines:
    name, _, value = line.rpartition(' ')
    name = name.partition('{')[0]
    if name.startswith('smg_kv_') and not name.endswith('_bucket'):
      sums[name] = sums.get(name, 0.0) + float(value)
  return sums


def wait_until_followed(servers: list[fake.RunningServer]) -> None:
  for running in servers:
    journal = running.server._journal
    assert journal is not None
    fake.wait_until(lambda journal=journal: journal._num_followers > 0)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return http_client.write_tokenizer(tmp_path_factory.mktemp('tokenizer'))


def test_two_replicas_find_what_one_does(folder: pathlib.Path) -> None:
  with behind_smg(folder, 1) as (_, client):
    alone = have_chats(client)
  with behind_smg(folder, 2) as (servers, client):
    wait_until_followed(servers)
    together = have_chats(client)
    # New chats go to either one, by chance: of 20, twice in a million none.
    assert all(s.stats().num_finished for s in servers)
    told = kv_metrics(servers[-1])
    # It knows how each page comes after others.
    assert told['smg_kv_event_blocks_total'] > 100
    assert told['smg_kv_event_parentless_stores_total'] == 0
    assert told['smg_kv_event_missed_batches_total'] == 0
  assert alone > 0.6 and together >= alone - 0.05
  with behind_smg(folder, 2, '--policy', 'round_robin') as (servers, client):
    assert have_chats(client) < alone - 0.1
    journal = servers[0].server._journal
    assert journal is not None and not journal._num_followers


def test_smg_learns_of_what_it_did_not_send(folder: pathlib.Path) -> None:
  """Also of what a server had before smg came, and after it has lost count."""
  prompt = [7] * 40
  body = {
    'model': 'counting',
    'prompt': ' '.join(f't{token}' for token in prompt),
    'max_tokens': 1,
  }

  def is_found(client: http_client.Client) -> bool:
    status, whole = client.json('/v1/completions', body)
    assert status == 200, whole
    found: int = whole['usage']['prompt_tokens_details']['cached_tokens']
    return found == 39  # All but the last.

  with behind_smg(folder, 2) as (servers, client):
    wait_until_followed(servers)
    for running in servers:
      list(running.generate(token_ids=prompt, sampling={'max_tokens': 1}))
      fake.wait_until(lambda: is_found(client))
      # The other one has to be found, now.
      for other in servers:
        other.run(
          other.server._engine_thread.call(
            lambda engine: engine.reset_prefix_cache()
          )
        )
    journal = servers[0].server._journal
    assert journal is not None
    list(servers[0].generate(token_ids=prompt, sampling={'max_tokens': 1}))

    async def lose_followers() -> None:
      """As a restart does: what they know of is from before it."""
      journal._sequence += 1000
      journal._history.clear()
      journal._num_kept = 0
      journal._wake()

    servers[0].run(lose_followers())
    fake.wait_until(
      lambda: kv_metrics(servers[-1])['smg_kv_event_resyncs_total'] >= 3
    )
    fake.wait_until(lambda: is_found(client))
