# SPDX-License-Identifier: Apache-2.0
"""The stages of `scripts/gpu_check`, the most important first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import os
import sys
from typing import Any

from absl import flags

from sarathi_jax.benchmarks import journal as journal_lib
from sarathi_jax.benchmarks import live_capacity
from sarathi_jax.benchmarks.gpu import attention
from sarathi_jax.benchmarks.gpu import engine
from sarathi_jax.benchmarks.gpu import kernel_tests
from sarathi_jax.benchmarks.gpu import preflight
from sarathi_jax.benchmarks.gpu import sizes
from sarathi_jax.benchmarks.gpu import timing
from sarathi_jax.benchmarks.gpu import tune
from sarathi_jax.simulator import search


@dataclasses.dataclass(frozen=True)
class Run:
  """What a stage is run with.

  Attributes:
    size: how much it measures.
    journal: takes the rows, and has those of an earlier run.
    preflight: the journal of the stage `preflight`.
  """

  size: sizes.Size
  journal: journal_lib.Journal
  preflight: journal_lib.Journal

  @functools.cached_property
  def limits(self) -> Mapping[str, float]:
    """The device's limits, as the preflight measured them, or measured now."""
    found = self.preflight.rows.get('limits', {})
    return (
      found
      if 'copy_bytes_per_s' in found
      else timing.limits(self.size.copy_bytes, self.size.matmul_n)
    )

  def make_params(self) -> Any:
    """Makes random weights of the model, on the device."""
    return engine.make_params(self.size.model, self.size.dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
  """One stage.

  Attributes:
    run: measures.
    most_s: seconds that it may take, its process's start included.
    environment: variables for its process.
    xla_flags: flags for XLA, after the engine's own.
  """

  run: Callable[[Run], None]
  most_s: float
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
  xla_flags: str = ''


def _capacity(run: Run) -> None:
  size, journal = run.size, run.journal
  setup = live_capacity.Setup(
    model=size.model,
    params=run.make_params(),
    workload=size.chats,
    config=dataclasses.replace(
      size.config,
      num_pages=None,
      max_model_len=live_capacity.max_model_len(size.chats),
    ),
  )
  # One SLO for all rows, if they are of several runs, too.
  journal.measure(
    'strict SLO', lambda: {'slo_tbt_p99_s': live_capacity.strict_slo_s(setup)}
  )
  slo_s = journal.rows['strict SLO'].get('slo_tbt_p99_s')
  for name in size.capacity_rows if slo_s else ():
    journal.measure(
      name,
      functools.partial(
        live_capacity.search_row,
        setup,
        name,
        search.Slo(p99_tbt_s=float(slo_s or 0)),
        start=4.0,
        precision=0.2,
      ),
    )


def _quantized(run: Run) -> None:
  for sweep in run.size.quantized:
    attention.run(run.journal, sweep, run.limits, run.size.attention)


def _write(run: Run) -> None:
  for measure in (tune.writes, tune.norms):
    measure(run.journal, run.size.tuned, run.size.written)


def _torch(run: Run) -> None:
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'  # torch takes it.
  attention.run_torch(
    run.journal, run.size.sweep, flags.FLAGS.torch_python or sys.executable
  )


STAGES: Mapping[str, Stage] = {
  'preflight': Stage(lambda run: preflight.run(run.size, run.journal), 45),
  # Five processes share the memory.
  'tests': Stage(
    lambda run: kernel_tests.run(run.journal, run.size.tests),
    87,
    {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.18'},
  ),
  'engine': Stage(
    lambda run: engine.steps(
      run.journal,
      run.size.model,
      run.make_params(),
      run.limits,
      run.size.config,
      run.size.points,
    ),
    140,
  ),
  'variants': Stage(
    lambda run: engine.variants(
      run.journal,
      run.size.model,
      run.make_params(),
      run.size.config,
      run.size.varied,
    ),
    70,
  ),
  'attention': Stage(
    lambda run: attention.run(
      run.journal,
      run.size.sweep,
      run.limits,
      run.size.attention,
      run.size.dense,
    ),
    75,
  ),
  'tune': Stage(
    lambda run: tune.sizes(run.journal, run.size.tuned, run.size.num_tried), 75
  ),
  'mosaic': Stage(
    lambda run: attention.run_mosaic(run.journal, run.size.mosaic, run.limits),
    65,
  ),
  # From here on, it is a second call's.
  'serving': Stage(
    lambda run: engine.whole_engine(
      run.journal,
      run.size.model,
      run.make_params(),
      run.size.config,
      run.size.workload,
      run.size.idle,
    ),
    150,
    xla_flags='--xla_enable_command_buffers_during_profiling=true',
  ),
  'capacity': Stage(_capacity, 300),
  'write': Stage(_write, 60),
  'filters': Stage(
    lambda run: tune.filters(
      run.journal, run.size.filtered, run.size.num_tried
    ),
    120,
  ),
  'sweep': Stage(
    lambda run: attention.run(
      run.journal, run.size.rest, run.limits, run.size.attention
    ),
    200,
  ),
  'quantized': Stage(_quantized, 120),
  'torch': Stage(_torch, 60),
}
