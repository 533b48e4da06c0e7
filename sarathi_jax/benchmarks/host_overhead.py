# SPDX-License-Identifier: Apache-2.0
"""Measures the host work of a step: all that it costs but its computation.

  python -m sarathi_jax.benchmarks.host_overhead --running=128,256 --json=h.json

Runs the real scheduler, batch building, outputs and detokenizing, with a runner
that takes its tokens from a text instead of a model. Sequences are at all
phases: in each step some end, and some of the waiting ones begin. Times are the
thread's CPU time, so that what else the machine does hardly counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import itertools
import pathlib
import pydoc_data.topics
import random
import statistics
import time
from typing import Any

from absl import flags
import rich.console
import rich.progress

from sarathi_jax import config as config_lib
from sarathi_jax import scheduler as scheduler_lib
from sarathi_jax import types
from sarathi_jax.benchmarks import common
from sarathi_jax.cli import flags as engine_flags
from sarathi_jax.cli import mains
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.launch import loading
from sarathi_jax.runner import batch as batch_lib
from sarathi_jax.text import tokenizer as tokenizer_lib

FLAGS = flags.FLAGS
PAGE_SIZE = 64
MAX_MODEL_LEN = 2048
QUICKSTART = pathlib.Path(__file__).parent.parent / 'quickstart' / 'model'


def define_flags() -> None:
  flags.DEFINE_list(
    'running',
    ['128', '256'],
    'Numbers of sequences that run at once; each number is measured.',
  )
  flags.DEFINE_list(
    'waiting',
    ['0', '10000'],
    'Numbers of sequences that wait meanwhile; each number is measured.',
  )
  engine_flags.define_fields(policy='sarathi', token_budget=512)
  flags.DEFINE_integer('steps', 1000, 'Number of steps to measure.')
  flags.DEFINE_string(
    'tokenizer', str(QUICKSTART), 'Folder with the tokenizer.json to use.'
  )
  flags.DEFINE_string('json', None, 'File to write the results to, as JSON.')


class Stopwatch:
  """Adds up the time spent in functions that it was given."""

  def __init__(self) -> None:
    self.seconds: dict[str, float] = {}

  def timed(self, part: str, function: Callable[..., Any]) -> Any:
    """Returns `function` with its time added to `part`."""
    self.seconds[part] = 0.0

    def run(*args: Any) -> Any:
      start = time.thread_time()
      result = function(*args)
      self.seconds[part] += time.thread_time() - start
      return result

    return run


class TextRunner:
  """A runner that builds batches as for a device; a text gives the tokens."""

  def __init__(
    self,
    text: Sequence[int],
    max_num_seqs: int,
    max_step_tokens: int,
    watch: Stopwatch,
  ) -> None:
    pages_per_seq = -(-MAX_MODEL_LEN // PAGE_SIZE)
    self._sizes = batch_lib.ladder(max_step_tokens, max_num_seqs)
    self._layouts = {
      n: batch_lib.BatchLayout(
        n, min(n, max_num_seqs), min(n, max_num_seqs), pages_per_seq
      )
      for n in self._sizes
    }
    builder = batch_lib.BatchBuilder(max_num_seqs, pages_per_seq)
    self._build = watch.timed('build', builder.build)
    self._text = text

  def launch(self, batch: types.ScheduledBatch) -> types.ScheduledBatch:
    self._build(batch, self._layouts[self.num_rows(batch.num_tokens)])
    return batch

  def fetch(self, batch: types.ScheduledBatch) -> types.Sampled:
    text = self._text  # Each sequence reads on from a place of its own.
    return types.Sampled.of(
      batch.chunks,
      [text[(c.seed + c.start) % len(text)] for c in batch.chunks if c.samples],
      itertools.repeat(-0.5),
    )

  def mask(self, pending: Any, masks: Any) -> None:
    """Does nothing: no output has a grammar here."""

  def num_rows(self, num_tokens: int) -> int:
    return next(n for n in self._sizes if n >= num_tokens)

  def recover(self) -> None:
    """Does nothing: nothing fails here."""


class Load:
  """Requests without end, of all lengths."""

  def __init__(self, text: Sequence[int]) -> None:
    self._text = text
    self._random = random.Random(0)
    self._ids = itertools.count()

  def request(self, prompt_len: int) -> types.Request:
    start = self._random.randrange(len(self._text) - prompt_len)
    return types.Request(
      request_id=f'request-{next(self._ids)}',
      prompt_token_ids=tuple(self._text[start : start + prompt_len]),
      sampling=types.SamplingParams(
        temperature=0.7,
        ignore_eos=True,
        max_tokens=self._random.randint(16, 1024),
      ),
    )


def make_engine(
  tokenizer: tokenizer_lib.Tokenizer,
  text: Sequence[int],
  num_running: int,
  watch: Stopwatch,
) -> engine_lib.Engine:
  """Makes an engine whose parts are timed."""
  config = config_lib.SchedulerConfig(
    token_budget=FLAGS.token_budget,
    max_num_seqs=num_running,
    max_model_len=MAX_MODEL_LEN,
    page_size=PAGE_SIZE,
    num_pages=num_running * (MAX_MODEL_LEN // PAGE_SIZE),
  )
  policy = scheduler_lib.policy_class(FLAGS.policy)
  scheduler: Any = policy(config)
  runner: Any = TextRunner(
    text, num_running, policy.max_step_tokens(config), watch
  )
  engine = engine_lib.Engine(
    scheduler,
    runner,
    tokenizer=tokenizer,
    info=engine_lib.EngineInfo.of(
      config, policy=FLAGS.policy, vocab_size=2**31
    ),
  )
  scheduler.schedule = watch.timed('schedule', scheduler.schedule)
  scheduler.complete = watch.timed('complete', scheduler.complete)
  runner.fetch = watch.timed('(the text)', runner.fetch)
  return engine


def measure(
  tokenizer: tokenizer_lib.Tokenizer,
  text: Sequence[int],
  num_running: int,
  num_waiting: int,
  on_step: Callable[[], None],
) -> dict[str, float]:
  """Measures milliseconds a step by part, and of whole steps.

  'outputs' is all that the engine does beside its parts: times, text, deltas.
  """
  watch = Stopwatch()
  engine = make_engine(tokenizer, text, num_running, watch)
  load = Load(text)
  for _ in range(num_running):  # Short prompts fill the slots soon.
    engine.add(load.request(8))
  for _ in range(num_waiting):
    engine.add(load.request(256))
  while engine.stats().num_running < num_running:
    engine.step()
  for part in watch.seconds:
    watch.seconds[part] = 0.0
  steps = []
  for _ in range(FLAGS.steps):
    start = time.thread_time()
    deltas = engine.step()
    steps.append((time.thread_time() - start) * 1e3)
    for delta in deltas:
      if delta.finish_reason is not None:
        engine.add(load.request(256))
    on_step()
  parts = {k: s / len(steps) * 1e3 for k, s in watch.seconds.items()}
  fake = parts.pop('(the text)')
  total = statistics.mean(steps) - fake
  return {
    'running': num_running,
    'waiting': num_waiting,
    **parts,
    'outputs': total - sum(parts.values()),
    'total': total,
    'p50': statistics.median(steps) - fake,
    'p99': statistics.quantiles(steps, n=100)[98] - fake,
  }


def main() -> None:
  console = rich.console.Console(highlight=False)
  tokenizer = tokenizer_lib.Tokenizer(FLAGS.tokenizer)
  loading.collect_less_garbage()  # As the server does.
  manual = '\n'.join(pydoc_data.topics.topics.values())  # Python's own.
  text = tokenizer.encode(manual[:400_000])
  cases = list(
    itertools.product(map(int, FLAGS.running), map(int, FLAGS.waiting))
  )
  with rich.progress.Progress(console=console, transient=True) as progress:
    task = progress.add_task('Running', total=len(cases) * FLAGS.steps)
    rows = [
      measure(tokenizer, text, *case, on_step=lambda: progress.advance(task))
      for case in cases
    ]
  console.print(
    common.table(
      rows,
      f'Host work, ms a step: {FLAGS.policy}, {FLAGS.token_budget} tokens a '
      'step',
    )
  )
  common.write_json(FLAGS.json, 'host_overhead', FLAGS, rows)


if __name__ == '__main__':
  mains.run(main, define_flags)
