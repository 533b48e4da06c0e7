# SPDX-License-Identifier: Apache-2.0
"""The protocol vllm.grpc.engine.VllmEngine: what vLLM's gateway `smg` speaks.

Messages are those of the package smg-grpc-proto; semantics are those of vLLM's
own server: zeros stand for defaults, a stream has deltas and then one
`complete` of each output, without a stream `complete` is all. What this engine
does not do is refused, and calls that it does not have are UNIMPLEMENTED.
Imports no JAX.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import datetime
import functools
import hashlib
import io
import json
import pathlib
import re
import time
from typing import Any, ClassVar
import zipfile

import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

import sarathi_jax
from sarathi_jax import errors
from sarathi_jax import structured_outputs
from sarathi_jax import types
from sarathi_jax.server import frontend as frontend_lib
from sarathi_jax.server.guard import caller
from sarathi_jax.server.protocols import messages
from sarathi_jax.server.protocols import status
from sarathi_jax.server.protocols import vllm_cache
from sarathi_jax.server.protocols import vllm_loads
from sarathi_jax.server.queue import outbox

NAME = pb.DESCRIPTOR.services_by_name['VllmEngine'].full_name
# For administrators: others' prompts and cache are in their hands.
ADMIN_METHODS = (f'/{NAME}/SubscribeKvEvents', f'/{NAME}/FlushCache')
Context = grpc.aio.ServicerContext[Any, Any]

_CHUNK_BYTES = 64 * 1024
# Files that a gateway needs to tokenize and to lay out chats.
_TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'generation_config.json',
  'config.json',
  'chat_template.jinja',
  'chat_template.json',
)

# Zero stands for these, as messages of proto3 can't tell it from unset.
_FOR_ZERO = {'top_p': 1.0, 'repetition_penalty': 1.0, 'n': 1}
# smg sends these for all seeds beyond, which would be one and the same.
_CLAMPED_SEEDS = (-(2**31), 2**31 - 1)
# Request ids that smg makes of an HTTP call's id, one for each of its prompts.
_OF_A_CALL = re.compile(
  r'(?P<call>.+?)(-p\d+)?-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}'
)
_MAX_CALL_CHARS = 128
# About the text, which the client makes.
_NO_EFFECT = 'spaces_between_special_tokens'
_AT_ONCE = 'grammar_from_first_token'
# Names of its constraints -> those of `StructuredOutputsParams`, if others.
_FIELDS = {'json_schema': 'json'}
# Fields of GenerateRequest that are set only for what this engine does not do.
_UNSUPPORTED = (
  'kv_transfer_params',
  'kv_transfer_params_json',
  'mm_inputs',
  'extra_mm_inputs',
  'media_refs',
)


class _Constraint(types.StructuredOutputsParams):
  """What the output has to be, in this protocol's words."""

  NAMES: ClassVar[Mapping[str, str]] = {
    name: name for name in structured_outputs.KINDS
  } | {ours: theirs for theirs, ours in _FIELDS.items()}
  AFTER_REASONING: ClassVar[bool] = True


class _AtOnce(_Constraint):
  """The same, from the first token: the gateway has cared for reasoning."""

  AFTER_REASONING: ClassVar[bool] = False


