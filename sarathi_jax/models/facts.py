# SPDX-License-Identifier: Apache-2.0
"""Counts what a model weighs and computes, by its config alone. No JAX.

The scheduler's costs, the simulator and plans count by these. A test shows for
every family that they agree with the parameters (`param_specs`).
"""

from __future__ import annotations

from collections.abc import Iterator
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
    number_bytes: of a number, with its part of the scales, if it is quantized;
      None: it is in the model's dtype.
  """

  rows: int
  columns: int
  copies: int = 1
  used: float = 1
  number_bytes: float | None = None

  def num_read(self, tokens: float) -> float:
    """Returns how many of the copies some tokens use.

    On average, if all are as likely to be chosen.
    """
    return float(self.copies * (1 - (1 - self.used / self.copies) ** tokens))


def layer_matrices(
  model: config_lib.ModelConfig, layer: int, tp: int = 1
) -> tuple[Matrix, ...]:
  """Returns the matrices that one of `tp` devices has of a layer in [0, L).

  Those that multiply the same rows and are kept alike are one.
  """

  def of(
    rows: int, columns: dict[str, int], copies: int = 1, used: float = 1
  ) -> Iterator[Matrix]:
    kept: dict[float | None, int] = {}
    for name, num in columns.items():
      how = number_bytes(model, f'layers.{layer}.{name}', rows)
      kept[how] = kept.get(how, 0) + num
    for how, num in kept.items():
      yield Matrix(rows, num, copies, used, how)

  def mlp_of(
    branch: str, inner: int, copies: int = 1, used: float = 1
  ) -> Iterator[Matrix]:
    into = ('gate', 'up') if mlp.is_gated else ('up',)
    columns = {f'{branch}.{name}': inner for name in into}
    yield from of(width, columns, copies, used)
    yield from of(inner, {f'{branch}.down': width}, copies, used)

  width, mlp = model.hidden_size, model.layer_mlp(layer)
  heads, kv_heads = model.num_heads // tp, max(model.num_kv_heads // tp, 1)
  q, kv = heads * model.head_dim, kv_heads * model.head_dim
  shares = tp if mlp.are_whole else 1
  inner = -(-mlp.size // (tp // shares))
  experts = mlp.num_experts // shares, mlp.experts_per_token / shares
  has_experts = mlp.num_experts > 1
  found = [
    *of(width, {'attn.q': q, 'attn.k': kv, 'attn.v': kv}),
    *of(q, {'attn.o': width}),
  ]
  if has_experts:
    found += of(width, {'moe.router': mlp.num_experts})
  if mlp.shared_size:
    found += mlp_of('moe.shared', -(-mlp.shared_size // tp))
  if mlp.shared_gate:
    found += of(width, {'moe.shared_gate': 1})
  found += mlp_of('moe' if has_experts else 'mlp', inner, *experts)
  return tuple(found)


def number_bytes(
  model: config_lib.ModelConfig, name: str, rows: int
) -> float | None:
  """Returns the bytes of a matrix's numbers, scales included, by its name.

  Returns None if it is not quantized.

  Args:
    model: the model.
    name: of the matrix, such as 'layers.3.attn.q'.
    rows: that a device has of it.
  """
  how = model.quantization
  if how is None or not how.covers(name):
    return None
  return how.number_bytes(rows)


def layer_bytes(
  model: config_lib.ModelConfig, layer: int, dtype_bytes: int, tp: int = 1
) -> float:
  """Returns the bytes of a layer's matrices, on one of `tp` devices.

  Args:
    model: the model.
    layer: in [0, L).
    dtype_bytes: of a number that is not quantized.
    tp: devices that share the layer.
  """
  return sum(
    m.rows * m.columns * m.copies * (m.number_bytes or dtype_bytes)
    for m in layer_matrices(model, layer, tp)
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
