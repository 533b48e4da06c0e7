# SPDX-License-Identifier: Apache-2.0
"""Weights that can't be loaded: the old ones stay, or the LLM says it ended."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax.runner import weights
from tests import tiny
from tests.llm import common

GREEDY, PROMPTS = common.GREEDY, common.PROMPTS
tokens_of = common.tokens_of


@pytest.fixture
def opened(new_params, tmp_path) -> checkpoint.Checkpoint:
  """Other weights of the tiny model."""
  named = {
    jax.tree_util.keystr(path, simple=True, separator='.'): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(new_params)
  }
  return checkpoint.Checkpoint(
    checkpoint.CheckpointMetadata(model=tiny.MODEL, dtype='float32'),
    lambda name, index: named[name][index],
    tmp_path,
  )


def _with(opened: checkpoint.Checkpoint, **fields: Any) -> Any:
  return opened._replace(
    metadata=dataclasses.replace(opened.metadata, **fields)
  )


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (lambda opened: '/a/folder', 'opened: is a str; .*open_weights'),
    (lambda opened: None, 'opened: is a NoneType'),
    (tuple, 'opened: is a tuple'),
    (
      lambda opened: _with(
        opened, model=dataclasses.replace(tiny.MODEL, num_layers=7)
      ),
      'is of another model',
    ),
  ],
)
def test_what_is_no_such_checkpoint_changes_nothing(
  llm, greedy, opened, change: Callable[[Any], Any], words: str
) -> None:
  stream = llm.stream(PROMPTS[0], GREEDY)
  tokens = list(next(stream).token_ids)
  with pytest.raises(errors.ConfigError, match=words):
    llm.load_weights(change(opened))
  assert (*tokens, *(t for d in stream for t in d.token_ids)) == greedy['old'][
    0
  ]
  with pytest.raises(errors.ConfigError, match="on_update='x'"):
    llm.load_weights(opened, on_update='x')
  llm.load_weights(opened, on_update='keep', version=7)
  done = llm.generate(PROMPTS, GREEDY)
  assert tokens_of(done) == greedy['new']
  assert {span.version for one in done for span in one.versions} == {7}


def _fail_to_load(llm, opened, monkeypatch) -> None:
  def read(name: str, index: Any) -> np.ndarray:
    if name == 'final_norm.scale':
      raise errors.CheckpointError('a file shrank.')
    return opened.read(name, index)

  llm.load_weights(opened._replace(read=read))


def _fail_to_update(llm, opened, monkeypatch) -> None:
  def place(*args: Any) -> Any:
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: a file shrank.')

  with monkeypatch.context() as patched:
    patched.setattr(weights, '_place_one', place)
    llm.update_params(tiny.make_params(seed=1))


@pytest.mark.parametrize('fail', [_fail_to_load, _fail_to_update])
def test_where_the_old_weights_are_gone_every_call_says_so(
  make_llm, params, opened, monkeypatch, fail: Callable[..., None]
) -> None:
  llm = make_llm(params)
  stream = llm.stream(PROMPTS[0], GREEDY)
  next(stream)
  for call in (
    lambda: fail(llm, opened, monkeypatch),
    lambda: list(stream),
    lambda: llm.generate(PROMPTS, GREEDY),
    lambda: next(llm.stream(PROMPTS[0], GREEDY)),
    lambda: llm.chat([{'role': 'user', 'content': 'x'}], GREEDY),
    lambda: llm.update_params(params),
    lambda: llm.load_weights(opened),
  ):
    with pytest.raises(errors.EngineDeadError, match='a file shrank'):
      call()
  with pytest.raises(errors.EngineDeadError, match='weights were lost'):
    llm._runner.recover()