class VllmEngineService(vllm_engine_pb2_grpc.VllmEngineServicer):  # type: ignore[misc]
  """Serves the protocol; see vllm_engine.proto of smg-grpc-proto.

  Args:
    frontend: admits requests and reaches the engine.
    cache: serves what is about the cache.
    loads: tells the engine's load.
  """

  def __init__(
    self,
    frontend: frontend_lib.Frontend,
    cache: vllm_cache.CacheCalls,
    loads: vllm_loads.Loads,
  ) -> None:
    self._frontend = frontend
    self._cache = cache
    self._loads = loads
    self._start = time.monotonic()
    self._bundling = asyncio.Lock()
    self._bundle: tuple[bytes, str] | None = None  # of the tokenizer

  async def Generate(
    self, request: pb.GenerateRequest, context: Context
  ) -> None:
    async with status.reported(context):
      prompt, sampling = await messages.read(
        request.ByteSize(),
        lambda: (prompt_of(request), sampling_of(request.sampling_params)),
      )
      async with self._frontend.open(
        prompt,
        sampling,
        request.request_id or None,
        caller=self._caller(request, context),
        protocol=NAME,
      ) as stream:
        await _write(request, stream, context)

  async def Abort(
    self, request: pb.AbortRequest, context: Context
  ) -> pb.AbortResponse:
    async with status.reported(context):
      await self._frontend.abort(request.request_ids, caller.of(context))
      return pb.AbortResponse()

  async def HealthCheck(
    self, request: pb.HealthCheckRequest, context: Context
  ) -> pb.HealthCheckResponse:
    return pb.HealthCheckResponse(
      healthy=self._frontend.is_serving, message=self._frontend.state.value
    )

  async def GetModelInfo(
    self, request: pb.GetModelInfoRequest, context: Context
  ) -> pb.GetModelInfoResponse:
    async with status.reported(context):
      info = self._frontend.engine.info
      # No paths of ours: the tokenizer comes by GetTokenizer.
      return pb.GetModelInfoResponse(
        model_path=info.model_name,
        is_generation=True,
        max_context_length=info.max_model_len,
        vocab_size=info.vocab_size,
        served_model_name=info.model_name,
        model_type=info.family,
        eos_token_ids=info.eos_token_ids,
        max_req_input_len=info.max_model_len - 1,
        default_sampling_params_json=json.dumps(dict(info.default_sampling)),
      )

  async def GetServerInfo(
    self, request: pb.GetServerInfoRequest, context: Context
  ) -> pb.GetServerInfoResponse:
    async with status.reported(context):
      info = self._frontend.engine.info
      return pb.GetServerInfoResponse(
        active_requests=self._frontend.num_open,
        is_paused=self._frontend.engine_thread.is_paused,
        last_receive_timestamp=self._frontend.last_arrival,
        uptime_seconds=time.monotonic() - self._start,
        server_type='sarathi-grpc',
        data_parallel_size=1,
        block_size=info.page_size,
        max_num_seqs=info.max_num_seqs,
      )

  async def GetLoads(
    self, request: pb.GetLoadsRequest, context: Context
  ) -> pb.GetLoadsResponse:
    async with status.reported(context):
      if request.dp_rank:
        raise errors.NotFoundError(
          f'dp_rank={request.dp_rank}: there is one rank, 0.'
        )
      return pb.GetLoadsResponse(
        timestamp=datetime.datetime.now(datetime.UTC).isoformat(),
        version=sarathi_jax.__version__,
        dp_rank_count=1,
        loads=[await self._loads.ask()],
      )

  async def GetTokenizer(
    self, request: common_pb2.GetTokenizerRequest, context: Context
  ) -> None:
    async with status.reported(context):
      if self._folder is None:
        raise errors.NotFoundError('tokenizer: this model has none.')
      async with self._bundling:  # once: it takes a second for large ones
        if self._bundle is None:
          self._bundle = await asyncio.get_running_loop().run_in_executor(
            None, bundle, self._folder, self._frontend.engine.info.family
          )
      for chunk in chunks(*self._bundle):
        await context.write(chunk)

  async def FlushCache(
    self, request: common_pb2.FlushCacheRequest, context: Context
  ) -> common_pb2.FlushCacheResponse:
    return await self._cache.flush(request, context)

  async def SubscribeKvEvents(
    self, request: common_pb2.SubscribeKvEventsRequest, context: Context
  ) -> None:
    await self._cache.subscribe(request, context)

  @property
  def _folder(self) -> pathlib.Path | None:
    tokenizer = self._frontend.engine.tokenizer
    return None if tokenizer is None else tokenizer.folder

  def _caller(
    self, request: pb.GenerateRequest, context: Context
  ) -> frontend_lib.Caller:
    """Returns who calls; for the gateway, which HTTP call, not whose it is.

    The gateway does not say whose. So each HTTP call has its turn, however
    many prompts another one has.
    """
    who = caller.of(context)
    self._frontend.limits.check_name('request_id', request.request_id)
    match = _OF_A_CALL.fullmatch(request.request_id)
    if match is None or who.client != who.tenant:
      return who
    return dataclasses.replace(
      who, client=f'{who.tenant}/{match["call"][:_MAX_CALL_CHARS]}'
    )


