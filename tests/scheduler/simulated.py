# SPDX-License-Identifier: Apache-2.0
"""What the simulated model says, requests to it, and its device's pages.

The token at position p of a sequence is `token_at(its id, p)`, so that a wrong
token, position, slot or order shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol
import zlib

from sarathi_jax import config as config_lib
from sarathi_jax import types

VOCAB = 1000


def token_at(request_id: str, position: int) -> int:
  """Returns the token that the model says at a position of a request."""
  return zlib.crc32(f'{request_id}:{position}'.encode()) % VOCAB


def make_request(
  request_id: str,
  prompt_len: int,
  max_tokens: int | None,
  stop_token_ids: tuple[int, ...] = (),
  arrival_time: float = 0.0,
  priority: int = 0,
  n: int = 1,
  beginnings: tuple[tuple[str, int], ...] = (),
  cache_salt: str = '',
  client: str = '',
) -> types.Request:
  """Makes a request; its prompt is its own but for its beginnings.

  Args:
    beginnings: names, each with the length of what prompts share that have it.
  """
  prompt: list[int] = []
  for name, length in (*beginnings, (request_id, prompt_len)):
    stop = min(length, prompt_len)
    prompt += (token_at(name, p) for p in range(len(prompt), stop))
  return types.Request(
    request_id=request_id,
    prompt_token_ids=tuple(prompt),
    sampling=types.SamplingParams(
      max_tokens=max_tokens, stop_token_ids=stop_token_ids, n=n
    ),
    arrival_time=arrival_time,
    priority=priority,
    cache_salt=cache_salt,
    client=client,
  )


class Sequence(Protocol):
  """What memory has to know of a sequence; see `known.Known`."""

  @property
  def id(self) -> str: ...

  def content(self, position: int) -> int: ...


class Memory:
  """The memory of a device's pages.

  Each chunk must find all tokens before it there, computed after the same
  tokens. What others computed must have been completed.
  """

  def __init__(self, config: config_lib.SchedulerConfig) -> None:
    self._config = config
    # (page, place in it) -> what is there (of `Sequence.content` and the group
    # of layers), and the step that wrote it.
    self._there: dict[tuple[int, int], tuple[tuple[int, int], int]] = {}

  def clear(self) -> None:
    self._there.clear()

  def copy(self, copies: Iterable[tuple[int, int]]) -> None:
    """Copies pages, (source, target) each."""
    for source, target in copies:
      for place in range(self._config.page_size):
        if (source, place) in self._there:
          self._there[target, place] = self._there[source, place]
        else:
          self._there.pop((target, place), None)

  def use(self, seq: Sequence, chunk: types.Chunk, step: int) -> None:
    """Reads the tokens before a chunk's that it attends to, writes these."""
    for where, group, position in self._places(
      chunk, chunk.start, chunk.start + chunk.num_tokens
    ):
      content = seq.content(position), group
      if position >= chunk.start:
        self._there[where] = content, step
      assert self._there.get(where, (None,))[0] == content, (
        f'{seq.id}: something else lies where its tokens should'
      )

  def check_found(
    self, seq: Sequence, chunk: types.Chunk, num_completed: int
  ) -> None:
    """What a chunk begins after is of steps that were completed."""
    for where, _, _ in self._places(chunk, chunk.start, chunk.start):
      _, step = self._there.get(where, (None, num_completed))
      assert step < num_completed, f'{seq.id}: found what is not computed yet'

  def _places(
    self, chunk: types.Chunk, start: int, stop: int
  ) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Yields ((page, place in it), group, position) of what tokens read."""
    size, windows = self._config.page_size, self._config.windows
    for group, window in enumerate(windows):
      first = 0 if window is None else max(0, start - window + 1)
      for position in range(first, stop):
        page, place = divmod(position, size)
        number = chunk.page_table[page * len(windows) + group]
        yield (number, place), group, position
