# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics, by the names that dashboards of vLLM know.

Where vLLM has a metric, ours has its name under another prefix:
`vllm:time_to_first_token_seconds` is `sarathi:time_to_first_token_seconds`;
with the prefix vllm they are the same. Further down are those that only this
engine has. Nothing is counted twice: a scrape reads the engine's own totals,
between two steps.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
import concurrent.futures
import time
from typing import Any

import prometheus_client
from prometheus_client import core
from prometheus_client import registry as registry_lib

from sarathi_jax import errors
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import metrics as metrics_lib
from sarathi_jax.server import background
from sarathi_jax.server import frontend
from sarathi_jax.server.guard import auth
from sarathi_jax.server.guard import tls
from sarathi_jax.server.queue import engine_thread as engine_thread_lib
from sarathi_jax.server.telling import metric_tables as tables
from sarathi_jax.server.telling import request_log
from sarathi_jax.server.telling import web

_SCRAPE_S = 5.0  # a step that takes longer is not waited for


class Collector(registry_lib.Collector):
  """Reads an engine and its front end at every scrape.

  Args:
    prefix: what the metrics' names begin with.
    engine_thread: owns the engine.
    loop: the server's event loop; a scrape is on a thread of its own.
    watch: looks after what runs in the background.
    num_compiled: counts the programs compiled so far.
  """

  def __init__(
    self,
    prefix: str,
    engine_thread: engine_thread_lib.EngineThread,
    loop: asyncio.AbstractEventLoop,
    watch: background.Watch,
    num_compiled: Callable[[], int] | None,
  ) -> None:
    self._prefix = prefix
    self._watch = watch
    self._thread = engine_thread
    self._loop = loop
    self._num_compiled = num_compiled
    self._ended: Counter[tuple[str, str]] = Counter()
    self._last: tables.Snapshot | None = None
    self._start = time.time()

  def count(self, ended: frontend.Ended) -> None:
    """Counts a request that ended, however it did."""
    self._ended[ended.protocol, request_log.outcome(ended)] += 1

  def collect(self) -> Iterator[core.Metric]:
    is_up = self._read()
    yield self._gauge(
      'engine_up',
      'Whether the engine serves; 0 while it is loaded, and after a fault.',
      is_up,
    )
    yield self._gauge(
      'is_paused', 'Whether no requests begin.', self._thread.is_paused
    )
    yield self._family(
      core.CounterMetricFamily,
      'requests_ended',
      'Requests, by how they ended.',
      ('protocol', 'outcome'),
      self._ended,
    )
    yield self._family(
      core.GaugeMetricFamily,
      'background_up',
      'Whether what runs beside the calls is '
      'well; of the gateway: whether it serves.',
      ('name',),
      {(name,): up for name, up in self._watch.is_up().items()},
    )
    yield self._family(
      core.CounterMetricFamily,
      'background_restarts',
      'How often it was started again.',
      ('name',),
      {(name,): n for name, n in list(self._watch.num_restarts.items())},
    )
    if self._last is not None:
      yield from self._of_engine(self._last)

  def _read(self) -> bool:
    """Takes a snapshot; keeps the last one if the engine is in a long step."""
    if not self._thread.is_up:
      return False
    snapshot = asyncio.run_coroutine_threadsafe(
      self._thread.call(_snapshot), self._loop
    )
    try:
      self._last = snapshot.result(_SCRAPE_S)
    except concurrent.futures.TimeoutError:
      snapshot.cancel()
      return True
    except (errors.EngineDeadError, RuntimeError):
      return False
    return True

  def _of_engine(self, snapshot: tables.Snapshot) -> Iterator[core.Metric]:
    info, totals = snapshot.info, snapshot.totals
    model = info.model_name
    for value in tables.GAUGES:
      yield self._gauge(
        value.name, value.text, value.read(snapshot), model_name=model
      )
    if snapshot.needed_tbt_s is not None:
      yield self._gauge(
        'tbt_slo_needed_seconds',
        'The least time between tokens that can be '
        'held at this load, of --tbt_slo_ms or above.',
        snapshot.needed_tbt_s,
        model_name=model,
      )
    yield self._gauge(
      'num_requests_waiting',
      'Requests that wait.',
      snapshot.stats.num_waiting + self._thread.num_queued,
      model_name=model,
    )
    yield self._gauge(
      'num_tokens_waiting',
      'Tokens of prompts that wait in the queue.',
      self._thread.num_queued_tokens,
      model_name=model,
    )
    if self._num_compiled is not None:
      yield self._gauge(
        'compiled_programs',
        'Programs compiled for steps.',
        self._num_compiled(),
        model_name=model,
      )
    for value in tables.COUNTERS:
      yield self._family(
        core.CounterMetricFamily,
        value.name,
        value.text,
        ('model_name',),
        {(model,): value.read(snapshot)},
        created=self._start,
      )
    yield self._family(
      core.CounterMetricFamily,
      'request_success',
      'Requests that ended by themselves.',
      ('model_name', 'finished_reason'),
      {(model, r.value): n for r, n in totals.finish_reasons.items()},
    )
    yield self._gauge(
      'cache_config_info',
      'The KV cache.',
      1,
      model_name=model,
      block_size=str(info.page_size),
      num_gpu_blocks=str(info.num_pages),
    )
    if info.max_loras:
      # As vLLM has it: names in labels, and the time, by which the last one is
      # known of all that were ever told.
      running, waiting = (
        ','.join(one.name for one in snapshot.adapters if getattr(one, field))
        for field in ('num_running', 'num_waiting')
      )
      yield self._gauge(
        'lora_requests_info',
        'Adapters of running and of waiting requests, and since when.',
        time.time(),
        model_name=model,
        max_lora=str(info.max_loras),
        running_lora_adapters=running,
        waiting_lora_adapters=waiting,
      )
    for histogram in tables.HISTOGRAMS:
      yield self._histogram(histogram, getattr(totals, histogram.field), model)

  def _histogram(
    self,
    histogram: tables.Histogram,
    values: metrics_lib.Quantiles,
    model_name: str,
  ) -> core.HistogramMetricFamily:
    family = core.HistogramMetricFamily(
      self._name(histogram.name), histogram.text, labels=('model_name',)
    )
    counts = values.cumulative(histogram.bounds)
    family.add_metric(
      (model_name,),
      [
        *(
          (str(bound), count)
          for bound, count in zip(histogram.bounds, counts, strict=True)
        ),
        ('+Inf', values.count),
      ],
      values.total,
    )
    return family

  def _gauge(
    self, name: str, text: str, value: float, **labels: str
  ) -> core.Metric:
    return self._family(
      core.GaugeMetricFamily,
      name,
      text,
      tuple(labels),
      {tuple(labels.values()): value},
    )

  def _family(
    self,
    kind: Callable[..., Any],
    name: str,
    text: str,
    labels: tuple[str, ...],
    values: Mapping[Any, float],
    **options: float,
  ) -> core.Metric:
    """Makes a metric of the values of labels; `options` are each value's."""
    family: core.Metric = kind(self._name(name), text, labels=labels)
    for of_labels, value in list(values.items()):
      family.add_metric(of_labels, float(value), **options)  # type: ignore
    return family

  def _name(self, name: str) -> str:
    return f'{self._prefix}:{name}'


