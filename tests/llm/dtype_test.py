# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's weights are served in: on CPUs, panels keep 16 bits."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax import checkpoint
from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import llm as llm_lib
from sarathi_jax import models
from sarathi_jax import opening
from sarathi_jax import types
from sarathi_jax.runner import memory
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import weights
from tests import naive
from tests import tiny
from tests.llm import common

GREEDY, PROMPTS = common.GREEDY, common.PROMPTS
tokens_of = common.tokens_of


@pytest.fixture
def open_in(params, tmp_path, monkeypatch) -> Callable[..., None]:
  """Has every path lead to a checkpoint of the tiny model, in a dtype."""
  named = {
    jax.tree_util.keystr(path, simple=True, separator='.'): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }

  def become(dtype: str, **changed: np.ndarray) -> None:
    named.update(changed)
    monkeypatch.setattr(
      opening,
      'open_checkpoint',
      lambda *args, **kwargs: checkpoint.Checkpoint(
        checkpoint.CheckpointMetadata(model=tiny.MODEL, dtype=dtype),
        lambda name, index: named[name][index].astype(dtype),
        tmp_path,
      ),
    )

  return become


def dtypes_of(llm: llm_lib.LLM) -> set[str]:
  return {leaf.dtype.name for leaf in llm._runner._leaves}


@pytest.mark.parametrize(
  ('asked', 'kept', 'served'),
  [
    ('auto', 'float32', {'float32'}),
    ('auto', 'bfloat16', {'float32', 'bfloat16'}),
    ('auto', 'float16', {'float32', 'float16'}),
    ('float32', 'float16', {'float32'}),
    # Panels don't divide the output matrix, which XLA multiplies.
    ('bfloat16', 'float32', {'bfloat16', 'float32'}),
  ],
)
def test_what_is_served(
  open_in, params, cache_dir, asked: str, kept: str, served: set[str]
) -> None:
  open_in(kept)
  llm = llm_lib.LLM.from_checkpoint(
    'x',
    config=tiny.engine_config(
      token_budget=4,  # one program
      compilation_cache_dir=cache_dir,
      dtype=asked,
      **tiny.STEPS_ALONE,
    ),
  )
  assert dtypes_of(llm) == served
  tokens = tokens_of(llm.generate(PROMPTS, GREEDY))
  if asked != 'bfloat16':  # Nothing is rounded but what is kept.
    rounded = jax.tree.map(
      lambda leaf: leaf.astype(kept).astype(jnp.float32), params
    )
    recompute = naive.recompute(tiny.MODEL, rounded)
    assert tokens == [
      tuple(
        recompute(
          types.Request(
            request_id='', prompt_token_ids=tuple(prompt), sampling=GREEDY
          )
        )[0]
      )
      for prompt in PROMPTS
    ]
  llm.load_weights(llm.open_weights('y'))
  assert dtypes_of(llm) == served
  assert tokens_of(llm.generate(PROMPTS, GREEDY)) == tokens


def test_live_weights_for_what_panels_keep_are_of_its_dtype(
  open_in, params, cache_dir
) -> None:
  """Others would be rounded, and nobody told."""
  open_in('bfloat16')
  llm = llm_lib.LLM.from_checkpoint(
    'x',
    config=tiny.engine_config(
      token_budget=4, compilation_cache_dir=cache_dir, **tiny.STEPS_ALONE
    ),
  )
  assert {leaf.dtype.name for leaf in llm.wanted_params.values()} == {
    'bfloat16'
  }
  tokens, kept = tokens_of(llm.generate(PROMPTS, GREEDY)), dtypes_of(llm)
  other = jax.tree.map(lambda leaf: leaf.astype('bfloat16'), params)
  with pytest.raises(
    errors.ConfigError, match=r'params\..*: is float32.*; must be bfloat16'
  ):
    llm.update_params(params)
  llm.update_params(jax.tree.map(lambda leaf: leaf * 0, other))
  assert tokens_of(llm.generate(PROMPTS, GREEDY)) != tokens
  llm.update_params(other)
  assert dtypes_of(llm) == kept
  assert tokens_of(llm.generate(PROMPTS, GREEDY)) == tokens
  open_in('float32')
  with pytest.raises(
    errors.CheckpointError, match='y: is in float32, and bfloat16 is served'
  ):
    llm.open_weights('y')


