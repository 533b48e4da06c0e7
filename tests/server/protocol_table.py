# SPDX-License-Identifier: Apache-2.0
"""Sends each field over each protocol to a fake engine, and writes what came.

  python -m tests.server.protocol_table

writes sarathi_jax/server/PROTOCOLS.md; the test sends all again, and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import itertools
import json
import pathlib
import tempfile
from typing import Any, NamedTuple

import grpc
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc

from sarathi_jax import errors
from sarathi_jax import llm as llm_lib
from sarathi_jax import offline
from sarathi_jax import types
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.in_process import requests
from sarathi_jax.server import open_inference_pb2 as oip
from sarathi_jax.server import open_inference_pb2_grpc as oip_grpc
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server.http import chat
from sarathi_jax.server.http import completions
from sarathi_jax.server.protocols import open_inference
from tests import sampling_fields
from tests import source_tree
from tests.server import behind_smg
from tests.server import fake
from tests.server import http_client

FILE = source_tree.ROOT / 'sarathi_jax/server/PROTOCOLS.md'
YES, NO_FIELD, REFUSED, DROPPED = 'yes', 'no field', 'refused', 'dropped'
TAKEN = 'taken'
MESSAGES = [{'role': 'user', 'content': 't1 t2'}]
TOOLS = [{'type': 'function', 'function': {'name': 't9'}}]
# It writes the tools' names, and a variable.
TEMPLATE = (
  '{% for t in tools or () %}{{ t.function.name }} {% endfor %}{{ style }}'
  '{% for m in messages %}{{ m["content"] }} {% endfor %}{# <tool_call> #}'
)
_PROMPTS = ('prompt', 'prompt_token_ids', 'messages')


class NoFieldError(Exception):
  """The protocol has no place for it."""


class Row(NamedTuple):
  """A field, and how it is seen whether it came.

  Attributes:
    name: of the field.
    value: sent.
    came: whether a request that reached the engine has it; None for what is
      seen in answers alone.
    beside: what is sent with it.
  """

  name: str
  value: Any
  came: Callable[[types.Request], bool] | None
  beside: Mapping[str, Any] = {}


class Served(NamedTuple):
  """A server with all protocols, and the requests that came to its engine."""

  running: fake.RunningServer
  ours: http_client.Client
  smg: http_client.Client
  seen: list[types.Request]
  engine: engine_lib.Engine  # another, for what needs no server


@contextlib.contextmanager
def served() -> Iterator[Served]:
  """Serves until the context is left."""
  with tempfile.TemporaryDirectory() as name:
    folder = http_client.write_tokenizer(pathlib.Path(name))
    (folder / 'chat_template.jinja').write_text(TEMPLATE)
    engine: dict[str, Any] = {'adapters': {'tuned': {}}}
    with behind_smg.serve(folder, http_port=0, engine=engine) as (running, smg):
      seen: list[types.Request] = []
      add = running.engine.add

      def spy(request: types.Request) -> None:
        seen.append(request)
        add(request)

      running.engine.add = spy  # type: ignore[method-assign]
      yield Served(
        running,
        http_client.Client.of(running),
        smg,
        seen,
        fake.make_engine(tokenizer_folder=folder, **engine),
      )


def _sampling(name: str, value: Any) -> Row:
  wanted = getattr(types.SamplingParams(**{name: value}), name)
  return Row(name, value, lambda r: getattr(r.sampling, name) == wanted)


def _prompt_is(*ids: int) -> Callable[[types.Request], bool]:
  return lambda request: request.prompt_token_ids == ids


def rows() -> tuple[Row, ...]:
  """Returns all fields, of sampling and of requests."""
  return (
    Row('prompt', 't1 t2', _prompt_is(1, 2)),
    Row('prompt_token_ids', [1, 2], _prompt_is(1, 2)),
    Row('messages', MESSAGES, _prompt_is(1, 2)),
    Row('tools', TOOLS, _prompt_is(9, 1, 2), {'messages': MESSAGES}),
    Row(
      'tool_choice',
      'none',
      _prompt_is(1, 2),
      {'messages': MESSAGES, 'tools': TOOLS},
    ),
    Row(
      'parallel_tool_calls',
      False,
      None,
      {'messages': MESSAGES, 'tools': TOOLS},
    ),
    Row(
      'chat_template_kwargs',
      {'style': 't7 '},
      _prompt_is(7, 1, 2),
      {'messages': MESSAGES},
    ),
    Row('request_id', 'mine', lambda r: r.request_id.endswith('mine')),
    Row('priority', 3, lambda r: r.priority == 3),
    Row('tier', 'batch', lambda r: r.tier == 'batch'),
    Row('cache_salt', 's', lambda r: r.cache_salt.endswith('s')),
    Row(
      'adapter',
      'tuned',
      lambda r: r.adapter is not None and r.adapter.name == 'tuned',
    ),
    Row('client', 'ann', lambda r: r.client.endswith('ann')),
    *itertools.starmap(_sampling, sampling_fields.EXAMPLES.items()),
  )


def _split(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns those of sampling, and the others."""
  sampling = {
    name: value
    for name, value in fields.items()
    if name in sampling_fields.EXAMPLES
  }
  return sampling, {k: v for k, v in fields.items() if k not in sampling}


