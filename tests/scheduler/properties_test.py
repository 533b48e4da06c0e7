# SPDX-License-Identifier: Apache-2.0
"""What holds under every policy, whatever comes. See `checker`."""

from __future__ import annotations

import dataclasses
import random

import hypothesis
from hypothesis import stateful
from hypothesis import strategies as st
import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import page_groups
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from tests.scheduler import checker as checker_lib

POLICIES = tuple(scheduler_lib.POLICIES)


@dataclasses.dataclass(frozen=True)
class Workload:
  """A configuration, and how wild the driver is.

  Attributes:
    config: of the scheduler.
    num_requests: to be added over the run.
    arrival_rate, abort_rate: chance of one before a step.
    eager: the chance to complete a batch before more can't be launched.
    stop_rate: the part of the vocabulary that ends a request.
    priorities: that requests have.
    most: the most sequences of a request.
    beginnings: the names of what prompts may begin with.
    clients: who sends them.
  """

  config: config_lib.SchedulerConfig
  num_requests: int
  arrival_rate: float
  abort_rate: float
  eager: float
  stop_rate: float
  priorities: tuple[int, ...]
  most: int
  beginnings: tuple[str, ...]
  clients: tuple[str, ...]


def make_workload(rng: random.Random) -> Workload:
  """Draws one; pages are scarce in most."""
  max_model_len = rng.randint(2, rng.choice((8, 60, 60)))
  page_size = rng.randint(1, rng.choice((2, 8, 16)))
  per_seq = -(-max_model_len // page_size)
  max_num_seqs = rng.randint(1, rng.choice((2, 8, 8)))
  return Workload(
    config=config_lib.SchedulerConfig(
      token_budget=rng.randint(max_num_seqs, max_num_seqs + 24),
      max_num_seqs=max_num_seqs,
      max_model_len=max_model_len,
      num_pages=per_seq + rng.choice((0, 1, per_seq // 2, 8 * per_seq)),
      page_size=page_size,
      num_stages=rng.randint(1, 3),
      look_ahead=rng.random() < 0.5,
      short_prompt_share=rng.choice((0.0, 0.25, 0.9)),
      prefix_cost=(0.0, 0.0, 0.01, 1.0)[max_model_len % 4],
      prefix_cache=rng.random() < 0.8,
      prefix_cache_misses=rng.random() < 0.2,
      cache_aware_window=(1, 2, 1, 2, 1, 5)[max_model_len % 6],
    ),
    num_requests=rng.randint(1, 16),
    arrival_rate=rng.choice((0.2, 0.8, 1.0)),
    abort_rate=rng.choice((0.0, 0.0, 0.05)),
    eager=rng.choice((0.0, 0.3, 1.0)),
    stop_rate=rng.choice((0.0, 0.0, 0.05)),
    priorities=rng.choice(((0,), (0, 0, 0, -1), (3, 0, -2, -(2**31)))),
    most=rng.choice((1, 1, max_num_seqs)),
    beginnings=('a', 'b', 'c')[: rng.randint(0, 3)],
    clients=('', 'ann')[: 1 + (max_num_seqs % 2)],
  )


def make_queue(rng: random.Random) -> Workload:
  """Draws one in which many wait, and some of these would find a lot."""
  workload = make_workload(rng)
  return dataclasses.replace(
    workload,
    config=dataclasses.replace(
      workload.config,
      token_budget=rng.randint(2, 24),
      max_num_seqs=rng.randint(1, 2),
      max_model_len=60,
      num_pages=120,
      page_size=2,
      cache_aware_window=rng.randint(2, 4),
      prefix_cache=True,
      prefix_cache_misses=False,
    ),
    num_requests=24,
    arrival_rate=1.0,
    most=1,
    beginnings=('a', 'b', 'c'),
  )


def with_windows(
  workload: Workload, rng: random.Random, policy: str
) -> Workload:
  """Returns the same with layers in groups, of one window or several."""
  config = workload.config
  drawn = [
    rng.randint(1, config.max_model_len + 1) for _ in range(rng.randint(0, 3))
  ]
  windows = (None,) * rng.randint(not drawn, 2) + (*sorted(drawn)[::-1],)
  in_chunks = scheduler_lib.policy_class(policy).in_chunks
  per_seq = page_groups.num_pages(
    windows,
    config.max_model_len,
    config.page_size,
    1 if in_chunks else config.max_model_len,
  )
  spare = config.num_pages - config.pages_per_seq
  return dataclasses.replace(
    workload,
    config=dataclasses.replace(
      config,
      windows=windows,
      num_pages=per_seq + spare * rng.choice((0, 1, len(windows))),
    ),
  )


def draw_request(
  rng: random.Random, request_id: str, workload: Workload, arrival_time: float
) -> types.Request:
  max_model_len = workload.config.max_model_len
  number = int(request_id[1:])
  beginnings = workload.beginnings[: rng.randint(0, 2)]
  if number and rng.random() < 0.3:  # A later turn, it may be.
    beginnings = (f'r{rng.randrange(number)}',)
  return checker_lib.make_request(
    request_id,
    prompt_len=rng.randint(
      1, max(1, (max_model_len - 1) // rng.choice((1, 10, 10)))
    ),
    max_tokens=rng.choice((None, None, 1, rng.randint(1, max_model_len))),
    stop_token_ids=tuple(range(int(workload.stop_rate * checker_lib.VOCAB))),
    arrival_time=arrival_time,
    priority=rng.choice(workload.priorities),
    n=rng.choice((1, rng.randint(1, workload.most))),
    cache_salt=rng.choice(('', '', '', 'salt')),
    client=workload.clients[number % len(workload.clients)],
    beginnings=tuple(
      (name, rng.choice((9, 20, max_model_len))) for name in beginnings
    ),
  )


def drive(
  checker: checker_lib.Checker, workload: Workload, rng: random.Random
) -> None:
  """Arrivals, steps, late completions and aborts, until all is done."""
  num_added = 0
  now = arrival = 0.0
  while num_added < workload.num_requests:
    now += 1.0
    while (
      num_added < workload.num_requests and rng.random() < workload.arrival_rate
    ):
      # Some are known ahead, as the simulator's are.
      arrival = max(arrival, now + rng.choice((0.0, 0.0, 1.5)))
      checker.add(draw_request(rng, f'r{num_added}', workload, arrival))
      num_added += 1
    if checker.live and rng.random() < workload.abort_rate:
      checker.remove(rng.choice(sorted(checker.live)))
    launched = checker.schedule(now).chunks
    if checker.num_in_flight and (
      not launched or rng.random() < workload.eager
    ):
      checker.complete()
  checker.drain()


def run(policy: str, seed: int) -> checker_lib.Checker:
  rng = random.Random(seed)
  workload = make_workload(rng)
  if seed % 2:
    workload = with_windows(workload, rng, policy)
  checker = checker_lib.make_checker(policy, workload.config)
  drive(checker, workload, rng)
  return checker


@pytest.mark.parametrize('policy', POLICIES)
@hypothesis.given(rng=st.randoms(use_true_random=False))
@hypothesis.settings(max_examples=40)
def test_every_batch_is_right(policy: str, rng: random.Random) -> None:
  workload = make_workload(rng)
  if rng.random() < 0.5:
    workload = with_windows(workload, rng, policy)
  drive(checker_lib.make_checker(policy, workload.config), workload, rng)


@pytest.mark.parametrize('policy', POLICIES)
def test_soak(policy: str) -> None:
  """Some 5,000 steps a policy of what hypothesis would not draw."""
  num_steps = num_preempted = num_finished = num_found = num_within = 0
  seed = 0
  while num_steps < 5000:
    checker = run(policy, seed)
    num_steps += checker.num_steps
    if all(k.request.sampling.n == 1 for k in checker.finished.values()):
      num_preempted += checker.num_preempted
    num_finished += len(checker.finished)
    num_found += checker.num_found
    num_within += checker.num_within
    seed += 1
  assert num_finished > 100
  assert num_found > 100
  assert num_within > 20
  # Where all memory is reserved at first, nothing is preempted but for forks.
  assert bool(num_preempted) == (policy in ('sarathi', 'vllm'))


@pytest.mark.parametrize('policy', POLICIES)
def test_who_finds_the_most_passes_a_few(policy: str) -> None:
  """And nobody more than the window allows, which `checker` counts."""
  num_passed = 0
  for seed in range(10):
    rng = random.Random(seed)
    workload = make_queue(rng)
    if seed % 2:
      workload = with_windows(workload, rng, policy)
    checker = checker_lib.make_checker(policy, workload.config)
    drive(checker, workload, rng)
    num_passed += sum(k.num_passed for k in checker.finished.values())
  print(num_passed)
  assert num_passed > 10


class Machine(stateful.RuleBasedStateMachine):
  """Any order of calls that an engine may make."""

  @stateful.initialize(
    policy=st.sampled_from(POLICIES), rng=st.randoms(use_true_random=False)
  )
  def start(self, policy: str, rng: random.Random) -> None:
    self.workload = make_workload(rng)
    if rng.random() < 0.5:
      self.workload = with_windows(self.workload, rng, policy)
    self.checker = checker_lib.make_checker(policy, self.workload.config)
    self.num_added = 0

  @stateful.rule(rng=st.randoms(use_true_random=False))
  def add(self, rng: random.Random) -> None:
    self.checker.add(
      draw_request(rng, f'r{self.num_added}', self.workload, 0.0)
    )
    self.num_added += 1

  @stateful.rule()
  def schedule(self) -> None:
    self.checker.schedule()

  @stateful.precondition(lambda self: self.checker.num_in_flight)
  @stateful.rule()
  def complete(self) -> None:
    self.checker.complete()

  @stateful.precondition(lambda self: self.checker.live)
  @stateful.rule(data=st.data())
  def remove(self, data: st.DataObject) -> None:
    self.checker.remove(data.draw(st.sampled_from(sorted(self.checker.live))))

  @stateful.precondition(lambda self: not self.checker.num_in_flight)
  @stateful.rule()
  def preempt_all(self) -> None:
    self.checker.preempt_all()

  def teardown(self) -> None:
    if hasattr(self, 'checker'):
      self.checker.drain()


Machine.TestCase.settings = hypothesis.settings(
  max_examples=50, stateful_step_count=40
)
MachineTest = Machine.TestCase
