# SPDX-License-Identifier: Apache-2.0
"""Who of those that wait may pass others, as more of it is in the cache.

Pages that nobody holds are evicted by whoever comes first. So a request that
would find its beginning now may find nothing after one that finds none. The
next one is thus chosen from the first few: the one of which the most is found.

Nobody starves: each is passed by fewer others than these few are, all in all;
who was passed so often is passed no more. With a window of one it is first
come, first served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import heapq
import itertools
from typing import Protocol, TypeVar


class Waiting(Protocol):
  """What waits in a queue.

  Attributes:
    num_passed: how many that came later went first.
  """

  num_passed: int


T = TypeVar('T', bound=Waiting)


def first_few(queue: Iterable[T], window: int) -> list[T]:
  """Returns those of which any may go next, in their order.

  Args:
    queue: who waits, in order.
    window: how many they are at most.
  """
  few = []
  for waiting in itertools.islice(queue, window):
    few.append(waiting)
    if waiting.num_passed >= window - 1:
      break
  return few


def by_found(
  few: Sequence[T], guess: Callable[[T], int], find: Callable[[T], int]
) -> Iterator[T]:
  """Yields those of which the most is found first; of equals, the first.

  Args:
    few: in order.
    guess: returns how much was found, and is perhaps there no more. Much
      cheaper than `find`.
    find: returns how much is found.
  """
  heap = [(-guess(waiting), i) for i, waiting in enumerate(few)]
  heapq.heapify(heap)
  while heap:
    guessed, i = heap[0]
    found = -find(few[i])
    if found == guessed:
      heapq.heappop(heap)
      yield few[i]
    else:
      heapq.heapreplace(heap, (found, i))


def note(few: Iterable[T], goes: T) -> None:
  """Notes that one passes those before it."""
  for waiting in itertools.takewhile(lambda w: w is not goes, few):
    waiting.num_passed += 1
