# SPDX-License-Identifier: Apache-2.0
"""Reads matrices in MXFP4 as codes and scales of ours.

Or as if they were in bfloat16, which holds all of it, in four times the bytes.

Of X there are X_blocks, uint8 [..., in / 32, 16], of two numbers a byte, the
first one in its low half; and X_scales, uint8 [..., in / 32], for each 32
numbers the power of two that they are times, plus 127. The format is of OCP's
Microscaling Formats (MX) Specification 1.0: numbers E2M1, scales E8M0.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math

import numpy as np

from checkpoints_convert import coded
from checkpoints_convert import rules as rules_lib
from checkpoints_convert import safetensors_reader
from sarathi_jax import errors
from sarathi_jax.models import codes as codes_lib
from sarathi_jax.models import quantization

BLOCKS, SCALES = '_blocks', '_scales'
_BYTES, _NUMBERS = 16, 32  # of a block
_DTYPE = 'U8'
_MOST_SCALE = 252  # With larger ones, some numbers are infinite, or NaN.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-x for x in _MAGNITUDES)], np.float32)
# Byte -> its two numbers.
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=1)
# Scale -> what it multiplies by; the last one is NaN.
_POWERS = np.append(
  np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan)
).astype(np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class PackedTensor(safetensors_reader.Tensor):
  """A tensor in MXFP4; its shape and dtype are those of what it stands for.

  Attributes:
    blocks: its numbers.
    scales: their scales.
  """

  blocks: safetensors_reader.Tensor
  scales: safetensors_reader.Tensor

  def item(self, index: int) -> PackedTensor:
    return dataclasses.replace(
      self,
      shape=self.shape[1:],
      num_bytes=self.num_bytes // self.shape[0],
      blocks=self.blocks.item(index),
      scales=self.scales.item(index),
    )

  def read(
    self, reader: safetensors_reader.Reader, start: int, rows: np.ndarray
  ) -> None:
    blocks, scales = (
      np.empty((len(rows), *tensor.shape[1:]), np.uint8)
      for tensor in (self.blocks, self.scales)
    )
    self.blocks.read(reader, start, blocks)
    self.scales.read(reader, start, scales)
    rows[:] = unpack(blocks, scales)


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """Returns the numbers of blocks, float32 [..., in].

  Args:
    blocks: uint8 [..., in / 32, 16].
    scales: uint8 [..., in / 32].
  """
  numbers = _PAIRS[blocks].reshape(*scales.shape, _NUMBERS)
  with np.errstate(over='ignore'):  # It is told of, as of all that is infinite.
    numbers *= _POWERS[scales][..., None]
  return numbers.reshape(*scales.shape[:-1], -1)


def unpacked(
  tensors: Mapping[str, safetensors_reader.Tensor],
) -> dict[str, safetensors_reader.Tensor]:
  """Returns tensors by name, blocks and their scales as one, named as blocks.

  Raises:
    CheckpointError: blocks have no scales, or such that don't fit them; by
      name.
  """
  result = dict(tensors)
  for name, blocks in tensors.items():
    if not name.endswith(BLOCKS) or blocks.dtype != _DTYPE:
      continue
    of_scales = name.removesuffix(BLOCKS) + SCALES
    scales = result.pop(of_scales, None)
    if scales is None:
      raise errors.CheckpointError(
        f'the checkpoint lacks {of_scales}, without which {name} means nothing.'
      )
    fits = (
      scales.dtype == _DTYPE
      and blocks.shape == (*scales.shape, _BYTES)
      and len(scales.shape) > 1
      and all(x.num_bytes == math.prod(x.shape) for x in (blocks, scales))
    )
    if not fits:
      raise errors.CheckpointError(
        f'{name}: shape {blocks.shape}, and {of_scales}: {scales.dtype} of '
        f'shape {scales.shape}: are no MXFP4, which has {_BYTES} bytes for '
        'each scale, of uint8.'
      )
    *rows, num = scales.shape
    shape = (*rows, num * _NUMBERS)
    result[name] = PackedTensor(
      name,
      shape,
      'BF16',
      blocks.path,
      blocks.offset,
      2 * math.prod(shape),
      blocks,
      scales,
    )
  return result


def is_in(tensors: Mapping[str, safetensors_reader.Tensor]) -> bool:
  """Says whether some of the tensors of `unpacked` are in MXFP4."""
  return any(isinstance(tensor, PackedTensor) for tensor in tensors.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Codes(coded.Codes):
  """The codes of a matrix, as ours lie: uint8 [..., out, bytes].

  Attributes:
    packed: the matrix.
  """

  packed: PackedTensor

  @property
  def numpy_dtype(self) -> np.dtype:
    return np.dtype(np.uint8)

  @property
  def numbers(self) -> PackedTensor:
    return self.packed

  def item(self, index: int) -> Codes:
    return dataclasses.replace(
      self, shape=self.shape[1:], packed=self.packed.item(index)
    )

  def read(
    self, reader: safetensors_reader.Reader, start: int, rows: np.ndarray
  ) -> None:
    stored = self.packed.blocks
    blocks = np.empty((len(rows), *stored.shape[1:]), np.uint8)
    stored.read(reader, start, blocks)
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1)
    rows[:] = codes_lib.pack(codes.reshape(len(rows), -1).T).T


@dataclasses.dataclass(frozen=True, slots=True)
class Scales(coded.Made):
  """The scales of a matrix, uint8 [..., out, groups].

  Attributes:
    packed: the matrix.
  """

  packed: PackedTensor

  @property
  def numpy_dtype(self) -> np.dtype:
    return np.dtype(np.uint8)

  def item(self, index: int) -> Scales:
    return dataclasses.replace(
      self, shape=self.shape[1:], packed=self.packed.item(index)
    )

  def read(
    self, reader: safetensors_reader.Reader, start: int, rows: np.ndarray
  ) -> None:
    self.packed.scales.read(reader, start, rows)
    if rows.size and rows.max() > _MOST_SCALE:
      raise errors.CheckpointError(
        f'{self.packed.scales.name}: has scales of more than '
        f'2**{_MOST_SCALE - 127}, of numbers that are infinite or NaN.'
      )


def take(tensors: Mapping[str, safetensors_reader.Tensor]) -> coded.Taken:
  """Returns tensors by name, those in MXFP4 as our codes and scales.

  Args:
    tensors: of `unpacked`.

  Raises:
    CheckpointError: there are none.
  """
  result = dict(tensors)
  found = [t for t in tensors.values() if isinstance(t, PackedTensor)]
  if not found:
    raise errors.CheckpointError(
      f'keep_mxfp4: no tensor is named *{BLOCKS}, as those in MXFP4 are.'
    )
  for tensor in found:
    *front, width = tensor.shape
    for name, columns, cls in (
      (tensor.name, width // 2, Codes),
      (rules_lib.scale_of(tensor.name), width // _NUMBERS, Scales),
    ):
      shape = (*front, columns)
      result[name] = cls.of(name, shape, 'MXFP4', tensor.blocks, tensor)
  return coded.Taken(
    result,
    f'{len(found):,} tensors of experts stay in MXFP4.',
    quantization.Quantization(codes='mxfp4', group=_NUMBERS),
  )
