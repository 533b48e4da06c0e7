# SPDX-License-Identifier: Apache-2.0
"""Requests of HTTP that a client can make large at no cost, and honest ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import socket

from sarathi_jax.benchmarks import hostile_bodies

METHOD = 'HTTP'
_LARGEST = 15 * 2**20  # below what a server reads by default
_TIMEOUT_S = 120.0
_TEXTS = '/v1/completions'
_CHATS = '/v1/chat/completions'
_ONE = {'max_tokens': 1, 'temperature': 0}


def _request(path: str, body: bytes, *headers: str) -> bytes:
  lines = (
    f'POST {path} HTTP/1.1',
    'host: x',
    'connection: close',
    *(headers or (f'content-length: {len(body)}',)),
  )
  return '\r\n'.join(lines).encode() + b'\r\n\r\n' + body


def _filled(before: bytes, part: bytes, after: bytes) -> bytes:
  """As many parts as a server would read."""
  num = (_LARGEST - len(before) - len(after)) // len(part)
  return _request(_TEXTS, before + part * num + after)


def _prompt(value: object) -> bytes:
  return _request(_TEXTS, json.dumps({'prompt': value, **_ONE}).encode())


_LISTED = b'{"prompt": ['
# Name -> what to send, all of it refused.
_LARGE: Mapping[str, Callable[[], bytes]] = {
  'lists': lambda: _filled(_LISTED, b'[],', b'0]}'),
  'objects': lambda: _filled(_LISTED, b'{"a":0},', b'0]}'),
  'zeros': lambda: _filled(_LISTED, b'0,', b'0]}'),
  'texts': lambda: _filled(_LISTED, b'"",', b'0]}'),
  'one text': lambda: _filled(b'{"prompt": "', b'a b ', b'"}'),
  'escapes': lambda: _filled(b'{"prompt": "', b'\\n', b'"}'),
  'escaped characters': lambda: _filled(b'{"prompt": "', b'\\u00e9', b'"}'),
  'backslashes': lambda: _filled(b'{"prompt": "', b'\\\\', b'"}'),
  'quotes': lambda: _filled(b'{"prompt": "', b'\\"', b'"}'),
  'a number': lambda: _filled(b'{"seed": ', b'1', b'}'),
  'long numbers': lambda: _filled(_LISTED, b'1' * 4000 + b',', b'0]}'),
  'blanks': lambda: _filled(b'', b' ', b'{}'),
  'keys': lambda: _request(
    _TEXTS, json.dumps({f'k{i}': 0 for i in range(60_000)}).encode()
  ),
  'nested': lambda: _filled(b'', b'[', b''),
  'chunks of a byte': lambda: _request(
    _TEXTS, b'1\r\nx\r\n' * (_LARGEST // 6), 'transfer-encoding: chunked'
  ),
  'a header': lambda: _request(_TEXTS, b'', 'a: ' + 'b' * _LARGEST),
  'headers': lambda: _request(_TEXTS, b'', *(['a: b'] * (_LARGEST // 6))),
  'pipelined requests': lambda: b'GET / HTTP/1.1\r\n\r\n' * (_LARGEST // 18),
  'a message of parts': lambda: _request(
    _CHATS,
    json.dumps(
      {
        'messages': [
          {
            'role': 'user',
            'content': [{'type': 'text', 'text': ''}] * 20_000,
          }
        ],
        **_ONE,
      }
    ).encode(),
  ),
  'arguments of parts': lambda: _request(
    _CHATS,
    json.dumps(
      {
        'messages': [
          {'role': 'user', 'content': 'x'},
          {
            'role': 'assistant',
            'tool_calls': [
              {
                'function': {
                  'name': 'f',
                  'arguments': '{"a":[' + '[],' * 600_000 + '0]}',
                }
              }
            ],
          },
        ],
        **_ONE,
      }
    ).encode(),
  ),
  'prompts told often': lambda: _request(
    _TEXTS,
    json.dumps(
      {
        'prompt': [[5] * 100_000] * 8,
        'n': 16,
        'max_tokens': 1,
        'return_token_ids': True,
      }
    ).encode(),
  ),
  'characters of many tokens': lambda: _request(
    '/tokenize',
    json.dumps(
      {'prompt': '\U00020000' * 1_000_000, 'return_token_strs': True},
      ensure_ascii=False,
    ).encode(),
  ),
  'ids to tokenize': lambda: _request(
    '/detokenize', json.dumps({'tokens': [-1] * 1_000_000}).encode()
  ),
}
_SERVED: Mapping[str, Callable[[], bytes]] = {
  '100,000 token ids': lambda: _prompt([5] * 100_000),
  '100,000 words': lambda: _prompt('the ' * 100_000),
  '1,000 prompts': lambda: _prompt(['the list'] * 1000),
  '10,000 messages': lambda: _request(
    _CHATS,
    json.dumps(
      {'messages': [{'role': 'user', 'content': 'x'}] * 10_000, **_ONE}
    ).encode(),
  ),
  '100,000 words to tokenize': lambda: _request(
    '/tokenize', json.dumps({'prompt': 'the ' * 100_000}).encode()
  ),
  '100,000 tokens to tell': lambda: _request(
    '/tokenize',
    json.dumps({'prompt': 'the ' * 50_000, 'return_token_strs': True}).encode(),
  ),
  '100,000 ids to detokenize': lambda: _request(
    '/detokenize', json.dumps({'tokens': [5] * 100_000}).encode()
  ),
}


def all_bodies(only: str = '') -> Iterator[hostile_bodies.Body]:
  """Yields requests with `only` in their names, each made when asked for."""
  for table in (_LARGE, _SERVED):
    for name, make in table.items():
      if only in (shown := f'HTTP: {name}'):
        yield hostile_bodies.Body(
          shown, METHOD, make(), is_served=table is _SERVED
        )


def send(port: int, data: bytes) -> str:
  """Sends a request; returns OK, or the status of the response."""
  with socket.create_connection(('127.0.0.1', port), _TIMEOUT_S) as connection:
    with contextlib.suppress(ConnectionError):
      connection.sendall(data)
    first = b''
    with contextlib.suppress(ConnectionError):
      while more := connection.recv(1 << 16):
        first = first or more
  status = first[9:12].decode(errors='replace')
  return 'OK' if status == '200' else status or 'cut off'
