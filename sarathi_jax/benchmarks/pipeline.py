# SPDX-License-Identifier: Apache-2.0
"""Counts a pipeline's bubbles: which policy keeps its stages full and even.

  python -m sarathi_jax.benchmarks.pipeline --num_stages=4 --plot=bubbles.png

Runs the schedulers on requests with a chat's lengths and no model: what is
counted, tokens at each stage in each step, depends on no device. See figure 4
and section 3.3 of the paper.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
import dataclasses
import random
from typing import Any

from absl import flags
import rich.console
import rich.table

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.benchmarks import common
from sarathi_jax.cli import mains
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import fake_runner

FLAGS = flags.FLAGS
Load = tuple[int, ...]  # tokens at each stage in one step


def define_flags() -> None:
  flags.DEFINE_integer('num_stages', 4, 'Number of pipeline stages.')
  flags.DEFINE_integer('token_budget', 512, 'The most tokens of a batch.')
  flags.DEFINE_integer(
    'max_num_seqs',
    512,
    'The most sequences that run at once. Where these are '
    'too few to keep prefills coming, batches of decodes alone are small.',
  )
  flags.DEFINE_integer(
    'num_requests',
    256,
    'Number of requests, which are all there from the start.',
  )
  flags.DEFINE_integer('seed', 0, "Seed of the requests' lengths.")
  flags.DEFINE_list(
    'policy', ['sarathi', 'vllm'], 'Scheduling policies to compare.'
  )
  flags.DEFINE_string(
    'plot', None, 'File to draw the first steps into, .png or .svg.'
  )
  flags.DEFINE_string('json', None, 'File to write the results to, as JSON.')


class Pipeline:
  """An `engine.Runner` that notes how full its stages are.

  Like `DeviceRunner`, it lets nothing in where a batch is waited for.

  Attributes:
    loads: tokens at each stage in each step, the first stage first.
  """

  def __init__(self, num_stages: int, max_num_seqs: int) -> None:
    self.loads: list[Load] = []
    self._num_stages = num_stages
    self._stages = deque([0] * num_stages, num_stages)
    self._runner = fake_runner.FakeRunner(1000, max_num_seqs)

  def launch(
    self,
    batch: types.ScheduledBatch,
  ) -> tuple[int, types.Sampled]:
    sampled = self._runner.launch(batch)
    self._step(batch.num_tokens)
    return len(self.loads) + self._num_stages - 2, sampled

  def fetch(self, pending: tuple[int, types.Sampled]) -> types.Sampled:
    while len(self.loads) <= pending[0]:
      self._step(0)
    return pending[1]

  def mask(self, pending: Any, masks: Any) -> None:
    """Does nothing: no output has a grammar here."""

  def recover(self) -> None:
    """Does nothing: nothing fails here."""

  def num_rows(self, num_tokens: int) -> int:
    return num_tokens

  def _step(self, num_tokens: int) -> None:
    self._stages.appendleft(num_tokens)
    self.loads.append(tuple(self._stages))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
  """Counts over the steps from when the pipeline is full to the queue's end.

  Attributes:
    steps: number of steps.
    bubbles: fraction of stages that had nothing to do.
    idle: fraction of stages' time lost to bubbles, and to waiting for a stage
      with more tokens.
    largest_gap: the most tokens that two stages of one step differed by.
  """

  steps: int
  bubbles: float
  idle: float
  largest_gap: int


def count(loads: Sequence[Load]) -> Counts:
  """Counts the bubbles and unevenness of some steps.

  Raises:
    ConfigError: there are no steps.
  """
  if not loads:
    raise errors.ConfigError(
      'num_requests: too few; none waited once the pipeline was full.'
    )
  slots = [tokens for load in loads for tokens in load]
  longest = sum(max(load) * len(load) for load in loads)
  return Counts(
    steps=len(loads),
    bubbles=slots.count(0) / len(slots),
    idle=1 - sum(slots) / longest,
    largest_gap=max(max(load) - min(load) for load in loads),
  )


def run(
  config: config_lib.SchedulerConfig,
  policy: str,
  requests: Sequence[types.Request],
) -> tuple[list[Load], list[Load]]:
  """Runs requests to their end.

  Returns:
    Loads of the steps in which requests waited, with the pipeline full; and
    loads of the steps after.
  """
  scheduler = scheduler_lib.policy_class(policy)(config)
  pipeline = Pipeline(config.num_stages, config.max_num_seqs)
  engine = engine_lib.Engine(
    scheduler,
    pipeline,
    info=engine_lib.EngineInfo.of(config, policy=policy, vocab_size=1000),
  )
  for request in requests:
    engine.add(request)
  last = 0
  while engine.has_work:
    engine.step()
    if scheduler.waiting:
      last = len(pipeline.loads)
  return pipeline.loads[config.num_stages : last], pipeline.loads[last:]


def chat_requests(num: int, seed: int) -> list[types.Request]:
  """Draws lengths much like table 2's: median prompts of 1730 tokens."""
  rng = random.Random(seed)
  requests = []
  for i in range(num):
    prompt_len = min(int(rng.lognormvariate(7.45, 0.8)) + 1, 6000)
    output_len = min(int(rng.lognormvariate(6.03, 0.6)) + 1, 2000)
    requests.append(
      types.Request(
        request_id=str(i),
        prompt_token_ids=(1,) * prompt_len,
        arrival_time=0.0,
        cache_salt=str(i),  # Their tokens are alike.
        sampling=types.SamplingParams(
          temperature=0, ignore_eos=True, max_tokens=output_len
        ),
      )
    )
  return requests


