# SPDX-License-Identifier: Apache-2.0
"""Asks OpenAI's HTTP, ours or smg's, for tests."""

from __future__ import annotations

import contextlib
import http.client
import json
import pathlib
from typing import Any

from tests.server import fake

TEXT = ' t3 t4 t5 t6'  # that follows 't1 t2'
PROMPT = {
  'model': 'counting',
  'prompt': 't1 t2',
  'max_tokens': 4,
  'temperature': 0,
}
CHAT = {
  'model': 'counting',
  'messages': [{'role': 'user', 'content': 't1 t2'}],
  'max_tokens': 4,
  'temperature': 0,
}
BODIES = {
  'chat': ('/v1/chat/completions', CHAT),
  'text': ('/v1/completions', PROMPT),
}


class Client:
  """Asks a server, and knows what it is to answer."""

  def __init__(self, port: int, text: str = TEXT) -> None:
    self.port = port
    self._text = text  # that follows PROMPT; smg leaves its space out
    self._open: list[http.client.HTTPConnection] = []

  def ask(
    self, method: str, path: str, body: Any = None, **headers: str
  ) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(
      '127.0.0.1', self.port, timeout=fake.TIMEOUT_S
    )
    with contextlib.closing(connection):
      connection.request(
        method,
        path,
        None if body is None else json.dumps(body),
        {'content-type': 'application/json', **headers},
      )
      reply = connection.getresponse()
      return (
        reply.status,
        {k.lower(): v for k, v in reply.getheaders()},
        reply.read().decode(),
      )

  def complete(self, **headers: str) -> tuple[int, str]:
    status, _, text = self.ask('POST', '/v1/completions', PROMPT, **headers)
    if status == 200:
      text = json.loads(text)['choices'][0]['text']
    return status, text

  def serves(self) -> bool:
    try:
      return self.complete() == (200, self._text)
    except OSError:
      return False

  @classmethod
  def of(cls, running: fake.RunningServer) -> Client:
    """Asks a server of ours."""
    assert running.server.http_port is not None
    return cls(running.server.http_port)

  def json(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    status, _, text = self.ask('POST', path, body, **headers)
    return status, json.loads(text)

  def refused(self, path: str, body: Any) -> tuple[int, str, str | None]:
    status, told = self.json(path, body)
    assert 'error' in told, told
    return status, told['error']['message'], told['error']['param']

  def events(self, path: str, body: Any) -> list[Any]:
    """All events of a stream."""
    _, headers, text = self.ask('POST', path, {**body, 'stream': True})
    assert headers['content-type'].startswith('text/event-stream'), text
    *lines, end = text.split('\n\n')
    assert end == ''
    if lines[-1] == 'data: [DONE]':
      del lines[-1]
    return [json.loads(line.removeprefix('data: ')) for line in lines]

  def begin(self, path: str, body: Any) -> http.client.HTTPConnection:
    """Sends a request, and leaves it to whoever asks to read the answer."""
    connection = http.client.HTTPConnection(
      '127.0.0.1', self.port, timeout=fake.TIMEOUT_S
    )
    connection.request(
      'POST', path, json.dumps(body), {'content-type': 'application/json'}
    )
    self._open.append(connection)
    return connection

  def close(self) -> None:
    """Closes what was begun."""
    for connection in self._open:
      connection.close()


def write_tokenizer(folder: pathlib.Path) -> pathlib.Path:
  """As `fake.write_tokenizer`, for chats with tools, too."""
  (folder / 'chat_template.jinja').write_text(
    '{% for m in messages %}{{ m["content"] }} {% endfor %}'
    '{% if tools %}{# as <tool_call> #}{% endif %}'
  )
  return fake.write_tokenizer(folder)


def text_of(choice: Any) -> Any:
  """The text of a choice, or of its piece."""
  if 'text' in choice:
    return choice['text']
  return choice.get('message', choice.get('delta')).get('content', '')
