# SPDX-License-Identifier: Apache-2.0
"""How long the device waits for the host between the steps of an engine."""

from __future__ import annotations

from collections.abc import Iterable
import pathlib
import tempfile
import time
from typing import NamedTuple

import jax

from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib

_STEPS = 32


class Decodes(NamedTuple):
  """What `decode_steps` saw.

  Attributes:
    wall_s: of a step.
    context: tokens of a sequence, in the mean.
    idle: the part of the time in which the device did nothing, as a profile
      has it; None where a profile shows no device.
  """

  wall_s: float
  context: int
  idle: float | None


def decode_steps(engine: engine_lib.Engine, sequences: int,
                 context: int) -> Decodes:
  """Runs steps in which all sequences decode, after prompts of `context`."""
  names = [f'idle-{i}' for i in range(sequences)]
  for i, name in enumerate(names):
    engine.add(types.Request(
      request_id=name, arrival_time=engine.clock(),
      prompt_token_ids=(1 + i,) * context, sampling=types.SamplingParams(
        temperature=0, ignore_eos=True,
        max_tokens=engine.info.max_model_len - context)))
  try:
    waiting, generated = set(names), 0
    while waiting:
      deltas = engine.step()
      waiting -= {delta.request_id for delta in deltas}
      generated += sum(len(delta.token_ids) for delta in deltas)
    wall = _steps(engine)
    with tempfile.TemporaryDirectory() as folder:
      with jax.profiler.trace(folder):
        _steps(engine)
      idle = _idle_in(pathlib.Path(folder))
    return Decodes(
      wall, context + generated // sequences + _STEPS // 2, idle)
  finally:
    for name in names:
      engine.abort(name)
    engine.drain()


def idle_part(intervals: Iterable[tuple[float, float]]) -> float | None:
  """The part of the time, first start to last end, that no interval covers."""
  busy = 0.0
  first = last = None
  for start, end in sorted(intervals):
    first = start if first is None else first
    busy += max(0.0, end - max(start, start if last is None else last))
    last = end if last is None else max(last, end)
  if first is None or last is None or last == first:
    return None
  return 1 - busy / (last - first)


def _steps(engine: engine_lib.Engine) -> float:
  """Seconds of a step; each call launches one and completes one."""
  start = time.perf_counter()
  for _ in range(_STEPS):
    engine.step()
  return (time.perf_counter() - start) / _STEPS


def _idle_in(folder: pathlib.Path) -> float | None:
  intervals = []
  for file in folder.rglob('*.xplane.pb'):
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
      if plane.name.startswith('/device:GPU'):
        streams = [x for x in plane.lines if x.name.startswith('Stream')]
        intervals += [(event.start_ns, event.start_ns + event.duration_ns)
                      for stream in streams for event in stream.events]
  return idle_part(intervals)