async def _write(
  request: pb.GenerateRequest, stream: outbox.Stream, context: Context
) -> None:
  wants_logprobs = request.sampling_params.HasField('logprobs')
  deltas: list[list[types.OutputDelta]] = [
    [] for _ in range(stream.request.sampling.n)
  ]
  async for delta in stream:
    of_output = deltas[delta.output_index]
    of_output.append(delta)
    if request.stream:
      chunk = await messages.make(
        delta, functools.partial(_chunk, stream.request, delta, wants_logprobs)
      )
      await context.write(pb.GenerateResponse(chunk=chunk))
    if delta.finish_reason is not None:
      whole = outbox.merge(of_output)
      complete = await messages.make(
        whole,
        functools.partial(_complete, stream.request, whole, wants_logprobs),
      )
      await context.write(pb.GenerateResponse(complete=complete))


def _chunk(
  request: types.Request, delta: types.OutputDelta, wants_logprobs: bool
) -> pb.GenerateStreamChunk:
  """Makes the message of a piece of an output."""
  chunk = pb.GenerateStreamChunk(
    token_ids=delta.token_ids,
    prompt_tokens=len(request.prompt_token_ids),
    completion_tokens=len(delta.token_ids),
    index=delta.output_index,
  )
  if wants_logprobs:
    chunk.output_logprobs.CopyFrom(_logprobs(delta))
  if delta.prompt_logprobs is not None:
    chunk.input_logprobs.CopyFrom(_of_prompt(request, delta))
  return chunk


def _complete(
  request: types.Request, whole: types.OutputDelta, wants_logprobs: bool
) -> pb.GenerateComplete:
  """Makes the last message of an output."""
  complete = pb.GenerateComplete(
    output_ids=whole.token_ids,
    prompt_tokens=len(request.prompt_token_ids),
    completion_tokens=len(whole.token_ids),
    finish_reason=whole.finish_reason.value if whole.finish_reason else '',
    index=whole.output_index,
  )
  if whole.metrics is not None:
    complete.cached_tokens = whole.metrics.num_cached_tokens
  if isinstance(whole.stop_reason, str):
    complete.matched_stop_str = whole.stop_reason
  elif whole.stop_reason is not None:
    complete.matched_token_id = whole.stop_reason
  if wants_logprobs:
    complete.output_logprobs.CopyFrom(_logprobs(whole))
  if whole.prompt_logprobs is not None:
    complete.input_logprobs.CopyFrom(_of_prompt(request, whole))
  return complete


def _logprobs(delta: types.OutputDelta) -> pb.OutputLogProbs:
  return pb.OutputLogProbs(
    token_logprobs=delta.logprobs,
    token_ids=delta.token_ids,
    top_logprobs=map(_top, delta.told),
  )


def _of_prompt(
  request: types.Request, delta: types.OutputDelta
) -> pb.InputLogProbs:
  told = delta.prompt_logprobs or ()
  return pb.InputLogProbs(
    token_logprobs=[
      pb.InputTokenLogProb(),  # nothing is before the first token
      *(pb.InputTokenLogProb(value=at.logprob) for at in told),
    ],
    token_ids=request.prompt_token_ids,
    top_logprobs=[pb.TopLogProbs(), *map(_top, told)],
  )


