# SPDX-License-Identifier: Apache-2.0
"""Nonsense over HTTP: bodies of OpenAI's schema, mutated.

Every body gets an HTTP status, who takes it lives on, and others' streams get
their exact tokens, with gaps that it hardly lengthens.
`SEED=7 scripts/test -k http_fuzz` tries other bodies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent import futures
import contextlib
import copy
import functools
import http.client
import json
import multiprocessing
import os
import random
import threading
import time
from typing import Any

from openai.types import chat
from openai.types import completion_create_params
from openai.types import responses
import pydantic

from tests.server import fake
from tests.server import http_client

SEED = int(os.environ.get('SEED', '0'))
_NUM_CLIENTS = 8
MAX_LENGTHENED_S = 0.05
MAX_REPEATS = 5
_PATIENCE_S = 120.0  # with 1,000 prompts of one body
_FAULTS = range(500, 600)  # but for what smg does not do
_NOT_DONE = 501
_chats = chat.completion_create_params
_responses = responses.response_create_params
_texts = completion_create_params
TYPES: dict[str, Any] = {
  '/v1/completions': _texts.CompletionCreateParamsNonStreaming,
  '/v1/chat/completions': _chats.CompletionCreateParamsNonStreaming,
  '/v1/responses': _responses.ResponseCreateParamsNonStreaming,
}
_EDGES: tuple[Any, ...] = (
  None,
  True,
  False,
  0,
  -1,
  1,
  2**31 - 1,
  2**31,
  -(2**31),
  2**53,
  2**63,
  2**64,
  10**40,
  0.5,
  -0.5,
  1e308,
  5e-324,
  '',
  'a',
  't1 t2',
  '\0',
  '\ud7ff',
  '\U0001f600' * 100,
  '\x1b[31m\r\n',
  'x' * 100_000,
  '../../etc/passwd',
  'file:///etc/passwd',
  'http://127.0.0.1:1/x',
  '{{ 1/0 }}',
  '{% for i in range(9) %}{{ i }}{% endfor %}',
  '(a+)+$',
  [],
  {},
  [[]],
  [None],
  [0] * 1000,
  ['x'] * 1000,
  {'type': 'x'},
  {'a': {'b': {'c': []}}},
)
# Leads past the first check, as noise seldom does.
_HINTS: dict[str, tuple[Any, ...]] = {
  'prompt': ('t1 t2', [1, 2], 't1'),
  'input': ('t1 t2',),
  'max_tokens': (1, 4, 8),
  'n': (1,),
  'max_completion_tokens': (1, 4),
  'max_output_tokens': (1, 4),
  'temperature': (0, 1, 0.5),
  'top_p': (1, 0.5),
  'seed': (1, 2),
  'content': ('t1 t2', 'x'),
  'stop': ('t9', ['t9', 't10']),
}
_MAX_DEPTH = 5


class Bodies:
  """Makes bodies, the same ones from the same seed."""

  def __init__(
    self,
    seed: int,
    model: str = 'counting',
    paths: Collection[str] = tuple(TYPES),
  ) -> None:
    self._random = random.Random(seed)
    self._hints = {**_HINTS, 'model': (model,) * 9 + ('x',)}
    self._schemas = {
      path: pydantic.TypeAdapter(kind).json_schema()
      for path, kind in TYPES.items()
      if path in paths
    }

  def make(self) -> tuple[str, bytes]:
    """A path and what to send there."""
    rng = self._random
    path = rng.choice(list(self._schemas))
    schema = self._schemas[path]
    body = self._value(schema, schema, '', 0)
    if rng.random() < 0.3:
      body['stream'] = True
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
      self._mutate(body)
    data = json.dumps(body).encode(errors='surrogatepass')
    return path, self._damage(data)

  def _value(  # noqa: PLR0911
    self, schema: Any, root: Any, name: str, depth: int
  ) -> Any:
    """A value of a schema, with some of the fields that it allows."""
    rng = self._random
    if name in self._hints and rng.random() < 0.9:
      return copy.deepcopy(rng.choice(self._hints[name]))
    if '$ref' in schema:
      schema = root['$defs'][schema['$ref'].rpartition('/')[2]]
    for key in ('anyOf', 'oneOf'):
      if key in schema:
        return self._value(rng.choice(schema[key]), root, name, depth + 1)
    if 'const' in schema:
      return schema['const']
    if 'enum' in schema:
      return rng.choice(schema['enum'])
    match schema.get('type'):
      case 'object' if 'properties' in schema:
        needed = set(schema.get('required', ()))
        odds = 0.05 if depth < _MAX_DEPTH else 0.0
        return {
          key: self._value(field, root, key, depth + 1)
          for key, field in schema['properties'].items()
          if key in needed or rng.random() < odds
        }
      case 'array':
        return [
          self._value(schema.get('items', {}), root, name, depth + 1)
          for _ in range(rng.choice((0, 1, 1, 2)))
        ]
      case 'integer' | 'number':
        return rng.choice((0, 1, 2, 0.5, -1))
      case 'boolean':
        return rng.random() < 0.5
      case 'string':
        return rng.choice(('t1', 't1 t2', 'auto', ''))
      case 'null':
        return None
      case _:
        return {}

  def _edge(self) -> Any:
    return copy.deepcopy(self._random.choice(_EDGES))

  def _mutate(self, body: Any) -> None:
    """Changes one place of a body."""
    rng = self._random
    parent, key = rng.choice(list(_places(body)) or [(body, 'odd')])
    match rng.randrange(5):
      case 0:
        parent.pop(key, None) if isinstance(parent, dict) else parent.pop()
      case 1 if isinstance(parent, dict):
        parent[rng.choice(('odd', '', 'n', key + 'x'))] = self._edge()
      case 2:
        deep: Any = self._edge()
        for _ in range(rng.choice((3, 100, 200))):
          deep = [deep] if rng.random() < 0.5 else {'a': deep}
        parent[key] = deep
      case 3 if isinstance(parent, dict) and isinstance(parent.get(key), list):
        parent[key] = parent[key] * rng.choice((2, 100))
      case _:
        parent[key] = self._edge()

  def _damage(self, data: bytes) -> bytes:
    """Now and then, no JSON any more."""
    rng = self._random
    i = rng.randrange(len(data))
    match rng.randrange(30):
      case 0:
        return data[:i]
      case 1:
        return data[:i] + rng.randbytes(3) + data[i + 1 :]
      case 2:
        return rng.choice(
          (
            b'',
            b'null',
            b'[' * 100_000,
            b'{"a":' * 9_999,
            b'\xff\xfe{}',
            b'1' * 99_999,
            b'"' + b'\\u0000' * 9_999 + b'"',
          )
        )
      case 3:  # a key twice
        return b'{"model": "counting", ' + data[1:]
      case _:
        return data


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
  """Where something stands in a body: what holds it, and at which key."""
  for key, value in list(
    node.items() if isinstance(node, dict) else enumerate(node)
  ):
    yield node, key
    if isinstance(value, (dict, list)):
      yield from _places(value)


class Streams(threading.Thread):
  """One stream after another, beside the nonsense, and their gaps."""

  def __init__(self, running: fake.RunningServer) -> None:
    super().__init__()
    self._running = running
    self.is_over = False
    self.num_right = self.num_wrong = 0
    self.longest_gap_s = 0.0

  def run(self) -> None:
    while not self.is_over:
      call = self._running.generate(
        token_ids=[1], sampling={'max_tokens': 100, 'ignore_eos': True}
      )
      tokens, last = [], time.monotonic()
      for response in call:
        tokens += response.token_ids
        now = time.monotonic()
        self.longest_gap_s, last = max(self.longest_gap_s, now - last), now
      is_right = tokens == [(2 + k) % 64 for k in range(100)]
      self.num_right += is_right
      self.num_wrong += not is_right


def _send(
  port: int, calls: list[tuple[str, bytes]], timeout_s: float = fake.TIMEOUT_S
) -> Counter[int]:
  """The statuses of calls, one after another."""
  statuses: Counter[int] = Counter()
  for path, body in calls:
    connection = http.client.HTTPConnection(
      '127.0.0.1', port, timeout=timeout_s
    )
    with contextlib.closing(connection):
      try:
        connection.request(
          'POST', path, body, {'content-type': 'application/json'}
        )
        reply = connection.getresponse()
        reply.read()
      except (OSError, http.client.HTTPException) as error:
        # What it was goes with the error through a pipe; its cause would not.
        raise AssertionError((repr(error), path, body[:2000])) from error
      assert reply.status == _NOT_DONE or reply.status not in _FAULTS, (
        reply.status,
        path,
        body[:2000],
      )
      statuses[reply.status] += 1
  return statuses


def _send_all(
  port: int, calls: list[tuple[str, bytes]], timeout_s: float = fake.TIMEOUT_S
) -> Counter[int]:
  """The same by several clients at once."""
  with futures.ThreadPoolExecutor(_NUM_CLIENTS) as pool:
    return sum(
      pool.map(
        functools.partial(_send, port, timeout_s=timeout_s),
        [calls[i::_NUM_CLIENTS] for i in range(_NUM_CLIENTS)],
      ),
      Counter(),
    )


def fuzz(
  running: fake.RunningServer,
  client: http_client.Client,
  num_bodies: int,
  make: Callable[[], tuple[str, bytes]],
) -> None:
  """Sends bodies; the server answers each, and serves others as before."""
  calls = [make() for _ in range(num_bodies)]
  streams = Streams(running)
  streams.start()
  try:
    statuses = _send_all(client.port, calls)
  finally:
    streams.is_over = True
    streams.join(fake.TIMEOUT_S)
  print(dict(statuses), f'longest gap {streams.longest_gap_s * 1e3:.0f} ms')
  assert client.serves()
  # It is of use only if both happen a lot.
  assert statuses[200] > num_bodies // 50
  assert statuses[400] > num_bodies // 10
  assert streams.num_right and not streams.num_wrong
  fake.wait_until(running.all_pages_are_free)
  assert running.is_alive()
  assert not any(running.server.watch.num_restarts.values())


# What follows measures: the server, who sends nonsense, and who watches are
# three processes, so that none is held up by another's Python.


def send_when_asked(
  pipe: Any, port: int, seed: int, model: str, paths: Collection[str]
) -> None:
  """Makes as many bodies as it is told, and sends them as often as it is told;
  answers with their statuses, or the problem."""
  os.nice(19)  # else they would take the server's time, whatever they sent
  bodies = Bodies(seed, model, paths)
  while num_bodies := pipe.recv():
    calls = [bodies.make() for _ in range(num_bodies)]
    pipe.send(None)
    while pipe.recv():
      try:
        pipe.send(_send_all(port, calls, _PATIENCE_S))
      except AssertionError as error:
        pipe.send(error)


@contextlib.contextmanager
def beside(target: Callable[..., None], *args: Any) -> Iterator[Any]:
  """A pipe to what runs in a process of its own."""
  context = multiprocessing.get_context('spawn')
  here, there = context.Pipe()
  process = context.Process(target=target, args=(there, *args), daemon=True)
  process.start()
  there.close()
  try:
    yield here
  finally:
    process.kill()
    process.join()


class Lengthened:
  """By how much nonsense lengthens others' longest gap."""

  def __init__(self, watcher: Any, sender: Any) -> None:
    self._watcher, self._sender = watcher, sender
    self.statuses: Counter[int] = Counter()
    while not self._longest_gap_s():  # until streams run
      time.sleep(0.1)

  def _longest_gap_s(self) -> float:
    """Since it was last asked."""
    self._watcher.send(True)
    gap: float = self._watcher.recv()
    return gap

  def by(self, num_bodies: int, repeats: int) -> float:
    """Seconds, of the next bodies, the least of some times: what else a busy
    machine does to the gap does not happen each time."""
    self._sender.send(num_bodies)
    self._sender.recv()
    least = float('inf')
    for _ in range(repeats):
      self._longest_gap_s()
      start = time.monotonic()
      self._sender.send(True)
      statuses = self._sender.recv()
      gap = self._longest_gap_s()
      if isinstance(statuses, Exception):
        raise statuses
      time.sleep(time.monotonic() - start)
      quiet = self._longest_gap_s()
      self.statuses += statuses
      least = min(least, gap - quiet)
      print(f'longest gap {gap * 1e3:.0f} ms, {quiet * 1e3:.0f} ms alone')
      if least <= MAX_LENGTHENED_S:
        break
    self._sender.send(False)
    return least
