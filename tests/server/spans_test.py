# SPDX-License-Identifier: Apache-2.0
"""OpenTelemetry spans, as a collector gets them."""

from __future__ import annotations

from concurrent import futures
import contextlib
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
import pytest

from sarathi_jax.server import sarathi_pb2 as pb
from tests.server import fake


class _Collector(trace_service_pb2_grpc.TraceServiceServicer):
  def __init__(self) -> None:
    self.spans: list[Any] = []

  def Export(self, request: Any, context: Any) -> Any:
    self.spans += [
      span
      for resource in request.resource_spans
      for scope in resource.scope_spans
      for span in scope.spans
    ]
    return trace_service_pb2.ExportTraceServiceResponse()


def test_a_span_a_request_in_its_callers_trace() -> None:
  collector = _Collector()
  server = grpc.server(futures.ThreadPoolExecutor(2))
  trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
  port = server.add_insecure_port('127.0.0.1:0')
  server.start()
  trace_id, parent = 'ab' * 16, 'cd' * 8
  with contextlib.closing(
    fake.RunningServer(
      fake.make_engine, otlp_endpoint=f'http://127.0.0.1:{port}'
    )
  ) as running:
    list(
      running.stub.Generate(
        pb.GenerateRequest(
          token_ids=pb.TokenIds(ids=[1, 2]),
          request_id='r',
          sampling=pb.SamplingParams(max_tokens=3),
        ),
        metadata=[('traceparent', f'00-{trace_id}-{parent}-01')],
      )
    )
    with pytest.raises(grpc.RpcError):
      list(running.generate(token_ids=[]))
  server.stop(None)  # what was left was sent before the server was closed
  good, bad = sorted(collector.spans, key=lambda span: span.status.code)
  assert good.trace_id.hex() == trace_id
  assert good.parent_span_id.hex() == parent
  values = {a.key: a.value for a in good.attributes}
  assert values['gen_ai.request.id'].string_value == 'r'
  assert values['gen_ai.usage.prompt_tokens'].int_value == 2
  assert values['gen_ai.usage.completion_tokens'].int_value == 3
  assert values['gen_ai.latency.time_to_first_token'].double_value > 0
  assert bad.status.message == 'INVALID_ARGUMENT'
