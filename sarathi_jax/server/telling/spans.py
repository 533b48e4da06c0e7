# SPDX-License-Identifier: Apache-2.0
"""An OpenTelemetry span for each request, by the conventions for GenAI.

A span joins the trace of its caller, if that sends W3C trace context.
"""

from __future__ import annotations

import threading

from sarathi_jax import errors
from sarathi_jax.server import background
from sarathi_jax.server import frontend
from sarathi_jax.server.telling import request_log

_TIMES = {
  'scheduling_delay_s': 'gen_ai.latency.time_in_queue',
  'ttft_s': 'gen_ai.latency.time_to_first_token',
  'e2e_s': 'gen_ai.latency.e2e',
}


class Spans:
  """Sends spans to a collector, by gRPC, from a thread of its own.

  Args:
    endpoint: the collector's, such as http://localhost:4317.

  Raises:
    ConfigError: OpenTelemetry is not installed.
  """

  def __init__(self, endpoint: str) -> None:
    try:
      from opentelemetry.exporter.otlp.proto.grpc import trace_exporter
      from opentelemetry.sdk import resources
      from opentelemetry.sdk import trace as sdk
      from opentelemetry.sdk.trace import export
      from opentelemetry.trace.propagation import tracecontext
    except ImportError as error:
      raise errors.ConfigError(
        f'otlp_endpoint={endpoint!r}: needs OpenTelemetry, in the source tree: '
        f'pip install -e ".[otel]" ({error}).'
      ) from error

    def provide() -> sdk.TracerProvider:
      provider = sdk.TracerProvider(
        resource=resources.Resource.create({'service.name': 'sarathi_jax'})
      )
      provider.add_span_processor(
        export.BatchSpanProcessor(
          trace_exporter.OTLPSpanExporter(
            endpoint=endpoint, insecure=not endpoint.startswith('https')
          )
        )
      )
      return provider

    self._provide = provide
    self._propagator = tracecontext.TraceContextTextMapPropagator()
    self.restart()

  @property
  def as_background(self) -> background.Background:
    """The sending thread as `background.Watch` takes it."""
    return background.Background('spans', self.why_ended, self.restart)

  def why_ended(self) -> str | None:
    """Tells whether the thread that sends is gone; None while it runs."""
    is_well = self._thread is None or self._thread.is_alive()
    return None if is_well else 'its thread is gone'

  def restart(self) -> None:
    """Sends from a new thread; loses the spans that the last one had."""
    before = set(threading.enumerate())
    self._provider = self._provide()
    self._tracer = self._provider.get_tracer('sarathi_jax')
    # OpenTelemetry does not show its thread.
    self._thread = next(
      (
        thread
        for thread in set(threading.enumerate()) - before
        if thread.name.startswith('Otel')
      ),
      None,
    )

  def __call__(self, ended: frontend.Ended) -> None:
    """Makes the span of a request that ended, without any of its text."""
    from opentelemetry import trace

    span = self._tracer.start_span(
      'llm_request',
      self._propagator.extract(dict(ended.caller.trace)),
      kind=trace.SpanKind.SERVER,
      start_time=round(ended.started * 1e9),
    )
    outcome = request_log.outcome(ended)
    span.set_attributes(
      {
        'gen_ai.request.id': ended.request_id,
        'gen_ai.usage.completion_tokens': ended.num_tokens,
        'rpc.service': ended.protocol,
        'sarathi.client': ended.caller.client,
        'sarathi.outcome': outcome,
      }
    )
    if (request := ended.request) is not None:
      sampling = request.sampling
      span.set_attributes(
        {
          'gen_ai.usage.prompt_tokens': len(request.prompt_token_ids),
          'gen_ai.request.temperature': sampling.temperature,
          'gen_ai.request.top_p': sampling.top_p,
        }
      )
    if ended.last is not None and ended.last.metrics is not None:
      for field, name in _TIMES.items():
        value = getattr(ended.last.metrics, field)
        if value is not None:
          span.set_attribute(name, value)
    if ended.error is not None:
      span.set_status(trace.StatusCode.ERROR, outcome)
    span.end()

  def stop(self) -> None:
    """Sends what is left."""
    self._thread = None
    self._provider.shutdown()
