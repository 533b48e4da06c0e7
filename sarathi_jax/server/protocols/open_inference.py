# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol v2, with Triton's streaming: an adapter.

See open_inference.proto for the tensors. Imports no JAX.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import contextlib
import dataclasses
import functools
import json
from typing import Any

import grpc

import sarathi_jax
from sarathi_jax import errors
from sarathi_jax import sampling_params
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server import frontend as frontend_lib
from sarathi_jax.server import open_inference_pb2 as pb
from sarathi_jax.server import open_inference_pb2_grpc
from sarathi_jax.server.guard import caller as caller_lib
from sarathi_jax.server.protocols import messages
from sarathi_jax.server.protocols import open_inference_describe as describe
from sarathi_jax.server.protocols import status
from sarathi_jax.server.protocols import tensors
from sarathi_jax.server.queue import admission
from sarathi_jax.server.queue import outbox

NAME = pb.DESCRIPTOR.services_by_name['GRPCInferenceService'].full_name
Context = grpc.aio.ServicerContext[Any, Any]

# Names that Triton's backends for language models use -> ours.
_ALIASES = {
  'stop_words': 'stop',
  'random_seed': 'seed',
  'request_output_len': 'max_tokens',
}
_LISTS = tuple(
  name for name, field in sampling_params.FIELDS.items() if field.kind.is_list
)
_OBJECTS = tuple(
  name for name, field in sampling_params.FIELDS.items() if field.kind.is_object
)
# Input -> what bounds its elements; of others, max_elements.
_SIZES = {
  'stop': 'max_stops',
  'stop_token_ids': 'max_stop_token_ids',
  'bad_words': 'max_bad_words',
  'allowed_token_ids': 'max_adjusted_token_ids',
  'bad_token_ids': 'max_adjusted_token_ids',
  'logprob_token_ids': 'max_adjusted_token_ids',
}


