# SPDX-License-Identifier: Apache-2.0
"""Stands in for the Python of a peer, whatever it is told to run.

Its models have tokens that count up, as those of `tests.server.fake`. It makes
a model, is a worker of `peers`, a server of OpenAI's completions with vLLM's
fields, or says its version. Standard library only, so that it starts at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
import json
import os
import pathlib
import sys
from typing import Any

VOCAB_SIZE = 64
VERSION = '0.0.fake'
STEP_S = 0.002  # of each token


def install(folder: pathlib.Path) -> pathlib.Path:
  """Makes an environment with this as its Python; returns that."""
  for name in ('python', 'optimum-cli'):
    script = folder / name
    script.write_text(
      f'#!{sys.executable}\n' + pathlib.Path(__file__).read_text()
    )
    script.chmod(0o755)
  return folder / 'python'


def continued(prompt: Sequence[int], count: int) -> list[int]:
  """What follows a prompt."""
  return [(prompt[-1] + 1 + i) % VOCAB_SIZE for i in range(count)]


async def _answer(
  reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
  """One connection's one request."""
  method = (await reader.readline()).decode().partition(' ')[0]
  length = 0
  while line := (await reader.readline()).strip():
    name, _, value = line.decode().partition(':')
    length = int(value) if name.lower() == 'content-length' else length
  body = json.loads(await reader.readexactly(length) or '{}')
  if method == 'GET':
    writer.write(b'HTTP/1.1 200 OK\r\n\r\n{"data": [{"id": "m"}]}')
  elif body['max_tokens'] > 1000:
    writer.write(b'HTTP/1.1 400 Bad Request\r\n\r\n{"error": "too long"}')
  else:
    await _stream(writer, body)
  await writer.drain()
  writer.close()


async def _stream(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
  """Chunked events, the last two tokens in one; without ids, as text."""

  def send(text: str) -> None:
    data = text.encode()
    writer.write(b'%x\r\n%b\r\n' % (len(data), data))

  def event(**fields: Any) -> None:
    send(f'data: {json.dumps(fields)}\n\n')

  writer.write(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n')
  count, has_ids = body['max_tokens'], body.get('return_token_ids')
  tokens = continued(body['prompt'] if has_ids else [0], count)
  pieces = [[t] for t in tokens[:-2]] + [tokens[-2:]]
  for piece in pieces:
    await asyncio.sleep(STEP_S)
    event(
      choices=[{'text': '', 'token_ids': piece} if has_ids else {'text': 'x'}]
    )
  if body.get('stream_options'):
    event(choices=[], usage={'completion_tokens': count})
  send('data: [DONE]\n\n')


async def _serve(port: int) -> None:
  server = await asyncio.start_server(_answer, '127.0.0.1', port)
  await server.serve_forever()


def _work(folder: str) -> None:
  """A worker of `peers`, by its own protocol."""
  sys.path.insert(0, folder)
  import workload  # type: ignore[import-not-found]

  args = workload.parse_args()
  assert os.path.isdir(args.model)
  workload.serve(
    args,
    lambda prompts: [continued(p, n) for p, n in prompts],
    VERSION,
    lambda: [(STEP_S, 8)],
  )


def main() -> None:
  arguments = sys.argv[1:]
  flags = dict(a.split('=', 1) for a in arguments if '=' in a)
  what = pathlib.Path(arguments[0]).name
  if what == 'make_model.py':
    pathlib.Path(arguments[1], 'config.json').write_text(
      json.dumps({'vocab_size': VOCAB_SIZE})
    )
  elif what == 'export':
    pathlib.Path(arguments[-1]).mkdir(exist_ok=True)
  elif what == '-c':
    print(VERSION)
  elif '--port' in flags:
    if flags['--max-num-batched-tokens'] == '13':
      sys.exit('thirteen is a bad number')
    asyncio.run(_serve(int(flags['--port'])))
  else:
    folder = (
      os.environ['WORKERS'] if what == '-m' else os.path.dirname(arguments[0])
    )
    del sys.argv[1 : 3 if what == '-m' else 2]
    _work(folder)


if __name__ == '__main__':
  main()
