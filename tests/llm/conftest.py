# SPDX-License-Identifier: Apache-2.0
"""LLMs of a tiny model, whose equal steps are compiled once for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sarathi_jax import llm as llm_lib
from sarathi_jax.text import tokenizer as tokenizer_lib
from tests import tiny
from tests import tokenizer_fixture
from tests.llm import common

MODEL = tiny.MODEL
GREEDY, PROMPTS = common.GREEDY, common.PROMPTS


@pytest.fixture(scope='session')
def cache_dir(tmp_path_factory) -> str:
  return str(tmp_path_factory.mktemp('compiled'))


@pytest.fixture(scope='session')
def make_llm(cache_dir, tmp_path_factory):
  folder = tokenizer_fixture.write(tmp_path_factory.mktemp('tokenizer'))
  words = tokenizer_lib.Tokenizer(folder)

  def make(
    params: Any,
    *,
    tokenizer: Any = words,
    default_sampling: Any = None,
    adapters: Any = None,
    **fields: Any,
  ) -> llm_lib.LLM:
    return llm_lib.LLM(
      MODEL,
      params,
      tokenizer=tokenizer,
      eos_token_ids=(),
      default_sampling=default_sampling,
      adapters=adapters,
      config=tiny.engine_config(compilation_cache_dir=cache_dir, **fields),
    )

  return make


@pytest.fixture(scope='session')
def params() -> Any:
  return tiny.make_params()


@pytest.fixture(scope='session')
def new_params() -> Any:
  return tiny.make_params(seed=1)


@pytest.fixture(scope='session')
def shared_llm(make_llm, params) -> llm_lib.LLM:
  return make_llm(params)


@pytest.fixture
def llm(shared_llm, params) -> Iterator[llm_lib.LLM]:
  """One for all tests, which leave it with its weights and pages."""
  yield shared_llm
  shared_llm.update_params(params)
  stats = shared_llm.engine.stats()
  assert stats.num_free_pages == stats.num_pages
  assert stats.num_running == stats.num_waiting == 0
  assert not shared_llm.engine.has_work


@pytest.fixture(scope='session')
def greedy(make_llm, params, new_params) -> dict[str, list[tuple[int, ...]]]:
  """PROMPTS' tokens with either weights, of LLMs that serve nothing else."""
  return {
    name: [c.token_ids for c in make_llm(p).generate(PROMPTS, GREEDY)]
    for name, p in (('old', params), ('new', new_params))
  }
