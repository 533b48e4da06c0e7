# SPDX-License-Identifier: Apache-2.0
"""A tiny checkpoint, and runs with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import pathlib
from typing import Any

import pytest

from checkpoints_convert import convert
from sarathi_jax import offline
from sarathi_jax.engine import metrics
from sarathi_jax.launch import loading
from tests import absl_flags
from tests import tokenizer_fixture
from tests.checkpoints_convert import fake_checkpoint
from tests.offline import runs

VOCAB, CONTEXT = runs.VOCAB, runs.CONTEXT


@pytest.fixture(scope='session')
def hugging_face(tmp_path_factory) -> pathlib.Path:
  """A checkpoint with a tokenizer, as one downloads it."""
  folder = tmp_path_factory.mktemp('checkpoints') / 'tiny[llama]'
  shapes = {
    name: (VOCAB, *shape[1:]) if shape[0] == fake_checkpoint.VOCAB else shape
    for name, shape in fake_checkpoint.llama_shapes().items()
  }
  fake_checkpoint.write(
    folder,
    fake_checkpoint.llama_config(
      vocab_size=VOCAB,
      max_position_embeddings=CONTEXT,
      bos_token_id=0,
      eos_token_id=1,
    ),
    {
      name: 0.3 * tensor
      for name, tensor in fake_checkpoint.random_tensors(shapes).items()
    },
  )
  return tokenizer_fixture.write(folder)


@pytest.fixture(scope='session')
def checkpoint(hugging_face) -> pathlib.Path:
  target = hugging_face.with_name('converted')
  convert.convert(hugging_face, target)
  return target


@pytest.fixture(scope='session')
def cache_dir(tmp_path_factory) -> pathlib.Path:
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module', autouse=True)
def _flags() -> Iterator[None]:
  with absl_flags.defined(offline.define_flags):
    yield


@pytest.fixture
def cold(tmp_path, checkpoint, cache_dir, capsys) -> runs.Runner:
  return runs.Runner(tmp_path, checkpoint, cache_dir, capsys)


@pytest.fixture(scope='session')
def load_once() -> Callable[..., Any]:
  loaded: list[Any] = []
  load = loading.load_llm

  def load_llm(*args: Any, **fields: Any) -> Any:
    if not loaded:
      loaded.append(load(*args, **fields))
    engine = loaded[0].engine
    for request_id in list(engine._live):  # of a run that failed
      engine.abort(request_id)
    engine.drain()
    engine.metrics = metrics.EngineMetrics()
    return loaded[0]

  return load_llm


@pytest.fixture
def run(cold, monkeypatch, load_once) -> runs.Runner:
  """With one engine for all tests."""
  monkeypatch.setattr(loading, 'load_llm', load_once)
  return cold
