# SPDX-License-Identifier: Apache-2.0
"""A scrape, as Prometheus reads it, after known requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import functools
import json
import pathlib
import re
import socket
import threading
import time
from typing import Any
import urllib.request

import grpc
from prometheus_client import parser
import pytest

from sarathi_jax import errors
from sarathi_jax.engine import metrics as metrics_lib
from sarathi_jax.server.protocols import control_v1
from sarathi_jax.server.telling import metric_tables
from sarathi_jax.server.telling import metrics
from sarathi_jax.server.telling import web
from tests.server import fake

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope='module')
def scraped() -> Iterator[fake.RunningServer]:
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(fake.make_engine, eos_token_ids=frozenset({60})),
      hooks=control_v1.Hooks(num_compiled=lambda: 7),
      metrics_port=0,
    )
  ) as running:
    for i in range(5):
      list(running.generate(token_ids=[i] * 3, sampling={'max_tokens': 4}))
    list(running.generate(token_ids=[58], sampling={'max_tokens': 40}))
    for bad in ({'token_ids': []}, {'token_ids': [64]}):
      with pytest.raises(grpc.RpcError):
        list(running.generate(**bad))
    yield running


def _scrape(running: fake.RunningServer) -> tuple[str, Samples]:
  port = running.server.telemetry.metrics_port
  with urllib.request.urlopen(
    f'http://127.0.0.1:{port}/metrics', timeout=fake.TIMEOUT_S
  ) as reply:
    text = reply.read().decode()
  return text, {
    (sample.name, tuple(sorted(sample.labels.items()))): sample.value
    for family in parser.text_string_to_metric_families(text)
    for sample in family.samples
  }


def _value(samples: Samples, name: str, **labels: str) -> float:
  found = [
    value
    for (n, given), value in samples.items()
    if n == f'sarathi:{name}' and labels.items() <= dict(given).items()
  ]
  assert len(found) == 1, (name, labels, found)
  return found[0]


def test_totals(scraped: fake.RunningServer) -> None:
  _, samples = _scrape(scraped)
  value = functools.partial(_value, samples)
  assert value('prompt_tokens_total') == 16
  assert value('generation_tokens_total') == 22
  assert value('request_success_total', finished_reason='length') == 5
  assert value('request_success_total', finished_reason='stop') == 1
  assert value('requests_ended_total', outcome='INVALID_ARGUMENT') == 2
  assert value('requests_ended_total', outcome='length') == 5
  assert value('num_requests_running') == value('num_requests_waiting') == 0
  assert value('kv_cache_usage_perc') == 0
  assert value('engine_up') == 1 and value('is_paused') == 0
  assert value('compiled_programs') == 7
  assert value('token_budget') == 8
  num_launched = 16 + 22 - 6
  assert value('scheduled_tokens_total') in (  # one behind the stop
    num_launched,
    num_launched + 1,
  )
  assert value('decode_stall_seconds_total') == 0
  assert value('cache_config_info', block_size='4', num_gpu_blocks='64') == 1


def test_histograms_count_each_thing_once(scraped: fake.RunningServer) -> None:
  _, samples = _scrape(scraped)
  value = functools.partial(_value, samples)
  assert value('time_to_first_token_seconds_count') == 6
  assert value('inter_token_latency_seconds_count') == 22 - 6
  assert value('e2e_request_latency_seconds_count') == 6
  assert value('request_prompt_tokens_sum') == 16
  assert value('request_generation_tokens_bucket', le='2.0') == 1
  assert value('request_generation_tokens_bucket', le='5.0') == 6
  assert value('token_budget_use_bucket', le='1.0') == value('steps_total')
  for histogram in metric_tables.HISTOGRAMS:
    counts = [
      v
      for (n, labels), v in samples.items()
      if n == f'sarathi:{histogram.name}_bucket'
    ]
    assert counts == sorted(counts) and counts[-1] == value(
      f'{histogram.name}_count'
    )


def test_names_are_those_of_vllm() -> None:
  """Those of vLLM 0.32's dashboard that apply to this engine."""
  ours = {
    v.name for v in (*metric_tables.GAUGES, *metric_tables.HISTOGRAMS)
  } | {f'{v.name}_total' for v in metric_tables.COUNTERS}
  assert ours >= {
    'num_requests_running',
    'kv_cache_usage_perc',
    'num_preemptions_total',
    'prompt_tokens_total',
    'prompt_tokens_cached_total',
    'prefix_cache_queries_total',
    'prefix_cache_hits_total',
    'generation_tokens_total',
    'time_to_first_token_seconds',
    'inter_token_latency_seconds',
    'request_time_per_output_token_seconds',
    'e2e_request_latency_seconds',
    'request_queue_time_seconds',
    'request_prefill_time_seconds',
    'request_decode_time_seconds',
    'request_prompt_tokens',
    'request_generation_tokens',
    'iteration_tokens_total',
  }


def test_the_dashboard_asks_for_metrics_that_there_are(
  scraped: fake.RunningServer,
) -> None:
  _, samples = _scrape(scraped)
  there = {name for name, _ in samples}
  path = pathlib.Path(metrics.__file__).with_name('grafana.json')
  dashboard = json.loads(path.read_text())
  asked = {
    name
    for panel in dashboard['panels']
    for target in panel.get('targets', ())
    for name in re.findall(r'sarathi:\w+', target['expr'])
  }
  assert len(asked) > 20
  assert asked <= there, asked - there


