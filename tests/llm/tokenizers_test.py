# SPDX-License-Identifier: Apache-2.0
"""What a program hands over as a tokenizer, and where the model stops by it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import transformers

from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax import llm as llm_lib
from sarathi_jax import types
from sarathi_jax.in_process import building
from sarathi_jax.in_process import tokenizing
from sarathi_jax.text import tokenizer as tokenizer_lib
from tests import tiny
from tests import tokenizer_fixture
from tests.llm import common

CHAT = [{'role': 'user', 'content': 'the fox'}]


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
  return tokenizer_fixture.write(tmp_path)


def eos_of(given: Any, said: Any = None) -> tuple[int, ...]:
  return tokenizing.eos_token_ids_of(
    said, given, tokenizing.tokenizer_of(given)
  )


def write(folder: pathlib.Path, name: str, **fields: Any) -> None:
  (folder / name).write_text(json.dumps(fields))


def test_the_files_of_a_folder_say_where_to_stop(folder) -> None:
  """As conversion reads them: generation, model, then tokenizer."""
  for given in (folder, str(folder), tokenizer_lib.Tokenizer(folder)):
    assert eos_of(given) == (tokenizer_fixture.EOS,)
  write(folder, 'tokenizer_config.json', eos_token={'content': 'x'})
  assert eos_of(folder) == (tokenizer_lib.Tokenizer(folder).token_id('x'),)
  write(folder, 'config.json', eos_token_id=5)
  assert eos_of(folder) == (5,)
  write(folder, 'generation_config.json', eos_token_id=[6, 7])
  assert eos_of(folder) == (6, 7)
  checkpoint.write_metadata(
    folder,
    checkpoint.CheckpointMetadata(
      model=tiny.MODEL, dtype='float32', eos_token_ids=(8,)
    ),
  )
  assert eos_of(folder) == (8,)
  assert eos_of(folder, [9]) == (9,)
  assert eos_of(folder, ()) == ()


@pytest.mark.parametrize('value', ['2', [None], {'a': 1}, 1.5])
def test_a_file_that_names_no_token_is_refused(folder, value: Any) -> None:
  write(folder, 'config.json', eos_token_id=value)
  with pytest.raises(errors.CheckpointError, match=r'config\.json: eos_token'):
    eos_of(folder)


@pytest.mark.parametrize(
  'said', [3, [3], (3,), np.int32(3), np.array([3]), {3}]
)
def test_what_the_caller_says_counts(said: Any) -> None:
  assert eos_of(None, said) == (3,)


@pytest.mark.parametrize('said', ['</s>', [None], 1.5, [1.5], [True]])
def test_what_is_no_token_is_refused(said: Any) -> None:
  with pytest.raises(errors.ConfigError, match='eos_token_ids='):
    eos_of(None, said)


def test_a_tokenizer_of_transformers(folder) -> None:
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  ours = tokenizing.tokenizer_of(theirs)
  assert ours is not None
  assert eos_of(theirs) == (tokenizer_fixture.EOS,)
  write(folder, 'generation_config.json', eos_token_id=[5])
  assert eos_of(theirs) == (5, tokenizer_fixture.EOS)
  assert ours.encode('the fox') == tuple(theirs('the fox').input_ids)
  assert ours.apply_chat_template(CHAT) == (
    tokenizer_lib.Tokenizer(folder).apply_chat_template(CHAT)
  )
  assert len(theirs('the fox', truncation=True, max_length=1).input_ids) == 1
  assert len(ours.encode('the fox')) > 1  # Theirs was changed, not ours.


def test_a_tokenizer_of_tokenizers() -> None:
  theirs = tokenizer_fixture.make()
  ours = tokenizing.tokenizer_of(theirs)
  assert ours is not None
  assert ours.encode('the fox') == tuple(theirs.encode('the fox').ids)
  with pytest.raises(errors.UnsupportedError, match='no chat template'):
    ours.apply_chat_template(CHAT)
  with pytest.raises(errors.ConfigError, match="tokenizer doesn't say which"):
    eos_of(theirs)


class SlowTokenizer:
  """It has no `backend_tokenizer`."""

  eos_token_id = 1

  def encode(self, text: str) -> list[int]:
    raise AssertionError

  decode = encode


@pytest.mark.parametrize(
  'fields,words',
  [
    (dict(tokenizer=SlowTokenizer()), 'tokenizer: is a .*SlowTokenizer; must'),
    (dict(tokenizer=7), 'tokenizer: is a builtins.int; must be'),
    (dict(tokenizer=tokenizer_fixture.make()), 'eos_token_ids: must be given'),
    (
      dict(tokenizer=None),
      'eos_token_ids: must be given.*there is no tokenizer',
    ),
    (dict(tokenizer='/no/such'), 'not a tokenizer that can be read'),
    (dict(eos_token_ids=(3, -1)), r'eos_token_ids=\(3, -1\): must be of the'),
    (dict(eos_token_ids=10**6), r'eos_token_ids=\(1000000,\): must be of the'),
    (dict(config={'tp': 1}), 'config: is a dict; must be an EngineConfig'),
    (dict(eos_token_ids=(), mesh=1), 'mesh=1: must be a Mesh'),
  ],
)
def test_what_cant_be_is_refused_before_anything_is_compiled(
  params, fields, words, monkeypatch
) -> None:
  monkeypatch.setattr(building, 'build_runner', None)
  with pytest.raises(errors.ConfigError, match=words):
    llm_lib.LLM(
      tiny.MODEL, params, **dict(config=tiny.engine_config()) | fields
    )


@pytest.mark.parametrize('path', [None, 5, b'/checkpoint'])
def test_a_path_that_is_none_is_refused(path: Any) -> None:
  with pytest.raises(errors.ConfigError, match=r'path=.*: must be a folder'):
    llm_lib.LLM.from_checkpoint(path)


@pytest.mark.parametrize(
  'model',
  [
    '/checkpoint',
    pathlib.Path('/checkpoint'),
    None,
    transformers.LlamaConfig(),
  ],
)
def test_a_model_that_is_none_is_told_what_to_call(model: Any) -> None:
  with pytest.raises(errors.ConfigError, match=r'LLM\.from_checkpoint'):
    llm_lib.LLM(model)


def test_it_stops_where_the_model_stops(
  cache_dir, params, folder, greedy
) -> None:
  """Live arrays, and a tokenizer whose folder says which token ends."""
  tokens = greedy['old'][0]
  stop = next(t for t in tokens[1:] if t != tokens[0])
  write(folder, 'generation_config.json', eos_token_id=stop)
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  for given in (str(folder), theirs):
    llm = llm_lib.LLM(
      tiny.MODEL,
      params,
      tokenizer=given,
      config=tiny.engine_config(compilation_cache_dir=cache_dir),
    )
    (done,) = llm.generate(common.PROMPTS[0], common.GREEDY)
    assert done.finish_reason is types.FinishReason.STOP
    assert done.token_ids == tokens[: tokens.index(stop) + 1]
    assert llm.generate(CHAT, common.GREEDY)[0].token_ids
