# SPDX-License-Identifier: Apache-2.0
"""A model so small that compiling it is what takes time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
from typing import Any

import jax
from jax import monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import models
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.runner import batch as batch_lib

# Its vocabulary is that of tokenizer_fixture.
MODEL = model_config_lib.LlamaConfig(
  vocab_size=300,
  hidden_size=16,
  intermediate_size=24,
  num_layers=1,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  max_position_embeddings=64,
)
# Fields of an engine that runs steps alone. Programs for adjusted logits and
# grammars are most of what there is to compile.
STEPS_ALONE: Mapping[str, Any] = dict(max_adjusted_seqs=0, grammars=False)


def make_params(
  seed: int = 0,
  dtype: Any = jnp.float32,
  *,
  model: model_config_lib.ModelConfig = MODEL,
) -> Any:
  """Lively weights, drawn by NumPy, which need not be compiled."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(
      (leaf.init == 'scale') + rng.normal(0, 0.4, leaf.shape), dtype
    ),
    models.param_specs(model),
  )


def engine_config(**fields: Any) -> config_lib.EngineConfig:
  """Two programs to compile, of 4 and of 8 tokens."""
  return config_lib.EngineConfig(
    **(dict(token_budget=8, max_num_seqs=4, page_size=8, num_pages=24) | fields)
  )


@contextlib.contextmanager
def few_sizes(number: int = 3) -> Iterator[None]:
  """Steps that are made meanwhile have a few sizes.

  Each takes seconds to compile; `equivalence_test` has a whole ladder.

  Args:
    number: 1: the largest; 2: that of as many tokens as sequences, too; 3: one
      between them, if they are far apart.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      batch_lib,
      'ladder',
      lambda most, seqs, *, fine=False, small=False: tuple(
        sorted(
          {most}
          | ({1, 4} if small else set())
          | ({seqs} if number > 1 else set())
          | ({3 * seqs} if number > 2 and most > 6 * seqs else set())
        )
      ),
    )
    yield


@contextlib.contextmanager
def count_compiles() -> Iterator[list[str]]:
  """The functions that XLA compiles meanwhile."""
  names: list[str] = []

  def listen(event: str, duration: float, **fields: Any) -> None:
    del duration
    if event == '/jax/core/compile/backend_compile_duration':
      names.append(fields['fun_name'])

  monitoring.register_event_duration_secs_listener(listen)
  try:
    yield names
  finally:
    monitoring.unregister_event_duration_listener(listen)