class OpenInferenceService(
  open_inference_pb2_grpc.GRPCInferenceServiceServicer
):
  """Serves the protocol; open_inference.proto says what the calls do."""

  def __init__(self, frontend: frontend_lib.Frontend) -> None:
    self._frontend = frontend

  async def ServerLive(
    self, request: pb.ServerLiveRequest, context: Context
  ) -> pb.ServerLiveResponse:
    return pb.ServerLiveResponse(live=True)

  async def ServerReady(
    self, request: pb.ServerReadyRequest, context: Context
  ) -> pb.ServerReadyResponse:
    return pb.ServerReadyResponse(ready=self._frontend.is_serving)

  async def ModelReady(
    self, request: pb.ModelReadyRequest, context: Context
  ) -> pb.ModelReadyResponse:
    try:
      self._check_model(request.name, request.version)
    except errors.SarathiError:
      return pb.ModelReadyResponse(ready=False)
    return pb.ModelReadyResponse(ready=self._frontend.is_serving)

  async def ServerMetadata(
    self, request: pb.ServerMetadataRequest, context: Context
  ) -> pb.ServerMetadataResponse:
    return pb.ServerMetadataResponse(
      name='sarathi_jax',
      version=sarathi_jax.__version__,
      extensions=[
        'model_configuration',
        'model_repository',
        'parameters',
        'statistics',
      ],
    )

  async def ModelMetadata(
    self, request: pb.ModelMetadataRequest, context: Context
  ) -> pb.ModelMetadataResponse:
    async with status.reported(context):
      self._check_model(request.name, request.version)
      return describe.metadata(self._named(request.name))

  async def ModelConfig(
    self, request: pb.ModelConfigRequest, context: Context
  ) -> pb.ModelConfigResponse:
    async with status.reported(context):
      self._check_model(request.name, request.version)
      return pb.ModelConfigResponse(
        config=describe.config(self._named(request.name))
      )

  async def ModelStatistics(
    self, request: pb.ModelStatisticsRequest, context: Context
  ) -> pb.ModelStatisticsResponse:
    async with status.reported(context):
      if request.name:
        self._check_model(request.name, request.version)
      return pb.ModelStatisticsResponse(
        model_stats=[await describe.statistics(self._frontend)]
      )

  async def RepositoryIndex(
    self, request: pb.RepositoryIndexRequest, context: Context
  ) -> pb.RepositoryIndexResponse:
    async with status.reported(context):
      frontend = self._frontend
      response = pb.RepositoryIndexResponse()
      if frontend.is_serving or not request.ready:
        info = frontend.engine.info
        for name in (info.model_name, *info.adapters):
          response.models.add(
            name=name,
            version=describe.VERSION,
            state='READY' if frontend.is_serving else 'UNAVAILABLE',
            reason='' if frontend.is_serving else frontend.state.value,
          )
      return response

  async def ModelInfer(
    self, request: pb.ModelInferRequest, context: Context
  ) -> pb.ModelInferResponse:
    async with status.reported(context):
      call = await self._read(request)
      if call.stream:
        raise errors.InvalidRequestError(
          'stream=True: ModelInfer has one response; use ModelStreamInfer.'
        )
      if (n := call.sampling.get('n') or 1) != 1:
        raise errors.InvalidRequestError(
          f'n={errors.shown(n)}: ModelInfer has one response; use '
          'ModelStreamInfer, which has one for each output.'
        )
      async with self._open(call, caller_lib.of(context)) as stream:
        deltas = [delta async for delta in stream]
        return await self._response(call, outbox.merge(deltas))

  async def ModelStreamInfer(self, requests: Any, context: Context) -> None:
    # The error that refuses a request ends its own responses, not the stream.
    async with status.reported(context):
      caller = caller_lib.of(context)
    writing = asyncio.Lock()
    running: set[asyncio.Task[None]] = set()
    try:
      async with asyncio.TaskGroup() as group:
        async for request in requests:
          if len(running) >= self._frontend.limits.max_stream_requests:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
          task = group.create_task(
            self._answer(request, caller, context, writing)
          )
          running.add(task)
          task.add_done_callback(running.discard)
    except* grpc.aio.AbortError as group_error:
      raise group_error.exceptions[0] from None

  async def _answer(
    self,
    request: pb.ModelInferRequest,
    caller: frontend_lib.Caller,
    context: Context,
    writing: asyncio.Lock,
  ) -> None:
    """Writes all responses to one request of a stream."""

    async def write(response: pb.ModelStreamInferResponse) -> None:
      async with writing:  # gRPC takes one message at a time
        await context.write(response)

    try:
      call = await self._read(request)
      async with self._open(call, caller) as stream:
        deltas: dict[int, list[types.OutputDelta]] = {}
        async for delta in stream:
          so_far = deltas.setdefault(delta.output_index, [])
          so_far.append(delta)
          if call.stream or delta.finish_reason is not None:
            response = await self._response(call, outbox.merge(so_far))
            await write(pb.ModelStreamInferResponse(infer_response=response))
            so_far.clear()
    except Exception as error:
      status.log_defect(error)
      code, message = status.of(error)
      refusal = pb.ModelStreamInferResponse(
        error_message=f'[{code.name}] {message}'
      )
      # By which the client knows it, if it is none that it was refused for.
      refusal.infer_response.id = errors.cut(request.id)
      refusal.infer_response.model_name = errors.cut(request.model_name)
      for key, value in status.hints(error):
        refusal.infer_response.parameters[key].string_param = value
      _set_final(refusal.infer_response, True)
      await write(refusal)

  async def _read(self, request: pb.ModelInferRequest) -> _Call:
    """Reads a request for the model that is served."""
    frontend = self._frontend
    self._check_model(request.model_name, request.model_version)
    frontend.limits.check_name('id', request.id)

    def check_size(name: str, size: int) -> None:
      if name == 'input_ids':
        frontend.limits.check_prompt_tokens(
          size, frontend.engine.info.max_model_len
        )
      else:
        row = _SIZES.get(_ALIASES.get(name, name), 'max_elements')
        frontend.limits.check(row, size, f'inputs: {errors.cut(name)}')

    return await messages.read(
      request.ByteSize(), lambda: _Call(request, frontend.limits, check_size)
    )

  def _open(
    self,
    call: _Call,
    caller: frontend_lib.Caller,
  ) -> contextlib.AbstractAsyncContextManager[outbox.Stream]:
    sampling = self._frontend.engine.info.sampling(call.sampling)
    self._frontend.limits.check(
      'max_echoed_chars',
      sampling.n * len(call.echo),
      'exclude_input_in_output',
    )
    return self._frontend.open(
      call.prompt,
      sampling,
      priority=call.priority,
      adapter=self._adapter_of(call.request.model_name),
      caller=caller,
      protocol=NAME,
    )

  def _check_model(self, name: str, version: str) -> None:
    info = self._frontend.engine.info
    served = (info.model_name, *info.adapters)
    if name not in served or version not in ('', describe.VERSION):
      raise errors.NotFoundError(
        f'model={errors.shown(name)}, version={errors.shown(version)}: is '
        f'not served here; {", ".join(map(repr, served))} '
        f'{"are" if info.adapters else "is"}, version {describe.VERSION!r}.'
      )

  def _adapter_of(self, model_name: str) -> str | None:
    """Returns the adapter that a known name means; None for the model."""
    info = self._frontend.engine.info
    return None if model_name == info.model_name else model_name

  def _named(self, name: str) -> engine_lib.EngineInfo:
    """Returns what is served, by a known name."""
    return dataclasses.replace(self._frontend.engine.info, model_name=name)

  async def _response(
    self, call: _Call, delta: types.OutputDelta
  ) -> pb.ModelInferResponse:
    is_first = delta.output_index not in call.echoed
    return await messages.make(
      delta,
      functools.partial(self._respond, call, delta),
      len(call.echo) * is_first,
    )

  def _respond(
    self, call: _Call, delta: types.OutputDelta
  ) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(
      model_name=call.request.model_name,
      model_version=describe.VERSION,
      id=call.request.id,
    )
    text = delta.text
    if delta.output_index not in call.echoed:
      text = call.echo + text  # before the first piece only
      call.echoed.add(delta.output_index)
    reason = '' if delta.finish_reason is None else delta.finish_reason.value
    for name, datatype, values in (
      ('text_output', 'BYTES', [text.encode()]),
      ('output_ids', 'INT64', delta.token_ids),
      ('logprobs', 'FP32', delta.logprobs),
      ('finish_reason', 'BYTES', [reason.encode()]),
      ('index', 'INT32', [delta.output_index]),
    ):
      if name in call.outputs:
        tensors.add_output(response, name, datatype, values)
    for name, field in describe.USED.items():
      if name in call.outputs and delta.metrics is not None:
        used = getattr(delta.metrics, field)
        tensors.add_output(response, name, 'INT32', [used])
    for of, told in (
      ('told', delta.told),
      ('prompt_told', delta.prompt_logprobs or ()),
    ):
      for (name, datatype, _), values in zip(
        describe.TOLD, zip(*told, strict=True), strict=False
      ):
        if f'{of}_{name}' in call.outputs:
          tensors.add_output(response, f'{of}_{name}', datatype, values)
    _set_final(response, delta.ends_request)
    return response


