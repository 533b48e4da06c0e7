# SPDX-License-Identifier: Apache-2.0
"""A server of OpenAI's completions, for the open-loop client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
import contextlib
import json
import random
from typing import Any
import urllib.parse

from sarathi_jax.simulator import open_loop

_WORDS = ('a', 'the', 'of', 'list', 'function')


class HttpTarget:
  """A server of OpenAI's HTTP.

  Args:
    url: the server's address.
    has_token_ids: whether it takes prompts of token ids, and answers with those
      of each message (vLLM's `return_token_ids`). Else prompts are about as
      many words, and each event with text counts as a token; tokens that the
      server counted beyond these count as having come with the last event.
  """

  def __init__(self, url: str, *, has_token_ids: bool) -> None:
    parts = urllib.parse.urlsplit(url)
    self._host = parts.hostname or 'localhost'
    self._port = parts.port or 80
    self._has_token_ids = has_token_ids

  @contextlib.asynccontextmanager
  async def open(self) -> AsyncIterator[open_loop.Ask]:
    model = (await self.json('GET', '/v1/models'))['data'][0]['id']

    async def ask(
      request: open_loop.Request,
    ) -> AsyncIterator[open_loop.Message]:
      count = 0
      async for event in self._events(self._body(model, request)):
        for choice in event.get('choices', ()):
          tokens = (
            choice.get('token_ids') or ()
            if self._has_token_ids
            else [0] * bool(choice.get('text'))
          )
          count += len(tokens)
          yield open_loop.Message(tokens)
        told = (event.get('usage') or {}).get('completion_tokens', 0)
        if told > count and not self._has_token_ids:
          yield open_loop.Message([0] * (told - count))
          count = told

    yield ask

  async def json(self, method: str, path: str, body: Any = None) -> Any:
    """Returns an answer that is JSON, whole.

    Raises:
      RequestError: there is no connection, or a status other than 200.
    """
    return json.loads(
      b''.join([data async for data in self._request(method, path, body)])
    )

  def _body(self, model: str, request: open_loop.Request) -> dict[str, Any]:
    body: dict[str, Any] = {
      'model': model,
      'prompt': request.token_ids,
      'stream': True,
      'max_tokens': request.max_tokens,
      'ignore_eos': True,
      'temperature': 0,
    }
    if self._has_token_ids:
      return body | {'return_token_ids': True}
    rng = random.Random(hash(tuple(request.token_ids)))
    return body | {
      'prompt': ' '.join(rng.choice(_WORDS) for _ in request.token_ids),
      'stream_options': {'include_usage': True},
    }

  async def _events(self, body: dict[str, Any]) -> AsyncIterator[Any]:
    left = b''
    async for data in self._request('POST', '/v1/completions', body):
      *lines, left = (left + data).split(b'\n')
      for line in lines:
        # Other lines are empty, or say how long the next part is.
        said = line.removeprefix(b'data:').strip()
        if not line.startswith(b'data:') or said == b'[DONE]':
          continue
        event = json.loads(said)
        if 'error' in event:
          raise open_loop.RequestError(json.dumps(event['error']))
        yield event

  async def _request(
    self, method: str, path: str, body: Any = None
  ) -> AsyncIterator[bytes]:
    """Yields an answer as it comes. Each request has its own connection.

    Raises:
      RequestError: there is no connection, or a status other than 200.
    """
    try:
      reader, writer = await asyncio.open_connection(
        self._host, self._port, limit=1 << 20
      )  # of a line
      try:
        data = b'' if body is None else json.dumps(body).encode()
        writer.write(
          (
            f'{method} {path} HTTP/1.0\r\nHost: {self._host}\r\n'
            'Content-Type: application/json\r\n'
            f'Content-Length: {len(data)}\r\n\r\n'
          ).encode()
          + data
        )
        await writer.drain()
        status = (await reader.readline()).decode()
        while (await reader.readline()).strip():
          pass
        if ' 200 ' not in status:
          said = (await reader.read(500)).decode(errors='replace')
          raise open_loop.RequestError(f'{status.strip()}: {said}')
        while data := await reader.read(1 << 16):
          yield data
      finally:
        writer.close()
    except OSError as error:
      raise open_loop.RequestError(str(error)) from error
