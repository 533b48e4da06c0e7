# SPDX-License-Identifier: Apache-2.0
"""Takes matrices that a checkpoint has in codes of 8 bits, and their scales.

Of a matrix X.weight [out, in] in FP8 or int8 there is a tensor of scales, one
for all of it, one a row, or one a block; each number is its code times its
scale. Ours have for each row a scale for each block along `in`
(`sarathi_jax.models.quantization`), which loses nothing. What else a checkpoint
has for 8 bits is known by name, and left out or refused.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math

import ml_dtypes
import numpy as np

from checkpoints_convert import coded
from checkpoints_convert import quantization_config
from checkpoints_convert import rules as rules_lib
from checkpoints_convert import safetensors_reader
from sarathi_jax import errors
from sarathi_jax.models import quantization as quantization_lib

# What safetensors calls codes -> what we do, and NumPy.
_CODES: Mapping[str, tuple[str, np.dtype]] = {
  'F8_E4M3': ('fp8', np.dtype(ml_dtypes.float8_e4m3fn)),
  'I8': ('int8', np.dtype(np.int8)),
}
_WEIGHT = '.weight'
_ZERO_POINT = '.weight_zero_point'


@dataclasses.dataclass(frozen=True, slots=True)
class Scales(coded.Made):
  """Scales of a matrix's rows, float32 [out, groups], as ours are.

  Attributes:
    stored: the tensor of them, 0 to 2 axes.
    block: (rows, columns) of the matrix that have one in common.
  """

  stored: safetensors_reader.Tensor
  block: tuple[int, int]

  def read(
    self, reader: safetensors_reader.Reader, start: int, rows: np.ndarray
  ) -> None:
    of_rows = np.arange(start, start + len(rows)) // self.block[0]
    first, last = of_rows[0], of_rows[-1]
    found = np.empty((last - first + 1, rows.shape[1]), self.stored.numpy_dtype)
    self.stored.read(reader, int(first), found)
    rows[:] = found[of_rows - first]


@dataclasses.dataclass(frozen=True, slots=True)
class Codes(coded.Codes):
  """A matrix's codes.

  Attributes:
    stored: the tensor of them.
    scales: of the matrix.
  """

  stored: safetensors_reader.Tensor
  scales: Scales

  @property
  def numpy_dtype(self) -> np.dtype:
    return _CODES[self.dtype][1]

  def read(
    self, reader: safetensors_reader.Reader, start: int, rows: np.ndarray
  ) -> None:
    reader.read_rows(self.stored, start, rows)

  @property
  def numbers(self) -> Numbers:
    return Numbers.of(self.name, self.shape, 'F32', self.stored, self)


@dataclasses.dataclass(frozen=True, slots=True)
class Numbers(coded.Made):
  """What codes stand for, as the formats say, to check ours by.

  Attributes:
    codes: of the matrix.
  """

  codes: Codes

  def read(
    self, reader: safetensors_reader.Reader, start: int, rows: np.ndarray
  ) -> None:
    scales, stored = self.codes.scales, self.codes.scales.stored
    found = np.empty(math.prod(stored.shape), stored.numpy_dtype)
    stored.read(reader, 0, found)
    grid = found.astype(np.float32).reshape(-1, scales.shape[1])
    codes = np.empty(rows.shape, self.codes.numpy_dtype)
    self.codes.read(reader, start, codes)
    tall, wide = scales.block
    y = np.arange(start, start + len(rows))[:, None]
    x = np.arange(self.shape[1])[None, :]
    rows[:] = codes.astype(np.float32) * grid[y // tall, x // wide]


def take(
  tensors: Mapping[str, safetensors_reader.Tensor],
  scheme: quantization_config.Scheme,
  reader: safetensors_reader.Reader,
) -> coded.Taken:
  """Returns tensors by name: codes, and scales by the name of `scale_of`.

  Args:
    tensors: of the checkpoint.
    scheme: what config.json says of them.
    reader: of them.

  Raises:
    CheckpointError: codes have no scales, or such that don't fit them; or there
      are no codes; by name.
  """
  result, told = coded.without_others(tensors)
  for name in [name for name in result if name.endswith(_ZERO_POINT)]:
    _check_zero(result.pop(name), reader)
  num = 0
  for name, tensor in list(result.items()):
    if tensor.dtype not in _CODES:
      continue
    if tensor.dtype != scheme.dtype or not name.endswith(_WEIGHT):
      raise errors.CheckpointError(
        f'{name}: dtype={tensor.dtype}: is not of what quantization_config '
        f'says, weights in {scheme.dtype}.'
      )
    stored = name.removesuffix(_WEIGHT) + scheme.suffix
    if stored not in result:
      raise errors.CheckpointError(
        f'the checkpoint lacks {stored}, without which {name} means nothing.'
      )
    scales = _scales(name, tensor, result.pop(stored), scheme)
    result[scales.name] = scales
    result[name] = Codes.of(
      name, tensor.shape, tensor.dtype, tensor, tensor, scales
    )
    num += 1
  if not num:
    raise errors.CheckpointError(
      'quantization_config: no weights are in '
      f'{scheme.dtype}, of which it says that they are.'
    )
  codes, _ = _CODES[scheme.dtype]
  kept = (
    f'{num:,} matrices stay in {codes}, and what they multiply in 16 or 32 '
    f'bits. {told}'
  )
  group = scheme.block and scheme.block[1]
  how = quantization_lib.Quantization(codes=codes, group=group)
  return coded.Taken(result, kept.strip(), how)


def _check_zero(
  tensor: safetensors_reader.Tensor, reader: safetensors_reader.Reader
) -> None:
  found = np.empty(tensor.num_bytes, np.uint8)
  reader.read_rows(tensor, 0, found)
  if found.any():
    raise errors.CheckpointError(
      f'{tensor.name}: is not 0: asymmetric codes are not supported. '
      + quantization_config.REMEDY
    )


def _scales(
  name: str,
  codes: safetensors_reader.Tensor,
  stored: safetensors_reader.Tensor,
  scheme: quantization_config.Scheme,
) -> Scales:
  """Returns a matrix's scales, once they are seen to fit it."""
  if (
    len(codes.shape) != 2
    or 0 in codes.shape
    or codes.num_bytes != math.prod(codes.shape)
  ):
    raise errors.CheckpointError(
      f'{name}: {codes.num_bytes} bytes of shape {codes.shape}: is no matrix '
      f'in {codes.dtype}.'
    )
  rows, columns = codes.shape
  block = scheme.block_of(rows, columns)
  grid = -(-rows // block[0]), -(-columns // block[1])
  # What has no columns may be written without their axis, or as one number.
  fits = [grid, *[grid[:1]] * (grid[1] == 1), *[()] * (grid == (1, 1))]
  if stored.shape not in fits:
    raise errors.CheckpointError(
      f'{stored.name}: shape {stored.shape}: must be {grid}, as {name} has '
      f'shape {codes.shape} and scales by {scheme.strategy}.'
    )
  _ = stored.numpy_dtype  # Raises, by name.
  return Scales.of(
    rules_lib.scale_of(name), (rows, grid[1]), 'F32', stored, stored, block
  )