def _set_final(response: pb.ModelInferResponse, is_final: bool) -> None:
  response.parameters['triton_final_response'].bool_param = is_final


class _Call:
  """What one ModelInferRequest asks.

  Raises:
    InvalidRequestError: what it asks can't be understood.
  """

  def __init__(
    self,
    request: pb.ModelInferRequest,
    limits: admission.Limits,
    check_size: Callable[[str, int], None],
  ) -> None:
    self.request = request
    inputs = tensors.read_inputs(request, limits, check_size)
    self.prompt = _prompt(inputs)
    fields = {
      _ALIASES.get(name, name): _plain(name, values)
      for name, values in inputs.items()
    }
    for name, parameter in request.parameters.items():
      field = _ALIASES.get(name, name)
      if field in fields:
        raise errors.InvalidRequestError(f'{errors.cut(name)}: is there twice.')
      fields[field] = tensors.parameter_value(parameter)
      if field in _LISTS:
        fields[field] = (fields[field],)
    for name in fields.keys() & set(_OBJECTS):
      fields[name] = _from_json(name, fields[name], limits)
    self.stream = _bool('stream', fields.pop('stream', False))
    fields.pop('triton_enable_empty_final_response', None)
    self.priority = _int32('priority', fields.pop('priority', 0))
    without_input = _bool(
      'exclude_input_in_output', fields.pop('exclude_input_in_output', True)
    )
    if not (without_input or isinstance(self.prompt, str)):
      raise errors.UnsupportedError(
        'exclude_input_in_output=False: only with text_input.'
      )
    self.echo = '' if without_input else str(self.prompt)
    self.echoed: set[int] = set()  # outputs whose text has begun
    self.sampling = (
      _from_json(
        'sampling_parameters', fields.pop('sampling_parameters', ''), limits
      )
      | fields
    )
    self.outputs = {output.name for output in request.outputs} or {
      name for name, _, _ in describe.OUTPUTS
    }
    for name in self.outputs - {name for name, _, _ in describe.OUTPUTS}:
      raise errors.InvalidRequestError(
        f'outputs: there is no {errors.shown(name)}; there are '
        f'{", ".join(name for name, _, _ in describe.OUTPUTS)}.'
      )


