# SPDX-License-Identifier: Apache-2.0
"""The capacity program: what it writes, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import json
import pathlib
import sys

from absl import flags
import pytest

from sarathi_jax.cli import mains
from sarathi_jax.engine import fake_runner
from sarathi_jax.simulator import capacity
from sarathi_jax.simulator import live
from sarathi_jax.simulator import search
from sarathi_jax.simulator import workload as workload_lib
from tests import absl_flags
from tests.server import fake
from tests.simulator import cost_model_test

MISTRAL = f'--config={cost_model_test.CONFIGS / "mistral_7b_a100.py"}'
KEYS = {
  'config',
  'workload',
  'policy',
  'token_budget',
  'slo_tbt_p99_s',
  'capacity_qps',
  'p99_tbt_s',
  'p50_ttft_s',
  'p50_scheduling_delay_s',
  'found',
  'prefix_cache',
}


@pytest.fixture(scope='module', autouse=True)
def _flags() -> Iterator[None]:
  with absl_flags.defined(capacity.define_flags):
    yield


def run(*args: str) -> None:
  absl_flags.parse(*args)
  if mains.call(capacity.main, ['']):
    sys.exit(1)


def error_of(capsys: pytest.CaptureFixture, *args: str) -> str:
  with pytest.raises(SystemExit):
    run(*args)
  message: str = capsys.readouterr().err
  assert message.startswith('error: ')
  assert message.count('\n') == 1
  return message


def test_help_shows_the_flags_that_are_shared() -> None:
  shown = {f.name for f in flags.FLAGS.get_key_flags_for_module(capacity)}
  assert shown >= {'config', 'device', 'workload', 'length_scale', 'tp'}


@pytest.mark.slow
def test_results_and_plots_are_kept(tmp_path: pathlib.Path) -> None:
  run(
    MISTRAL,
    '--policy=sarathi,vllm,orca',
    '--token_budget=512,auto',
    '--slo_tbt_p99=0.1',
    '--num_requests=60',
    '--precision=0.2',
    f'--output={tmp_path}',
  )
  results = json.loads((tmp_path / 'capacity.json').read_text())
  assert [(r['policy'], r['token_budget']) for r in results] == [
    ('sarathi', 512),
    ('sarathi', 'auto'),
    ('vllm', None),
    ('orca', None),
  ]
  for result in results:
    assert set(result) == KEYS
    assert result['p99_tbt_s'] <= 0.1
    assert result['p50_scheduling_delay_s'] <= 2
  qps = [r['capacity_qps'] for r in results]
  assert min(qps[:2]) > 2 * max(qps[2:])  # the paper: 2.6 times
  for name in ('capacity', 'tbt', 'ttft', 'stalls'):
    assert (tmp_path / f'{name}.png').read_bytes()[:4] == b'\x89PNG'
    assert '<svg' in (tmp_path / f'{name}.svg').read_text()


def test_a_trace_may_be_short(tmp_path: pathlib.Path) -> None:
  trace = tmp_path / 'trace.csv'
  trace.write_text(
    '\n'.join(
      [
        'num_prefill_tokens,num_decode_tokens,arrived_at',
        *(f'{100 + i},{5 + i},{i / 4}' for i in range(12)),
      ]
    )
  )
  run(
    MISTRAL,
    f'--workload={trace}',
    '--arrivals=trace',
    '--slo_tbt_p99=0.1',
    '--precision=0.5',
    f'--output={tmp_path}',
  )
  assert (tmp_path / 'stalls.png').exists()


def test_an_slo_no_rate_can_meet_says_the_fastest(
  capsys: pytest.CaptureFixture,
) -> None:
  message = error_of(capsys, MISTRAL, '--slo_tbt_p99=0.001')
  assert 'no rate can meet it; the fastest possible time between' in message


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    ([], 'config=None: must be given'),
    (['--config=nowhere.py'], 'no such file'),
    ([MISTRAL], 'slo_tbt_p99=None: must be given'),
    ([MISTRAL, '--slo_tbt_p99=soon'], 'must be seconds'),
    ([MISTRAL, '--slo_tbt_p99=-1'], 'must be seconds > 0'),
    ([MISTRAL, '--slo_tbt_p99=1', '--policy=fifo'], "policy='fifo'"),
    ([MISTRAL, '--slo_tbt_p99=1', '--token_budget=big'], "token_budget='big'"),
    ([MISTRAL, '--slo_tbt_p99=1', '--token_budget=64'], 'max_num_seqs=128'),
    ([MISTRAL, '--slo_tbt_p99=1', '--workload=nowhere'], "workload='nowhere'"),
    ([MISTRAL, '--slo_tbt_p99=1', '--device=tpu'], "device='tpu'"),
    (
      [
        MISTRAL,
        '--slo_tbt_p99=1',
        '--policy=chunked_only',
        '--token_budget=auto',
      ],
      'no budget that follows',
    ),
    ([MISTRAL, '--slo_tbt_p99=1', '--tp=3'], 'tp=3: must divide'),
    (
      [
        f'--config={cost_model_test.CONFIGS / "falcon_180b_a100_tp8.py"}',
        '--slo_tbt_p99=1',
        '--tp=1',
      ],
      'of weights on each of 1 A100',
    ),
    (['--slo_tbt_p99=1', '--target=localhost:1'], 'must be grpc://HOST:PORT'),
  ],
)
def test_bad_input_is_told_in_a_line(
  capsys: pytest.CaptureFixture, args: list[str], message: str
) -> None:
  assert message in error_of(capsys, *args)


def test_a_live_server_is_searched(tmp_path: pathlib.Path) -> None:
  # Steps that took no time could give a request all its tokens at once.
  runner = functools.partial(fake_runner.FakeRunner, step_s=0.002)
  with contextlib.closing(
    fake.RunningServer(functools.partial(fake.make_engine, runner))
  ) as server:
    run(
      f'--target=grpc://127.0.0.1:{server.server.port}',
      '--slo_tbt_p99=0.5',
      '--num_requests=8',
      '--length_scale=0.01',
      '--start_qps=400',
      '--precision=0.5',
      f'--output={tmp_path}',
    )
    assert server.all_pages_are_free()
  (result,) = json.loads((tmp_path / 'capacity.json').read_text())
  assert set(result) == KEYS
  assert result['config'] == 'counting'
  assert result['token_budget'] == 8
  assert result['capacity_qps'] > 0
  assert 0 < result['p99_tbt_s'] <= 0.5


def test_gaps_of_the_tier_batch_do_not_count() -> None:
  config = workload_lib.WorkloadConfig(
    source='openchat_sharegpt4',
    num_requests=8,
    length_scale=0.01,
    qps=100,
    batch_share=1.0,
  )
  with contextlib.closing(fake.RunningServer(fake.make_engine)) as server:
    client = live.Client(f'127.0.0.1:{server.server.port}')
    point = client.try_rate(
      workload_lib.make(config), search.Slo(p99_tbt_s=1e-9), 100
    )
  assert point.holds
  assert point.p99_tbt_s == 0
  assert point.p50_ttft_s > 0


def test_requests_too_long_for_a_live_server(
  capsys: pytest.CaptureFixture,
) -> None:
  with contextlib.closing(fake.RunningServer(fake.make_engine)) as server:
    message = error_of(
      capsys,
      f'--target=grpc://127.0.0.1:{server.server.port}',
      '--slo_tbt_p99=1',
    )
  assert "the server's max_model_len=128; a --length_scale below" in message


def test_no_server(
  capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(live, '_CONNECT_S', 0.2)
  assert 'no server answers' in error_of(
    capsys, '--target=grpc://127.0.0.1:1', '--slo_tbt_p99=1'
  )
