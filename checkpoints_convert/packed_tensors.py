# SPDX-License-Identifier: Apache-2.0
"""Tensors of packed matrices, as they are stored and as ours; see `packed`."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

import numpy as np

from checkpoints_convert import coded
from checkpoints_convert import safetensors_reader
from sarathi_jax.models import codes as codes_lib
from sarathi_jax.models import quantization as quantization_lib

_BAND_BYTES = 4 * 2**20  # of a tensor [in, out] that are read at once
WORD = 32  # bits
# bits -> ours.
CODES: Mapping[int, str] = {4: 'int4', 8: 'int8'}


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
  """A stored tensor as [out, width], of numbers or of what words have.

  Attributes:
    stored: the tensor.
    width: groups, or in.
    is_transposed: whether it is stored as [width, out].
    bits: of a code; None: it has numbers.
    along: the axis along which a word has several codes, 'in' or 'out'.
    order: see `packed.Layout`.
  """

  stored: safetensors_reader.Tensor
  width: int
  is_transposed: bool
  bits: int | None = None
  along: str = 'in'
  order: tuple[int, ...] = ()

  def shape_for(self, out: int) -> tuple[int, int]:
    """Returns the shape that the tensor must have."""
    of_words = {'out': out, 'in': self.width}
    if self.bits is not None:
      of_words[self.along] = -(-of_words[self.along] * self.bits // WORD)
    shape = of_words['out'], of_words['in']
    return shape[::-1] if self.is_transposed else shape

  def rows(
    self, reader: safetensors_reader.Reader, start: int, stop: int
  ) -> np.ndarray:
    """Reads rows [start, stop), [rows, width]; codes as uint8."""
    if self.bits is None:
      return self._words(reader, start, stop, self.stored.numpy_dtype)
    per = WORD // self.bits
    first, last = start, stop
    if self.along == 'out':
      first, last = start // per, -(-stop // per)
    words = self._words(reader, first, last, np.dtype('<u4'))
    codes = np.ascontiguousarray(words)[..., None].view(np.uint8)
    if self.bits == 4:
      codes = np.stack([codes & 15, codes >> 4], axis=-1)
      codes = codes.reshape(*words.shape, per)
    if self.order:
      codes = codes[..., self.order]
    if self.along == 'out':
      codes = codes.swapaxes(1, 2).reshape(-1, words.shape[1])
      return codes[start - first * per :][: stop - start]
    return codes.reshape(len(words), -1)[:, : self.width]

  def _words(
    self,
    reader: safetensors_reader.Reader,
    first: int,
    last: int,
    dtype: np.dtype,
  ) -> np.ndarray:
    rows, columns = self.stored.shape
    if not self.is_transposed:
      found = np.empty((last - first, columns), dtype)
      reader.read_rows(self.stored, first, found)
      return found
    found = np.empty((rows, last - first), dtype)
    step = max(1, _BAND_BYTES // (columns * dtype.itemsize))
    for start in range(0, rows, step):
      band = np.empty((min(step, rows - start), columns), dtype)
      reader.read_rows(self.stored, start, band)
      found[start : start + step] = band[:, first:last]
    return found.T


@dataclasses.dataclass(frozen=True, slots=True)
class Matrix:
  """A packed matrix [out, in].

  Attributes:
    codes, scales: of it.
    zeros: codes that stand for 0; None: the middle one does.
    less: what zeros are stored without.
    groups: the tensor of the group of each column; None: they are in order.
    size: columns of a group; None: all.
  """

  codes: Grid
  scales: Grid
  zeros: Grid | None
  less: int
  groups: safetensors_reader.Tensor | None
  size: int | None

  @property
  def bits(self) -> int:
    assert self.codes.bits is not None
    return self.codes.bits

  @property
  def middle(self) -> int:
    return 1 << (self.bits - 1)

  def group_of(self, reader: safetensors_reader.Reader) -> np.ndarray:
    """Returns each column's group, int32 [in]."""
    width = self.codes.width
    if self.groups is None:
      return np.arange(width, dtype=np.int32) // (self.size or width)
    return coded.all_of(self.groups, reader, np.int32)

  def order(self, reader: safetensors_reader.Reader) -> np.ndarray:
    """Returns the columns by their groups, int32 [in]."""
    return np.argsort(self.group_of(reader), kind='stable').astype(np.int32)

  def zero_rows(
    self, reader: safetensors_reader.Reader, start: int, stop: int
  ) -> np.ndarray:
    """Reads zero points of rows, uint8 [rows, groups]."""
    assert self.zeros is not None
    return self.zeros.rows(reader, start, stop) + np.uint8(self.less)


