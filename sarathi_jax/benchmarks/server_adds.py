# SPDX-License-Identifier: Apache-2.0
"""Measures what serving adds: one load, in process and through the server.

  python -m sarathi_jax.benchmarks.server_adds --rounds=10

Requests come at the same times to one engine of random weights, in rounds of
runs, whose order alternates. In one run a loop adds them and steps; in the
others they come over gRPC or OpenAI's HTTP, from clients in a process of their
own. Times between tokens are those of whoever reads them: the loop, or the
clients. It also measures CPU time a step: of the thread that steps, of the
event loop, of all other threads of that process, which are XLA's and gRPC's,
and of the clients, who share the machine's cores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
import os
import random
import statistics
import sys
import threading
import time
from typing import Any

from absl import flags
import numpy as np
import rich
import rich.table
import uvloop

from sarathi_jax import config as config_lib
from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks import openai
from sarathi_jax.benchmarks import peer_models
from sarathi_jax.cli import mains
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import metrics as metrics_lib
from sarathi_jax.server import server as server_lib
from sarathi_jax.simulator import open_loop
from sarathi_jax.simulator import simulate
from sarathi_jax.simulator import workload as workload_lib

FLAGS = flags.FLAGS
MakeEngine = Callable[[Mapping[str, Any]], engine_lib.Engine]
_RESAMPLES = 2000
_QUANTILES = (0.5, 0.99)
_DIRECT = 'direct'  # in process
_PROTOCOLS = ('grpc', 'http')


def define_flags() -> None:
  flags.DEFINE_enum(
    'model_size',
    '43m',
    peer_models.SIZES,
    'The random model to run; see the flag --model_size of benchmarks.peers. '
    'transformers and torch make it.',
  )
  flags.DEFINE_integer('token_budget', 128, 'The most tokens of a step.')
  flags.DEFINE_integer(
    'max_num_seqs', 64, 'The most sequences that run at once.'
  )
  flags.DEFINE_float('qps', 8.0, 'Requests per second; arrivals are Poisson.')
  flags.DEFINE_integer('prompt_len', 64, 'Tokens of each prompt.')
  flags.DEFINE_integer('output_len', 96, 'Tokens to generate for each request.')
  flags.DEFINE_float(
    'seconds', 6.0, 'Seconds for which requests come in each run.'
  )
  flags.DEFINE_multi_enum(
    'protocol',
    list(_PROTOCOLS),
    _PROTOCOLS,
    'Protocol to serve by; each that is given is measured.',
  )
  flags.DEFINE_integer('rounds', 10, 'Runs of each kind to measure.')
  flags.DEFINE_string('json', None, 'File to write the results to, as JSON.')


def make_workload(
  options: Mapping[str, Any], seed: int
) -> workload_lib.Workload:
  """Makes requests that are alike, at random times."""
  rng = np.random.default_rng(seed)
  n = max(1, round(options['qps'] * options['seconds']))
  return workload_lib.Workload(
    arrived_at=np.sort(rng.uniform(0, options['seconds'], n)),
    prompt_lens=np.full(n, options['prompt_len']),
    output_lens=np.full(n, options['output_len']),
    is_batch=np.zeros(n, bool),
  )


def make_engine(options: Mapping[str, Any]) -> engine_lib.Engine:
  """Makes an engine as a server does, of a checkpoint, warm."""
  from sarathi_jax import llm as llm_lib
  from sarathi_jax.launch import loading

  longest = options['prompt_len'] + options['output_len']
  llm = llm_lib.LLM.from_checkpoint(
    peer_models.made(options['model_size'], sys.executable),
    config=config_lib.EngineConfig(
      token_budget=options['token_budget'],
      max_model_len=longest,
      max_num_seqs=options['max_num_seqs'],
      num_pages=options['max_num_seqs'] * -(-longest // 64),
      prefix_cache=False,  # One engine is given each load several times.
    ),
  )
  loading.collect_less_garbage()
  return llm.engine


def _cpu_s() -> dict[str, float]:
  """Returns CPU seconds of this process so far, and of its threads, by name."""
  spent = {'all': time.process_time()}
  for thread in threading.enumerate():
    assert thread.ident is not None
    spent[thread.name] = time.clock_gettime(
      time.pthread_getcpuclockid(thread.ident)
    )
  return spent


def _ms_per_step(
  before: Mapping[str, float],
  after: Mapping[str, float],
  engine: engine_lib.Engine,
) -> dict[str, float]:
  spent = {
    name: (seconds - before.get(name, 0.0)) / engine.metrics.num_steps * 1e3
    for name, seconds in after.items()
  }
  main, stepping = spent['MainThread'], spent.get('engine')
  all_ms = spent['all']
  return {
    'cpu_ms': all_ms,
    'loop_ms': main if stepping else 0.0,
    'engine_ms': main if stepping is None else stepping,
    'other_ms': all_ms - main - (stepping or 0.0),
  }


def _quantiles(
  tbt_s: metrics_lib.Quantiles, ttft_s: metrics_lib.Quantiles
) -> dict[str, float]:
  return {
    f'{name}_p{q * 100:g}_ms': (seconds.quantile(q) or 0.0) * 1e3
    for name, seconds in (('tbt', tbt_s), ('ttft', ttft_s))
    for q in _QUANTILES
  }


def work(pipe: Any, options: Mapping[str, Any], make: MakeEngine) -> None:
  """Runs the engine in a process; takes (how, seed) until None comes."""
  engine = make(options)
  pipe.send('ready')
  while (command := pipe.recv()) is not None:
    how, seed = command
    if how == _DIRECT:
      before = _cpu_s()
      metrics = simulate.drive(
        engine, make_workload(options, seed), wait_until=common.sleep_until
      ).metrics
      pipe.send(
        _quantiles(metrics.tbt_s, metrics.ttft_s)
        | _ms_per_step(before, _cpu_s(), engine)
        | {'steps': metrics.num_steps}
      )
    else:
      uvloop.run(_serve(pipe, engine))


async def _serve(pipe: Any, engine: engine_lib.Engine) -> None:
  server = server_lib.Server(
    server_lib.ServerConfig(port=0, http_port=0), lambda: engine
  )
  await server.start()
  await server.warm()
  engine.metrics = type(engine.metrics)()
  before = _cpu_s()
  pipe.send((server.port, server.http_port))
  await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
  pipe.send(
    _ms_per_step(before, _cpu_s(), engine)
    | {
      f'engine_{name}': value
      for name, value in _quantiles(
        engine.metrics.tbt_s, engine.metrics.ttft_s
      ).items()
    }
    | {'steps': engine.metrics.num_steps}
  )
  await server.stop()


def served(
  pipe: Any, options: Mapping[str, Any], protocol: str, seed: int
) -> dict[str, float]:
  """Sends a load to a server in the other process."""
  pipe.send((protocol, seed))
  grpc_port, http_port = pipe.recv()
  grpc = open_loop.GrpcTarget(f'127.0.0.1:{grpc_port}')
  target: open_loop.Target = grpc
  if protocol == 'http':
    target = openai.HttpTarget(
      f'http://127.0.0.1:{http_port}', has_token_ids=True
    )
  asked = open_loop.requests(
    make_workload(options, seed), grpc.info(10).vocab_size, seed
  )
  before = time.process_time()
  seen = uvloop.run(open_loop.run(target, asked))
  assert not seen.errors, seen.errors
  client_s = time.process_time() - before
  pipe.send('done')
  told: dict[str, float] = pipe.recv()
  return (
    _quantiles(seen.tbt_s, seen.quantiles('ttft_s'))
    | told
    | {'client_ms': client_s / told['steps'] * 1e3}
  )


def measure(
  options: Mapping[str, Any],
  protocols: Sequence[str],
  num_rounds: int,
  on_round: Callable[[dict[str, Any]], None],
  make: MakeEngine = make_engine,
) -> list[dict[str, Any]]:
  """Runs rounds, after one that warms up."""
  with common.process(work, options, make) as here:
    here.recv()
    rounds = []
    for seed in range(num_rounds + 1):
      found: dict[str, Any] = {}
      for how in (_DIRECT, *protocols)[:: 1 if seed % 2 else -1]:
        if how == _DIRECT:
          here.send((how, seed))
          found[how] = here.recv()
        else:
          found[how] = served(here, options, how, seed)
      if seed:
        rounds.append(found)
        on_round(found)
  return rounds


def summary(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Returns medians, and ratios to those in process.

  A ratio is the median of those of the rounds, with its 95 % interval, by
  resampling.
  """
  rng = random.Random(0)
  rows = []
  names = (name for found in rounds[0].values() for name in found)
  for name in dict.fromkeys(names):
    row: dict[str, Any] = {'quantity': name}
    for how in rounds[0]:
      values = [found[how][name] for found in rounds if name in found[how]]
      row[how] = statistics.median(values) if values else None
      if how == _DIRECT or not (values and row[_DIRECT]):
        continue
      ratios = [found[how][name] / found[_DIRECT][name] for found in rounds]
      medians = sorted(
        statistics.median(rng.choices(ratios, k=len(ratios)))
        for _ in range(_RESAMPLES)
      )
      row[f'{how}_ratio'] = {
        'median': statistics.median(ratios),
        'low': medians[round(0.025 * _RESAMPLES)],
        'high': medians[round(0.975 * _RESAMPLES) - 1],
      }
    rows.append(row)
  return rows


