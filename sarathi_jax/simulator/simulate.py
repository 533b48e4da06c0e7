# SPDX-License-Identifier: Apache-2.0
"""Runs a workload on a simulated deployment: the real engine, virtual time."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import gc
import math

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import metrics as metrics_lib
from sarathi_jax.models import facts
from sarathi_jax.scheduler import pacing
from sarathi_jax.simulator import asking
from sarathi_jax.simulator import cost_model
from sarathi_jax.simulator import runner as runner_lib
from sarathi_jax.simulator import workload as workload_lib

StopWhen = Callable[[engine_lib.Engine, float], bool]
OnToken = Callable[[int, float], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
  """What a run went through. Times are virtual seconds.

  Attributes:
    metrics: the engine's own, as a live one has them.
    requests: metrics of each request, in the order they finished.
    seconds: time from the first arrival to the end.
    num_preemptions: preemptions of all requests.
    busy: fraction of the time that each simulated stage computed, in [0, 1].
    is_complete: False if `stop_when` ended it.
    found: the part of the prompts' tokens that was in the cache, in [0, 1].
    interactive_tbt_s: times between tokens of the tier 'interactive', where
      there are requests of another; these are what an SLO is about.
  """

  metrics: metrics_lib.EngineMetrics
  requests: tuple[types.RequestMetrics, ...]
  seconds: float
  num_preemptions: int
  busy: tuple[float, ...]
  is_complete: bool = True
  found: float = 0.0
  interactive_tbt_s: metrics_lib.Quantiles | None = None

  @property
  def p99_tbt_s(self) -> float:
    tbt_s = self.interactive_tbt_s or self.metrics.tbt_s
    return tbt_s.quantile(0.99) or 0.0

  @property
  def p50_ttft_s(self) -> float:
    return self.metrics.ttft_s.quantile(0.5) or math.inf

  @property
  def p50_scheduling_delay_s(self) -> float:
    value = self.metrics.scheduling_delay_s.quantile(0.5)
    return math.inf if value is None else value


def make_scheduler(
  cost: cost_model.CostModel,
  config: config_lib.EngineConfig,
  max_model_len: int,
) -> scheduler_lib.Scheduler:
  """Makes the scheduler of a deployment whose cache fills the memory left.

  Raises:
    ConfigError: the model, or one sequence, does not fit.
  """
  config_lib.check(
    not config.deterministic,
    'deterministic',
    True,
    'must be false: what such steps take is not simulated',
  )
  num_tokens = scheduler_lib.max_step_tokens(config, max_model_len)
  groups = cost.groups(config, max_model_len)
  return scheduler_lib.make(
    config,
    cost.num_rows,
    max_model_len=max_model_len,
    num_stages=cost.pp,
    num_pages=cost.num_pages(config, num_tokens, groups.num_arrays),
    windows=groups.windows,
    prefix_cost=facts.prefix_cost(cost.model, cost.pp),
  )


def simulate(
  cost: cost_model.CostModel,
  config: config_lib.EngineConfig,
  workload: workload_lib.Workload,
  *,
  on_span: Callable[[runner_lib.Span], None] | None = None,
  stop_when: StopWhen | None = None,
  on_token: OnToken | None = None,
) -> Result:
  """Runs a workload to its end.

  Args:
    cost: the model on its hardware.
    config: the engine's; without max_model_len, sequences may be as long as
      the longest of the workload.
    workload: what comes, and when.
    on_span: told what each stage does.
    stop_when: asked after each step with the engine and the seconds since
      the first arrival; True ends the run early.
    on_token: told of each token: the request's number, and the time.

  Raises:
    ConfigError: the model does not fit into memory, or a request is too long.
  """
  longest = int((workload.prompt_lens + workload.output_lens).max())
  max_model_len = config.max_model_len or longest
  if longest > max_model_len:
    raise errors.ConfigError(
      f'workload: a request of {longest} tokens, prompt and output, exceeds '
      f'max_model_len={max_model_len}.'
    )
  scheduler = make_scheduler(cost, config, max_model_len)
  return simulate_steps(
    scheduler,
    cost,
    workload,
    on_span=on_span,
    stop_when=stop_when,
    on_token=on_token,
    info=engine_lib.EngineInfo.of(
      scheduler.config,
      policy=config.policy,
      model_name='simulated',
      family=cost.model.family,
      vocab_size=cost.model.vocab_size,
    ),
  )


def simulate_steps(
  scheduler: scheduler_lib.Scheduler,
  cost: runner_lib.StepCost,
  workload: workload_lib.Workload,
  *,
  info: engine_lib.EngineInfo,
  on_span: Callable[[runner_lib.Span], None] | None = None,
  stop_when: StopWhen | None = None,
  on_token: OnToken | None = None,
) -> Result:
  """Runs a workload on any scheduler, with steps that take what `cost` says.

  See `simulate` for the other arguments.
  """
  clock = runner_lib.Clock()
  runner = runner_lib.SimulatedRunner(cost, clock, on_span)
  engine = engine_lib.Engine(
    scheduler, pacing.paced(runner, scheduler, clock), clock=clock, info=info
  )
  runner.reset()
  result = drive(
    engine,
    workload,
    wait_until=clock.advance_to,
    stop_when=stop_when,
    on_token=on_token,
  )
  return dataclasses.replace(
    result, busy=tuple(b / result.seconds for b in runner.busy_s)
  )


def drive(
  engine: engine_lib.Engine,
  workload: workload_lib.Workload,
  *,
  wait_until: Callable[[float], None],
  stop_when: StopWhen | None = None,
  on_token: OnToken | None = None,
) -> Result:
  """Has an engine serve a workload, whose time begins now.

  Args:
    engine: live or simulated; its metrics begin anew.
    workload: what comes, and when.
    wait_until: lets time pass until the engine's clock shows a time.
    stop_when, on_token: see `simulate`.
  """
  engine.metrics = metrics_lib.EngineMetrics()
  interactive: metrics_lib.Quantiles | None = None
  if workload.is_batch.any():
    interactive = metrics_lib.Quantiles()
    on_token = _gaps(workload, interactive, on_token)
  # The engine's objects have no cycles, and looking for some takes a third of
  # a simulation's time.
  was_enabled = gc.isenabled()
  gc.disable()
  try:
    return dataclasses.replace(
      _drive(engine, workload, wait_until, stop_when, on_token),
      interactive_tbt_s=interactive,
    )
  finally:
    if was_enabled:
      gc.enable()


def _gaps(
  workload: workload_lib.Workload,
  gaps: metrics_lib.Quantiles,
  on_token: OnToken | None,
) -> OnToken:
  """Adds the times between tokens of interactive requests to `gaps`."""
  last: dict[int, float] = {}

  def add(request: int, now: float) -> None:
    if not workload.is_batch[request]:
      if request in last:
        gaps.add([now - last[request]])
      last[request] = now
    if on_token is not None:
      on_token(request, now)

  return add


def _drive(
  engine: engine_lib.Engine,
  workload: workload_lib.Workload,
  wait_until: Callable[[float], None],
  stop_when: StopWhen | None,
  on_token: OnToken | None,
) -> Result:
  began, clock = engine.clock(), engine.clock
  before = engine.stats()
  coming = asking.Asking(workload, began)
  requests: list[types.RequestMetrics] = []
  stopped = False
  while (coming.next_at < math.inf or engine.has_work) and not stopped:
    wait_until(engine.step_at if engine.has_work else coming.next_at)
    for request in coming.take(clock()):
      engine.add(request)
    for delta in engine.step():
      if delta.metrics is not None:
        requests.append(delta.metrics)
      coming.hear(delta, clock())
      if on_token is not None:
        on_token(int(delta.request_id), clock())
    stopped = stop_when is not None and stop_when(engine, clock() - began)
  seconds = clock() - began
  num_preemptions = sum(r.num_preemptions for r in requests)
  for key in coming.asked if stopped else ():
    engine.abort(key)
  if stopped:
    engine.drain()
    engine.step()
  after = engine.stats()
  return Result(
    metrics=engine.metrics,
    requests=tuple(requests),
    seconds=seconds,
    num_preemptions=num_preemptions,
    busy=(),
    is_complete=not stopped,
    found=(after.num_found - before.num_found)
    / max(after.num_looked_up - before.num_looked_up, 1),
  )
