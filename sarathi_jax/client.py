# SPDX-License-Identifier: Apache-2.0
"""A command-line client of the server's own protocol, sarathi.v1.

  python -m sarathi_jax.client "Once upon a time" --max_tokens=64

Text goes to stdout as it comes; counts and times to stderr.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import json
import sys
from typing import Any

from absl import app
from absl import flags
from google.protobuf import json_format
import grpc

from sarathi_jax.cli import mains
from sarathi_jax.cli import sampling_flags
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server import sarathi_pb2_grpc

FLAGS = flags.FLAGS

_EXIT_CANCELLED = 130  # as a shell reports a process that Ctrl-C ended


def define_flags() -> None:
  """Defines the flags; not on import, as their names may be taken."""
  flags.DEFINE_string('target', 'localhost:50051', 'Server to ask, HOST:PORT.')
  flags.DEFINE_bool(
    'chat',
    False,
    "Send the prompt as a user's message of a chat, which the checkpoint's "
    'template lays out.',
  )
  flags.DEFINE_string(
    'system', None, 'System message of the chat; needs --chat.'
  )
  flags.DEFINE_list(
    'token_ids',
    None,
    'Token ids to send in place of a text, such as 1,15043. Those of the '
    'output are printed, too.',
  )
  flags.DEFINE_bool(
    'json', False, 'Print every message of the server as a line of JSON.'
  )
  flags.DEFINE_string(
    'request_id', None, 'Id to give the request. Default: the server makes one.'
  )
  flags.DEFINE_enum(
    'tier',
    None,
    ['interactive', 'batch'],
    'Tier of the request: whether its time between tokens counts for the '
    "server's --tbt_slo_ms (interactive) or --batch_tbt_slo_ms (batch). "
    'Default: interactive.',
  )
  flags.DEFINE_string(
    'adapter', None, 'LoRA adapter to ask for, by name. Default: none.'
  )
  flags.DEFINE_float(
    'timeout_s', None, 'Give up after this many seconds.', lower_bound=0
  )
  flags.DEFINE_bool(
    'fill_context',
    None,
    'Generate as many tokens as the context has room '
    'for, in place of --max_tokens.',
  )
  sampling_flags.define()


def main(prompts: list[str]) -> None:
  request = _request(prompts)
  with grpc.insecure_channel(FLAGS.target) as channel:
    stub = sarathi_pb2_grpc.SarathiStub(channel)  # type: ignore[no-untyped-call]
    call: Any = stub.Generate(request, timeout=FLAGS.timeout_s)
    try:
      _print(call)
    except KeyboardInterrupt:
      call.cancel()
      _say('\ncancelled')
      sys.exit(_EXIT_CANCELLED)
    except grpc.RpcError:
      _say(f'error: {_explain(call)}')
      sys.exit(1)


def _request(prompts: list[str]) -> pb.GenerateRequest:
  """Makes the request of the command line; UsageError if it makes no sense."""
  # Unset ones are not sent: the server's defaults hold.
  sampling = pb.SamplingParams(
    fill_context=FLAGS.fill_context, **sampling_flags.said()
  )
  request = pb.GenerateRequest(
    request_id=FLAGS.request_id,
    tier=FLAGS.tier,
    adapter=FLAGS.adapter,
    sampling=sampling,
  )
  if len(prompts) + (FLAGS.token_ids is not None) != 1:
    raise app.UsageError('give one prompt, in quotes, or --token_ids')
  if FLAGS.token_ids is not None:
    request.token_ids.ids.extend(map(_token_id, FLAGS.token_ids))
  elif FLAGS.chat:
    if FLAGS.system is not None:
      request.chat.messages.add(role='system', content=FLAGS.system)
    request.chat.messages.add(role='user', content=prompts[0])
  else:
    request.text = prompts[0]
  return request


def _token_id(text: str) -> int:
  if not text.isdecimal():
    raise app.UsageError(
      f'--token_ids: {text!r} is not a token id, such as 15043'
    )
  return int(text)


def _print(responses: Iterator[pb.GenerateResponse]) -> None:
  show = next(
    show
    for is_on, show in (
      (FLAGS.json, _json),
      (FLAGS.token_ids is not None, _ids),
      (True, _text),
    )
    if is_on
  )
  is_failed = False
  shown: dict[int, str] = {}
  for response in responses:
    text = show(response)
    if FLAGS.n is not None and FLAGS.n > 1 and not FLAGS.json:
      # Several outputs at once: each as a whole, as it ends.
      text = shown[response.index] = shown.get(response.index, '') + text
      if not response.HasField('finished'):
        continue
      print(f'[{response.index}] ', end='')
    print(text, end='', flush=True)
    if response.HasField('finished') and not FLAGS.json:
      print(flush=True)
      _say(_summary(response.finished))
      is_failed |= response.finished.finish_reason == pb.FINISH_REASON_ERROR
  if is_failed:
    sys.exit(1)


def _json(response: pb.GenerateResponse) -> str:
  return (
    json.dumps(
      json_format.MessageToDict(response, preserving_proto_field_name=True),
      ensure_ascii=False,
    )
    + '\n'
  )


def _ids(response: pb.GenerateResponse) -> str:
  return ''.join(f'{token} ' for token in response.token_ids)


def _text(response: pb.GenerateResponse) -> str:
  return response.text


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _summary(finished: pb.Finished) -> str:
  """Returns a line such as '9 prompt tokens, 16 generated, ttft 12.3 ms'."""
  reason = pb.FinishReason.Name(finished.finish_reason)
  timing = finished.timing
  return ', '.join(
    [
      f'{finished.usage.prompt_tokens} prompt tokens',
      f'{finished.usage.completion_tokens} generated',
      reason.removeprefix('FINISH_REASON_').lower(),
      *(
        f'{name} {getattr(timing, f"{name}_s") * 1e3:.1f} ms'
        for name in ('ttft', 'tpot')
        if timing.HasField(f'{name}_s')
      ),
    ]
  )


def _explain(call: Any) -> str:
  """Returns what went wrong, and what to do about it."""
  code, details = call.code(), call.details()
  if code is grpc.StatusCode.DEADLINE_EXCEEDED:
    return f'no end within --timeout_s={FLAGS.timeout_s:g}'
  if code is not grpc.StatusCode.UNAVAILABLE:
    return f'{code.name}: {details}'
  if 'connect' not in details:  # the server's own words
    return f'{FLAGS.target}: {details}'
  return (
    f'no server at {FLAGS.target}; start one with '
    'python -m sarathi_jax.server, or give its --target'
  )


def run() -> None:
  with contextlib.suppress(BrokenPipeError):
    mains.run(main, define_flags, takes_arguments=True)


if __name__ == '__main__':
  run()
