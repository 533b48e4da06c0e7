# SPDX-License-Identifier: Apache-2.0
"""The load generator: what it makes of runs, and runs on servers that count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import functools
import io
import json
import pathlib
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import pytest
import rich.console

from sarathi_jax import config as config_lib
from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks import journal
from sarathi_jax.benchmarks import openai
from sarathi_jax.benchmarks import serve
from sarathi_jax.benchmarks import serve_capacity
from sarathi_jax.benchmarks import serve_runs
from sarathi_jax.benchmarks import serve_tables
from sarathi_jax.benchmarks import servers
from sarathi_jax.cli import mains
from sarathi_jax.engine import fake_runner
from sarathi_jax.runner import joining
from sarathi_jax.simulator import open_loop
from sarathi_jax.simulator import workload as workload_lib
from tests import absl_flags
from tests.benchmarks import fake_peer
from tests.benchmarks import serve_tables_test
from tests.server import fake

ROOT = pathlib.Path(__file__).parents[2]
SLO = serve_capacity.Slo(name='2 steps', tbt_s=0.1, ttft_s=1.0)
# A run of a hundredth of what people would run.
BRIEF = ('--seconds=0.2', '--drain_s=20', '--length_scale=0.02', '--qps=10,20')


@pytest.fixture(scope='module', autouse=True)
def _flags() -> Iterator[None]:
  with absl_flags.defined(serve.define_flags):
    yield


@pytest.fixture
def python(
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> pathlib.Path:
  """A Python of vLLM. Our server is of this process, and counts, too."""
  started = servers.start

  def make_engine() -> Any:
    return fake.make_engine(
      functools.partial(fake_runner.FakeRunner, step_s=fake_peer.STEP_S)
    )

  @contextlib.contextmanager
  def start(
    setup: servers.Setup, side: servers.Side, port: int, **slos: Any
  ) -> Iterator[serve_runs.Server]:
    if side.engine == servers.VLLM:
      with started(setup, side, port, **slos) as server:
        yield server
      return
    assert (slos['tbt_slo_s'] is None) == (side.steps is None)
    with contextlib.closing(fake.RunningServer(make_engine)) as running:
      yield serve_runs.Given(
        open_loop.GrpcTarget(f'127.0.0.1:{running.server.port}')
      )

  monkeypatch.setattr(serve_runs, '_PAUSE_S', 0.0)
  monkeypatch.setattr(serve, '_OUTPUT_LEN', 8)
  monkeypatch.setattr(servers, 'start', start)
  monkeypatch.setattr(config_lib, 'default_cache_dir', lambda: tmp_path)
  return fake_peer.install(tmp_path)


def run(*args: str) -> None:
  absl_flags.parse(*BRIEF, *args)
  if mains.call(serve.main, ['']):
    sys.exit(1)


def compare(python: pathlib.Path, *args: str) -> None:
  run(
    '--model_size=43m',
    f'--vllm_python={python}',
    '--slo_steps=50',
    '--token_budgets=8',
    '--max_model_len=128',
    *args,
  )


def test_a_running_server(tmp_path: pathlib.Path) -> None:
  trace = tmp_path / 'trace.csv'
  trace.write_text('num_prefill_tokens,num_decode_tokens\n' + '5,4\n' * 20)
  with contextlib.closing(fake.RunningServer(fake.make_engine)) as running:
    done = subprocess.run(
      [
        sys.executable,
        '-m',
        'sarathi_jax.benchmarks.serve',
        f'--target=127.0.0.1:{running.server.port}',
        f'--workload={trace}',
        '--qps=100',
        '--seconds=0.2',
        f'--json={tmp_path / "out.json"}',
        f'--plot={tmp_path / "plot.svg"}',
      ],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=True,
    )
    assert running.all_pages_are_free()
  assert 'P99' in done.stdout
  found = json.loads((tmp_path / 'out.json').read_text())
  (row,) = found['results']['runs']
  assert (row['num_requests'], row['num_errors'], row['num_cut']) == (20, 0, 0)
  assert row['output_tokens_per_s'] * row['seconds'] == pytest.approx(80)
  assert found['flags']['qps'] == ['100']
  assert not (tmp_path / 'out.jsonl').exists()
  ElementTree.parse(tmp_path / 'plot.svg')
  assert '100 QPS, round 0, measured' in (tmp_path / 'plot.svg').read_text()


def test_a_server_of_openai_s_http(
  tmp_path: pathlib.Path, python: pathlib.Path
) -> None:
  port = joining.free_port()
  with servers.running(
    [str(python), f'--port={port}', '--max-num-batched-tokens=1'],
    {},
    openai.HttpTarget(f'http://127.0.0.1:{port}', has_token_ids=True),
  ) as server:
    seen = serve_runs.run(
      server.target,
      [open_loop.Request(0.0, [3, 4], 5), open_loop.Request(0.0, [9], 2000)],
    )
    run(f'--http=http://127.0.0.1:{port}', f'--json={tmp_path / "out.json"}')
  good, refused = seen.outcomes
  assert good.token_ids == [5, 6, 7, 8, 9] and good.num_messages == 4
  assert '400' in refused.error and 'too long' in refused.error
  # Texts are events, and its last one has two tokens.
  for row in json.loads((tmp_path / 'out.json').read_text())['results']['runs']:
    assert row['num_errors'] == 0 and row['output_tokens_per_s'] > 0


def test_servers_take_turns_and_a_run_goes_on(
  tmp_path: pathlib.Path,
  python: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture,
) -> None:
  args = [
    f'--json={tmp_path / "out.json"}',
    '--rounds=2',
    '--vllm_token_budgets=16',
  ]
  asked: list[Sequence[open_loop.Request]] = []
  names: list[str] = []
  make_row = serve_capacity.make_row
  original = serve_runs._Turn._run

  def cut(self: Any, server: Any, qps: float) -> open_loop.Seen:
    if len(names) == 5:
      sys.exit(130)
    names.append(self._contender.name)
    asked.append(self._load.requests(qps, self._round))
    return original(self, server, qps)

  monkeypatch.setattr(serve_runs._Turn, '_run', cut)
  with pytest.raises(SystemExit):
    compare(python, *args)
  assert not (tmp_path / 'out.json').exists()
  with pytest.raises(SystemExit):
    compare(python, *args, '--seconds=0.5')
  assert 'is of --seconds=0.2, not 0.5' in capsys.readouterr().err
  monkeypatch.setattr(serve_runs._Turn, '_run', original)
  monkeypatch.setattr(
    serve_capacity, 'make_row', lambda *a: names.append('later') or make_row(*a)
  )  # type: ignore[func-returns-value]
  compare(python, *args)

  sides = ['sarathi_jax 8', 'vLLM 16', 'sarathi_jax ≤ 50 steps']
  assert names == [s for s in sides for _ in range(2)][:5] + ['later'] * 7
  assert asked[:2] == asked[2:4]  # the same for each
  found = json.loads((tmp_path / 'out.json').read_text())
  rows = found['results']['runs']
  assert [(r['side'], r['qps'], r['round']) for r in rows] == [
    (side, qps, round_)
    for round_ in range(2)
    for side in sides
    for qps in (10, 20)
  ]
  assert not any(r['num_errors'] or r['num_cut'] for r in rows)
  assert found['results']['same_tokens'] == 1
  assert found['engines'][servers.VLLM] == fake_peer.VERSION
  assert len(found['results']['points']) == 6
  (capacity,) = found['results']['capacity']
  assert capacity['tbt_s'] == pytest.approx(
    50
    * min(
      sorted(steps)[1] for steps in found['results']['decode_step_s'].values()
    )
  )
  assert set(capacity['best']) == {
    serve_tables.PACED,
    serve_tables.FIXED,
    servers.VLLM,
  }
  assert not (tmp_path / 'out.jsonl').exists()
  shown = capsys.readouterr().out
  assert '5 of them done' in shown and 'Capacity' in shown


def test_a_server_that_does_not_start(
  python: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
  with pytest.raises(SystemExit):
    compare(python, '--paced_token_budget=13')
  assert 'thirteen is a bad number' in capsys.readouterr().err


def test_a_server_that_gives_no_answer() -> None:
  with (
    pytest.raises(common.PeerError, match='gave no answer for'),
    servers.running(
      [sys.executable, '-c', 'import time; time.sleep(60)'],
      {},
      open_loop.GrpcTarget('127.0.0.1:1'),
      start_s=0.3,
    ),
  ):
    pass


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--qps=1,x'], '--qps=1,x: must be numbers > 0'),
    (['--qps=0'], '--qps=0: must be numbers > 0'),
    (['--qps='], '--qps=: must be numbers > 0'),
    (['--model_size=43m'], '--model_size takes --vllm_python'),
    (['--model_size=43m', '--vllm_python=/no/python'], 'must be a program'),
  ],
)
def test_bad_flags(
  args: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
  with (
    contextlib.closing(fake.RunningServer(fake.make_engine)) as running,
    pytest.raises(SystemExit),
  ):
    run(f'--target=127.0.0.1:{running.server.port}', *args)
  assert message in capsys.readouterr().err


def test_no_server(
  capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(serve, '_CONNECT_S', 0.2)
  with pytest.raises(SystemExit):
    run('--target=127.0.0.1:1')
  assert capsys.readouterr().err.startswith('error: ')


def test_rates_near_the_capacity_are_tried_and_those_far_above_not(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def run_at(self: Any, server: Any, qps: float) -> open_loop.Seen:
    return serve_tables_test.seen(
      open_loop.Outcome(
        token_ids=[1, 2],
        num_messages=2,
        e2e_s=1.0,
        ttft_s=0.1 if qps <= 5 else 30.0,
      )
    )

  monkeypatch.setattr(serve_runs._Turn, '_run', run_at)
  monkeypatch.setattr(
    serve_runs._Turn,
    '_running',
    lambda self: serve_runs.Given(open_loop.GrpcTarget('')),
  )
  console = rich.console.Console(file=io.StringIO())
  runs = serve_runs.Runs(
    journal.Journal(tmp_path / 'runs.jsonl'), console, common.progress(console)
  )
  load = serve_runs.Load(
    config=workload_lib.WorkloadConfig(),
    rates=(2, 4, 8, 16),
    seconds=1,
    drain_s=1,
    rounds=2,
    refine=3,
    vocab_size=64,
  )
  runs.announce(load, [1], num_started=0)
  slo = serve_capacity.Slo(name='2 steps', tbt_s=0.2, ttft_s=1.0)
  found = runs.go(
    load,
    [slo],
    [serve_runs.Contender(name='a', slos=(slo,), start=contextlib.nullcontext)],
    {slo.name: {'a': ['a']}},
  )
  tried = [(r['qps'], 'skipped' in r) for r in found['runs']]
  assert tried == 2 * [
    (2, False),
    (4, False),
    (8, False),
    (16, True),
    (5.66, False),
    (4.76, False),
    (5.19, False),
  ]
  assert found['capacity'][0]['best']['a']['qps'] == 4.76
