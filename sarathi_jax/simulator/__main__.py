# SPDX-License-Identifier: Apache-2.0
"""One simulation: what a deployment does at a rate.

  python -m sarathi_jax.simulator --config=configs/yi_34b_a100_tp2.py \
      --qps=1 --policy=sarathi --token_budget=512 --trace=trace.json

Prints what a live engine reports; --trace writes a Chrome trace, in which
hybrid batches and pipeline bubbles are seen (ui.perfetto.dev opens it).
"""

from __future__ import annotations

import time

from absl import flags
import rich.console

from sarathi_jax import errors
from sarathi_jax.cli import mains
from sarathi_jax.cli import report
from sarathi_jax.simulator import scenario as scenario_lib
from sarathi_jax.simulator import simulate
from sarathi_jax.simulator import trace as trace_lib
from sarathi_jax.simulator import workload as workload_lib

FLAGS = flags.FLAGS


def define_flags() -> None:
  scenario_lib.define_flags()
  flags.DEFINE_float('qps', None, 'Requests a second; without, at the pace of '
                     'a trace (--arrivals=trace).')
  flags.DEFINE_string('policy', 'sarathi', 'Of scheduling.')
  flags.DEFINE_string('token_budget', None, 'A number; or auto, which follows '
                      '--slo_tbt_p99; else --config\'s.')
  flags.DEFINE_float('slo_tbt_p99', None, 'Seconds, for token_budget=auto.')
  flags.DEFINE_string('trace', None, 'File for a Chrome trace; compressed '
                      'if it ends with .gz.')
  flags.DEFINE_float('trace_s', 120.0, 'How much of the run it shows, seconds.')


def main() -> None:
  console = rich.console.Console(highlight=False)
  budget = scenario_lib.budget_of(FLAGS.token_budget)
  scenario = scenario_lib.from_flags(FLAGS.qps).with_policy(
    FLAGS.policy, budget, FLAGS.slo_tbt_p99)
  trace = trace_lib.ChromeTrace(FLAGS.trace_s)
  start = time.perf_counter()
  with console.status('Simulating'):
    result = simulate.simulate(
      scenario.cost(), scenario.config, workload_lib.make(scenario.workload),
      on_span=trace.add if FLAGS.trace else None)
  console.print(report.summary_table(
    result.metrics, result.seconds, result.num_preemptions))
  busy = ', '.join(f'{part:.1%}' for part in result.busy)
  console.print(f'Stages were busy {busy} of the time. Simulated in '
                f'{time.perf_counter() - start:.1f} s.')
  if FLAGS.trace:
    try:
      trace.write(FLAGS.trace)
    except OSError as error:
      raise errors.ConfigError(
        f'trace={FLAGS.trace!r}: can\'t be written: {error.strerror}.'
      ) from error


if __name__ == '__main__':
  mains.run(main, define_flags)
