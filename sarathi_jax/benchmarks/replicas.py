# SPDX-License-Identifier: Apache-2.0
"""Measures what replicas behind smg find of chats' prompts in their KV caches.

  python -m sarathi_jax.benchmarks.replicas --chats=1000

Chats of several turns go over HTTP to smg, in front of one server, and then of
two; each turn has all before it. What was found is what answers say of
themselves (`cached_tokens`). Of one server that is all there is to find; of two
it depends on which one each turn is sent to. All servers have caches of the
same size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import itertools
import os
import pydoc_data.topics
import random
import shlex
import sys
import time
from typing import Any

from absl import flags
from absl import logging
import grpc
import rich.console

from sarathi_jax import config as config_lib
from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks import openai
from sarathi_jax.benchmarks import servers
from sarathi_jax.cli import mains
from sarathi_jax.runner import joining
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.simulator import open_loop

FLAGS = flags.FLAGS
# Name -> (replicas, the last one's arguments, arguments of all).
SETUPS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
  'one': (1, (), ()),
  'two': (2, (), ()),
  'two_round_robin': (2, ('--gateway_args=--policy round_robin',), ()),
  'two_no_events': (2, (), ('--nokv_events',)),
}
_READY_S = 60.0  # for smg to find all servers


def define_flags() -> None:
  flags.DEFINE_list(
    'setups',
    ['one', 'two'],
    'What to measure, one after another: one server; two of which smg knows '
    'what they hold; two by turns; two of which it knows what it sent them.',
  )
  flags.DEFINE_string(
    'checkpoint', None, 'Model to serve. Default: the quickstart model.'
  )
  flags.DEFINE_integer('chats', 1000, 'Number of chats.')
  flags.DEFINE_integer('turns', 4, 'Turns of each chat.')
  flags.DEFINE_integer('at_once', 16, 'Chats that go on at once.')
  flags.DEFINE_integer('first_words', 100, 'Words of a first message.')
  flags.DEFINE_integer('words', 20, 'Words of each other message.')
  flags.DEFINE_integer('output_len', 16, 'The most tokens of an answer.')
  flags.DEFINE_string(
    'server_args', '--page_size=16', 'Further arguments of each server.'
  )
  flags.DEFINE_integer('seed', 0, 'Seed of the messages.')
  flags.DEFINE_string('json', None, 'File to write the results to, as JSON.')


@dataclasses.dataclass(slots=True)
class Found:
  """What answers said of their prompts."""

  num_tokens: int = 0
  num_found: int = 0

  @property
  def rate(self) -> float:
    return self.num_found / max(1, self.num_tokens)


@contextlib.contextmanager
def running(name: str) -> Iterator[tuple[openai.HttpTarget, list[str]]]:
  """Runs the servers of a setup; yields smg, and their addresses."""
  num, last_args, all_args = SETUPS[name]
  url = f'http://127.0.0.1:{(http := joining.free_port())}'
  gateway = openai.HttpTarget(url, has_token_ids=False)
  addresses: list[str] = []
  with contextlib.ExitStack() as stack:
    for index in range(num):
      is_last = index == num - 1
      port = joining.free_port()
      address = f'127.0.0.1:{port}'
      more = [f'--gateway_port={http}', *last_args] if is_last else []
      if addresses and is_last:
        more.append(f'--replicas={",".join(addresses)}')
      addresses.append(address)
      target = gateway if is_last else open_loop.GrpcTarget(address)
      command = [
        sys.executable,
        '-m',
        'sarathi_jax.server',
        *([f'--checkpoint={FLAGS.checkpoint}'] if FLAGS.checkpoint else ()),
        '--served_model_name=m',
        f'--port={port}',
        *shlex.split(FLAGS.server_args),
        *all_args,
        *more,
      ]
      stack.enter_context(servers.running(command, os.environ, target))
    asyncio.run(_find_all(gateway, addresses))
    yield gateway, addresses


async def _find_all(
  gateway: openai.HttpTarget, addresses: Sequence[str]
) -> None:
  """Waits until smg sends requests to all servers."""
  end = time.monotonic() + _READY_S
  for number in itertools.count():
    if all(num_finished(address) for address in addresses):
      return
    if time.monotonic() > end:
      raise common.PeerError(f'smg sends nothing to one of {addresses}')
    try:
      await asyncio.gather(
        *(ask(gateway, [_user(f'{number} {i}')], 1) for i in range(4))
      )
    except open_loop.RequestError:  # It has no tokenizer yet.
      await asyncio.sleep(0.1)


def num_finished(address: str) -> int:
  """Returns how many outputs a server has finished."""
  with grpc.insecure_channel(address) as channel:
    stub: Any = sarathi_pb2_grpc.SarathiStub(channel)  # type: ignore[no-untyped-call]
    return int(stub.GetStats(pb.GetStatsRequest()).num_finished)


def _user(text: str) -> dict[str, str]:
  return {'role': 'user', 'content': text}


async def ask(
  target: openai.HttpTarget, messages: Sequence[Any], max_tokens: int
) -> Any:
  """Returns the answer to a chat."""
  return await target.json(
    'POST',
    '/v1/chat/completions',
    {
      'model': 'm',
      'messages': messages,
      'max_tokens': max_tokens,
      'temperature': 0,
    },
  )


async def chat(
  target: openai.HttpTarget, words: Sequence[str], number: int, found: Found
) -> None:
  """Has one chat, to its end."""
  rng = random.Random(f'{FLAGS.seed} {number}')
  messages: list[dict[str, str]] = []
  for turn in range(FLAGS.turns):
    num = FLAGS.words if turn else FLAGS.first_words
    messages.append(_user(' '.join(rng.choices(words, k=num))))
    answer = await ask(target, messages, FLAGS.output_len)
    messages.append(
      {
        'role': 'assistant',
        'content': answer['choices'][0]['message']['content'] or '',
      }
    )
    usage = answer['usage']
    details = usage.get('prompt_tokens_details') or {}
    found.num_tokens += usage['prompt_tokens']
    found.num_found += details.get('cached_tokens', 0)


async def have_chats(
  target: openai.HttpTarget, num_chats: int, on_chat: Any
) -> Found:
  """Has all chats, some at once; returns what was found of their prompts."""
  words = [w for t in pydoc_data.topics.topics.values() for w in t.split()]
  numbers = iter(range(num_chats))
  found = Found()

  async def go_on() -> None:
    for number in numbers:
      await chat(target, words, number, found)
      on_chat()

  async with asyncio.TaskGroup() as tasks:
    for _ in range(FLAGS.at_once):
      tasks.create_task(go_on())
  return found


def measure(name: str, on_chat: Any) -> dict[str, Any]:
  """Returns the numbers of a setup."""
  with running(name) as (gateway, addresses):
    before = [num_finished(address) for address in addresses]
    start = time.monotonic()
    found = asyncio.run(have_chats(gateway, FLAGS.chats, on_chat))
    seconds = time.monotonic() - start
    shares = [
      num_finished(address) - num
      for address, num in zip(addresses, before, strict=True)
    ]
  return {
    'setup': name,
    'found': found.rate,
    'prompt tokens': found.num_tokens,
    'requests of each': ', '.join(map(str, shares)),
    'seconds': seconds,
  }


def main() -> None:
  console = rich.console.Console(highlight=False)
  for name in FLAGS.setups:
    config_lib.check(
      name in SETUPS, 'setups', name, f'must be among {", ".join(SETUPS)}'
    )
  rows = []
  with common.progress(console) as progress:
    for name in FLAGS.setups:
      task = progress.add_task(name, total=FLAGS.chats)
      rows.append(measure(name, lambda task=task: progress.advance(task)))
  console.print(
    common.table(
      rows,
      f'{FLAGS.chats} chats of {FLAGS.turns} turns, {FLAGS.at_once} at once',
    )
  )
  rates = {row['setup']: row['found'] for row in rows}
  if {'one', 'two'} <= rates.keys():
    console.print(
      'Two replicas that tell what they hold find '
      f'{(rates["two"] - rates["one"]) * 100:+.1f} points of what one finds.'
    )
  common.write_json(FLAGS.json, 'replicas', FLAGS, rows)


if __name__ == '__main__':
  mains.run(
    main, define_flags, starts_processes=True, verbosity=logging.WARNING
  )
