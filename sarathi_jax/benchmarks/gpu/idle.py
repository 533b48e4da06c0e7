# SPDX-License-Identifier: Apache-2.0
"""Measures how long the device waits for the host between engine steps."""

from __future__ import annotations

import time
from typing import NamedTuple

from sarathi_jax import types
from sarathi_jax.benchmarks.gpu import profile
from sarathi_jax.engine import engine as engine_lib

_STEPS = 32


class Decodes(NamedTuple):
  """What `decode_steps` saw.

  Attributes:
    wall_s: wall-clock time of a step.
    context: mean tokens of a sequence.
    idle: fraction of the time in which the device did nothing, by a profile;
      None where a profile shows no device.
  """

  wall_s: float
  context: int
  idle: float | None


def decode_steps(
  engine: engine_lib.Engine, sequences: int, context: int
) -> Decodes:
  """Runs steps in which all sequences decode, after prompts of `context`."""
  names = [f'idle-{i}' for i in range(sequences)]
  for i, name in enumerate(names):
    engine.add(
      types.Request(
        request_id=name,
        arrival_time=engine.clock(),
        prompt_token_ids=(1 + i,) * context,
        sampling=types.SamplingParams(
          temperature=0,
          ignore_eos=True,
          max_tokens=engine.info.max_model_len - context,
        ),
      )
    )
  try:
    waiting, generated = set(names), 0
    while waiting:
      deltas = engine.step()
      waiting -= {delta.request_id for delta in deltas}
      generated += sum(len(delta.token_ids) for delta in deltas)
    wall = _steps(engine)
    idle = profile.idle_part(profile.traced(lambda: _steps(engine)))
    return Decodes(wall, context + generated // sequences + _STEPS // 2, idle)
  finally:
    for name in names:
      engine.abort(name)
    engine.drain()


def _steps(engine: engine_lib.Engine) -> float:
  """Returns the seconds of a step; each call launches and completes one."""
  start = time.perf_counter()
  for _ in range(_STEPS):
    engine.step()
  return (time.perf_counter() - start) / _STEPS
