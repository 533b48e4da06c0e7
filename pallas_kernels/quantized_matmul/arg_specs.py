# SPDX-License-Identifier: Apache-2.0
"""Rows and matrices in codes, as data, for tests and the compiler."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul import operand


@dataclasses.dataclass(frozen=True, slots=True)
class ArgSpec:
  """Shapes, from which `make` draws arguments.

  Attributes:
    num_tokens: T.
    num_in, num_out: the sizes of the matrix.
    codes: of `operand.CODES`.
    group: rows of a group; None: all.
    has_zero: whether groups have codes of 0 of their own.
  """

  num_tokens: int
  num_in: int
  num_out: int
  codes: str
  group: int | None = None
  has_zero: bool = False

  @property
  def groups(self) -> int:
    return 1 if self.group is None else -(-self.num_in // self.group)

  @property
  def values_shape(self) -> tuple[int, int]:
    if operand.CODES[self.codes].bits == 8:
      return self.num_in, self.num_out
    return operand.HALF * -(-self.num_in // operand.BLOCK), self.num_out


def make(spec: ArgSpec, seed: int = 0) -> tuple[np.ndarray, operand.Operand]:
  """Draws x, [T, in] float32, and the matrix: of NumPy's arrays.

  All codes are drawn, but for fp8's that are no numbers, and those beyond the
  matrix, too.
  """
  rng = np.random.default_rng(seed)
  kind = operand.CODES[spec.codes]
  values = rng.integers(0, 256, spec.values_shape).astype(np.uint8)
  if spec.codes == 'fp8':
    values[values & 0x7F == 0x7F] = 0
    values = values.view(jnp.float8_e4m3fn)
  else:
    values = values.view(kind.dtype)
  of_groups = spec.groups, spec.num_out
  if kind.scale == 'float32':
    scale = rng.uniform(0.5, 1, of_groups).astype(np.float32)
  else:
    scale = rng.integers(125, 130, of_groups).astype(np.uint8)
  zero = None
  if spec.has_zero:
    zero = rng.integers(0, 16, of_groups).astype(np.uint8)
  x = rng.normal(size=(spec.num_tokens, spec.num_in)).astype(np.float32)
  return x, operand.Operand(values, scale, zero)


def shapes(spec: ArgSpec) -> operand.Operand:
  """Returns the shapes and dtypes of the matrix."""
  kind = operand.CODES[spec.codes]
  of_groups = spec.groups, spec.num_out
  return operand.Operand(
    jax.ShapeDtypeStruct(spec.values_shape, jnp.dtype(kind.dtype)),
    jax.ShapeDtypeStruct(of_groups, jnp.dtype(kind.scale)),
    jax.ShapeDtypeStruct(of_groups, jnp.uint8) if spec.has_zero else None,
  )


# All codes; groups of whole turns, of parts of one, of several parts, and the
# last one with fewer rows; sizes that tiles divide, and that they don't; sums
# that are split.
TESTS: tuple[ArgSpec, ...] = (
  ArgSpec(1, 64, 64, 'int8'),
  ArgSpec(3, 80, 40, 'fp8', 32),
  ArgSpec(20, 96, 24, 'int8', 48),
  ArgSpec(5, 48, 16, 'fp8'),
  ArgSpec(2, 160, 64, 'int4', 64, True),
  ArgSpec(40, 176, 40, 'int4', None, True),
  ArgSpec(2, 40, 32, 'int4'),
  ArgSpec(3, 256, 32, 'int4', 128),
  ArgSpec(1, 96, 48, 'mxfp4', 32),
  ArgSpec(1, 272, 24, 'int8', 48),
)

# Of published models, on so many devices that share a layer: the matrices that
# one has of it, (in, out).
MODELS: dict[str, dict[str, tuple[int, int]]] = {
  'llama-3.1-8b': {
    'qkv': (4096, 6144),
    'o': (4096, 4096),
    'gate_up': (4096, 28672),
    'down': (14336, 4096),
  },
  'llama-3.1-70b-tp4': {
    'qkv': (8192, 2560),
    'o': (2048, 8192),
    'gate_up': (8192, 14336),
    'down': (7168, 8192),
  },
  'qwen3-32b': {
    'qkv': (5120, 10240),
    'o': (8192, 5120),
    'gate_up': (5120, 51200),
    'down': (25600, 5120),
  },
  # No power of two above 16 divides the rows.
  'qwen2.5-72b-tp8': {'down': (3696, 8192)},
}
# Ways to quantize: codes, group, and whether there are zeros.
KINDS: dict[str, tuple[str, int | None, bool]] = {
  'int8': ('int8', None, False),
  'fp8': ('fp8', None, False),
  'fp8-128': ('fp8', 128, False),
  'int4-128': ('int4', 128, False),
  'int4-128-zero': ('int4', 128, True),
  'int4-64-zero': ('int4', 64, True),
  'int4-32': ('int4', 32, False),
  'int4-32-zero': ('int4', 32, True),
  'int4': ('int4', None, False),
  'mxfp4': ('mxfp4', 32, False),
}
TOKENS = 16, 32, 64, 512  # of steps: one for each tile
