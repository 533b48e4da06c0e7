# SPDX-License-Identifier: Apache-2.0
"""Orders sequences by urgency: the more urgent go first and keep their pages.

The smaller `Request.priority` is the more urgent; of equal priorities, the one
that came first. So where all are equal, it is first come, first served.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, MutableSequence
import operator

from sarathi_jax.scheduler import sequence

# Yields those of a queue that may go now; None: any may.
Able = (
  Callable[[Iterable[sequence.Sequence]], Iterator[sequence.Sequence]] | None
)
_URGENCY = operator.attrgetter('urgency')


def insert(
  queue: MutableSequence[sequence.Sequence], seq: sequence.Sequence
) -> None:
  """Inserts a sequence in its place, with the most urgent at the front."""
  if not queue or queue[-1].urgency < seq.urgency:
    queue.append(seq)
  elif seq.urgency < queue[0].urgency:
    queue.insert(0, seq)
  else:
    bisect.insort(queue, seq, key=_URGENCY)


def first_arrived(
  queue: MutableSequence[sequence.Sequence],
  now: float,
  able: Able = None,
) -> sequence.Sequence | None:
  """Returns the most urgent sequence that has arrived, of those that may go.

  Returns None if none has. The queue must not be empty.
  """
  if able is not None:
    return next(able(arrived(queue, now)), None)
  first = queue[0]
  if first.request.arrival_time <= now:
    return first
  if queue[-1].request.priority == first.request.priority:
    return None  # All have one priority, so they are in the order of arrival.
  return next((s for s in queue if s.request.arrival_time <= now), None)


def arrived(
  queue: Iterable[sequence.Sequence], now: float
) -> Iterator[sequence.Sequence]:
  """Yields those that have arrived."""
  return (seq for seq in queue if seq.request.arrival_time <= now)


def first_turn(
  queue: Iterable[sequence.Sequence], now: float, able: Able = None
) -> Iterator[sequence.Sequence]:
  """Yields the most urgent ones that have arrived, of one priority and client.

  They end where another client's turn is. Those that may not go are left out.
  """
  turn = None
  there = arrived(queue, now)
  for seq in there if able is None else able(there):
    request = seq.request
    of = request.priority, request.tenant, request.client
    if of != (turn := turn or of):
      return
    yield seq
