# SPDX-License-Identifier: Apache-2.0
"""How a parameter comes from tensors, a chunk at a time.

Hugging Face keeps a linear layer as [out, in]; ours is [in, out]. A chunk of
ours is all of `in` by some of `out`: consecutive rows of the file, transposed.
So no whole tensor is ever in memory, whatever is fused, stacked or transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses

import numpy as np

from checkpoints_convert import safetensors_reader
from sarathi_jax import errors

CHUNK_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class Select:
  """Some rows of a fused tensor: `width` of every `stride`, from `offset`.

  For example, with two groups of two query heads, one key and one value head,
  each one row: stride=4, offset=0, width=2 are the queries 0, 1, 4, 5.
  """

  stride: int
  offset: int
  width: int


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
  """Rows of one tensor that make up a parameter, or one expert's of it."""

  tensor: safetensors_reader.Tensor
  transpose: bool
  select: Select | None

  @property
  def num_rows(self) -> int:
    rows = self.tensor.shape[0]
    if self.select is None:
      return rows
    return rows // self.select.stride * self.select.width

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the parameter."""
    shape = (self.num_rows, *self.tensor.shape[1:])
    return shape[::-1] if self.transpose else shape

  def read(self, reader: safetensors_reader.Reader, start: int, stop: int
           ) -> np.ndarray:
    """Rows [start, stop) of those selected, as they are in the file."""
    if self.select is None:
      return reader.read_rows(self.tensor, start, stop)
    stride, offset, width = dataclasses.astuple(self.select)
    pieces = []
    while start < stop:
      group, within = divmod(start, width)
      length = min(width - within, stop - start)
      first = group * stride + offset + within
      pieces.append(reader.read_rows(self.tensor, first, first + length))
      start += length
    return np.concatenate(pieces)


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
  """Rows [start, stop) of a part, and where they go in the parameter."""

  part: Part
  start: int
  stop: int
  index: tuple[slice, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
  """A parameter that is not in memory.

  Attributes:
    path: its name, such as 'layers.0.attn.q'.
    shape: its shape.
    dtype: what it is stored in.
    parts: one; or one an expert, along a leading axis.
    stacked: whether there is that leading axis.
  """

  path: str
  shape: tuple[int, ...]
  dtype: np.dtype
  parts: tuple[Part, ...]
  stacked: bool

  @property
  def num_bytes(self) -> int:
    return int(np.prod(self.shape)) * self.dtype.itemsize

  @property
  def _axis(self) -> int:
    """The axis that chunks divide, which is the rows of the tensor."""
    return len(self.shape) - 1 if self.parts[0].transpose else self.stacked

  @property
  def chunk_shape(self) -> tuple[int, ...]:
    """Chunks are about CHUNK_BYTES, and as equal as can be."""
    rows = self.shape[self._axis]
    part_bytes = self.num_bytes // len(self.parts)
    num_chunks = min(rows, -(-part_bytes // CHUNK_BYTES))
    shape = list(self.shape)
    shape[self._axis] = -(-rows // num_chunks)
    if self.stacked:
      shape[0] = 1
    return tuple(shape)

  def chunks(self) -> Iterator[Chunk]:
    rows, step = self.shape[self._axis], self.chunk_shape[self._axis]
    for i, part in enumerate(self.parts):
      for start in range(0, rows, step):
        stop = min(start + step, rows)
        index = [slice(0, size) for size in self.shape]
        index[self._axis] = slice(start, stop)
        if self.stacked:
          index[0] = slice(i, i + 1)
        yield Chunk(part, start, stop, tuple(index))

  def compute(self, reader: safetensors_reader.Reader, chunk: Chunk
              ) -> np.ndarray:
    """The chunk's rows, cast and laid out as they are stored."""
    rows = self.rows(reader, chunk)
    laid_out = transposed(rows) if chunk.part.transpose else rows
    return laid_out[None] if self.stacked else laid_out

  def rows(self, reader: safetensors_reader.Reader, chunk: Chunk
           ) -> np.ndarray:
    """The chunk's rows, cast, laid out as they are in the file."""
    rows = chunk.part.read(reader, chunk.start, chunk.stop)
    return cast(rows, self.dtype, chunk.part.tensor.name)


def cast(rows: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
  """Rounds to the nearest; equal dtypes are left as they are, bit by bit.

  Raises:
    CheckpointError: a finite number is too large for `dtype`.
  """
  if rows.dtype == dtype:
    return rows
  with np.errstate(over='ignore'):  # reported below, by name
    narrowed = rows.astype(dtype)
  if dtype == np.float16 and not np.array_equal(
    np.isfinite(narrowed), np.isfinite(rows)):
    raise errors.CheckpointError(
      f'{name}: holds numbers too large for {dtype}; convert to bfloat16 or '
      'float32.')
  return narrowed


def transposed(rows: np.ndarray) -> np.ndarray:
  """rows.T in C order.

  Sixteen rows at a time, so that a cache line of the result is filled at once:
  several times as fast as NumPy's own way, which walks one column after
  another. As integers, since NumPy copies those without a call an element.
  """
  bits = rows.view(f'u{rows.itemsize}')
  result = np.empty(bits.shape[::-1], bits.dtype)
  for start in range(0, len(bits), 16):
    result[:, start:start + 16] = bits[start:start + 16].T
  return result.view(rows.dtype)
