# SPDX-License-Identifier: Apache-2.0
"""The load generator: arrivals, what it measures, and a run by command."""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from sarathi_jax.benchmarks import serve
from tests.server import fake

ROOT = pathlib.Path(__file__).parents[2]


def test_arrivals_are_poisson() -> None:
  jobs = serve.poisson(10.0, 4000, 100, 50, seed=1)
  assert jobs == serve.poisson(10.0, 4000, 100, 50, seed=1)
  assert jobs[-1].arrival_s == pytest.approx(400, rel=0.1)
  gaps = [b.arrival_s - a.arrival_s
          for a, b in itertools.pairwise(jobs)]
  # An exponential's standard deviation is its mean.
  mean = sum(gaps) / len(gaps)
  deviation = (sum((g - mean)**2 for g in gaps) / len(gaps))**0.5
  assert deviation == pytest.approx(mean, rel=0.1)
  assert {50 <= j.prompt_tokens <= 150 for j in jobs} == {True}


def test_the_summary() -> None:
  outcomes = [
    serve.Outcome(times=[0.1, 0.2, 0.3], num_tokens=3),
    serve.Outcome(times=[0.1, 0.2, 0.7], num_tokens=3),  # a gap too long
    serve.Outcome(times=[2.0, 2.1, 2.2], num_tokens=3),  # a start too late
    serve.Outcome(error='UNAVAILABLE')]
  summary = serve.summarize(outcomes, 2.0, ttft_s=1.0, tbt_s=0.2)
  assert summary['goodput_per_s'] == 0.5
  assert summary['requests_per_s'] == 1.5
  assert summary['output_tokens_per_s'] == 4.5
  assert (summary['num_errors'], summary['errors']) == (1, ['UNAVAILABLE'])
  assert summary['ttft_s']['p99'] == pytest.approx(0.1, rel=0.02)
  assert summary['ttft_s']['p50'] == pytest.approx(0.1, rel=0.02)


def test_a_run(tmp_path: pathlib.Path) -> None:
  trace = tmp_path / 'trace.jsonl'
  trace.write_text(''.join(json.dumps(
    {'arrival_s': i / 50, 'prompt_tokens': 5, 'output_tokens': 4}) + '\n'
    for i in range(20)))
  with contextlib.closing(fake.RunningServer(fake.make_engine)) as running:
    done = subprocess.run(
      [sys.executable, '-m', 'sarathi_jax.benchmarks.serve',
       f'--target=127.0.0.1:{running.server.port}', f'--trace={trace}',
       f'--json={tmp_path / "out.json"}', f'--plot={tmp_path / "plot.svg"}'],
      cwd=ROOT, capture_output=True, text=True, check=True)
  assert 'goodput_per_s' in done.stdout
  results = json.loads((tmp_path / 'out.json').read_text())['results']
  assert (results['requests'], results['num_errors']) == (20, 0)
  assert results['output_tokens_per_s'] * results['seconds'] == (
    pytest.approx(80))
  ElementTree.parse(tmp_path / 'plot.svg')
