# SPDX-License-Identifier: Apache-2.0
"""Computes a parameter from tensors, a chunk at a time.

Hugging Face keeps a linear layer as [out, in]; ours is [in, out]. A chunk of
ours is all of `in` by some of `out`: consecutive rows of the file, transposed.
So no whole tensor is ever in memory, whatever is fused, stacked or transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import math
import mmap

import numpy as np

from checkpoints_convert import safetensors_reader
from sarathi_jax import errors

CHUNK_BYTES = 16 * 2**20


class Scratch:
  """Memory that one thread reuses for every chunk.

  Fresh memory would cost more than the rest of a conversion: the system clears
  its pages before they are overwritten.
  """

  def __init__(self) -> None:
    self._buffers: dict[str, np.ndarray] = {}

  def take(
    self, name: str, shape: tuple[int, ...], dtype: np.dtype
  ) -> np.ndarray:
    """Returns an array of any content, valid until this name's next call."""
    size = math.prod(shape) * dtype.itemsize
    buffer = self._buffers.get(name)
    if buffer is None or buffer.size < size:
      # Page-aligned, as direct writes have to be.
      buffer = np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)
      self._buffers[name] = buffer
    return buffer[:size].view(dtype).reshape(shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Select:
  """Some rows of a fused tensor: `width` of every `stride`, from `offset`.

  For example, with two groups of two query heads, one key and one value head,
  each one row: stride=4, offset=0, width=2 are the queries 0, 1, 4, 5.

  Attributes:
    paired: so many of a group's first rows are pairs, one behind the other; the
      parameter has the first of all pairs, then the second ones.
  """

  stride: int
  offset: int
  width: int
  paired: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
  """Rows of one tensor that make up a parameter, or one expert's of it."""

  tensor: safetensors_reader.Tensor
  transpose: bool
  select: Select | None
  column: tuple[int, int] | None = None  # see `rules.Rule`

  @property
  def num_rows(self) -> int:
    rows = self.tensor.shape[0]
    if self.select is None:
      return rows
    return rows // self.select.stride * self.select.width

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of these rows in the parameter."""
    shape = (self.num_rows, *self.row_shape)
    return shape[::-1] if self.transpose else shape

  @property
  def row_shape(self) -> tuple[int, ...]:
    """The shape of a row."""
    shape = self.tensor.shape[1:]
    if self.column is None or not shape:
      return shape
    which, num = self.column
    return (*shape[:-1], len(range(which, shape[-1], num)))

  def read(
    self, reader: safetensors_reader.Reader, start: int, rows: np.ndarray
  ) -> None:
    """Fills `rows` with selected ones from `start` on, as in the file."""
    if self.column is not None:
      which, num = self.column
      shape = len(rows), *self.tensor.shape[1:]
      whole = np.empty(shape, rows.dtype)
      self.tensor.read(reader, start, whole)
      rows[:] = whole[..., which::num]
      return
    if self.select is None:
      self.tensor.read(reader, start, rows)
      return
    stride, offset, width, paired = dataclasses.astuple(self.select)
    done = 0
    while done < len(rows):
      group, within = divmod(start + done, width)
      length = min(width - within, len(rows) - done)
      part, first = rows[done : done + length], group * stride + offset
      if not paired:
        self.tensor.read(reader, first + within, part)
      else:
        whole = np.empty((width, *rows.shape[1:]), rows.dtype)
        self.tensor.read(reader, first, whole)
        order = np.arange(width)
        order[:paired] = order[:paired].reshape(-1, 2).T.ravel()
        part[:] = whole[order[within : within + length]]
      done += length


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
  """Rows [start, stop) of a part, and where they go in the parameter."""

  part: Part
  start: int
  stop: int
  index: tuple[slice, ...]


def chunked_axis(shape: tuple[int, ...], part: Part, stacked: bool) -> int:
  """Returns the axis of a parameter that chunks divide: its tensor's rows."""
  return len(shape) - 1 if part.transpose else int(stacked)


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
  """A parameter that is not in memory.

  Attributes:
    path: its name, such as 'layers.0.attn.q'.
    shape: its shape.
    dtype: what it is stored in.
    parts: one; or one an expert, along a leading axis.
    stacked: whether there is that leading axis.
    part_len: the length that one device will have of the axis that chunks
      divide; no chunk spans two devices.
  """

  path: str
  shape: tuple[int, ...]
  dtype: np.dtype
  parts: tuple[Part, ...]
  stacked: bool
  part_len: int

  @property
  def num_bytes(self) -> int:
    return int(np.prod(self.shape)) * self.dtype.itemsize

  def chunk_bytes(self, chunk: Chunk) -> int:
    """Counts a chunk's bytes, without the zeros that pad the last one."""
    lengths = (piece.stop - piece.start for piece in chunk.index)
    return math.prod(lengths) * self.dtype.itemsize

  @property
  def _axis(self) -> int:
    return chunked_axis(self.shape, self.parts[0], self.stacked)

  @property
  def chunk_shape(self) -> tuple[int, ...]:
    """The shape of chunks: about CHUNK_BYTES, and as equal as possible."""
    rows = min(self.shape[self._axis], self.part_len)
    row_bytes = self.num_bytes // len(self.parts) // self.shape[self._axis]
    num_chunks = min(rows, -(-rows * row_bytes // CHUNK_BYTES))
    if self.part_len < self.shape[self._axis]:
      num_chunks = next(
        (n for n in range(num_chunks, 4 * num_chunks) if not rows % n), 1
      )
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

  def compute(
    self, reader: safetensors_reader.Reader, chunk: Chunk, scratch: Scratch
  ) -> np.ndarray:
    """Returns a chunk as it is stored, [*chunk_shape]; zeros fill its end."""
    rows = self.rows(reader, chunk, scratch)
    stored = scratch.take('stored', self.chunk_shape, self.dtype)
    part = stored[0] if self.stacked else stored
    if chunk.part.transpose:
      transpose(rows, part[:, : len(rows)])
      part[:, len(rows) :] = 0
    else:
      part[: len(rows)] = rows
      part[len(rows) :] = 0
    return stored

  def rows(
    self, reader: safetensors_reader.Reader, chunk: Chunk, scratch: Scratch
  ) -> np.ndarray:
    """Returns a chunk's rows, cast, laid out as they are in the file."""
    tensor = chunk.part.tensor
    shape = (chunk.stop - chunk.start, *chunk.part.row_shape)
    rows = scratch.take('rows', shape, tensor.numpy_dtype)
    chunk.part.read(reader, chunk.start, rows)
    return cast(rows, self.dtype, tensor.name)


def cast(rows: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
  """Rounds to the nearest; keeps every bit where the dtype is the same.

  Raises:
    CheckpointError: a finite number is too large for `dtype`.
  """
  if rows.dtype == dtype:
    return rows
  with np.errstate(over='ignore'):  # reported below, by name
    narrowed = rows.astype(dtype)
  if count_nonfinite(narrowed) > count_nonfinite(rows):
    wider = 'bfloat16 or float32' if dtype == np.float16 else 'float32'
    raise errors.CheckpointError(
      f'{name}: holds numbers too large for {dtype}; convert to {wider}.'
    )
  return narrowed


def count_nonfinite(values: np.ndarray) -> int:
  """Counts the numbers that are NaN or infinite.

  Two maxima tell whether there are any: as integers, floats of one sign are
  in order, and infinity and NaN come last. This takes a thirtieth of a
  conversion's time; NumPy's isfinite of bfloat16 would take as long as all the
  rest.
  """
  if values.dtype.kind in 'iu':
    return 0
  infinity = int(np.array(np.inf, values.dtype).view(f'u{values.itemsize}'))
  sign = 1 << (8 * values.itemsize - 1)
  if (
    values.view(f'i{values.itemsize}').max() < infinity
    and values.view(f'u{values.itemsize}').max() < sign | infinity
  ):
    return 0
  return values.size - int(np.count_nonzero(np.isfinite(values)))


def nonfinite_error(counts: Mapping[str, int]) -> errors.CheckpointError:
  """Returns the error for tensors with NaN or infinite numbers.

  Args:
    counts: tensor name -> the count of such numbers.
  """
  shown = [f'{name} ({count:,})' for name, count in sorted(counts.items())]
  more = f' and {len(shown) - 5:,} more tensors' if len(shown) > 5 else ''
  return errors.CheckpointError(
    f'the checkpoint holds numbers that are NaN or infinite, in '
    f'{", ".join(shown[:5])}{more}; what it computes from them is of no use. '
    '--allow_nonfinite (allow_nonfinite=True) takes it all the same.'
  )


def transpose(rows: np.ndarray, result: np.ndarray) -> None:
  """Sets result to rows.T.

  Copies sixteen rows at a time, which fills whole cache lines of the result.
  That is several times as fast as NumPy's own way, which walks one column
  after another. Copies integers, which NumPy does without a call per element.
  """
  bits = rows.view(f'u{rows.itemsize}')
  result = result.view(bits.dtype)
  for start in range(0, len(bits), 16):
    result[:, start : start + 16] = bits[start : start + 16].T
