# SPDX-License-Identifier: Apache-2.0
"""Who goes first, and keeps its pages: the more urgent.

That is who has the smaller `Request.priority`; of the same priority, who came
first. So where all have the same, it is first come, first served.
"""

from __future__ import annotations

import bisect
from collections.abc import MutableSequence
import operator

from sarathi_jax.scheduler import sequence

_URGENCY = operator.attrgetter('urgency')


def insert(queue: MutableSequence[sequence.Sequence],
           seq: sequence.Sequence) -> None:
  """Puts a sequence where it belongs, the most urgent at the front."""
  if not queue or queue[-1].urgency < seq.urgency:
    queue.append(seq)
  elif seq.urgency < queue[0].urgency:
    queue.insert(0, seq)
  else:
    bisect.insort(queue, seq, key=_URGENCY)


def first_arrived(queue: MutableSequence[sequence.Sequence],
                  now: float) -> sequence.Sequence | None:
  """The most urgent one that has arrived, of a queue that is not empty."""
  first = queue[0]
  if first.request.arrival_time <= now:
    return first
  if queue[-1].request.priority == first.request.priority:
    return None  # As they are in the order of arrival.
  return next((s for s in queue if s.request.arrival_time <= now), None)
