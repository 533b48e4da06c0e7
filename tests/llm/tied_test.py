# SPDX-License-Identifier: Apache-2.0
"""An embedding that is the output matrix, as a CPU keeps it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import panel_matmul
from sarathi_jax import checkpoint
from sarathi_jax import llm as llm_lib
from sarathi_jax import opening
from sarathi_jax.models import matrices
from sarathi_jax.models import tree
from sarathi_jax.runner import placement
from tests import tiny
from tests.llm import common

GREEDY, PROMPTS = common.GREEDY, common.PROMPTS
pytestmark = pytest.mark.skipif(
  not panel_matmul.is_available(), reason='no such processor'
)


def model_of(vocab_size: int) -> Any:
  return dataclasses.replace(
    tiny.MODEL, vocab_size=vocab_size, tie_word_embeddings=True
  )


@pytest.mark.parametrize(
  ('vocab_size', 'dtype', 'mesh', 'is_table'),
  [
    (320, 'float32', {}, True),
    (320, 'bfloat16', {}, True),
    (320, 'float32', dict(tp=2), True),
    (320, 'float32', dict(pp=2), False),
    (303, 'bfloat16', {}, False),
  ],
)
def test_tokens_are_those_of_the_table(
  tmp_path, monkeypatch, cache_dir, vocab_size, dtype, mesh, is_table
) -> None:
  model = dataclasses.replace(model_of(vocab_size), num_layers=2)
  params = tiny.make_params(model=model)
  rounded = jax.tree.map(lambda x: x.astype(dtype), params)
  named = {
    name: np.asarray(leaf) for name, leaf in tree.named_leaves(rounded).items()
  }
  monkeypatch.setattr(
    opening,
    'open_checkpoint',
    lambda *args, **kwargs: checkpoint.Checkpoint(
      checkpoint.CheckpointMetadata(model=model, dtype=dtype),
      lambda name, index: named[name][index],
      tmp_path,
    ),
  )
  config = tiny.engine_config(
    token_budget=4, compilation_cache_dir=cache_dir, **tiny.STEPS_ALONE
  )
  live = llm_lib.LLM(
    model,
    jax.tree.map(lambda x: x.astype(jnp.float32), rounded),
    config=config,
    eos_token_ids=(),
  )
  expected = common.tokens_of(live.generate(PROMPTS, GREEDY))
  llm = llm_lib.LLM.from_checkpoint(
    'x', config=dataclasses.replace(config, **mesh)
  )
  runner = llm._runner
  embed = placement.places(model, llm.mesh, runner._layout)['embed']
  assert isinstance(embed, matrices.Table) == is_table
  if is_table:
    assert embed.array.dtype == dtype
  assert common.tokens_of(llm.generate(PROMPTS, GREEDY)) == expected
  llm.update_params(jax.tree.map(lambda x: x * 0, rounded))
  assert common.tokens_of(llm.generate(PROMPTS, GREEDY)) != expected
  llm.update_params(rounded)
  assert common.tokens_of(llm.generate(PROMPTS, GREEDY)) == expected
