# SPDX-License-Identifier: Apache-2.0
"""What the serving loop counts, on a clock that can be checked by hand."""

from __future__ import annotations

import dataclasses

from sarathi_jax import types
from tests.engine import harness

finish, make_engine = harness.finish, harness.make_engine
request, step = harness.make_request, harness.step


def test_metrics_by_hand() -> None:
  """b waits for one of two slots; each step takes a second."""
  clock = harness.Clock()
  engine = make_engine(
    clock=clock, token_budget=4, max_num_seqs=1, short_prompt_share=0.0
  )
  engine.add(request('a', range(6), 3))
  clock.now = 0.5
  engine.add(request('b', [9], 2, arrival_time=0.25))
  found = finish(engine)
  # Steps at 0.5: a[0,4), 1.5: a[4,6), 2.5: a6, 3.5: a7, 4.5: b[0,1), 5.5: b1.
  assert found['a'][-1].metrics == types.RequestMetrics(
    num_prompt_tokens=6,
    num_output_tokens=3,
    num_preemptions=0,
    scheduling_delay_s=0.5,
    ttft_s=1.5,
    tpot_s=1.0,
    e2e_s=3.5,
    max_tbt_s=1.0,
  )
  assert found['b'][-1].metrics == types.RequestMetrics(
    num_prompt_tokens=1,
    num_output_tokens=2,
    num_preemptions=0,
    scheduling_delay_s=4.25,
    ttft_s=4.25,
    tpot_s=1.0,
    e2e_s=5.25,
    max_tbt_s=1.0,
  )
  metrics = engine.metrics
  assert (metrics.num_steps, metrics.num_scheduled_tokens) == (6, 10)
  assert (metrics.num_prompt_tokens, metrics.num_output_tokens) == (7, 5)
  assert (metrics.num_finished, metrics.num_aborted) == (2, 0)
  assert (metrics.ttft_s.count, metrics.tbt_s.count) == (2, 3)
  assert metrics.scheduling_delay_s.total == 4.75


def test_the_longest_gap_between_tokens_shows() -> None:
  clock = harness.Clock()
  engine = make_engine(clock=clock)
  engine.add(request('a', [1], 4))
  for gap in (0.5, 3.0, 0.25):
    engine.step()
    clock.now += gap
  metrics = finish(engine)['a'][-1].metrics
  assert metrics is not None
  assert metrics.max_tbt_s == 3.0
  assert metrics.tpot_s == 3.75 / 3


def test_a_single_token_has_no_time_between_tokens() -> None:
  engine = make_engine()
  engine.add(request('a', [1], 1))
  metrics = finish(engine)['a'][-1].metrics
  assert metrics is not None
  assert (metrics.ttft_s, metrics.tpot_s, metrics.max_tbt_s) == (0, None, None)


def test_stats() -> None:
  engine = make_engine(max_num_seqs=2, look_ahead=True)
  for i, name in enumerate('abc'):
    engine.add(request(name, [i, 2, 3, 4, 5], 9))
  step(engine)
  stats = dataclasses.asdict(engine.stats())
  expected = dict(
    num_running=2,
    num_waiting=1,
    num_in_flight=1,
    num_pages=64,
    num_free_pages=60,
    num_preemptions=0,
    num_steps=2,
    padding_waste=0.0,
  )
  assert {name: stats[name] for name in expected} == expected


def test_padding_is_counted() -> None:
  class Padded(harness.ScriptRunner):
    def num_rows(self, num_tokens: int) -> int:
      return 8

  engine = make_engine(runner=Padded({'a': (1, 2)}))
  engine.add(request('a', [1, 2, 3], 2))
  finish(engine)
  assert engine.stats().padding_waste == (5 + 7) / 16
