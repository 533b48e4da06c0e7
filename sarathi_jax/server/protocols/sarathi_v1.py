# SPDX-License-Identifier: Apache-2.0
"""The protocol sarathi.v1: an adapter between its messages and the frontend.

Imports no JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import time
from typing import Any

import grpc

from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.server import frontend as frontend_lib
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc
from sarathi_jax.server.guard import caller
from sarathi_jax.server.protocols import messages
from sarathi_jax.server.protocols import status
from sarathi_jax.server.queue import outbox

NAME = pb.DESCRIPTOR.services_by_name['Sarathi'].full_name

_FINISH_REASONS = {
  types.FinishReason.STOP: pb.FINISH_REASON_STOP,
  types.FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
  types.FinishReason.ABORT: pb.FINISH_REASON_ABORT,
  types.FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}

_TIMING = tuple(field.name for field in pb.Timing.DESCRIPTOR.fields)
_MODEL_INFO = tuple(
  field.name
  for field in pb.GetModelInfoResponse.DESCRIPTOR.fields
  if field.name not in ('has_tokenizer', 'default_sampling', 'windows')
)
# Statistics that the server adds to the engine's.
OWN_STATS = ('is_paused', 'num_queued', 'uptime_s')
_STATS = tuple(
  field.name
  for field in pb.GetStatsResponse.DESCRIPTOR.fields
  if field.name not in OWN_STATS
)

# A recommended `top_k` beyond all vocabularies is as good as this.
_MAX_INT = 2**31 - 1

Context = grpc.aio.ServicerContext[Any, Any]


class SarathiService(sarathi_pb2_grpc.SarathiServicer):
  """Serves sarathi.v1.Sarathi; sarathi.proto says what the calls do."""

  def __init__(self, frontend: frontend_lib.Frontend) -> None:
    self._frontend = frontend
    self._start = time.monotonic()

  async def Generate(
    self, request: pb.GenerateRequest, context: Context
  ) -> None:
    # Written, not yielded: a cancelled call then unwinds `open` at once,
    # whereas it leaves a generator to the garbage collector.
    async with status.reported(context):
      info = self._frontend.engine.info
      prompt, sampling = await messages.read(
        request.ByteSize(),
        lambda: (
          prompt_of(request),
          sampling_of(request.sampling, info.sampling),
        ),
      )
      async with self._frontend.open(
        prompt,
        sampling,
        request.request_id if request.HasField('request_id') else None,
        priority=request.priority,
        tier=request.tier or types.TIERS[0],
        cache_salt=request.cache_salt,
        adapter=request.adapter if request.HasField('adapter') else None,
        caller=caller.of(context),
        protocol=NAME,
      ) as stream:
        await _write(stream, context)

  async def Abort(
    self, request: pb.AbortRequest, context: Context
  ) -> pb.AbortResponse:
    async with status.reported(context):
      return pb.AbortResponse(
        aborted=await self._frontend.abort(
          request.request_ids, caller.of(context)
        )
      )

  async def GetModelInfo(
    self, request: pb.GetModelInfoRequest, context: Context
  ) -> pb.GetModelInfoResponse:
    async with status.reported(context):
      engine = self._frontend.engine
      recommended: dict[str, Any] = {
        name: min(value, _MAX_INT) if type(value) is int else value
        for name, value in engine.info.default_sampling.items()
      }
      return pb.GetModelInfoResponse(
        has_tokenizer=engine.tokenizer is not None,
        default_sampling=pb.SamplingParams(**recommended),
        windows=[window or 0 for window in engine.info.windows],
        **{name: getattr(engine.info, name) for name in _MODEL_INFO},
      )

  async def GetStats(
    self, request: pb.GetStatsRequest, context: Context
  ) -> pb.GetStatsResponse:
    async with status.reported(context):
      frontend = self._frontend
      stats = await frontend.stats()
      return pb.GetStatsResponse(
        is_paused=frontend.engine_thread.is_paused,
        num_queued=frontend.engine_thread.num_queued,
        uptime_s=time.monotonic() - self._start,
        **{name: getattr(stats, name) for name in _STATS},
      )


async def _write(stream: outbox.Stream, context: Context) -> None:
  async for delta in stream:
    response = await messages.make(
      delta, functools.partial(_response, stream.request.request_id, delta)
    )
    if delta.finish_reason is not None:
      response.finished.CopyFrom(finished(delta))
      response.finished.usage.prompt_tokens = len(
        stream.request.prompt_token_ids
      )
      response.finished.usage.completion_tokens = stream.num_tokens[
        delta.output_index
      ]
    await context.write(response)


def _response(request_id: str, delta: types.OutputDelta) -> pb.GenerateResponse:
  response = pb.GenerateResponse(
    request_id=request_id,
    text=delta.text,
    token_ids=delta.token_ids,
    logprobs=delta.logprobs,
    index=delta.output_index,
  )
  # Most have none of these, and there is a message for each token.
  for told, field in (
    (delta.told, response.told),
    (delta.prompt_logprobs, response.prompt_logprobs),
    (delta.versions, response.versions),
  ):
    for each in told or ():
      field.add(**each._asdict())
  return response


def prompt_of(request: pb.GenerateRequest) -> frontend_lib.Prompt:
  """Returns the one input of a request; token ids as they are there.

  Raises:
    InvalidRequestError: there is no input.
  """
  match request.WhichOneof('input'):
    case 'text':
      return request.text
    case 'token_ids':
      return request.token_ids.ids or ()
    case 'chat':
      return [
        {'role': m.role, 'content': m.content} for m in request.chat.messages
      ]
    case _:
      raise errors.InvalidRequestError(
        'input: one of text, token_ids, chat must be set.'
      )


def sampling_of(
  message: pb.SamplingParams,
  make: Callable[[Mapping[str, Any]], types.SamplingParams] = (
    types.SamplingParams.from_dict
  ),
) -> types.SamplingParams:
  """Returns the parameters of a message; what is unset takes its default.

  Args:
    message: what a request says.
    make: makes parameters of the fields that the message sets; see
      `EngineInfo.sampling`.

  Raises:
    InvalidRequestError: a value is out of range.
  """
  fields = _plain(message)
  if fields.pop('fill_context', False):
    if 'max_tokens' in fields:
      raise errors.InvalidRequestError(
        f'max_tokens={message.max_tokens}: excludes fill_context.'
      )
    fields['max_tokens'] = None
  return make(fields)


def _plain(message: Any) -> dict[str, Any]:
  """Returns what a message sets, by name."""
  return {
    field.name: (
      dict(value) if field.message_type is not None else tuple(value)
    )
    if field.is_repeated
    else (_plain(value) if field.message_type is not None else value)
    for field, value in message.ListFields()
  }


def finished(delta: types.OutputDelta) -> pb.Finished:
  """Makes `finished` of an output's last message, but for its usage."""
  assert delta.finish_reason is not None
  message = pb.Finished(finish_reason=_FINISH_REASONS[delta.finish_reason])
  if isinstance(delta.stop_reason, str):
    message.stop_string = delta.stop_reason
  elif delta.stop_reason is not None:
    message.stop_token_id = delta.stop_reason
  if delta.metrics is not None:
    message.usage.cached_tokens = delta.metrics.num_cached_tokens
    message.timing.CopyFrom(
      pb.Timing(**{name: getattr(delta.metrics, name) for name in _TIMING})
    )
  return message
