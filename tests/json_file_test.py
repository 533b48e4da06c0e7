# SPDX-License-Identifier: Apache-2.0
"""The one reader of JSON files that others wrote."""

from __future__ import annotations

import pathlib

import pytest

from sarathi_jax import errors
from sarathi_jax import json_file


@pytest.mark.parametrize(
  'data', [b'{"a": [1, {"a": 2}]}', b'\xef\xbb\xbf {"a": [1, {"a": 2}]}\n']
)
def test_an_object_is_read(data: bytes, tmp_path: pathlib.Path) -> None:
  (tmp_path / 'x').write_bytes(data)
  assert json_file.read(tmp_path / 'x') == {'a': [1, {'a': 2}]}
  assert json_file.read_if_there(tmp_path / 'x') == {'a': [1, {'a': 2}]}
  assert json_file.read_if_there(tmp_path / 'y') == {}


@pytest.mark.parametrize(
  ('data', 'words'),
  [
    (b'', 'not JSON'),
    (b'{"a": ', 'not JSON'),
    (b'{"a": %s}' % (b'9' * 5000), 'not JSON'),
    (b'[' * 200_000, 'nested too deeply'),
    (b'{"a":' * 200_000, 'nested too deeply'),
    # What is read here, but not written, or shown, where the stack is deeper.
    (b'{"a": %s}' % (b'[' * 900 + b']' * 900), 'nested too deeply'),
    (b'{"a": 1, "b": 2, "a": 1}', 'a is there twice'),
    (b'{"b": [{"a": 1, "a": 2}]}', 'a is there twice'),
    (b'{"a": "\xff"}', 'not UTF-8'),
    (b'[1]', 'must be a JSON object'),
    (b'null', 'must be a JSON object'),
  ],
)
def test_anything_else_is_refused(
  data: bytes, words: str, tmp_path: pathlib.Path
) -> None:
  (tmp_path / 'x').write_bytes(data)
  with pytest.raises(ValueError, match=words):
    json_file.parse(data)
  with pytest.raises(errors.CheckpointError, match=f'x: can not be.*{words}'):
    json_file.read_if_there(tmp_path / 'x')


def test_what_is_no_file(tmp_path: pathlib.Path) -> None:
  with pytest.raises(errors.CheckpointError, match='x: missing'):
    json_file.read(tmp_path / 'x')
  with pytest.raises(errors.CheckpointError, match='can not be read'):
    json_file.read(tmp_path)
