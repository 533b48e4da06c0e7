# SPDX-License-Identifier: Apache-2.0
"""Counts what a model weighs and computes, by its config alone. No JAX.

The scheduler's costs, the simulator and plans count by these. A test shows for
every family that they agree with the parameters (`param_specs`).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from pallas_kernels import attention_work
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import rope_config


class Matrix(NamedTuple):
  """A matrix of a layer, [rows, columns], that tokens are multiplied by.

  Attributes:
    rows, columns: sizes of one device's part.
    copies: matrices of its kind, one an expert.
    used: how many of the copies a token uses, on average.
  """

  rows: int
  columns: int
  copies: int = 1
  used: float = 1

  def num_read(self, tokens: float) -> float:
    """Returns how many of the copies some tokens use.

    On average, if all are as likely to be chosen.
    """
    return float(self.copies * (1 - (1 - self.used / self.copies) ** tokens))


def layer_matrices(
  model: config_lib.ModelConfig, layer: int, tp: int = 1
) -> tuple[Matrix, ...]:
  """Returns the matrices that one of `tp` devices has of a layer in [0, L)."""
  width, mlp = model.hidden_size, model.layer_mlp(layer)
  heads, kv_heads = model.num_heads // tp, max(model.num_kv_heads // tp, 1)
  router = [Matrix(width, mlp.num_experts)] if mlp.num_experts > 1 else []
  shares = tp if mlp.are_whole else 1
  inner = -(-mlp.size // (tp // shares))
  experts = mlp.num_experts // shares, mlp.experts_per_token / shares
  shared: list[Matrix] = []
  if mlp.shared_size:
    columns = -(-mlp.shared_size // tp)
    shared = [Matrix(width, 2 * columns), Matrix(columns, width)]
  return (
    Matrix(width, (heads + 2 * kv_heads) * model.head_dim),
    Matrix(heads * model.head_dim, width),
    *router,
    *shared,
    *[Matrix(width, 1)] * mlp.shared_gate,
    Matrix(width, (1 + mlp.is_gated) * inner, *experts),
    Matrix(inner, width, *experts),
  )


def layer_size(model: config_lib.ModelConfig, layer: int, tp: int = 1) -> int:
  """Returns the numbers in the matrices of a layer, on one of `tp` devices."""
  return sum(
    m.rows * m.columns * m.copies for m in layer_matrices(model, layer, tp)
  )


def dynamic_rope_len(model: config_lib.ModelConfig) -> int | None:
  """Returns the longest sequence whose keys don't depend on its length.

  None if no sequence's do. 'dynamic' rotations look at the prompt's length,
  'longrope' ones at what it may become; see `rope_counts_outputs`.
  """
  return min(
    (
      rope.original_max_position
      for rope in _ropes(model)
      if rope.kind in rope_config.BY_LENGTH and rope.original_max_position
    ),
    default=None,
  )


def rope_counts_outputs(model: config_lib.ModelConfig) -> bool:
  """Says whether rotations go by the prompt and the most that is put out."""
  return any(rope.kind == 'longrope' for rope in _ropes(model))


def _ropes(model: config_lib.ModelConfig) -> set[config_lib.RopeConfig]:
  return {model.layer_kind(i).rope for i in range(model.num_layers)}


def prefix_cost(model: config_lib.ModelConfig, num_stages: int) -> float:
  """Returns what attending to one earlier token costs a token, in tokens.

  Scores and values take two operations each for every number of the heads,
  matrices two for each of their numbers. In layers with a sliding window the
  cost does not grow with the context. Returns 0 for a single stage, whose
  batches may take different times.
  """
  if num_stages == 1:
    return 0.0
  layers = range(model.num_layers)
  whole = sum(model.layer_window(i) is None for i in layers)
  matrices = itertools.chain.from_iterable(
    layer_matrices(model, i) for i in layers
  )
  return (
    whole
    * attention_work.pair_flops(model.num_heads, model.head_dim)
    / sum(2 * m.rows * m.columns * m.used for m in matrices)
  )
