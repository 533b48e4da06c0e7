# SPDX-License-Identifier: Apache-2.0
"""Compares what was measured with the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import statistics
from typing import Any

from pallas_kernels import gpu_targets
from pallas_kernels.ragged_paged_attention import tuning
from sarathi_jax.benchmarks.gpu import attention

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
  """A bound, and the values of the results by stage that it is for.

  Attributes:
    name: what is bounded.
    bound: the value that must be reached, or kept to if `at_most`.
    values: finds them; the worst one counts.
  """

  name: str
  bound: float
  values: Callable[[Mapping[str, Rows]], Iterable[float]]
  at_most: bool = False


def _points(results: Mapping[str, Rows]) -> Rows:
  """Returns the attention's rows, of both sweeps."""
  return [*results.get('attention', []), *results.get('sweep', [])]


def _attention(column: str, **least: int) -> Callable[..., list[float]]:
  """Returns what finds a column of attention's rows of large enough batches."""

  def values(results: Mapping[str, Rows]) -> list[float]:
    return [
      row[column]
      for row in _points(results)
      if row.get('kind') in ('decode', 'prefill')
      and column in row
      and all(row[name] >= n for name, n in least.items())
    ]

  return values


def _point(point: str, column: str, *stages: str) -> Callable[..., list[float]]:
  """Returns what finds a column of the rows of one point, in some stages."""

  def values(results: Mapping[str, Rows]) -> list[float]:
    return [
      row[column]
      for stage in stages
      for row in results.get(stage, [])
      if row['point'] == point and row.get(column) is not None
    ]

  return values


def _same_tokens(results: Mapping[str, Rows]) -> list[float]:
  """Returns the fraction of tokens that other choices of XLA draw alike."""
  drawn = {
    row['point']: row['tokens']
    for row in results.get('variants', [])
    if 'tokens' in row
  }
  ours = drawn.pop('as served', None)
  return (
    []
    if ours is None
    else [
      sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
      for theirs in drawn.values()
    ]
  )


def over_alternatives(results: Mapping[str, Rows]) -> dict[str, float]:
  """Returns prefill or decode -> the best alternative's time over ours."""
  best: dict[str, float] = {}
  for row in _points(results) + results.get('torch', []):
    if 'us' in row and (point := row.get('alternative_to')):
      best[point] = min(row['us'], best.get(point, row['us']))
  return {
    row['point']: best[row['point']] / row['us']
    for row in _points(results)
    if row['point'] in best and 'us' in row
  }


def over_parts(results: Mapping[str, Rows]) -> dict[str, float]:
  """Returns hybrid -> its time over the sum of its parts', launched alone."""
  rows = [r for r in _points(results) if 'us' in r]
  parts = {
    (r['decodes'], r['context'], r['chunk'], r['before']): r['us']
    for r in rows
    if r.get('kind') == 'part'
  }
  ratios = {}
  for row in rows:
    if row.get('kind') == 'hybrid':
      halves = (
        (row['decodes'], row['context'], 0, 0),
        (0, 0, row['chunk'], row['before']),
      )
      if all(half in parts for half in halves):
        ratios[row['point']] = row['us'] / sum(parts[h] for h in halves)
  return ratios


def over_mosaic(results: Mapping[str, Rows]) -> dict[str, float]:
  """Returns point -> pallas_triton's time over pallas_mosaic's.

  Above 1, pallas_triton is slower. The kernels' `tuning` is to prefer the
  faster one.
  """
  ours = {
    r['point']: r['us'] for r in _points(results) if 'kind' in r and 'us' in r
  }
  return {
    r['point']: ours[r['point']] / r['us']
    for r in results.get('mosaic', [])
    if 'us' in r and r['point'] in ours
  }


def best_sizes(results: Mapping[str, Rows]) -> Rows:
  """Finds the best of the sizes that were tried, for each kernel."""
  return [row for k in tuning.KINDS for row in best_sizes_of(k, results)]


def best_sizes_of(kernel: str, results: Mapping[str, Rows]) -> Rows:
  """Finds the best of the sizes that were tried, for `tuning.TUNED`.

  `over_best` is their time over the best one's, the geometric mean over the
  batches. Only sizes that all batches could be run with are here.

  Args:
    kernel: of `tuning.KINDS`.
    results: of the stages.
  """
  rows = [
    r for r in results.get('tune', []) if 'us' in r and r['kernel'] == kernel
  ]
  best: dict[str, float] = {}
  for row in rows:
    best[row['batch']] = min(row['us'], best.get(row['batch'], row['us']))
  tried: dict[tuple[int, ...], list[float]] = {}
  for row in rows:
    tried.setdefault(tuple(row[n] for n in tuning.NUMBERS), []).append(
      row['us'] / best[row['batch']]
    )
  found = [
    {'kernel': kernel}
    | dict(zip(tuning.NUMBERS, numbers, strict=True))
    | {'over_best': statistics.geometric_mean(ratios)}
    for numbers, ratios in tried.items()
    if len(ratios) == len(best)
  ]
  return sorted(found, key=lambda row: row['over_best'])[:5]


