# SPDX-License-Identifier: Apache-2.0
"""grpc.health.v1: whether each service serves.

Beside the services, and '' for the server as a whole, it knows these names:

  liveness   serves from the start, while the model is loaded and while we
             drain, until the engine is dead, or hangs in a step: for probes
             that end us
  gateway    smg, where there is one

Our own servicer, as that of grpcio-health-checking forgets all watchers of a
service when one of them leaves (its `Watch`, up to 1.85 at least).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from sarathi_jax import errors

LIVENESS = 'liveness'
GATEWAY = 'gateway'
NAME = pb.DESCRIPTOR.services_by_name['Health'].full_name
Context = grpc.aio.ServicerContext[Any, Any]
_Status = pb.HealthCheckResponse


class HealthService(health_pb2_grpc.HealthServicer):
  """Says the same of every service: one engine is behind them all.

  Args:
    services: their names.
  """

  def __init__(self, services: Iterable[str]) -> None:
    self._services = ('', *services)
    self._is_serving = dict.fromkeys(self._services, False) | {LIVENESS: True}
    self._changed = asyncio.Event()

  def set(self, is_serving: bool, *names: str) -> None:
    """Sets the status of services, all without names; tells all watchers."""
    self._is_serving |= dict.fromkeys(names or self._services, is_serving)
    self._changed.set()
    self._changed = asyncio.Event()

  async def Check(
    self, request: pb.HealthCheckRequest, context: Context
  ) -> pb.HealthCheckResponse:
    if request.service not in self._is_serving:
      await context.abort(
        grpc.StatusCode.NOT_FOUND,
        f'service={errors.shown(request.service)}: is not here.',
      )
    return self._response(request.service)

  async def List(self, request: Any, context: Context) -> Any:
    return pb.HealthListResponse(  # type: ignore[attr-defined]
      statuses={name: self._response(name) for name in self._is_serving}
    )

  async def Watch(
    self, request: pb.HealthCheckRequest, context: Context
  ) -> None:
    # By the protocol, this waits for ever if the service is unknown.
    sent = None
    while True:
      changed = self._changed
      response = self._response(request.service)
      if response != sent:
        await context.write(response)
        sent = response
      await changed.wait()

  def _response(self, service: str) -> pb.HealthCheckResponse:
    if service not in self._is_serving:
      return _Status(status=_Status.SERVICE_UNKNOWN)
    return _Status(
      status=_Status.SERVING
      if self._is_serving[service]
      else _Status.NOT_SERVING
    )
