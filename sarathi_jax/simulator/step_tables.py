# SPDX-License-Identifier: Apache-2.0
"""Reads whole steps that Sarathi-Serve's artifact, or gpu_check, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import csv
import dataclasses
import pathlib
from typing import Any

import numpy as np
from scipy import optimize

from sarathi_jax import errors
from sarathi_jax import json_file
from sarathi_jax.simulator import cost_model
from sarathi_jax.simulator import hosts
from sarathi_jax.simulator import paper
from sarathi_jax.simulator import tables

# Context of the artifact's decodes, as long as its sequences may be there.
_CONTEXT = 1024
# The efficiencies that gpu_check's steps tell.
_OF_GPU_CHECK = ('gemm', 'memory', 'decode_attention', 'prefill_attention')
CostModel = cost_model.CostModel


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
  """Steps that follow each other, measured as a whole.

  Attributes:
    table: name of the table that it is in.
    num_decodes, context: decodes of each step, and the context of each.
    chunks: (tokens, tokens before) of the chunks, one a step; none: one step
      of decodes alone.
    seconds: time of all steps together.
  """

  table: str
  num_decodes: int
  context: int
  chunks: tuple[tuple[int, int], ...]
  seconds: float
  num_prefills: int = 1

  def predict(self, cost: CostModel) -> float:
    """Returns what the model predicts, seconds."""
    total = 0.0
    for tokens, before in self.chunks or ((0, 0),):
      prefills = self.num_prefills if tokens else 0
      num_seqs = self.num_decodes + prefills
      total += sum(
        cost.stage_seconds(
          self.num_decodes + prefills * tokens,
          num_seqs,
          num_seqs,
          self.num_decodes * self.context,
          prefills * cost.chunk_seconds(tokens, before) if prefills else 0.0,
        )
      )
    return total


def read_artifact(folder: str) -> list[Step]:
  """Reads the artifact's tables of steps.

  Raises:
    ConfigError: a table is missing.
  """
  return [*_artifact(pathlib.Path(folder))]


def _artifact(folder: pathlib.Path) -> Iterator[Step]:
  def rows(name: str) -> list[dict[str, str]]:
    try:
      with (folder / name).open(newline='') as file:
        return list(csv.DictReader(file))
    except OSError as error:
      raise errors.ConfigError(
        f'artifact={str(folder)!r}: {name}: {error.strerror}.'
      ) from error

  for name in ('figure-2_decode', 'figure-2_prefill', 'table-2_results'):
    for row in rows(f'{name}.csv'):
      prefill = int(row['batch_num_prefill_tokens'])
      yield Step(
        table=name,
        num_decodes=int(row['batch_num_decode_tokens']),
        context=_CONTEXT,
        chunks=((prefill, 0),) if prefill else (),
        seconds=float(row['batch_execution_time'])
        / (1e3 if name == 'table-2_results' else 1),
      )
  for row in rows('figure-9_chunking-overhead.csv'):
    length, chunk = int(row['prefill_length']), int(row['chunk_size'])
    yield Step(
      table='figure-9_chunking-overhead',
      num_decodes=0,
      context=0,
      chunks=tuple(
        (min(chunk, length - s), s) for s in range(0, length, chunk)
      ),
      seconds=float(row['prefill_execution_time']) / 1e3,
    )

  yield Step(
    table='figure-1',
    num_decodes=paper.FIGURE_1_DECODES,
    context=paper.FIGURE_1_CONTEXT,
    chunks=(),
    seconds=paper.FIGURE_1_STEP_S,
  )


def read_gpu_check(path: str) -> list[Step]:
  """Reads the steps of a gpu_check.json.

  Raises:
    ConfigError: the file is malformed, or its stage `engine` was not run.
  """
  try:
    rows = json_file.read(pathlib.Path(path))['results']['engine']
    return [
      Step(
        table='gpu_check',
        context=row['context'],
        seconds=row['step_s'],
        **(
          {'num_decodes': row['sequences'], 'chunks': ()}
          if row['tokens'] == 1
          else {
            'num_decodes': 0,
            'num_prefills': row['sequences'],
            'chunks': ((row['tokens'], row['context']),),
          }
        ),
      )
      for row in rows
      if row.keys() >= {'step_s', 'sequences', 'context', 'tokens'}
    ]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise errors.ConfigError(
      f'gpu_check={path!r}: not what scripts/gpu_check writes with its stage '
      f'engine: {type(error).__name__}: {error}.'
    ) from error


def fit_host(cost: CostModel, steps: Sequence[Step]) -> hosts.Host:
  """Fits what launches, steps and contexts cost; the rest is `cost.host`'s."""
  scale = np.array([1e-3, 1e-2, 1e-6])

  def at(x: Any) -> hosts.Host:
    launch, step, context = (x * scale).tolist()
    return dataclasses.replace(
      cost.host, launch_s=launch, step_s=step, context_s=context
    )

  return at(
    _fit(lambda x: cost.with_host(at(x)), np.array([0.5, 0.1, 0.5]), steps)
  )


def fit_efficiencies(cost: CostModel, steps: Sequence[Step]) -> CostModel:
  """Fits the efficiencies, 4 numbers, that explain whole steps best."""
  start = np.array(
    [getattr(cost.hardware.efficiencies, f) for f in _OF_GPU_CHECK]
  )

  def at(x: Any) -> CostModel:
    return cost.with_hardware(
      cost.hardware.with_efficiencies(
        **dict(zip(_OF_GPU_CHECK, x.tolist(), strict=True))
      )
    )

  return at(_fit(at, start, steps))


def _fit(
  at: Callable[[Any], CostModel], start: Any, steps: Sequence[Step]
) -> Any:
  def residuals(x: Any) -> Any:
    cost = at(x)
    return [np.log(s.predict(cost) / s.seconds) for s in steps]

  return optimize.least_squares(
    residuals, start, bounds=(1e-6, np.inf), loss='soft_l1', f_scale=0.1
  ).x


def summary(
  cost: CostModel,
  steps: Sequence[Step],
) -> dict[str, tables.Spread]:
  """Returns table -> median error, P90 error, rows; and those of all."""
  return {
    name: tables.spread(
      [
        abs(s.predict(cost) / s.seconds - 1)
        for s in steps
        if name in ('all', s.table)
      ]
    )
    for name in dict.fromkeys(['all', *(s.table for s in steps)])
  }