def tuned_lines(
  results: Mapping[str, Rows], sweep: attention.Sweep, device: str
) -> list[str]:
  """Returns the best sizes as lines of `tuning.TUNED`; see `judge_all`."""
  shape = sweep.shape
  lines = []
  for kernel in tuning.KINDS:
    for best in best_sizes_of(kernel, results)[:1]:
      key = (
        kernel,
        gpu_targets.name_of(device) or device,
        shape.dtype,
        shape.kv_dtype,
        shape.group,
        shape.head_dim,
        shape.page_size,
      )
      lines.append(f'{key}: {tuple(best[name] for name in tuning.NUMBERS)},')
  return lines


TARGETS: tuple[Target, ...] = (
  Target(
    'decode attention, 64+ sequences of 1k+: of the copy bandwidth',
    0.85,
    _attention('of_copy', decodes=64, context=1024),
  ),
  Target(
    'decode attention, 1 sequence of 32k: of the copy bandwidth',
    0.7,
    _point('decode 1 x 32768', 'of_copy', 'attention', 'sweep'),
  ),
  Target(
    'prefill attention, chunks of 512+: of the matmul rate',
    0.6,
    _attention('of_matmul', chunk=512),
  ),
  Target(
    'prefill attention: of the best alternative',
    0.9,
    lambda r: [
      x
      for point, x in over_alternatives(r).items()
      if point.startswith('prefill')
    ],
  ),
  Target(
    'hybrid launch: over the sum of its parts',
    1.0,
    lambda r: over_parts(r).values(),
    at_most=True,
  ),
  Target(
    'decode step, 64 x 2k: over its bytes at copy bandwidth',
    1.25,
    _point('decode 64 x 1 after 2047', 'of_floor', 'engine'),
    at_most=True,
  ),
  Target(
    'decode, 64 x 2k: device idle between steps',
    0.03,
    _point('engine, decode 64 x 1 after 2047', 'idle', 'serving'),
    at_most=True,
  ),
  Target(
    'top-k and top-p, 64 x 32000: microseconds',
    150,
    _point('normal 64 x 32000 pallas_triton', 'us', 'filters'),
    at_most=True,
  ),
  # Other choices of matmuls may round otherwise, and draw another token.
  Target('drawn tokens: the same by other choices of XLA', 0.9, _same_tokens),
  Target(
    'prefill step, 512 tokens: MFU',
    0.45,
    _point('prefill 1 x 512 after 0', 'mfu', 'engine'),
  ),
  Target(
    'prefill step, 2048 tokens: MFU',
    0.55,
    _point('prefill 1 x 2048 after 0', 'mfu', 'engine'),
  ),
)


def judge(results: Mapping[str, Rows]) -> Rows:
  """Returns a row for each target: bound, worst value or None, if it is met."""
  rows: Rows = []
  yes = (
    'yes, of what ran'
    if any('error' in row for found in results.values() for row in found)
    else 'yes'
  )
  for target in TARGETS:
    values = list(target.values(results))
    worst = (max if target.at_most else min)(values, default=None)
    met = worst is not None and (
      worst <= target.bound if target.at_most else worst >= target.bound
    )
    rows.append(
      {
        'target': target.name,
        'bound': f'{"<=" if target.at_most else ">="} {target.bound:g}',
        'worst': worst,
        'of': len(values),
        'met': 'not measured' if worst is None else yes if met else 'no',
      }
    )
  return rows


# Comparisons that the results have beside rows and targets.
COMPARISONS: Mapping[str, Callable[[Mapping[str, Rows]], Any]] = {
  'over_alternatives': over_alternatives,
  'over_parts': over_parts,
  'over_mosaic': over_mosaic,
  'best_sizes': best_sizes,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Verdicts:
  """What results say.

  Attributes:
    targets: rows of `judge`.
    comparisons: results of `COMPARISONS`, by name.
    tuned: the best sizes, as lines of `tuning.TUNED`.
  """

  targets: Rows
  comparisons: Mapping[str, Any]
  tuned: list[str]


def judge_all(
  results: Mapping[str, Rows], tuned: attention.Sweep, device: str
) -> Verdicts:
  """Judges results, and compares what is in them.

  Args:
    results: rows by stage.
    tuned: what other sizes of tiles were tried on.
    device: its name, as in jax.Device.device_kind.
  """
  return Verdicts(
    judge(results),
    {name: compare(results) for name, compare in COMPARISONS.items()},
    tuned_lines(results, tuned, device),
  )
