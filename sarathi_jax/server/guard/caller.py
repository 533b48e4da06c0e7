# SPDX-License-Identifier: Apache-2.0
"""Who calls, until when, and in which trace: what a call's metadata tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc

from sarathi_jax.server import frontend
from sarathi_jax.server.guard import auth

# The name that a client gives itself, which tells apart those behind one token.
CLIENT_ID = 'x-client-id'
_TRACE_HEADERS = ('traceparent', 'tracestate')

Context = grpc.aio.ServicerContext[Any, Any]


def of(context: Context) -> frontend.Caller:
  """Reads a call's metadata; who remembers it has to hold it to `limits`."""
  metadata = {
    key: value
    for key, value in context.invocation_metadata() or ()
    if isinstance(value, str)
  }
  # Without its port: a client has one address and many connections.
  address = context.peer().rpartition(':')[0]
  return of_metadata(
    metadata, auth.CURRENT.get(), address, context.time_remaining()
  )


def of_metadata(
  metadata: Mapping[str, str],
  token: auth.Token | None,
  address: str,
  timeout_s: float | None = None,
) -> frontend.Caller:
  """Returns who calls, of any protocol.

  Args:
    metadata: the call's, or HTTP's headers; names in lower case.
    token: the one that it came with, if any.
    address: where it comes from, as gRPC writes it; whose it is without a
      token.
    timeout_s: seconds until its deadline, if it has one.
  """
  client_id = metadata.get(CLIENT_ID, '')
  tenant = token.name if token else address
  return frontend.Caller(
    tenant=tenant,
    client=f'{tenant}/{client_id}' if client_id else tenant,
    min_priority=token.min_priority if token else None,
    cache_scope=token.name if token else '',
    is_admin=token is not None and token.is_admin,
    timeout_s=timeout_s,
    trace={key: metadata[key] for key in _TRACE_HEADERS if key in metadata},
  )
