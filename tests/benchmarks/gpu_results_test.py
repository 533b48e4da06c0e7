# SPDX-License-Identifier: Apache-2.0
"""What is made of the results of scripts/gpu_check."""

from __future__ import annotations

import io
from typing import Any

import jax
import pytest
import rich.console

from sarathi_jax.benchmarks.gpu import attention
from sarathi_jax.benchmarks.gpu import profile
from sarathi_jax.benchmarks.gpu import tables
from sarathi_jax.benchmarks.gpu import targets


def profiled(text: str) -> list[profile.Event]:
  return profile.device_events(jax.profiler.ProfileData.from_text_proto(text))


def test_kernels_of_a_profile_by_time() -> None:
  def line(name: str, *events: tuple[int, int, int]) -> str:
    return (
      f'lines {{ name: "{name}" timestamp_ns: 1000 '
      + ''.join(
        f'events {{ metadata_id: {i} offset_ps: {at * 1000} '
        f'duration_ps: {ns * 1000} }} '
        for i, at, ns in events
      )
      + '}'
    )

  names = ''.join(
    f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }} '
    for i, name in ((1, 'gemm'), (2, 'attend'))
  )
  events = profiled(
    'planes { name: "/device:GPU:0" '
    + names
    + line(
      'Stream #1(Compute)',
      (1, 0, 4000),
      (2, 5000, 3000),
      (1, 8000, 4000),
      (2, 12000, 3000),
    )
    + line('XLA Ops', (1, 0, 99000))
    + '}'
    'planes { name: "/host:CPU" ' + names + line('Stream', (1, 0, 9)) + '}'
  )
  assert profile.kernels(events, steps=2) == [
    ('gemm', 1.0, 4.0),
    ('attend', 1.0, 3.0),
  ]
  assert profile.kernels(events, steps=2, most=1) == [('gemm', 1.0, 4.0)]
  assert profile.idle_part(events) == pytest.approx(1000 / 15000)
  console = rich.console.Console(file=io.StringIO(), width=80)
  tables.show(
    console,
    'engine',
    [{'point': 'kernels, decode', 'kernels': profile.kernels(events, 2)}],
  )
  assert 'attend' in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
  ('intervals', 'expected'),
  [
    ([], None),
    ([(3, 3)], None),
    ([(0, 10)], 0.0),
    ([(0, 4), (6, 10)], 0.2),
    ([(6, 10), (0, 4)], 0.2),
    ([(0, 8), (1, 2), (7, 9), (9, 10)], 0.0),  # streams beside each other
  ],
)
def test_idle_part(
  intervals: list[tuple[float, float]], expected: float | None
) -> None:
  assert profile.idle_part(
    profile.Event('', start, end - start) for start, end in intervals
  ) == (expected if expected is None else pytest.approx(expected))


def test_kernels_are_compared_by_point() -> None:
  rows = [
    {'point': 'prefill 512 after 0', 'kind': 'prefill', 'us': 12.0},
    {'point': 'prefill 512 after 0 cudnn', 'us': 5.0},
    {'point': 'decode 1 x 512', 'kind': 'decode', 'error': 'none'},
  ]
  found = {
    'attention': rows,
    'mosaic': [
      {'point': 'prefill 512 after 0', 'kind': 'prefill', 'us': 8.0},
      {'point': 'decode 1 x 512', 'kind': 'decode', 'us': 3.0},
    ],
  }
  assert targets.over_mosaic(found) == {'prefill 512 after 0': 1.5}
  assert not targets.over_mosaic(
    {'mosaic': [{'point': 'pallas_mosaic', 'absent': 'no Hopper'}]}
  )


def test_the_best_sizes_are_so_for_all_batches() -> None:
  numbers = dict(rows=64, block_n=32, num_warps=4, num_stages=2)
  numbers |= dict(kernel='chunks')
  found = {
    'tune': [
      {'batch': 'a', **numbers, 'us': 10.0},
      {'batch': 'b', **numbers, 'us': 20.0},
      {'batch': 'a', **numbers, 'num_warps': 8, 'us': 20.0},
      {'batch': 'b', **numbers, 'num_warps': 8, 'us': 5.0},
      {'batch': 'a', **numbers, 'num_stages': 3, 'us': 1.0},  # not with b
      {'batch': 'a', **numbers, 'kernel': 'small', 'us': 3.0},
      {**numbers, 'num_stages': 3, 'absent': 'shared memory'},
    ]
  }
  small, first, second = targets.best_sizes(found)
  assert (small['kernel'], small['over_best']) == ('small', 1)
  assert (first['num_warps'], second['num_warps']) == (8, 4)
  assert first['over_best'] == pytest.approx((20 * 1) ** 0.5)
  assert second['over_best'] == pytest.approx((10 * 4) ** 0.5)


def test_targets_take_the_worst() -> None:
  def row(
    kind: str,
    decodes: int,
    context: int,
    chunk: int,
    before: int,
    us: float,
    **more: float,
  ) -> dict[str, Any]:
    batch = attention.Batch(kind, decodes, context, chunk, before)
    return {
      'point': batch.name,
      'kind': kind,
      'decodes': decodes,
      'context': context,
      'chunk': chunk,
      'before': before,
      'us': us,
      **more,
    }

  found = {
    'attention': [
      row('decode', 64, 1024, 0, 0, 10, of_copy=0.9, of_matmul=0.1),
      row('decode', 64, 2048, 0, 0, 20, of_copy=0.8, of_matmul=0.1),
      row('decode', 1, 32768, 0, 0, 5, of_copy=0.75, of_matmul=0.1),
      row('prefill', 0, 0, 512, 0, 10, of_copy=0.1, of_matmul=0.7),
      {
        'point': 'prefill 512 after 0 cudnn',
        'us': 12,
        'alternative_to': 'prefill 512 after 0',
      },
      row('hybrid', 64, 1024, 448, 0, 11),
      row('part', 64, 1024, 0, 0, 6),
      row('part', 0, 0, 448, 0, 6),
    ],
    'torch': [
      {
        'point': 'prefill 512 after 0 torch',
        'us': 8,
        'alternative_to': 'prefill 512 after 0',
      }
    ],
    'engine': [
      {'point': 'decode 64 x 1 after 2047', 'of_floor': 1.2},
    ],
    'filters': [{'point': 'normal 64 x 32000 pallas_triton', 'us': 90.0}],
    'variants': [
      {'point': 'as served', 'tokens': [5, 6, 7, 8]},
      {'point': 'split-K', 'tokens': [5, 6, 7, 8]},
      {'point': 'no graphs', 'tokens': [5, 6, 9, 8]},
    ],
  }
  verdicts = [(v['worst'], v['met']) for v in targets.judge(found)]
  assert verdicts == [
    (0.8, 'no'),
    (0.75, 'yes'),
    (0.7, 'yes'),
    (0.8, 'no'),
    (pytest.approx(11 / 12), 'yes'),
    (1.2, 'yes'),
    (None, 'not measured'),
    (90, 'yes'),
    (0.75, 'no'),
    *[(None, 'not measured')] * 2,
  ]
