# SPDX-License-Identifier: Apache-2.0
"""Tokens that choose groups, as data, for tests and the compiler."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from pallas_kernels.quantized_matmul import arg_specs as quantized_specs
from pallas_kernels.quantized_matmul import operand

# How tokens choose: each for itself; a few groups far more often than others;
# all the same ones.
ROUTINGS = 'uniform', 'skewed', 'same'


class Args(NamedTuple):
  """Arrays of one case; see `api.grouped_matmul`.

  Attributes:
    x: [T, in], rows of the tokens.
    matrices: of each kind, [G, in, out].
    keys: [T, k] int32, the groups that each token chose, all others G.
  """

  x: np.ndarray
  matrices: tuple[np.ndarray, ...]
  keys: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class ArgSpec:
  """Shapes, from which `make` draws arguments.

  Attributes:
    num_tokens: T, of which the last `num_padding` choose nothing.
    num_groups: G.
    chosen: groups that each token chooses, k.
    num_in, num_out: the sizes of a matrix.
    routing: one of `ROUTINGS`.
    num_padding: rows of no group.
  """

  num_tokens: int
  num_groups: int
  chosen: int
  num_in: int = 32
  num_out: int = 48
  routing: str = 'uniform'
  num_padding: int = 0


def choose(spec: ArgSpec, seed: int = 0) -> np.ndarray:
  """Draws the groups that tokens choose: [T, k] int32, none twice."""
  rng = np.random.default_rng(seed)
  likely = {
    'uniform': np.ones(spec.num_groups),
    'skewed': 1 / np.arange(1, spec.num_groups + 1),
    'same': np.arange(spec.num_groups) < spec.chosen,
  }[spec.routing]
  shuffled = rng.permutation(likely) / likely.sum()
  keys = np.stack(
    [
      rng.choice(spec.num_groups, spec.chosen, replace=False, p=shuffled)
      for _ in range(spec.num_tokens)
    ]
  ).astype(np.int32)
  keys[spec.num_tokens - spec.num_padding :] = spec.num_groups
  return keys


def make(spec: ArgSpec, kinds: int = 1, seed: int = 0) -> Args:
  """Draws arguments.

  There is NaN in all that must not be read: matrices of groups that nobody
  chose, and rows that chose none.

  Args:
    spec: their shapes.
    kinds: of matrices.
    seed: of all that is drawn.
  """
  rng = np.random.default_rng(seed)
  keys = choose(spec, seed)
  x = rng.normal(size=(spec.num_tokens, spec.num_in)).astype(np.float32)
  x[spec.num_tokens - spec.num_padding :] = np.nan
  shape = spec.num_groups, spec.num_in, spec.num_out
  matrices = tuple(
    rng.normal(size=shape).astype(np.float32) for _ in range(kinds)
  )
  for matrix in matrices:
    matrix[~np.isin(np.arange(spec.num_groups), keys)] = np.nan
  return Args(x, matrices, keys)


def make_coded(
  spec: ArgSpec,
  codes: str,
  group: int | None = None,
  has_zero: bool = False,
  kinds: int = 1,
) -> tuple[np.ndarray, list[operand.Operand], np.ndarray]:
  """Draws x, matrices in codes, and the groups that tokens choose.

  Scales of groups that nobody chose, which must not be read, are no numbers.

  Args:
    spec: of the shapes.
    codes, group, has_zero: of the matrices; see `quantized_specs.ArgSpec`.
    kinds: of matrices.
  """
  x, _, keys = make(spec)
  of_one = quantized_specs.ArgSpec(
    1, spec.num_in, spec.num_out, codes, group, has_zero
  )
  matrices = []
  for kind in range(kinds):
    drawn = [
      quantized_specs.make(of_one, seed=1 + kind + kinds * g)[1]
      for g in range(spec.num_groups)
    ]
    w = operand.Operand(
      np.stack([one.values for one in drawn]),
      np.stack([one.scale for one in drawn]),
      np.stack([one.zero for one in drawn]) if has_zero else None,
    )
    unread = ~np.isin(np.arange(spec.num_groups), keys)
    # 2 ** 128 is none of float32's.
    w.scale[unread] = np.nan if w.scale.dtype == np.float32 else 255
    matrices.append(w)
  return x, matrices, keys


# As mixtures have them, but narrower: few rows, and many, of few groups and of
# many, by all that `tuning` tells apart.
TESTS: tuple[ArgSpec, ...] = (
  ArgSpec(1, 8, 2),
  ArgSpec(1, 1, 1),
  ArgSpec(3, 128, 8),
  ArgSpec(16, 128, 8, routing='skewed'),
  ArgSpec(32, 8, 2, num_padding=15),
  ArgSpec(40, 5, 3, num_in=80, num_out=112),
  ArgSpec(64, 128, 8, routing='same'),
  ArgSpec(64, 8, 2, routing='skewed', num_padding=1),
  ArgSpec(130, 4, 2, num_padding=60),
  ArgSpec(8, 8, 2, num_padding=8),
)

# Of published models: G, k, the width of the stream, and within an expert of
# one device.
MODELS: dict[str, tuple[int, int, int, int]] = {
  'qwen3-30b-a3b': (128, 8, 2048, 768),
  'qwen3-235b-a22b-tp8': (128, 8, 4096, 192),
  'mixtral-8x7b': (8, 2, 4096, 14336),
  'gpt-oss-20b': (32, 4, 2880, 2880),
}
# Ways to quantize matrices, in `quantized_specs.KINDS`, as they are published.
CODED: tuple[tuple[str, str], ...] = (
  ('qwen3-30b-a3b', 'int4-128'),
  ('qwen3-30b-a3b', 'int4-128-zero'),
  ('qwen3-30b-a3b', 'fp8-128'),
  ('qwen3-30b-a3b', 'int8'),
  ('gpt-oss-20b', 'mxfp4'),
)
TOKENS = 1, 16, 32, 64, 512, 2048  # of steps
