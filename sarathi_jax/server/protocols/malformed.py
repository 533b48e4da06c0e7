# SPDX-License-Identifier: Apache-2.0
"""Parses messages, and answers malformed ones with INVALID_ARGUMENT.

grpc.aio would parse on the event loop, however long that takes, and answer
UNKNOWN, which clients take for a defect of the server and try again. Here,
`wire` looks bytes over first, and large ones are another thread's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
import inspect
from typing import Any

from google.protobuf import message
import grpc

from sarathi_jax import errors
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.protocols import messages
from sarathi_jax.server.protocols import status
from sarathi_jax.server.protocols import wire

_Parse = Callable[[bytes, Any], Awaitable[Any]]


class Interceptor(grpc.aio.ServerInterceptor):
  """Parses the requests of every service.

  Args:
    limits: the most that messages may have.
    strict: methods, or services, whose requests must have no field that we
      don't know: a newer client's wish is refused then, not ignored.
  """

  def __init__(
    self, limits: limits_lib.Limits, strict: Collection[str] = ()
  ) -> None:
    self._limits = limits
    self._strict = frozenset(strict)

  async def intercept_service(
    self,
    continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
    handler_call_details: grpc.HandlerCallDetails,
  ) -> Any:
    handler = await continuation(handler_call_details)
    if handler is None:
      return handler
    method = handler_call_details.method
    parse = self._parser(
      handler.request_deserializer.__self__,
      not self._strict.isdisjoint((method, method.rpartition('/')[0])),
    )
    kind = (
      f'{"stream" if handler.request_streaming else "unary"}_'
      f'{"stream" if handler.response_streaming else "unary"}'
    )
    wrap = _wrap_stream if handler.request_streaming else _wrap_unary
    make = getattr(grpc, f'{kind}_rpc_method_handler')
    return make(
      wrap(getattr(handler, kind), parse), None, handler.response_serializer
    )

  def _parser(self, cls: Any, is_strict: bool) -> _Parse:
    def parse(data: bytes) -> Any:
      wire.check(data, cls.DESCRIPTOR, self._limits, refuses_unknown=is_strict)
      return cls.FromString(data)

    async def parse_or_end(data: bytes, context: Any) -> Any:
      async with status.reported(context):
        try:
          return await messages.read(len(data), lambda: parse(data))
        except message.DecodeError as error:
          raise errors.InvalidRequestError(str(error)) from None

    return parse_or_end


def _wrap_unary(method: Callable[[Any, Any], Any], parse: _Parse) -> Any:
  """Serves bytes by a method that takes a message."""

  async def checked(data: bytes, context: Any) -> Any:
    return await method(await parse(data, context), context)

  async def checked_generator(data: bytes, context: Any) -> Any:
    async for response in method(await parse(data, context), context):
      yield response

  return checked_generator if inspect.isasyncgenfunction(method) else checked


def _wrap_stream(method: Callable[[Any, Any], Any], parse: _Parse) -> Any:
  """Serves a stream of bytes by a method that takes one of messages."""

  async def parsed(requests: Any, context: Any) -> AsyncIterator[Any]:
    async for data in requests:
      yield await parse(data, context)

  async def checked(requests: Any, context: Any) -> Any:
    return await method(parsed(requests, context), context)

  async def checked_generator(requests: Any, context: Any) -> Any:
    async for response in method(parsed(requests, context), context):
      yield response

  return checked_generator if inspect.isasyncgenfunction(method) else checked