def _snapshot(engine: engine_lib.Engine) -> tables.Snapshot:
  return tables.Snapshot(
    engine.metrics.copy(),
    engine.stats(),
    engine.info,
    None if engine.pace is None else engine.pace.needed_s(engine.clock()),
    engine.adapter_states(),
  )


class MetricsServer:
  """Answers scrapes on threads of its own.

  Args:
    collector: makes the metrics.
    host, port: where it listens.
    tokens: a scrape needs one of these; None: it needs none.
    files: the files to speak TLS with as the gRPC port does, clients'
      certificates included; None for plain text.

  Raises:
    ConfigError: the port can't be had, or a file can't be used.

  Attributes:
    port: where it listens.
    thread: its thread. The port stays, if that is started again.
  """

  def __init__(
    self,
    collector: Collector,
    host: str,
    port: int,
    tokens: auth.Tokens | None = None,
    files: tls.TlsFiles | None = None,
  ) -> None:
    registry = core.CollectorRegistry(auto_describe=False)
    registry.register(collector)
    prometheus_client.ProcessCollector(registry=registry)
    app = prometheus_client.make_wsgi_app(registry)
    try:
      self._server = web.WebServer(
        app if tokens is None else web.guarded(app, tokens),
        host,
        port,
        None if files is None else tls.contexts(files),
      )
    except OSError as error:
      raise errors.ConfigError(
        f"metrics_port={port}: can't listen at {host}: {error.strerror}."
      ) from error
    self.port: int = self._server.server_port
    self.thread = background.Thread('metrics', self._server.serve_forever)

  def stop(self) -> None:
    self.thread.is_ending = True
    self._server.shutdown()
    self._server.server_close()
    self.thread.join()
