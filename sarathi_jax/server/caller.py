# SPDX-License-Identifier: Apache-2.0
"""Who calls, until when, and in which trace: what a call's metadata tell."""

from __future__ import annotations

import contextvars
from typing import Any

import grpc

from sarathi_jax.server import frontend

# The name of the token that the call came with; set by `auth.Interceptor`.
TOKEN_NAME: contextvars.ContextVar[str] = contextvars.ContextVar(
  'token_name', default='')

# What a client calls itself, which tells apart those behind one token.
CLIENT_ID = 'x-client-id'
_TRACE_HEADERS = ('traceparent', 'tracestate')

Context = grpc.aio.ServicerContext[Any, Any]


def of(context: Context) -> frontend.Caller:
  """Reads a call's metadata."""
  metadata = {
    key: value for key, value in context.invocation_metadata() or ()
    if isinstance(value, str)}
  named = metadata.get(CLIENT_ID, '')
  client = '/'.join(filter(None, (TOKEN_NAME.get(), named)))
  # Without its port: a client has one address and many connections.
  return frontend.Caller(
    client=client or context.peer().rpartition(':')[0],
    timeout_s=context.time_remaining(),
    trace={key: metadata[key] for key in _TRACE_HEADERS if key in metadata})
