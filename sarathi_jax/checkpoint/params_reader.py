# SPDX-License-Identifier: Apache-2.0
"""Reads parts of a converted checkpoint's parameters. Loads no JAX.

A device of a mesh needs some rows or columns of each parameter. Our converter
writes arrays without compression, one file a chunk, so a part is mapped from
its files and nothing else is read. Checkpoints that others wrote with orbax are
read by tensorstore, which reads whole chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import functools
import itertools
import pathlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sarathi_jax import errors
from sarathi_jax import json_file

Slices = tuple[slice, ...]
# Reads a part of a parameter, by its name, such as 'layers.3.attn.q'. Any
# thread may call it.
Read = Callable[[str, Slices], np.ndarray]

_DTYPES = {  # NumPy knows the others.
  name: np.dtype(getattr(ml_dtypes, name))
  for name in ('bfloat16', 'float8_e4m3fn')
}


def open_params(folder: pathlib.Path) -> Read:
  """Returns a reader of the parameters in an orbax checkpoint's folder.

  The reader raises CheckpointError if a parameter can not be read.
  """
  if (folder / 'manifest.ocdbt').exists():
    kvstore = {'driver': 'ocdbt', 'base': f'file://{folder}/'}
    return functools.partial(_read_by_tensorstore, kvstore)
  return functools.partial(_read, folder)


class Stored(NamedTuple):
  """How an array lies in its folder, as .zarray says.

  Attributes:
    shape: of the array.
    chunks: the shape of a chunk, each in a file of its own.
    dtype: NumPy's name, or one of `_DTYPES`.
    is_plain: whether a file holds a chunk's numbers in C order, and no more.
  """

  shape: tuple[int, ...]
  chunks: tuple[int, ...]
  dtype: str
  is_plain: bool

  @classmethod
  def of(cls, array: pathlib.Path) -> Stored:
    """Reads an array's .zarray.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    path = array / '.zarray'
    fields = json_file.read(path)
    shape: Any = fields.get('shape')
    chunks: Any = fields.get('chunks')
    if not (
      _are_sizes(shape) and _are_sizes(chunks) and len(shape) == len(chunks)
    ):
      raise errors.CheckpointError(
        f'{path}: damaged: shape={shape!r}, chunks={chunks!r}.'
      )
    return cls(
      tuple(shape),
      tuple(chunks),
      str(fields.get('dtype')),
      fields.get('compressor') is None and fields.get('order') == 'C',
    )


def _are_sizes(values: Any) -> bool:
  return isinstance(values, list) and all(
    type(value) is int and value >= 1 for value in values
  )


def _read(folder: pathlib.Path, name: str, index: Slices) -> np.ndarray:
  array = folder / name
  try:
    stored = Stored.of(array)
    if not stored.is_plain:
      return _read_by_tensorstore(
        {'driver': 'file', 'path': f'{folder}/'}, name, index
      )
    return _map(array, stored, index)
  except (ArithmeticError, OSError, ValueError, TypeError) as e:
    raise errors.CheckpointError(f'{array}: can not be read: {e}') from e


def _map(array: pathlib.Path, stored: Stored, index: Slices) -> np.ndarray:
  dtype = _DTYPES.get(stored.dtype) or np.dtype(stored.dtype)
  wanted = [
    range(*s.indices(size)) for s, size in zip(index, stored.shape, strict=True)
  ]
  part = np.empty(tuple(map(len, wanted)), dtype)
  if not part.size:
    return part
  per_axis = [
    list(_overlaps(span, size))
    for span, size in zip(wanted, stored.chunks, strict=True)
  ]
  for pieces in itertools.product(*per_axis):
    name = '.'.join(str(number) for number, _, _ in pieces)
    chunk = np.memmap(array / name, dtype, 'r', shape=stored.chunks)
    part[tuple(to for _, _, to in pieces)] = chunk[
      tuple(of for _, of, _ in pieces)
    ]
  return part


def _overlaps(wanted: range, size: int) -> Iterator[tuple[int, slice, slice]]:
  """Yields the chunks of an axis that hold a span.

  Each is a chunk's number, the slice of the chunk, and the slice of the span.
  """
  for number in range(wanted.start // size, (wanted.stop - 1) // size + 1):
    first = number * size
    start, stop = max(wanted.start, first), min(wanted.stop, first + size)
    yield (
      number,
      slice(start - first, stop - first),
      slice(start - wanted.start, stop - wanted.start),
    )


def _read_by_tensorstore(
  kvstore: dict[str, Any], name: str, index: Sequence[slice]
) -> np.ndarray:
  import tensorstore as ts

  for driver in ('zarr', 'zarr3'):
    try:
      array = ts.open(
        {
          'driver': driver,
          'fill_missing_data_reads': False,
          'kvstore': {**kvstore, 'path': f'{kvstore.get("path", "")}{name}/'},
        },
        open=True,
        read=True,
      ).result()
      values: np.ndarray = array[tuple(index)].read().result()
    except ValueError as e:  # what tensorstore raises for everything
      problem = e
    else:
      return values
  raise errors.CheckpointError(f'{name}: can not be read: {problem}')
