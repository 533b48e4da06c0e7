# SPDX-License-Identifier: Apache-2.0
"""Who calls, until when, and in which trace: what a call's metadata tell."""

from __future__ import annotations

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
  client_id = metadata.get(CLIENT_ID, '')
  token = auth.CURRENT.get()
  # Without its port: a client has one address and many connections.
  tenant = token.name if token else context.peer().rpartition(':')[0]
  return frontend.Caller(
    tenant=tenant,
    client=f'{tenant}/{client_id}' if client_id else tenant,
    min_priority=token.min_priority if token else None,
    is_admin=token is not None and token.is_admin,
    timeout_s=context.time_remaining(),
    trace={key: metadata[key] for key in _TRACE_HEADERS if key in metadata},
  )
