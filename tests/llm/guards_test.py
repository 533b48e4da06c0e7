# SPDX-License-Identifier: Apache-2.0
"""What the program around an LLM has set in JAX does not hurt it."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax import checkpoint
from sarathi_jax import llm as llm_lib
from sarathi_jax import opening
from tests import tiny
from tests.llm import common

GREEDY, PROMPTS = common.GREEDY, common.PROMPTS
tokens_of = common.tokens_of

# As contexts, and for all threads, as a program's settings are.
SETTINGS: tuple[tuple[str, Any], ...] = (
  ('jax_enable_x64', True),
  ('jax_transfer_guard', 'disallow'),
  ('jax_transfer_guard', 'disallow_explicit'),
  ('jax_disable_jit', True),
  ('jax_debug_nans', True),
  ('jax_numpy_dtype_promotion', 'standard'),
)


@contextlib.contextmanager
def configured(name: str, value: Any) -> Iterator[None]:
  before = getattr(jax.config, name)
  jax.config.update(name, value)
  try:
    yield
  finally:
    jax.config.update(name, before)


@pytest.mark.parametrize('name,value', SETTINGS)
def test_an_llm_is_made_and_used(
  make_llm, params, new_params, greedy, name: str, value: Any
) -> None:
  with configured(name, value):
    llm = make_llm(params)
    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']
    llm.update_params(new_params)
    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['new']
    llm._runner.recover()
    llm.engine.invalidate_cache()  # as an engine does
    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['new']


def test_a_guard_around_a_call_alone(llm, new_params, greedy) -> None:
  """As tunix has it."""
  prompts = [jnp.array(prompt) for prompt in PROMPTS]
  with jax.transfer_guard('disallow'):
    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']
    llm.update_params(new_params)
    assert tokens_of(llm.generate(prompts, GREEDY)) == greedy['new']


@pytest.mark.parametrize('name,value', SETTINGS[:3])
def test_a_checkpoint_is_loaded(
  cache_dir, tmp_path, params, greedy, name: str, value: Any, monkeypatch
) -> None:
  named = {
    jax.tree_util.keystr(path, simple=True, separator='.'): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  monkeypatch.setattr(
    opening,
    'open_checkpoint',
    lambda *args, **kwargs: checkpoint.Checkpoint(
      checkpoint.CheckpointMetadata(model=tiny.MODEL, dtype='float32'),
      lambda name, index: named[name][index],
      tmp_path,
    ),
  )
  with configured(name, value):
    llm = llm_lib.LLM.from_checkpoint(
      'x', config=tiny.engine_config(compilation_cache_dir=cache_dir)
    )
    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']
    llm.load_weights(llm.open_weights('x'))
    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == greedy['old']