def _with_prompt(fields: dict[str, Any]) -> dict[str, Any]:
  """Returns fields with a prompt, if they have none."""
  if fields.keys() & {*_PROMPTS}:
    return fields
  return {'prompt_token_ids': [1, 2], **fields}


def _llm(served: Served, fields: dict[str, Any]) -> None:
  sampling, others = _split(_with_prompt(fields))
  llm = object.__new__(llm_lib.LLM)
  llm.engine = served.engine
  params = types.SamplingParams(**sampling)
  adapter = others.pop('adapter', None)

  def generate(
    prompts: Any, sampling: Any, adapter: str | None = None
  ) -> list[types.Completion]:
    served.seen.extend(
      requests.make(
        served.engine, itertools.count(), prompts, sampling, adapter
      )
    )
    return []

  prompt = next(others.pop(name) for name in _PROMPTS if name in others)
  llm.generate = generate  # type: ignore[method-assign]
  if 'messages' not in fields:
    if others:
      raise NoFieldError
    llm.generate([prompt], params, adapter=adapter)
    return
  with contextlib.suppress(ValueError):  # there are no completions
    llm.chat(prompt, params, **others)


def _line(served: Served, fields: dict[str, Any]) -> None:
  sampling, others = _split(_with_prompt(fields))
  _parse(served, {'sampling': sampling, **others})


def _batch(path: str) -> Callable[[Served, dict[str, Any]], None]:
  def send(served: Served, fields: dict[str, Any]) -> None:
    body = _body(path, fields)
    named = body.pop('request_id', 'a')
    _parse(
      served,
      {'custom_id': named, 'method': 'POST', 'url': path, 'body': body},
    )

  return send


def _parse(served: Served, line: dict[str, Any]) -> None:
  data = json.dumps(line).encode()
  parsed = offline.parse_line(1, data, {}, 0, served.engine)
  if parsed.error is not None:
    raise parsed.error
  served.seen.extend(parsed.requests)


def _body(path: str, fields: dict[str, Any]) -> dict[str, Any]:
  """Returns a body, with the form's own names."""
  body = dict(fields)
  if path == chat.FORM.path:
    if body.keys() & {'prompt', 'prompt_token_ids'}:
      raise NoFieldError
    if 'logprobs' in body:
      body |= {'logprobs': True, 'top_logprobs': body['logprobs']}
    if 'logprobs_mode' in body:
      body['logprobs'] = True
    body.setdefault('messages', MESSAGES)
  else:
    if 'messages' in body:
      raise NoFieldError
    if 'prompt_token_ids' in body:
      body['prompt'] = body.pop('prompt_token_ids')
    body.setdefault('prompt', 't1 t2')
  for ours, theirs in (('client', 'user'), ('adapter', 'model')):
    if ours in body:
      body[theirs] = body.pop(ours)
  return {'max_tokens': 4, **body}


def _http(
  path: str, client_of: Callable[[Served], http_client.Client]
) -> Callable[[Served, dict[str, Any]], None]:
  def send(served: Served, fields: dict[str, Any]) -> None:
    body = _body(path, fields)
    named = body.pop('request_id', None)
    headers = {'x-request-id': named} if named else {}
    status, told = client_of(served).json(
      path, {'model': 'counting', **body}, **headers
    )
    if status != 200:
      raise errors.InvalidRequestError(str(told))

  return send


def _call(call: Any) -> None:
  try:
    list(call)
  except grpc.RpcError as error:
    raise errors.InvalidRequestError(str(error)) from error


def _known(message: Any, names: Any) -> None:
  if not set(names) <= set(message.DESCRIPTOR.fields_by_name):
    raise NoFieldError


def _client(fields: dict[str, Any]) -> Any:
  """Takes the client's name out of fields, as metadata."""
  return (('x-client-id', fields.pop('client')),) if 'client' in fields else ()


def _sarathi(served: Served, fields: dict[str, Any]) -> None:
  sampling, others = _split(_with_prompt(fields))
  metadata = _client(others)
  for ours, theirs, made in (
    ('prompt', 'text', lambda v: v),
    ('prompt_token_ids', 'token_ids', lambda v: pb.TokenIds(ids=v)),
    ('messages', 'chat', lambda v: pb.Chat(messages=v)),
  ):
    if ours in others:
      others[theirs] = made(others.pop(ours))
  _known(pb.SamplingParams, sampling)
  _known(pb.GenerateRequest, others)
  message = pb.GenerateRequest(sampling=pb.SamplingParams(**sampling), **others)
  _call(
    served.running.stub.Generate(
      message, timeout=fake.TIMEOUT_S, metadata=metadata
    )
  )


