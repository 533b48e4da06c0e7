# SPDX-License-Identifier: Apache-2.0
"""Answers bytes that are no message with INVALID_ARGUMENT.

grpc.aio answers UNKNOWN, which clients take for a defect of the server and
try again, and logs a traceback for each.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
import inspect
from typing import Any

from google.protobuf import message
import grpc


class Interceptor(grpc.aio.ServerInterceptor):
  """For calls of every service."""

  async def intercept_service(
      self,
      continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
      handler_call_details: grpc.HandlerCallDetails) -> Any:
    handler = await continuation(handler_call_details)
    if handler is None:
      return handler
    if handler.request_streaming:
      # Such a method finds the error among its requests, if it is ours:
      # others are generators.
      if not inspect.iscoroutinefunction(handler.stream_stream):
        return handler
      return grpc.stream_stream_rpc_method_handler(
        handler.stream_stream, _caught(handler.request_deserializer),
        handler.response_serializer)
    wrap, method = (
      (grpc.unary_stream_rpc_method_handler, handler.unary_stream)
      if handler.response_streaming else
      (grpc.unary_unary_rpc_method_handler, handler.unary_unary))
    if not inspect.iscoroutinefunction(method):
      return handler
    return wrap(_checked(method), _caught(handler.request_deserializer),
                handler.response_serializer)


def _caught(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
  """Returns the error in place of the message: raised here, it is UNKNOWN."""
  def caught(data: bytes) -> Any:
    try:
      return deserialize(data)
    except message.DecodeError as error:
      return error
  return caught


def _checked(method: Callable[[Any, Any], Awaitable[Any]]) -> Any:
  async def checked(request: Any, context: Any) -> Any:
    if isinstance(request, message.DecodeError):
      await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(request))
    return await method(request, context)
  return checked