def test_an_engine_that_stopped_shows() -> None:
  runners: list[fake.GatedRunner] = []

  def make_runner(*args: int) -> fake.GatedRunner:
    runners.append(fake.GatedRunner(*args))
    return runners[0]

  with contextlib.closing(
    fake.RunningServer(lambda: fake.make_engine(make_runner), metrics_port=0)
  ) as running:
    runners[0].fault, runners[0].is_gone = RuntimeError('gone'), True
    runners[0].open()
    with pytest.raises(grpc.RpcError):
      list(running.generate(token_ids=[1]))
    fake.wait_until(lambda: _value(_scrape(running)[1], 'engine_up') == 0)


def test_the_engine_is_not_up_until_it_serves() -> None:
  loaded = threading.Event()

  def make() -> Any:
    assert loaded.wait(fake.TIMEOUT_S)
    return fake.make_engine()

  with contextlib.closing(
    fake.RunningServer(make, wait=False, metrics_port=0)
  ) as running:
    try:
      start = time.monotonic()
      assert _value(_scrape(running)[1], 'engine_up') == 0
      assert time.monotonic() - start < metrics._SCRAPE_S  # nor waited for
    finally:
      loaded.set()
    running.warming.result(fake.TIMEOUT_S)
    assert _value(_scrape(running)[1], 'engine_up') == 1


def test_prompts_count_once_though_they_are_computed_again(
  gated: Callable[..., Any],
) -> None:
  running, runner = gated(
    max_num_seqs=2, num_pages=32, config={'metrics_port': 0}
  )
  calls = [
    running.generate(token_ids=[i] * 40, sampling={'max_tokens': 80})
    for i in range(4)
  ]
  running.wait_until_open(4)
  runner.open()
  assert [len(fake.take(call)) for call in calls] == [80] * 4
  value = functools.partial(_value, _scrape(running)[1])
  assert value('num_preemptions_total') > 0
  assert value('prompt_tokens_total') == 4 * 40
  assert value('prompt_tokens_computed_total') == 4 * 40
  assert value('prompt_tokens_cached_total') == 0
  assert (
    value('prefix_cache_hits_again_total')
    == (running.engine._scheduler.prefixes.num_found_again)
    > 0
  )
  assert running.stats().num_prefilled == 4 * 40


def test_tokens_that_were_found_are_told_by_vllms_names() -> None:
  """There, `prompt_tokens` has those in the cache, and may be subtracted."""
  with contextlib.closing(
    fake.RunningServer(fake.make_engine, metrics_port=0)
  ) as running:
    # Two full pages of four, and a part of one, of which one is computed again.
    prompt = list(range(1, 12))
    for more in ({}, {}, {'n': 3}, {'prompt_logprobs': 1}):
      list(running.generate(token_ids=prompt, sampling=more))
    value = functools.partial(_value, _scrape(running)[1])
    assert value('prompt_tokens_total') == 4 * 11
    assert value('prompt_tokens_cached_total') == 2 * 10
    assert value('prompt_tokens_computed_total') == 4 * 11 - 2 * 10
    # Of what is told of a prompt nothing is looked for.
    assert value('prefix_cache_queries_total') == 3 * 11
    assert value('prefix_cache_hits_total') == 2 * 10
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(fake.make_engine, prefix_cache=False), metrics_port=0
    )
  ) as running:
    list(running.generate(token_ids=prompt))
    value = functools.partial(_value, _scrape(running)[1])
    assert value('prompt_tokens_total') == 11
    assert value('prefix_cache_queries_total') == 0


def test_a_connection_that_says_nothing_holds_up_nobody(
  scraped: fake.RunningServer,
) -> None:
  port: Any = scraped.server.telemetry.metrics_port
  with contextlib.ExitStack() as stack:
    for _ in range(3):
      stack.enter_context(socket.create_connection(('127.0.0.1', port)))
    assert _value(_scrape(scraped)[1], 'engine_up') == 1


def test_connections_that_say_a_little_at_a_time_hold_up_nobody(
  scraped: fake.RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(web, '_LONGEST_S', 0.5, raising=False)
  address: Any = ('127.0.0.1', scraped.server.telemetry.metrics_port)
  with contextlib.ExitStack() as stack:
    connections = [
      stack.enter_context(socket.create_connection(address))
      for _ in range(2 * web._MAX_CONNECTIONS)
    ]
    is_answered, until = False, time.monotonic() + 5
    while not is_answered and time.monotonic() < until:
      for connection in connections:
        with contextlib.suppress(OSError):  # it was ended
          connection.sendall(b'G')
      time.sleep(0.1)
      with contextlib.suppress(OSError):
        is_answered = bool(_scrape(scraped))
    assert is_answered


def test_a_port_in_use_is_refused(scraped: fake.RunningServer) -> None:
  port: Any = scraped.server.telemetry.metrics_port
  with pytest.raises(errors.ConfigError, match=f'metrics_port={port}'):
    metrics.MetricsServer(object(), '127.0.0.1', port)  # type: ignore[arg-type]


def test_cumulative_counts_are_right_within_two_percent() -> None:
  values = metrics_lib.Quantiles()
  values.add([i / 1000 for i in range(1, 1001)])
  for bound, count in zip(
    (0.1, 0.5, 0.9, 2), values.cumulative((0.1, 0.5, 0.9, 2)), strict=True
  ):
    assert abs(count - min(bound, 1) * 1000) <= 1 + 20 * bound


def test_what_can_be_held_is_told_where_there_is_a_target(
  scraped: fake.RunningServer,
) -> None:
  assert 'tbt_slo_needed' not in _scrape(scraped)[0]
  with contextlib.closing(
    fake.RunningServer(
      functools.partial(fake.make_engine, tbt_slo_ms=5e3), metrics_port=0
    )
  ) as running:
    list(running.generate(token_ids=[1], sampling={'max_tokens': 4}))
    assert _value(_scrape(running)[1], 'tbt_slo_needed_seconds') == 5
