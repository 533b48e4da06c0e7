# SPDX-License-Identifier: Apache-2.0
"""From what an engine raises to the status that a gRPC client gets."""

from __future__ import annotations

from collections.abc import AsyncIterator
import contextlib
from typing import Any

from absl import logging
import grpc

from sarathi_jax import errors

# The first that fits. Anything else is a defect of ours: INTERNAL.
CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
  (errors.InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
  (errors.CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
  (errors.EngineDeadError, grpc.StatusCode.UNAVAILABLE),
)


def of(error: Exception) -> tuple[grpc.StatusCode, str]:
  """Returns the code and the message for a client."""
  for kind, code in CODES:
    if isinstance(error, kind):
      return code, str(error)
  return (grpc.StatusCode.INTERNAL,
          f'internal error, see the log of the server: {type(error).__name__}')


@contextlib.asynccontextmanager
async def reported(
    context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
  """Ends a call with the status of what is raised inside."""
  try:
    yield
  except grpc.aio.AbortError:
    raise  # has its status
  except Exception as error:
    code, message = of(error)
    if code is grpc.StatusCode.INTERNAL:
      logging.exception('A call failed.')
    await context.abort(code, message)
