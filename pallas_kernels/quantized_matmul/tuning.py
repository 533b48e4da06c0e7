# SPDX-License-Identifier: Apache-2.0
"""The sizes that the GPU kernel takes, and which implementation where."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.quantized_matmul import operand


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
  """The shape that a kernel is compiled for.

  Attributes:
    dtype: of rows.
    codes: of `operand.CODES`.
    num_rows, num_in, num_out: T, and the sizes of the matrix.
    group: rows of the matrix that have scales in common; `num_in`: all.
    by_columns: whether codes are [out, in].
    has_zero: whether groups have codes of 0 of their own.
  """

  dtype: str
  codes: str
  num_rows: int
  num_in: int
  num_out: int
  group: int
  by_columns: bool = False
  has_zero: bool = False

  @classmethod
  def of(
    cls,
    x: Any,
    w: operand.Operand,
    codes: str,
    group: int | None,
    by_columns: bool = False,
  ) -> Shape:
    """Returns the shape of a call; see `api.quantized_matmul`."""
    num_rows, num_in = x.shape
    groups, num_out = w.scale.shape
    return cls(
      x.dtype.name,
      codes,
      num_rows,
      num_in,
      num_out,
      num_in if groups == 1 or group is None else group,
      by_columns,
      w.zero is not None,
    )

  @property
  def has_groups(self) -> bool:
    return self.group < self.num_in

  @property
  def may_scale_numbers(self) -> bool:
    """Whether what is multiplied may have its scales already, exactly.

    Scales that are powers of two bfloat16 has, and the numbers with them.
    """
    return self.has_groups and (self.codes, self.dtype) == ('mxfp4', 'bfloat16')

  @property
  def is_fp8(self) -> bool:
    """Whether rows are of 8 bits, too."""
    return self.dtype == FP8

  @property
  def bits(self) -> int:
    return operand.CODES[self.codes].bits

  @property
  def itemsize(self) -> int:
    return jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
  """A tile of the GPU kernel; see `pallas_triton`.

  Attributes:
    rows: of x.
    columns: of the matrix.
    depth: rows of the matrix that a turn of the loop takes.
    num_warps: of a block of the GPU.
    num_stages: of the pipeline that loads.
    columns_first: whether the matrix, not x, is the first operand, so that sums
      are [columns, rows]. Hopper takes the first one from registers, where
      numbers of codes are made; and a thread has the sums of a few columns,
      whose scales it needs.
  """

  rows: int
  columns: int
  depth: int
  num_warps: int
  num_stages: int
  columns_first: bool = False


FP8 = 'float8_e4m3fn'  # the dtype of rows of 8 bits
_LEAST = 16  # that a side of a product has on a GPU
_ALIGNED = 8  # columns: what a thread loads at once
FEW_ROWS = 64  # as decodes have: such products wait for memory
# With so many rows of x, at most -> the tile, by the bits of codes: as many
# bytes are under way. (Two or three blocks fit a multiprocessor, most of all.)
_Table = tuple[tuple[int, Sizes], ...]
_FEW: Mapping[int, _Table] = {
  8: (
    (16, Sizes(16, 128, 64, 4, 4)),
    (32, Sizes(32, 128, 64, 4, 4)),
    (FEW_ROWS, Sizes(64, 128, 64, 4, 3)),
  ),
  4: (
    (16, Sizes(16, 128, 128, 4, 4)),
    (32, Sizes(32, 128, 128, 4, 4)),
    (FEW_ROWS, Sizes(64, 128, 128, 4, 3)),
  ),
}
# A multiprocessor of 100 KiB has room for one block of some of these. An A40's
# memory is slow: so many bytes need not be under way.
_FEW_OF_A40: Mapping[int, _Table] = {
  8: (
    (16, Sizes(16, 128, 64, 4, 4)),
    (32, Sizes(32, 128, 64, 4, 3)),
    (FEW_ROWS, Sizes(64, 128, 64, 4, 3)),
  ),
  4: (
    (16, Sizes(16, 128, 128, 4, 3)),
    (32, Sizes(32, 128, 128, 4, 3)),
    (FEW_ROWS, Sizes(64, 128, 64, 4, 3)),
  ),
}
# With more: each code is converted once for as many rows as registers allow.
# Sums of groups take as many again.
_MANY = Sizes(128, 128, 64, 8, 3)
_MANY_OF_GROUPS: Mapping[str, Sizes] = {
  'a100': Sizes(128, 64, 64, 4, 3),
  'a40': Sizes(128, 64, 64, 4, 3),
  'h100': Sizes(128, 64, 128, 4, 3, columns_first=True),
}
# Of numbers that have their scales.
_MANY_SCALED: Mapping[str, Sizes] = {
  'a100': Sizes(128, 64, 64, 4, 3),
  'a40': Sizes(128, 64, 64, 4, 3),
  'h100': _MANY,
}
# Of rows of 8 bits, which are many.
_FP8 = Sizes(128, 128, 128, 8, 3)
_FLOAT32: _Table = (
  (16, Sizes(16, 64, 32, 4, 2)),
  (2**31, Sizes(32, 64, 32, 4, 2)),
)
# What `implementation=None` means on a GPU that it supports, until a
# measurement says otherwise.
_FASTEST = 'pallas_triton'


def choose(shape: Shape) -> Sizes:
  """Returns the sizes for a shape, on the default device; CPUs interpret.

  Raises:
    NotImplementedError: the kernel can't run there, or not for such a shape.
  """
  device = devices.default()
  devices.check_triton(device)
  block = _LEAST * 8 // shape.bits
  for ok, name, rule in (
    (
      shape.num_out % _ALIGNED == 0 and shape.num_out >= _LEAST,
      'num_out',
      f'must be a multiple of {_ALIGNED}, and at least {_LEAST}',
    ),
    (
      shape.group % block == 0 or not shape.has_groups,
      'group',
      f'must be a multiple of {block} with {shape.codes}',
    ),
    (
      shape.num_in % _LEAST == 0 or not shape.by_columns,
      'num_in',
      f'must be a multiple of {_LEAST} where codes lie by columns',
    ),
    (
      shape.itemsize in (2, 4) or shape.is_fp8,
      'dtype',
      f'must be float32, bfloat16, float16 or {FP8}',
    ),
  ):
    if not ok:
      raise NotImplementedError(
        f'pallas_triton: {name}={getattr(shape, name)}: {rule}.'
      )
  if shape.is_fp8:
    return _FP8
  table = _FLOAT32
  if shape.itemsize == 2:
    many = _MANY
    if shape.has_groups:
      of = _MANY_SCALED if shape.may_scale_numbers else _MANY_OF_GROUPS
      many = of[devices.target_of(device)]
    few = _FEW_OF_A40 if devices.target_of(device) == 'a40' else _FEW
    table = (*few[shape.bits], (2**31, many))
  return next(sizes for most, sizes in table if shape.num_rows <= most)


def takes_fp8(num_rows: int, by_columns: bool) -> bool:
  """Says whether rows of fp8 are multiplied as such, on the default device.

  Few wait for the matrix, and are multiplied in 16 bits.

  Args:
    num_rows: of them.
    by_columns: whether codes lie so.
  """
  return by_columns and num_rows > FEW_ROWS and has_fp8(devices.default())


def has_fp8(device: Any) -> bool:
  """Says whether a device multiplies numbers of fp8: Hopper; CPUs interpret.

  Args:
    device: a jax.Device.
  """
  return device.platform == 'cpu' or devices.capability_of(device) == '9.0'


def fastest(shape: Shape) -> str:
  """Returns the fastest implementation for a shape, on the default device."""
  if devices.default().platform == 'cpu':
    return 'xla'
  try:
    choose(shape)
  except NotImplementedError:
    return 'xla'
  return _FASTEST