def _vllm(served: Served, fields: dict[str, Any]) -> None:
  sampling, others = _split(_with_prompt(fields))
  metadata = _client(others)
  if 'prompt' in others:
    others['text'] = others.pop('prompt')
  if 'prompt_token_ids' in others:
    ids = others.pop('prompt_token_ids')
    others['tokenized'] = vllm.TokenizedInput(input_ids=ids)
  sampling |= sampling.pop('structured_outputs', {})  # A field for each kind.
  _known(vllm.SamplingParams, sampling)
  _known(vllm.GenerateRequest, others)
  message = vllm.GenerateRequest(
    sampling_params=vllm.SamplingParams(**{'max_tokens': 4, **sampling}),
    **others,
  )
  stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(served.running.channel)
  _call(stub.Generate(message, timeout=fake.TIMEOUT_S, metadata=metadata))


def _open_inference(served: Served, fields: dict[str, Any]) -> None:
  sampling, others = _split(_with_prompt(fields))
  metadata = _client(others)
  request = oip.ModelInferRequest(model_name=others.pop('adapter', 'counting'))
  if 'prompt' in others:
    text = others.pop('prompt').encode()
    request.inputs.add(
      name='text_input',
      datatype='BYTES',
      shape=[1],
      contents=oip.InferTensorContents(bytes_contents=[text]),
    )
  elif 'prompt_token_ids' in others:
    ids = others.pop('prompt_token_ids')
    request.inputs.add(
      name='input_ids',
      datatype='INT64',
      shape=[len(ids)],
      contents=oip.InferTensorContents(int64_contents=ids),
    )
  if others.keys() - {'priority'}:
    raise NoFieldError
  for name, value in others.items():
    request.parameters[name].int64_param = value
  if sampling:
    parameter = request.parameters['sampling_parameters']
    parameter.string_param = json.dumps(sampling)
  if 'n' in sampling:  # It has a response for each output.
    stub: Any = oip_grpc.GRPCInferenceServiceStub(served.running.channel)
    for response in stub.ModelStreamInfer(
      iter([request]), timeout=fake.TIMEOUT_S
    ):
      if response.error_message:
        raise errors.InvalidRequestError(response.error_message)
    return
  _call(
    served.running.channel.unary_stream(
      f'/{open_inference.NAME}/ModelInfer',
      oip.ModelInferRequest.SerializeToString,
      oip.ModelInferResponse.FromString,
    )(request, timeout=fake.TIMEOUT_S, metadata=metadata)
  )


_CHAT, _TEXT = chat.FORM.path, completions.FORM.path
PROTOCOLS: Mapping[str, Callable[[Served, dict[str, Any]], None]] = {
  '`LLM`': _llm,
  'offline line': _line,
  'batch file, chat': _batch(_CHAT),
  'batch file, completion': _batch(_TEXT),
  'HTTP chat': _http(_CHAT, lambda served: served.ours),
  'HTTP completion': _http(_TEXT, lambda served: served.ours),
  'smg chat': _http(_CHAT, lambda served: served.smg),
  'smg completion': _http(_TEXT, lambda served: served.smg),
  'VllmEngine': _vllm,
  '`sarathi.v1`': _sarathi,
  'Open Inference': _open_inference,
}


def outcome(served: Served, protocol: str, row: Row) -> str:
  """Returns what becomes of a field that is sent over a protocol."""
  served.seen.clear()
  try:
    PROTOCOLS[protocol](served, {row.name: row.value, **row.beside})
  except NoFieldError:
    return NO_FIELD
  except (errors.InvalidRequestError, TypeError):
    return REFUSED
  if row.came is None:
    return TAKEN
  return YES if served.seen and row.came(served.seen[-1]) else DROPPED


_HEAD = """\
Written by `python -m tests.server.protocol_table`, which sends each field over
each protocol and looks at what came to the engine; a test sends all again.
`yes`: the engine had it. `no field`: the protocol has no place for it.
`refused`: an error names it. `dropped`: smg left it out, without a word.
`taken`: it is no error, and seen in answers alone.

Names are those of `SamplingParams` and of `sarathi_jax.offline`. For our HTTP,
`logprobs` of chats is `top_logprobs`, token ids are a `prompt`, `client` is
`user`, and `adapter` is the `model`, as for Open Inference; `request_id` is its
header `x-request-id`, in batch files `custom_id`. Over gRPC, `client` is the
metadata `x-client-id`. The `id` of Open Inference is given back, and names no
request; `n` is for its ModelStreamInfer.
"""


def table(served: Served) -> str:
  """Returns the document."""
  lines = [
    '# What each protocol carries',
    '',
    *_HEAD.splitlines(),
    '',
    '| field | ' + ' | '.join(PROTOCOLS) + ' |',
    '|' + '---|' * (len(PROTOCOLS) + 1),
  ]
  for row in rows():
    cells = [outcome(served, protocol, row) for protocol in PROTOCOLS]
    lines.append(f'| `{row.name}` | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def main() -> None:
  with served() as everything:
    FILE.write_text(table(everything))


if __name__ == '__main__':
  main()