def plot(path: str, loads: Mapping[str, Sequence[Load]]) -> None:
  """Draws the first steps under load: a row a stage, darker for more tokens."""
  from matplotlib import figure

  picture = figure.Figure(figsize=(10, 1.4 * len(loads) + 0.8))
  axes = picture.subplots(len(loads), sharex=True, squeeze=False)[:, 0]
  most = max(max(load) for some in loads.values() for load in some[:120])
  for axis, (policy, some) in zip(axes, loads.items(), strict=True):
    image = axis.imshow(
      list(zip(*some[:120], strict=True)),
      aspect='auto',
      cmap='Blues',
      vmin=0,
      vmax=most,
      interpolation='nearest',
    )
    axis.set_ylabel(f'policy {policy}\nstage')
    axis.set_yticks(range(len(some[0])))
  picture.suptitle('tokens at each stage while requests wait, simulated')
  axes[-1].set_xlabel('step')
  picture.colorbar(image, ax=list(axes), label='tokens')
  picture.savefig(path, dpi=150, bbox_inches='tight')


def main() -> None:
  console = rich.console.Console(highlight=False)
  config = config_lib.SchedulerConfig(
    token_budget=FLAGS.token_budget,
    max_num_seqs=FLAGS.max_num_seqs,
    max_model_len=8192,
    num_pages=FLAGS.max_num_seqs * 128,
    page_size=64,
    num_stages=FLAGS.num_stages,
  )
  requests = chat_requests(FLAGS.num_requests, FLAGS.seed)
  table = rich.table.Table(
    'policy',
    'steps',
    'bubbles',
    'stages idle',
    'largest gap, tokens',
    title=f'{FLAGS.num_stages} stages, {FLAGS.token_budget} tokens a batch, '
    'while requests wait',
  )
  loads, results = {}, {}
  for policy in FLAGS.policy:
    with console.status(f'Running {policy}'):
      loads[policy], _ = run(config, policy, requests)
    counts = count(loads[policy])
    results[policy] = dataclasses.asdict(counts)
    table.add_row(
      policy,
      f'{counts.steps:,}',
      f'{counts.bubbles:.1%}',
      f'{counts.idle:.1%}',
      f'{counts.largest_gap:,}',
    )
  console.print(table)
  common.write_json(FLAGS.json, 'pipeline', FLAGS, results)
  if FLAGS.plot:
    plot(FLAGS.plot, loads)


if __name__ == '__main__':
  mains.run(main, define_flags)