@dataclasses.dataclass(frozen=True, slots=True)
class Codes(coded.Codes):
  """A matrix's codes, as ours lie, [out, in] or [out, bytes].

  Attributes:
    matrix: of the checkpoint.
  """

  matrix: Matrix

  @property
  def numpy_dtype(self) -> np.dtype:
    kind = quantization_lib.CODES[CODES[self.matrix.bits]]
    return np.dtype(kind.dtype)

  def read(
    self, reader: safetensors_reader.Reader, start: int, rows: np.ndarray
  ) -> None:
    matrix = self.matrix
    codes = matrix.codes.rows(reader, start, start + len(rows))
    if matrix.groups is not None:
      codes = codes[:, matrix.order(reader)]
    if matrix.bits == 8:
      rows[:] = (codes ^ matrix.middle).view(np.int8)
    else:
      rows[:] = codes_lib.pack(codes.T, quantization_lib.INT4_ZERO).T

  @property
  def numbers(self) -> Numbers:
    matrix = self.matrix
    shape = self.shape[0], matrix.codes.width
    return Numbers.of(self.name, shape, 'F32', matrix.codes.stored, matrix)


@dataclasses.dataclass(frozen=True, slots=True)
class Scales(coded.Made):
  """A matrix's scales, [out, groups].

  Attributes:
    matrix: of the checkpoint.
  """

  matrix: Matrix

  @property
  def numpy_dtype(self) -> np.dtype:
    return self.matrix.scales.stored.numpy_dtype

  def read(
    self, reader: safetensors_reader.Reader, start: int, rows: np.ndarray
  ) -> None:
    rows[:] = self.matrix.scales.rows(reader, start, start + len(rows))


@dataclasses.dataclass(frozen=True, slots=True)
class Zeros(coded.Made):
  """A matrix's zero points, uint8 [out, groups].

  Attributes:
    matrix: of the checkpoint.
  """

  matrix: Matrix

  @property
  def numpy_dtype(self) -> np.dtype:
    return np.dtype(np.uint8)

  def read(
    self, reader: safetensors_reader.Reader, start: int, rows: np.ndarray
  ) -> None:
    rows[:] = self.matrix.zero_rows(reader, start, start + len(rows))


@dataclasses.dataclass(frozen=True, slots=True)
class Order(coded.Made):
  """The column of a matrix that each of ours is, int32 [in].

  Attributes:
    matrix: of the checkpoint.
  """

  matrix: Matrix

  @property
  def numpy_dtype(self) -> np.dtype:
    return np.dtype(np.int32)

  def read(
    self, reader: safetensors_reader.Reader, start: int, rows: np.ndarray
  ) -> None:
    rows[:] = self.matrix.order(reader)[start : start + len(rows)]


@dataclasses.dataclass(frozen=True, slots=True)
class Numbers(coded.Made):
  """What a matrix stands for, as the formats say, to check ours by.

  Attributes:
    matrix: of the checkpoint.
  """

  matrix: Matrix

  def read(
    self, reader: safetensors_reader.Reader, start: int, rows: np.ndarray
  ) -> None:
    stop, matrix = start + len(rows), self.matrix
    groups = matrix.group_of(reader)
    codes = matrix.codes.rows(reader, start, stop).astype(np.float32)
    zeros: np.ndarray | int = matrix.middle
    if matrix.zeros is not None:
      zeros = matrix.zero_rows(reader, start, stop)[:, groups]
    scales = matrix.scales.rows(reader, start, stop).astype(np.float32)
    rows[:] = (codes - zeros) * scales[:, groups]
