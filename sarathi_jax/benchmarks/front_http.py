# SPDX-License-Identifier: Apache-2.0
"""Opens many streams of OpenAI's HTTP at once, and takes little time."""

from __future__ import annotations

import asyncio
import json

_LINE_BYTES = 1 << 20


async def drive(
  port: int, num_streams: int, num_tokens: int, vocab_size: int
) -> list[int]:
  """Opens all streams at once; returns how many events each got.

  Args:
    port: of a server whose tokens count up.
    num_streams: how many.
    num_tokens: of each.
    vocab_size: of its model.
  """

  async def one(i: int) -> int:
    body = json.dumps(
      {
        'prompt': [i % vocab_size],
        'max_tokens': num_tokens,
        'ignore_eos': True,
        'stream': True,
        'return_token_ids': True,
      }
    ).encode()
    reader, writer = await asyncio.open_connection(
      '127.0.0.1', port, limit=_LINE_BYTES
    )
    writer.write(
      b'POST /v1/completions HTTP/1.1\r\nhost: x\r\n'
      b'content-type: application/json\r\ncontent-length: %d\r\n\r\n'
      % len(body)
      + body
    )
    tokens: list[int] = []
    num_events = 0
    while (line := await reader.readline()).strip() != b'data: [DONE]':
      assert line, 'the stream was cut'
      if line.startswith(b'data: '):
        (choice,) = json.loads(line[6:])['choices']
        tokens += choice['token_ids']
        num_events += 1
    writer.close()
    assert tokens == [(i + 1 + k) % vocab_size for k in range(num_tokens)]
    return num_events

  return list(await asyncio.gather(*(one(i) for i in range(num_streams))))
