# SPDX-License-Identifier: Apache-2.0
"""Simulations whose times can be told by hand; the same engine, any clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import gzip
import itertools
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.scheduler import step_time
from sarathi_jax.simulator import paper
from sarathi_jax.simulator import runner as runner_lib
from sarathi_jax.simulator import simulate
from sarathi_jax.simulator import trace
from sarathi_jax.simulator import workload as workload_lib
from tests.simulator import cost_model_test


class TokenCost:
  """A second for each token, in each of `pp` stages."""

  def __init__(self, pp: int = 1, lockstep: bool = False) -> None:
    self.pp = pp
    self.lockstep = lockstep

  def step_seconds(self, chunks: Iterable[types.Chunk]) -> Sequence[float]:
    return [float(sum(c.num_tokens for c in chunks))] * self.pp

  def num_rows(self, num_tokens: int) -> int:
    return num_tokens


def make_workload(*requests: tuple[float, int, int]) -> workload_lib.Workload:
  """(arrival, prompt length, output length) of each."""
  arrived, prompt, output = zip(*requests, strict=True)
  return workload_lib.Workload(
    arrived_at=np.array(arrived, float),
    prompt_lens=np.array(prompt),
    output_lens=np.array(output),
    is_batch=np.zeros(len(requests), bool),
  )


def run(
  workload: workload_lib.Workload,
  policy: str = 'sarathi',
  cost: Any = None,
  **fields: Any,
) -> tuple[simulate.Result, list[runner_lib.Span], dict[int, list[float]]]:
  """Simulates; returns spans and each request's token times, too."""
  cost = cost or TokenCost()
  config = config_lib.SchedulerConfig(
    **(
      dict(
        token_budget=8,
        max_num_seqs=4,
        max_model_len=64,
        num_pages=64,
        page_size=4,
        look_ahead=False,
        num_stages=cost.pp,
      )
      | fields
    )
  )
  info = engine_lib.EngineInfo.of(config, policy=policy, vocab_size=10)
  spans: list[runner_lib.Span] = []
  tokens: dict[int, list[float]] = {}
  result = simulate.simulate_steps(
    scheduler_lib.policy_class(policy)(config),
    cost,
    workload,
    info=info,
    on_span=spans.append,
    on_token=lambda i, now: tokens.setdefault(i, []).append(now),
  )
  return result, spans, tokens


def test_chunks_beside_decodes_take_as_long_as_their_tokens() -> None:
  _, _, tokens = run(make_workload((0, 4, 4), (1, 12, 1)))
  # 0-4 prefill of 4; 4-12 a decode and 7 of 12; 12-18 a decode and 5; 18-19.
  assert tokens == {0: [4, 12, 18, 19], 1: [18]}


def test_whole_prompts_stall_decodes() -> None:
  _, _, tokens = run(make_workload((0, 4, 4), (1, 12, 1)), 'vllm')
  # 0-4, then 12 of the other's prompt before the next decode.
  assert tokens == {0: [4, 17, 18, 19], 1: [16]}


def test_halves_of_sarathi() -> None:
  workload = make_workload((0, 4, 3), (1, 12, 1))
  _, _, hybrid = run(workload, 'hybrid_only')
  assert hybrid == {0: [4, 17, 18], 1: [17]}  # a decode beside all 12
  _, _, chunked = run(workload, 'chunked_only')
  # Turns: 4 of a prompt, a decode, 8, a decode, the last 4.
  assert chunked == {0: [4, 5, 14], 1: [18]}


def test_a_prompt_waits_for_the_step_under_way_alone() -> None:
  """And not for one that look-ahead planned before it came."""
  decodes = (0, 1, 60)
  for arrival, first in (
    (40.5, 45),  # in the next step, of the decode and its 3 tokens
    (40.9, 46),  # which is planned by then
  ):
    _, _, tokens = run(make_workload(decodes, (arrival, 3, 1)), look_ahead=True)
    assert tokens[1] == [first]
    # The device did not wait.
    assert tokens[0][-1] == 60 + 3


def test_steps_vary_as_those_that_were_measured() -> None:
  model = step_time.StepTimeModel(8)
  for i in range(2000):
    model.observe((1, 1, 4, 0), 1.0 if i % 2 else 3.0)
    model.observe((4, 0, 0, 8), 8.0)
  result, _, tokens = run(
    make_workload((0, 4, 41)), cost=runner_lib.FittedCost(model)
  )
  assert tokens[0][0] == pytest.approx(8, rel=0.05)
  gaps = np.diff(tokens[0])
  assert gaps.mean() == pytest.approx(2, rel=0.2)
  assert gaps.min() == pytest.approx(1, rel=0.2)
  assert gaps.max() == pytest.approx(3, rel=0.2)
  assert result.is_complete


def test_idle_time_is_waited_for() -> None:
  result, _, tokens = run(make_workload((5, 4, 1), (105, 4, 1)))
  assert tokens == {0: [4], 1: [104]}  # the first arrival is time 0
  assert result.seconds == 104
  assert result.busy == (pytest.approx(8 / 104),)
  assert [m.ttft_s for m in result.requests] == [4, 4]
  assert result.metrics.num_finished == 2