def table(
  rows: Sequence[Mapping[str, Any]], protocols: Sequence[str]
) -> rich.table.Table:
  """Makes a table for people."""
  shown = rich.table.Table(box=None, padding=(0, 1, 0, 0))
  shown.add_column('')
  for name in (_DIRECT, *protocols):
    shown.add_column(name, justify='right')
    if name != _DIRECT:
      shown.add_column('ratio (95 %)')

  def number(value: float | None) -> str:
    return '-' if value is None else f'{value:.4g}'

  for row in rows:
    cells = [number(row[_DIRECT])]
    for how in protocols:
      ratio = row.get(f'{how}_ratio')
      cells += [
        number(row[how]),
        '-'
        if ratio is None
        else '{median:.2f} ({low:.2f}-{high:.2f})'.format(**ratio),
      ]
    shown.add_row(row['quantity'], *cells)
  return shown


def main() -> None:
  options = {
    name: FLAGS[name].value
    for name in (
      'model_size',
      'token_budget',
      'max_num_seqs',
      'qps',
      'prompt_len',
      'output_len',
      'seconds',
    )
  }

  def on_round(found: dict[str, Any]) -> None:
    print(
      ' '.join(
        f'{how}: P50 {one["tbt_p50_ms"]:.1f} P99 {one["tbt_p99_ms"]:.1f} ms, '
        f'{one["cpu_ms"]:.1f} ms of CPU a step;'
        for how, one in found.items()
      ),
      flush=True,
    )

  protocols = list(dict.fromkeys(FLAGS.protocol))
  rounds = measure(options, protocols, FLAGS.rounds, on_round)
  rows = summary(rounds)
  rich.print(table(rows, protocols))
  common.write_json(
    FLAGS.json,
    'server_adds',
    FLAGS,
    {'summary': rows, 'rounds': rounds},
    cores_usable=len(os.sched_getaffinity(0)),
  )


if __name__ == '__main__':
  mains.run(main, define_flags)