def test_other_weights_of_the_live_ones_dtype_or_of_the_asked_one(
  open_in, make_llm
) -> None:
  half = tiny.make_params(dtype=jnp.bfloat16)
  # As they are, without a copy.
  llm = make_llm(half, token_budget=4, **tiny.STEPS_ALONE)
  assert dtypes_of(llm) == {'bfloat16'}
  open_in('bfloat16')
  llm.load_weights(llm.open_weights('x'))
  open_in('float16')
  with pytest.raises(
    errors.CheckpointError, match=('x: is in float16, and bfloat16 is served')
  ):
    llm.open_weights('x')


def test_live_weights_of_another_dtype_are_refused(make_llm, params) -> None:
  with pytest.raises(
    errors.ConfigError, match=(r'float32\[.*must be bfloat16')
  ):
    make_llm(params, dtype='bfloat16')


def test_unknown_dtypes_are_refused() -> None:
  with pytest.raises(
    errors.ConfigError,
    match=("dtype='int8': must be one of auto, float32, bfloat16, float16"),
  ):
    config_lib.EngineConfig(dtype='int8')


@pytest.mark.parametrize('kept', ['bfloat16', 'float32'])
def test_weights_too_large_for_what_they_are_served_in(
  open_in, params, kept: str
) -> None:
  """They would be infinite, and so would be all that is computed of them."""
  scale = np.asarray(params['final_norm']['scale']) + 1e5
  open_in(kept, **{'final_norm.scale': scale})
  with pytest.raises(
    errors.CheckpointError,
    match=r'params\.final_norm\.scale: .*too large for dtype=float16',
  ):
    llm_lib.LLM.from_checkpoint('x', config=tiny.engine_config(dtype='float16'))


class _Gpu:
  platform = 'gpu'


def test_gpus_take_a_checkpoints_own() -> None:
  class Mesh:
    devices = np.array([_Gpu()])

  mesh: Any = Mesh()
  choose = functools.partial(placement.choose_dtype, tiny.MODEL)
  assert choose('auto', 'bfloat16', mesh) == jnp.bfloat16
  assert choose('float32', 'bfloat16', mesh) == jnp.float32
  assert choose('auto', 'bfloat16', mesh_lib.make()) == jnp.float32


@pytest.mark.parametrize(
  ('name', 'kept'), [('float16', 'bfloat16'), ('auto', 'float16')]
)
def test_models_that_overflow_float16_are_not_served_in_it(name, kept) -> None:
  class Mesh:
    devices = np.array([_Gpu()])

  mesh: Any = Mesh()
  gemma = dataclasses.replace(tiny.MODEL, overflows_float16=True)
  with pytest.raises(errors.ConfigError, match=r"dtype='float16': .*bfloat16"):
    placement.choose_dtype(gemma, name, kept, mesh)
  assert placement.choose_dtype(gemma, 'bfloat16', kept, mesh) == jnp.bfloat16
  assert placement.choose_dtype(gemma, 'auto', kept, mesh_lib.make()) == (
    jnp.float32
  )
  live = models.init_params(gemma, jax.random.key(0), jnp.float16)
  with pytest.raises(errors.ConfigError, match=r"dtype='float16': .*bfloat16"):
    llm_lib.LLM(gemma, live, eos_token_ids=(), config=tiny.engine_config())


@pytest.mark.parametrize(
  ('asked', 'said'),
  [
    ('auto', r'GiB in bfloat16, and this machine has .* of memory\.$'),
    ('float32', r'GiB in float32, and .* bfloat16 takes half of it'),
  ],
)
def test_weights_that_the_machine_cant_hold(
  open_in, monkeypatch, asked: str, said: str
) -> None:
  """Named before any is read."""
  open_in('bfloat16')
  monkeypatch.setattr(weights, 'load', None)  # It is not called.
  monkeypatch.setattr(memory, 'machine_bytes', lambda: 30_000)
  with pytest.raises(
    errors.ConfigError, match=f"dtype='{asked}': the weights take .* {said}"
  ):
    llm_lib.LLM.from_checkpoint('x', config=tiny.engine_config(dtype=asked))
