# SPDX-License-Identifier: Apache-2.0
"""Simulates a deployment at one rate of requests.

  python -m sarathi_jax.simulator --config=configs/yi_34b_a100_tp2.py \
      --qps=1 --policy=sarathi --token_budget=512 --trace=trace.json

Prints what a live engine reports. With --turns, requests are chats':
  --workload=chat_turns --turns=5 --system_len=500 [--noprefix_cache]
--trace writes a Chrome trace, which shows
hybrid batches and pipeline bubbles (ui.perfetto.dev opens it).
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
  flags.DEFINE_float(
    'qps',
    None,
    'Requests per second to simulate. Default: '
    'the pace of the trace (--arrivals=trace).',
  )
  flags.DEFINE_string(
    'policy',
    'sarathi',
    'Scheduling policy: sarathi, vllm, '
    'orca, faster_transformer, hybrid_only or chunked_only.',
  )
  flags.DEFINE_string(
    'token_budget',
    None,
    'The most tokens of a step; auto '
    "follows --slo_tbt_p99. Default: --config's.",
  )
  flags.DEFINE_float(
    'slo_tbt_p99',
    None,
    'P99 time between tokens that --token_budget=auto aims at, seconds.',
  )
  flags.DEFINE_string(
    'trace',
    None,
    'File to write a Chrome trace to; compressed if it ends with .gz.',
  )
  flags.DEFINE_float(
    'trace_s', 120.0, 'Seconds of the run that --trace shows, from its start.'
  )


def main() -> None:
  console = rich.console.Console(highlight=False)
  budget = scenario_lib.budget_of(FLAGS.token_budget)
  scenario = scenario_lib.from_flags(FLAGS.qps).with_policy(
    FLAGS.policy, budget, FLAGS.slo_tbt_p99
  )
  trace = trace_lib.ChromeTrace(FLAGS.trace_s)
  start = time.perf_counter()
  with console.status('Simulating'):
    result = simulate.simulate(
      scenario.cost(),
      scenario.config,
      workload_lib.make(scenario.workload),
      on_span=trace.add if FLAGS.trace else None,
    )
  console.print(
    report.summary_table(result.metrics, result.seconds, result.num_preemptions)
  )
  if result.found:
    console.print(
      f"{result.found:.1%} of the prompts' tokens were found in the cache."
    )
  busy = ', '.join(f'{part:.1%}' for part in result.busy)
  console.print(
    f'Stages were busy {busy} of the time. Simulated in '
    f'{time.perf_counter() - start:.1f} s.'
  )
  if FLAGS.trace:
    try:
      trace.write(FLAGS.trace)
    except OSError as error:
      raise errors.ConfigError(
        f"trace={FLAGS.trace!r}: can't be written: {error.strerror}."
      ) from error


if __name__ == '__main__':
  mains.run(main, define_flags)
