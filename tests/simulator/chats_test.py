# SPDX-License-Identifier: Apache-2.0
"""Chats: what their turns are, when they come, and what a cache saves them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.simulator import asking
from sarathi_jax.simulator import chats as chats_lib
from sarathi_jax.simulator import open_loop
from sarathi_jax.simulator import workload as workload_lib
from tests.simulator import simulate_test

Config = workload_lib.WorkloadConfig


def make(**fields: Any) -> workload_lib.Workload:
  return workload_lib.make(
    Config(
      **(
        dict(
          source='chat_turns',
          num_requests=2000,
          turns=4,
          think_s=20,
          system_len=100,
        )
        | fields
      )
    )
  )


def test_a_turn_has_all_before_it() -> None:
  made = make()
  chats = made.chats
  assert chats is not None
  for i, before in enumerate(chats.after):
    said = chats.system_len
    if before >= 0:
      assert before < i
      said = made.prompt_lens[before] + made.output_lens[before]
      assert made.arrived_at[i] == pytest.approx(
        made.arrived_at[before] + chats.think_s[i]
      )
    assert made.prompt_lens[i] == said + chats.question_lens[i]
  assert len(set(chats.after[chats.after >= 0])) == (chats.after >= 0).sum()
  assert (np.diff(made.arrived_at) >= 0).all()
  assert (made.prompt_lens + made.output_lens).max() <= 8192


def test_turns_pauses_and_rates_are_those_asked_for() -> None:
  made = make(num_requests=20_000, max_chat_len=10**6, qps=3)
  chats = made.chats
  assert chats is not None
  is_first = chats.after < 0
  assert len(made) / is_first.sum() == pytest.approx(4, rel=0.05)
  assert chats.think_s[~is_first].mean() == pytest.approx(20, rel=0.05)
  assert made.qps == pytest.approx(3, rel=0.01)
  fast = made.at_rate(6)
  assert fast.qps == pytest.approx(6, rel=0.01)
  assert fast.chats is not None
  # The same chats, which begin at twice the rate and think as long.
  assert sorted(fast.prompt_lens) == sorted(made.prompt_lens)
  assert sorted(fast.chats.think_s) == sorted(chats.think_s)
  first = made.arrived_at[is_first]
  np.testing.assert_allclose(
    fast.arrived_at[fast.chats.after < 0], (first - first[0]) / 2
  )


def test_no_chat_is_longer_than_it_may() -> None:
  made = make(max_chat_len=400, system_len=300)
  assert (made.prompt_lens + made.output_lens).max() <= 400
  assert (made.output_lens >= 1).all()


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'turns': 0.5}, 'turns=0.5: must be >= 1'),
    ({'think_s': -1}, 'think_s=-1: must be seconds >= 0'),
    ({'arrivals': 'artifact'}, 'can arrive by poisson or gamma only'),
    ({'system_len': 8191}, 'leaves nothing of max_chat_len=8192'),
  ],
)
def test_what_can_not_be(fields: dict[str, Any], message: str) -> None:
  with pytest.raises(errors.ConfigError, match=message):
    make(**fields)


def test_a_live_server_is_not_asked_for_chats() -> None:
  with pytest.raises(errors.ConfigError, match='can only be simulated'):
    open_loop.requests(make(num_requests=5), 1000)


def chat(*turns: tuple[int, int, float, int]) -> workload_lib.Workload:
  """Makes one of (question's length, answer's, pause, the turn before)."""
  question, output, think_s, after = (
    np.array(x) for x in zip(*turns, strict=True)
  )
  prompts: list[int] = []
  for i, before in enumerate(after):
    said = prompts[before] + output[before] if before >= 0 else 4
    prompts.append(int(said + question[i]))
  return dataclasses.replace(
    simulate_test.make_workload(*[(0.0, n, 1) for n in prompts]),
    output_lens=output,
    chats=chats_lib.Chats(after, think_s.astype(float), question, 4),
  )


def test_a_turn_comes_after_the_answer_and_says_it() -> None:
  coming = asking.Asking(
    chat((6, 2, 0, -1), (5, 1, 7, 0), (6, 1, 0, -1)), began=10.0
  )
  first, other = coming.take(10.0)
  assert first.prompt_token_ids == (1, 1, 1, 1, 3, 3, 3, 3, 2, 2)
  assert other.prompt_token_ids[:5] == (1, 1, 1, 1, 5)
  assert coming.next_at == float('inf')
  coming.hear(types.OutputDelta('0', '', (8,), (0.0,)), 20.0)
  length = types.FinishReason.LENGTH
  coming.hear(types.OutputDelta('0', '', (9,), (0.0,), length), 30.0)
  coming.hear(types.OutputDelta('2', '', (9,), (0.0,), length), 30.0)
  assert coming.next_at == 37.0 and not list(coming.take(36.0))
  (second,) = coming.take(37.0)
  assert second.prompt_token_ids == (
    *first.prompt_token_ids,
    *(8, 9),
    *(4, 3, 3, 3, 2),
  )
  assert second.arrival_time == 37.0
  assert coming.next_at == float('inf')


def test_the_cache_saves_what_was_said() -> None:
  turns = chat((16, 4, 0, -1), (16, 4, 100, 0), (16, 4, 1000, -1))
  cold, _, late = simulate_test.run(turns, token_budget=64, prefix_cache=False)
  hot, _, soon = simulate_test.run(turns, token_budget=64)
  # Two prompts of 20 tokens, then decodes; the next turn's prompt has 40.
  assert late == {
    0: [40, 42, 44, 46],
    1: [186, 187, 188, 189],
    2: [40, 42, 44, 46],
  }
  # Of the other prompt the first 4 tokens are found, of the turn all 23 that
  # were computed.
  assert soon[1][0] < late[1][0]
  assert cold.found == 0 and hot.found == 27 / 80


def test_runs_of_chats_are_complete_and_the_same_by_seed() -> None:
  made = make(num_requests=60, length_scale=0.02, system_len=8, qps=0.01)
  fields = dict(max_model_len=400, num_pages=400, token_budget=16)
  one, _, tokens = simulate_test.run(made, **fields)
  same, _, _ = simulate_test.run(made, **fields)
  assert one.requests == same.requests and one.is_complete
  assert len(one.requests) == 60
  assert {i: len(t) for i, t in tokens.items()} == dict(
    enumerate(made.output_lens)
  )
  cold, _, _ = simulate_test.run(made, prefix_cache=False, **fields)
  assert cold.found == 0 and one.found > 0.3
  assert one.p50_ttft_s < cold.p50_ttft_s
