# SPDX-License-Identifier: Apache-2.0
"""The open-loop client: what it calls TTFT and TBT, on scripts of servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
import contextlib
import time

import numpy as np
import pytest

from sarathi_jax import types
from sarathi_jax.simulator import open_loop
from sarathi_jax.simulator import workload as workload_lib
from tests.server import fake

STEP_S = 0.02


class Script:
  """A server whose prompts say when it sends how many tokens.

  Prompts are pairs: so many steps later, so many tokens; -1 refuses.
  """

  @contextlib.asynccontextmanager
  async def open(self) -> AsyncIterator[open_loop.Ask]:
    async def ask(
      request: open_loop.Request,
    ) -> AsyncIterator[open_loop.Message]:
      prompt = list(request.token_ids)
      for steps, tokens in zip(prompt[::2], prompt[1::2], strict=True):
        await asyncio.sleep(steps * STEP_S)
        if tokens < 0:
          raise open_loop.RequestError('no')
        yield open_loop.Message([7] * tokens)

    yield ask


def run(
  *prompts: list[int],
  limit_s: float = 60,
  tier: str = types.TIERS[0],
) -> open_loop.Seen:
  return asyncio.run(
    open_loop.run(
      Script(),
      [
        open_loop.Request(
          0.0, prompt, sum(n for n in prompt[1::2] if n > 0), tier
        )
        for prompt in prompts
      ],
      limit_s=limit_s,
    )
  )


def test_tokens_of_one_message_waited_for_once() -> None:
  seen = run([2, 1, 3, 1, 4, 3])  # 1 token, 1, and 3 at once
  (outcome,) = seen.outcomes
  assert outcome.ttft_s is not None and outcome.ttft_s >= 2 * STEP_S
  assert seen.tbt_s.count == 4  # of five tokens
  gaps = sorted(seen.tbt_s.quantile(i / 3) or 0 for i in range(4))
  assert gaps[:2] == [pytest.approx(0, abs=1e-6)] * 2
  assert gaps[2] >= 3 * STEP_S * 0.98 and gaps[3] >= 4 * STEP_S * 0.98
  assert outcome.longest_gap_s >= 4 * STEP_S
  assert outcome.e2e_s is not None and outcome.e2e_s >= 9 * STEP_S
  assert seen.num_tokens == 5
  assert seen.tokens_per_message == pytest.approx(5 / 3)


def test_a_server_that_gathers_tokens_has_the_longer_tail() -> None:
  one_by_one = run([1, 1] * 8)
  gathered = run([1, 1, 7, 7])
  assert one_by_one.tbt_s.count == gathered.tbt_s.count == 7
  assert (gathered.tbt_s.quantile(1) or 0) >= 7 * STEP_S * 0.98
  assert (one_by_one.tbt_s.quantile(0) or 0) >= STEP_S * 0.98
  assert (gathered.tbt_s.quantile(0.5) or 0) < STEP_S / 2  # none


def test_what_is_cut_has_waited_so_long() -> None:
  seen = run([1, 1, 1, 1], [10_000, 1], [1, 1, 10_000, 1], limit_s=50 * STEP_S)
  done, not_begun, stuck = seen.outcomes
  assert [o.is_cut for o in seen.outcomes] == [False, True, True]
  assert not any(o.error for o in seen.outcomes)
  assert not_begun.ttft_s is not None
  assert not_begun.ttft_s >= 50 * STEP_S
  assert stuck.longest_gap_s >= 30 * STEP_S
  assert not not_begun.token_ids and not stuck.meets(60, 60)
  assert done.meets(60, 60) and not done.meets(60, STEP_S / 2)
  assert seen.num_tokens == 3  # those that came


def test_a_late_client_does_not_spare_the_server() -> None:
  async def late() -> open_loop.Seen:
    running = asyncio.create_task(
      open_loop.run(Script(), [open_loop.Request(STEP_S, [1, 1], 1)])
    )
    await asyncio.sleep(0)
    time.sleep(5 * STEP_S)  # Nobody runs, as on a busy machine.
    return await running

  (outcome,) = asyncio.run(late()).outcomes
  assert outcome.late_s >= 3 * STEP_S
  assert outcome.ttft_s is not None and outcome.ttft_s >= 4 * STEP_S


def test_what_fails_is_told() -> None:
  seen = run([1, 1, 1, -1], [1, 1])
  assert seen.errors == ['no']
  assert [bool(o.error) for o in seen.outcomes] == [True, False]
  short = asyncio.run(
    open_loop.run(Script(), [open_loop.Request(0.0, [1, 2], 5)])
  )
  assert short.errors == ['2 of 5 tokens came']


def test_gaps_of_the_tier_batch_are_left_out() -> None:
  seen = run([1, 1, 1, 1], tier='batch')
  assert seen.tbt_s.count == 0
  assert seen.outcomes[0].ttft_s is not None


def test_a_run_is_ended_early() -> None:
  seen = asyncio.run(
    open_loop.run(
      Script(),
      [open_loop.Request(0.0, [10_000, 1], 1)],
      stop_when=lambda seen: True,
    )
  )
  assert seen.is_stopped and seen.outcomes[0].is_cut


def test_no_two_prompts_begin_alike() -> None:
  workload = workload_lib.make(
    workload_lib.WorkloadConfig(source='short_chat', num_requests=50)
  )
  asked = open_loop.requests(workload, 8192)
  assert [len(r.token_ids) for r in asked] == list(workload.prompt_lens)
  assert len({tuple(r.token_ids[:8]) for r in asked}) == 50
  assert asked == open_loop.requests(workload, 8192)
  assert asked != open_loop.requests(workload, 8192, seed=1)
  np.testing.assert_allclose([r.arrives_s for r in asked], workload.arrived_at)


def test_a_server_of_sarathi_v1() -> None:
  with contextlib.closing(fake.RunningServer(fake.make_engine)) as server:
    target = open_loop.GrpcTarget(f'127.0.0.1:{server.server.port}')
    assert target.info(fake.TIMEOUT_S).vocab_size == fake.VOCAB_SIZE
    seen = asyncio.run(
      open_loop.run(
        target,
        [open_loop.Request(0.01 * i, [i, i + 1], 3) for i in range(5)]
        + [open_loop.Request(0.0, [1] * 1000, 3)],
      )
    )
    assert server.all_pages_are_free()
  assert [o.token_ids for o in seen.outcomes[:5]] == [
    [i + 2, i + 3, i + 4] for i in range(5)
  ]
  assert 'INVALID_ARGUMENT' in seen.outcomes[5].error
  delays = [o.scheduling_delay_s for o in seen.outcomes[:5]]
  assert all(d is not None and d >= 0 for d in delays)
  with pytest.raises(open_loop.RequestError, match='UNAVAILABLE'):
    asyncio.run(open_loop.run(target, []))