def _top(told: types.TokenLogprobs) -> pb.TopLogProbs:
  return pb.TopLogProbs(values=told.logprobs[1:], token_ids=told.token_ids[1:])


def prompt_of(request: pb.GenerateRequest) -> frontend_lib.Prompt:
  """Returns the one input of a request; token ids as they are there.

  Raises:
    InvalidRequestError: there is no input, or more than text.
  """
  for name in _UNSUPPORTED:
    if (
      getattr(request, name)
      if name == 'extra_mm_inputs'
      else request.HasField(name)
    ):
      raise errors.UnsupportedError(
        f'{name}: is not supported: this server takes text and token ids.'
      )
  if request.data_parallel_rank:
    raise errors.InvalidRequestError(
      f'data_parallel_rank={request.data_parallel_rank}: there is one rank, 0.'
    )
  match request.WhichOneof('input'):
    case 'text':
      return str(request.text)
    case 'tokenized':
      ids: Sequence[int] = request.tokenized.input_ids or ()
      return ids
    case _:
      raise errors.InvalidRequestError(
        'input: one of tokenized, text must be set.'
      )


def sampling_of(message: pb.SamplingParams) -> types.SamplingParams:
  """Returns the parameters of a message, with vLLM's defaults.

  Raises:
    InvalidRequestError: a value is out of range, or not supported.
  """
  fields: dict[str, Any] = {
    'skip_special_tokens': message.skip_special_tokens,
    'max_tokens': None,
  }
  if message.seed in _CLAMPED_SEEDS:
    raise errors.UnsupportedError(
      f'seed={message.seed}: must be between -2**31 and 2**31 - 1, both '
      'excluded: the gateway sends these for all seeds beyond.'
    )
  for field, value in message.ListFields():
    if field.containing_oneof is not None and (
      field.containing_oneof.name == 'constraint'
    ):
      outputs: Any = {_FIELDS.get(field.name, field.name): value}
      if field.name == 'choice':
        outputs = {'choice': tuple(value.choices)}
      kind = _AtOnce if message.grammar_from_first_token else _Constraint
      fields['structured_outputs'] = kind(**outputs)
    elif field.name not in (_NO_EFFECT, _AT_ONCE):
      plain = {'logit_bias': dict, 'stop': tuple, 'stop_token_ids': tuple}
      fields[field.name] = plain.get(field.name, lambda v: v)(value)
  for name, default in _FOR_ZERO.items():
    fields[name] = fields.get(name) or default
  return types.SamplingParams.from_dict(fields)


def bundle(folder: pathlib.Path, family: str) -> tuple[bytes, str]:
  """Returns a zip of a checkpoint's tokenizer, and its SHA-256.

  In it is a config, too, which says as much as gateways want to know: without
  one, smg asks Hugging Face for it, with every chat.

  Raises:
    NotFoundError: the checkpoint has no tokenizer.
  """
  data = io.BytesIO()
  with zipfile.ZipFile(data, 'w', zipfile.ZIP_DEFLATED) as archive:
    for name in _TOKENIZER_FILES:
      if (folder / name).is_file():
        archive.write(folder / name, name)
    if not archive.namelist():
      raise errors.NotFoundError('tokenizer: this model has none.')
    if 'config.json' not in archive.namelist():
      archive.writestr('config.json', json.dumps({'model_type': family}))
  zipped = data.getvalue()
  return zipped, hashlib.sha256(zipped).hexdigest()


def chunks(data: bytes, sha256: str) -> Iterator[common_pb2.GetTokenizerChunk]:
  """Yields pieces of `data`; the last one has its SHA-256."""
  for start in range(0, len(data), _CHUNK_BYTES):
    stop = start + _CHUNK_BYTES
    yield common_pb2.GetTokenizerChunk(
      data=data[start:stop], sha256=sha256 if stop >= len(data) else ''
    )