def test_stages_overlap() -> None:
  """Two micro-batches in two stages: a new one each second, not two."""
  _, spans, tokens = run(make_workload((0, 8, 3), (0, 8, 3)), cost=TokenCost(2))
  of = {s: [(x.start, x.end) for x in spans if x.stage == s] for s in (0, 1)}
  assert of[0][:2] == [(0, 8), (8, 16)]
  assert of[1][:2] == [(8, 16), (16, 24)]
  assert tokens[0][0] == 16
  assert tokens[1][0] == 24


def test_stages_in_lockstep_wait_for_the_slowest() -> None:
  workload = make_workload((0, 8, 1), (0, 2, 1))
  _, spans, tokens = run(
    workload, cost=TokenCost(2, lockstep=True), short_prompt_share=0.0
  )
  assert [(s.stage, s.start, s.end) for s in spans] == [
    (0, 0, 8),
    (0, 8, 10),
    (1, 8, 16),
    (1, 16, 18),
  ]
  assert tokens == {0: [16], 1: [18]}


def test_a_trace_shows_hybrid_batches_and_bubbles(
  tmp_path: pathlib.Path,
) -> None:
  chrome = trace.ChromeTrace()
  _, spans, _ = run(
    make_workload((0, 4, 4), (1, 12, 1), (2, 8, 2)), cost=TokenCost(2)
  )
  for span in spans:
    chrome.add(span)
  chrome.write(str(tmp_path / 'trace.json'))
  chrome.write(str(tmp_path / 'trace.json.gz'))
  text = (tmp_path / 'trace.json').read_text()
  assert (
    gzip.decompress((tmp_path / 'trace.json.gz').read_bytes()).decode() == text
  )
  events = json.loads(text)['traceEvents']
  steps = [e for e in events if e['ph'] == 'X']
  assert {e['tid'] for e in steps} == {0, 1}
  assert {e['name'] for e in steps} == {'prefill', 'hybrid', 'decode'}
  for event in steps:
    assert event['args']['num_tokens'] == (
      event['args']['num_decodes'] + sum(event['args']['chunks'])
    )
    assert event['dur'] == event['args']['num_tokens'] * 1e6
  for stage in (0, 1):  # One thing at a time.
    ends = [(e['ts'], e['ts'] + e['dur']) for e in steps if e['tid'] == stage]
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))


def test_runs_are_the_same_by_seed() -> None:
  cost = cost_model_test.cost_of(paper.MISTRAL, 'paper')
  config = config_lib.EngineConfig(max_model_len=16384)
  workload = workload_lib.make(
    workload_lib.WorkloadConfig(num_requests=50, qps=1.5, seed=3)
  )
  one, same = (simulate.simulate(cost, config, workload) for _ in range(2))
  assert one.requests == same.requests
  assert one.seconds == same.seconds
  assert one.metrics.num_output_tokens == workload.output_lens.sum()


def test_too_long_requests_are_told_before() -> None:
  cost = cost_model_test.cost_of(paper.MISTRAL)
  with pytest.raises(errors.ConfigError, match='exceeds max_model_len=100'):
    simulate.simulate(
      cost,
      config_lib.EngineConfig(max_model_len=100),
      make_workload((0, 90, 20)),
    )


def test_what_is_not_simulated_is_refused() -> None:
  with pytest.raises(errors.ConfigError, match='deterministic=True: must be f'):
    simulate.simulate(
      cost_model_test.cost_of(paper.MISTRAL),
      config_lib.EngineConfig(deterministic=True),
      make_workload((0, 90, 20)),
    )


def test_an_early_end_leaves_the_engine_in_order() -> None:
  clock = runner_lib.Clock()
  config = config_lib.SchedulerConfig(
    token_budget=8, max_num_seqs=4, max_model_len=64, num_pages=64, page_size=4
  )
  engine = engine_lib.Engine(
    scheduler_lib.policy_class('sarathi')(config),
    runner_lib.SimulatedRunner(TokenCost(), clock),
    clock=clock,
    info=engine_lib.EngineInfo.of(config, policy='sarathi', vocab_size=10),
  )
  workload = make_workload(*[(i, 8, 8) for i in range(8)])
  result = simulate.drive(
    engine,
    workload,
    wait_until=clock.advance_to,
    stop_when=lambda engine, now: now > 30,
  )
  assert not result.is_complete
  assert not engine.has_work
  assert engine.stats().num_free_pages == 64
  again = simulate.drive(engine, workload, wait_until=clock.advance_to)
  assert again.is_complete
  assert len(again.requests) == 8


def test_tiers_have_times_of_their_own() -> None:
  workload = dataclasses.replace(
    make_workload((0, 4, 4), (0, 4, 4)), is_batch=np.array([False, True])
  )
  result, _, tokens = run(workload)
  assert result.interactive_tbt_s is not None
  assert result.interactive_tbt_s.count == 3
  assert result.metrics.tbt_s.count == 6
  assert len(tokens) == 2
