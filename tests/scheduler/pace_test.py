# SPDX-License-Identifier: Apache-2.0
"""The budget that follows the time between tokens."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.engine import fake_runner
from sarathi_jax.scheduler import pace
from sarathi_jax.scheduler import pacing
from sarathi_jax.scheduler import step_time

MS = 1e-3


def true_seconds(load: step_time.Load) -> float:
  """10 ms, 0.05 ms for each further token, and attention."""
  tokens, num_decodes, context, pairs = load
  return (
    (10 + 0.05 * (tokens - 1)) * MS
    + num_decodes * 2e-5
    + (context * 1e-8 + pairs * 1e-8)
  )


def random_load(rng: random.Random) -> step_time.Load:
  num_decodes = rng.choice([0, 1, 8, 64])
  chunk = (
    rng.choice([0, 7, 15, 31, 64, 120, 250, 448, 960, 1984])
    if (num_decodes)
    else rng.choice([8, 16, 32, 512])
  )
  return (
    num_decodes + chunk,
    num_decodes,
    num_decodes * rng.randrange(4000),
    chunk * rng.randrange(8000),
  )


@pytest.mark.parametrize('noise', [0.0, 0.1])
def test_the_model_learns(noise: float) -> None:
  rng = random.Random(0)
  model = step_time.StepTimeModel(2048)
  for _ in range(2000):
    load = random_load(rng)
    model.observe(load, true_seconds(load) * rng.uniform(1 - noise, 1 + noise))
  for _ in range(200):
    load = random_load(rng)
    assert model.predict(load) == pytest.approx(
      true_seconds(load), rel=0.05 + noise / 3
    )
  assert model.spread == pytest.approx(noise, abs=0.05)


def test_the_model_follows_a_device_that_becomes_slower() -> None:
  rng = random.Random(0)
  model = step_time.StepTimeModel(2048)
  for factor in (1, 2):
    for _ in range(20_000):
      load = random_load(rng)
      model.observe(load, factor * true_seconds(load))
  errors_ = [
    model.predict(load) / (2 * true_seconds(load)) - 1
    for load in (random_load(rng) for _ in range(100))
  ]
  assert max(map(abs, errors_)) < 0.15


def test_padded_rows_take_time() -> None:
  """Steps of 65 to 128 tokens are all padded to 128, and take the same."""
  model = step_time.StepTimeModel(
    128, lambda n: 1 << max(3, (n - 1).bit_length())
  )
  rng = random.Random(0)
  for _ in range(500):
    n = rng.randrange(1, 129)
    model.observe((n, 0, 0, 0), model.num_rows(n) * MS)
  for n in (1, 8, 9, 33, 64, 65, 128):
    assert model.predict((n, 0, 0, 0)) == pytest.approx(
      model.num_rows(n) * MS, rel=0.02
    )


def test_a_noisy_machine_does_not_mislead() -> None:
  """Steps of which one in ten takes ten times as long."""
  rng = random.Random(0)
  model = step_time.StepTimeModel(2048)
  for _ in range(5000):
    load = random_load(rng)
    model.observe(load, true_seconds(load) * rng.choice([1] * 9 + [10]))
  for _ in range(200):
    load = random_load(rng)
    assert 0.8 < model.predict(load) / true_seconds(load) < 1.5
  assert list(model.recent)[-1][0] != load
  assert len(model.recent) == 5000


def make(
  tbt_slo_ms: float | None = 50.0, learn: bool = True, **fields: Any
) -> scheduler_lib.Scheduler:
  scheduler = scheduler_lib.policy_class('sarathi')(
    config_lib.SchedulerConfig(
      **(
        dict(
          token_budget=2048,
          max_num_seqs=128,
          max_model_len=16384,
          num_pages=4096,
          page_size=64,
          short_prompt_share=0.0,
          look_ahead=False,
          tbt_slo_ms=tbt_slo_ms,
        )
        | fields
      )
    )
  )
  if scheduler.pace is not None and learn:
    rng = random.Random(1)
    for _ in range(2000):
      load = random_load(rng)
      scheduler.pace.model.observe(load, true_seconds(load))
  return scheduler


def add(
  scheduler: scheduler_lib.Scheduler,
  request_id: str,
  prompt_len: int,
  tier: str = 'interactive',
) -> None:
  scheduler.add(
    types.Request(
      request_id=request_id,
      prompt_token_ids=(1,) * prompt_len,
      tier=tier,
      sampling=types.SamplingParams(max_tokens=100, ignore_eos=True),
    )
  )


def step(scheduler: scheduler_lib.Scheduler) -> types.ScheduledBatch:
  batch = scheduler.schedule(0.0)
  scheduler.complete(
    batch,
    types.Sampled.of(batch.chunks, itertools.repeat(0), itertools.repeat(0.0)),
  )
  return batch


def test_nothing_bounds_a_step_without_decodes() -> None:
  scheduler = make()
  add(scheduler, 'long', 9000)
  assert step(scheduler).num_tokens == 2048


def rate(load: step_time.Load) -> float:
  """Tokens of prompts a second."""
  return (load[0] - load[1]) / true_seconds(load)


@pytest.mark.parametrize('slo_ms', [20, 30, 50, 100, 150])
def test_a_step_with_decodes_keeps_the_target_and_uses_it(
  slo_ms: float,
) -> None:
  scheduler = make(slo_ms)
  for i in range(40):
    add(scheduler, f'short {i}', 50)
  step(scheduler)
  add(scheduler, 'long', 15000)
  for _ in range(5):
    batch = step(scheduler)
    load = step_time.load_of(batch.chunks)
    assert load[1] == 40  # No ready decode is left out.
    assert true_seconds(load) <= slo_ms * MS
    # No budget inside the target computes prompts faster, by more than what
    # the model may be wrong by.
    start = batch.chunks[-1].start
    for n in range(88, 2009, 128):
      other = (40 + n, 40, load[2], n * (2 * start + n) // 2)
      if true_seconds(other) < 0.9 * slo_ms * MS:
        assert rate(other) < 1.1 * rate(load)


def test_the_chunk_shrinks_as_the_prefix_grows() -> None:
  scheduler = make(60.0)
  add(scheduler, 'short', 50)
  step(scheduler)
  add(scheduler, 'long', 16000)
  sizes = [step(scheduler).num_tokens for _ in range(30)]
  assert sizes[0] > sizes[-1] > 0
  assert sizes == sorted(sizes, reverse=True)


def test_batch_requests_bound_steps_by_their_own_target() -> None:
  sizes = {}
  for tier, batch_slo in (
    ('interactive', None),
    ('batch', None),
    ('batch', 150.0),
  ):
    scheduler = make(40.0, batch_tbt_slo_ms=batch_slo)
    add(scheduler, 'short', 50, tier)
    step(scheduler)
    add(scheduler, 'long', 15000)
    sizes[tier, batch_slo] = step(scheduler).num_tokens
  assert sizes['batch', None] == 2048
  assert sizes['interactive', None] < sizes['batch', 150.0] < 2048


def test_stages_share_the_target() -> None:
  sizes = []
  for stages in (1, 2):
    scheduler = make(100.0, num_stages=stages)
    add(scheduler, 'short', 50)
    step(scheduler)
    add(scheduler, 'long', 15000)
    sizes.append(step(scheduler).num_tokens)
  assert sizes[1] == pytest.approx(sizes[0] / 2, abs=128)


def chunk_of_long(stages: int, num_slots: int, num_behind: int = 0) -> int:
  """Returns the tokens of a prompt of 1500 that join 60 decodes."""
  scheduler = make(
    400.0 * stages,
    num_stages=stages,
    max_num_seqs=num_slots,
    prefix_cache=False,
  )
  for i in range(60):
    add(scheduler, f'short {i}', 30)
  step(scheduler)
  add(scheduler, 'long', 1500)
  for i in range(num_behind):
    add(scheduler, f'behind {i}', 1500)
  return step(scheduler).chunks[-1].num_tokens


def test_a_pipeline_spreads_prompts_over_steps() -> None:
  """A long step among short ones has all other stages wait."""
  assert chunk_of_long(1, 128) == chunk_of_long(1, 61) == 1500
  for stages in (2, 4):
    assert chunk_of_long(stages, 61) < chunk_of_long(stages, 128) < 1000


def test_prompts_without_slots_make_no_step_longer() -> None:
  assert chunk_of_long(2, 61) == chunk_of_long(2, 61, num_behind=10)


def test_most_first_tokens_must_be_late_before_steps_grow() -> None:
  """The same prompt, late, after others that were in time or were not."""
  sizes = {}
  for waited_s in (0.0, 30.0):
    scheduler = make(30.0, ttft_slo_ms=1000.0)
    add(scheduler, 'first', 50)
    step(scheduler)
    assert scheduler.pace is not None
    for _ in range(20):
      scheduler.pace.answer(pace.Prompt(0, 50, waited_s))
    add(scheduler, 'late', 9000)
    sizes[waited_s] = scheduler.schedule(5.0).num_tokens
  assert sizes[0.0] < 512 < sizes[30.0]


def test_tiers_are_named() -> None:
  with pytest.raises(errors.InvalidRequestError, match="tier='slow'"):
    types.Request(request_id='x', prompt_token_ids=(1,), tier='slow')


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(tbt_slo_ms=0), 'must be milliseconds > 0'),
    (dict(tbt_slo_ms=float('nan')), 'must be milliseconds > 0'),
    (dict(batch_tbt_slo_ms=5), 'needs tbt_slo_ms'),
    (dict(tbt_slo_ms=5, policy='vllm'), 'only sarathi has'),
  ],
)
def test_bad_targets(fields: dict, message: str) -> None:
  with pytest.raises(errors.ConfigError, match=message):
    scheduler_lib.class_of(config_lib.EngineConfig(**fields))


class TimedRunner(fake_runner.FakeRunner):
  """Takes as long as `true_seconds` says, on a clock of its own."""

  def __init__(self, max_num_seqs: int) -> None:
    super().__init__(100, max_num_seqs)
    self.now = 0.0

  def launch(self, batch: types.ScheduledBatch) -> types.Sampled:
    self.now += true_seconds(step_time.load_of(batch.chunks))
    return super().launch(batch)


@pytest.mark.parametrize(('ttft_slo_ms', 'said'), [(1e6, 0), (None, 1)])
def test_what_cannot_be_held_is_said_once(
  ttft_slo_ms: float | None, said: int, caplog: pytest.LogCaptureFixture
) -> None:
  """100 decodes, beside a prompt that has waited for a while."""
  scheduler = make(20.0, learn=False, ttft_slo_ms=ttft_slo_ms)
  runner = TimedRunner(128)
  paced = pacing.paced(runner, scheduler, lambda: runner.now)
  for i in range(100):
    add(scheduler, str(i), 20)
  for _ in range(10):
    batch = scheduler.schedule(runner.now)
    scheduler.complete(batch, paced.fetch(paced.launch(batch)))
  add(scheduler, 'waiting', 9000)
  for _ in range(5):
    runner.now += 6.0
    batch = scheduler.schedule(runner.now)
    assert batch.chunks[-1].is_prefill
    scheduler.complete(batch, paced.fetch(paced.launch(batch)))
  lines = [r.getMessage() for r in caplog.records]
  assert len(lines) == said
  if said:
    assert re.fullmatch(
      'tbt_slo_ms=20 cannot be held at this load; at least '
      r'\d+ ms\.',
      lines[0],
    )


def test_warming_up_teaches_enough() -> None:
  scheduler = make(learn=False)
  runner = TimedRunner(128)
  pacing.paced(runner, scheduler, lambda: runner.now)
  assert scheduler.pace is not None
  rng = random.Random(2)
  for _ in range(100):
    load = random_load(rng)
    assert scheduler.pace.model.predict(load) == pytest.approx(
      true_seconds(load), rel=0.2
    ), load


@pytest.mark.parametrize(
  'fields',
  [
    dict(num_pages=4, max_model_len=64, max_num_seqs=128),
    dict(
      token_budget=8, max_num_seqs=4, num_pages=8, page_size=4, max_model_len=20
    ),
  ],
)
def test_warming_up_fits_any_cache(fields: dict) -> None:
  scheduler = make(learn=False, **fields)
  runner = TimedRunner(128)
  pacing.paced(runner, scheduler, lambda: runner.now)
  assert scheduler.pages.num_free == scheduler.pages.num_pages


def test_a_target_that_nothing_meets_is_refused() -> None:
  scheduler = make(5.0, learn=False)
  runner = TimedRunner(128)
  with pytest.raises(errors.ConfigError, match=r'decode takes 10 ms here'):
    pacing.paced(runner, scheduler, lambda: runner.now)
