# SPDX-License-Identifier: Apache-2.0
"""Finds what the device did while something ran, by JAX's profiler."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
import pathlib
import tempfile
from typing import Any, NamedTuple

import jax


class Event(NamedTuple):
  """A kernel or a copy on the device; times in nanoseconds."""

  name: str
  start: float
  duration: float


class Kernel(NamedTuple):
  """What all launches of one name took in a step.

  Attributes:
    name: the kernel's or the copy's.
    calls: number of calls in a step.
    us: microseconds of all calls in a step.
  """

  name: str
  calls: float
  us: float


def traced(run: Callable[[], Any]) -> list[Event]:
  """Returns what devices did in `run`; [] if a profile shows no device."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    return [
      event
      for file in pathlib.Path(folder).rglob('*.xplane.pb')
      for event in device_events(jax.profiler.ProfileData.from_file(str(file)))
    ]


def device_events(data: jax.profiler.ProfileData) -> list[Event]:
  """Returns the events on the streams of all GPUs."""
  return [
    Event(event.name, event.start_ns, event.duration_ns)
    for plane in data.planes
    if plane.name.startswith('/device:GPU')
    for line in plane.lines
    if line.name.startswith('Stream')
    for event in line.events
  ]


def kernels(
  events: Iterable[Event], steps: int, most: int = 40
) -> list[Kernel]:
  """Lists what took the most time, over so many steps that were alike."""
  took: dict[str, list[float]] = collections.defaultdict(list)
  for event in events:
    took[event.name].append(event.duration)
  table = [
    Kernel(name, len(each) / steps, sum(each) / steps / 1e3)
    for name, each in took.items()
  ]
  return sorted(table, key=lambda kernel: -kernel.us)[:most]


def idle_part(events: Iterable[Event]) -> float | None:
  """Returns the fraction of the time in which no event was under way.

  Time is from the first start to the last end. None if there are no events, or
  they take no time.
  """
  busy = 0.0
  first = last = None
  for start, end in sorted((e.start, e.start + e.duration) for e in events):
    first = start if first is None else first
    busy += max(0.0, end - max(start, start if last is None else last))
    last = end if last is None else max(last, end)
  if first is None or last is None or last == first:
    return None
  return 1 - busy / (last - first)