def _prompt(inputs: dict[str, list[Any]]) -> frontend_lib.Prompt:
  """Takes the prompt out of the inputs."""
  given = [name for name in ('text_input', 'input_ids') if name in inputs]
  if len(given) != 1:
    raise errors.InvalidRequestError(
      'inputs: must have one of text_input, input_ids.'
    )
  values = inputs.pop(given[0])
  if given[0] == 'input_ids':
    # Which are integers, and whether they are known, the engine checks.
    return tuple(values)
  if len(values) != 1:
    raise errors.InvalidRequestError(
      f'inputs: text_input has {len(values)} elements; must be one: a request '
      'is one prompt.'
    )
  return str(_plain('text_input', values))


def _plain(name: str, values: list[Any]) -> Any:
  """Returns one value, or a tuple where a field has several; bytes as text."""
  try:
    plain = tuple(v.decode() if isinstance(v, bytes) else v for v in values)
  except UnicodeDecodeError as error:
    raise errors.InvalidRequestError(
      f'inputs: {errors.shown(name)} is not UTF-8: {errors.cut(str(error))}.'
    ) from None
  if _ALIASES.get(name, name) in _LISTS:
    return plain
  if len(plain) != 1:
    raise errors.InvalidRequestError(
      f'inputs: {errors.shown(name)} has {len(plain)} elements; must be one.'
    )
  return plain[0]


def _bool(name: str, value: Any) -> bool:
  if not isinstance(value, bool):
    raise errors.InvalidRequestError(
      f'{name}={errors.shown(value)}: must be true or false.'
    )
  return value


def _int32(name: str, value: Any) -> int:
  if (
    isinstance(value, bool)
    or not isinstance(value, int)
    or not (-(2**31) <= value < 2**31)
  ):
    raise errors.InvalidRequestError(
      f'{name}={errors.shown(value)}: must be an integer of 32 bits.'
    )
  return value


def _from_json(
  name: str, text: Any, limits: admission.Limits
) -> dict[str, Any]:
  """Decodes an object that a field holds as JSON; nothing is an empty one."""
  if not text:
    return {}
  if isinstance(text, str):
    limits.check('max_json_chars', len(text), name)
  try:
    fields = json.loads(text)
  except (TypeError, ValueError, RecursionError) as error:
    raise errors.InvalidRequestError(f'{name}: is not JSON: {error}.') from None
  if not isinstance(fields, dict):
    raise errors.InvalidRequestError(
      f'{name}={errors.shown(text)}: must be an object.'
    )
  return fields
