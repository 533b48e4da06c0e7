# SPDX-License-Identifier: Apache-2.0
"""Reads rows of tensors out of safetensors files, one file or sharded.

The format (https://huggingface.co/docs/safetensors) is a length, a JSON header
and the bytes. It is read with `pread` and not mapped: mapped pages count as
this process's memory, and a truncated file is a signal instead of an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
import math
import os
import pathlib
from typing import Any, Self

import ml_dtypes
import numpy as np

from sarathi_jax import errors
from sarathi_jax import json_file

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
_PICKLED = ('.bin', '.pt', '.pth', '.ckpt')
_MAX_HEADER = 100_000_000  # bytes, the format's own limit

DTYPES: Mapping[str, np.dtype] = {
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F16': np.dtype(np.float16),
  'F32': np.dtype(np.float32),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
  """A tensor's shape, and its place in a file.

  Attributes:
    name: as in the file.
    shape: as in the file.
    dtype: a name in the file's header, such as 'BF16'.
    path: the file.
    offset: of its first byte in the file.
    num_bytes: its size.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  path: pathlib.Path
  offset: int
  num_bytes: int

  @property
  def numpy_dtype(self) -> np.dtype:
    if self.dtype not in DTYPES:
      raise errors.CheckpointError(
        f'{self.name}: dtype={self.dtype} can not be converted; supported: '
        f'{", ".join(DTYPES)}, and what a quantization_config of config.json '
        'explains.'
      )
    return DTYPES[self.dtype]

  def item(self, index: int) -> Tensor:
    """Returns one of the tensors that are stacked in this one."""
    size = self.num_bytes // self.shape[0]
    return dataclasses.replace(
      self,
      shape=self.shape[1:],
      offset=self.offset + index * size,
      num_bytes=size,
    )

  def read(self, reader: Reader, start: int, rows: np.ndarray) -> None:
    """Fills `rows` with rows from `start` on; see `Reader.read_rows`."""
    reader.read_rows(self, start, rows)


class Reader:
  """Open safetensors files. Reads are safe from several threads."""

  def __init__(self, folder: pathlib.Path):
    """Reads all headers.

    Args:
      folder: holds model.safetensors, or shards and their index.

    Raises:
      CheckpointError: no safetensors file, a shard that is missing or
        truncated, a damaged header, or an index that does not match.
    """
    self._files: dict[pathlib.Path, int] = {}
    self.tensors: dict[str, Tensor] = {}
    try:
      for path, names in _files(folder).items():
        self._add(path, names)
    except BaseException:
      self.close()
      raise

  def _add(self, path: pathlib.Path, names: frozenset[str] | None) -> None:
    tensors = _read_header(path)
    if names is not None and names != tensors.keys():
      odd = sorted(names ^ tensors.keys())
      raise errors.CheckpointError(
        f'{path}: its tensors are not those that {INDEX} says; first '
        f'difference: {odd[0]}.'
      )
    twice = tensors.keys() & self.tensors.keys()
    if twice:
      raise errors.CheckpointError(f'{path}: {min(twice)} is in two files.')
    self.tensors |= tensors
    self._files[path] = os.open(path, os.O_RDONLY)

  def read_rows(self, tensor: Tensor, start: int, rows: np.ndarray) -> None:
    """Fills `rows`, in C order, with the tensor's rows from `start` on.

    Raises:
      CheckpointError: the file is truncated, or can't be read.
    """
    row_bytes = math.prod(tensor.shape[1:]) * rows.itemsize
    view = rows.reshape(-1).view(np.uint8).data
    offset = tensor.offset + start * row_bytes
    file = self._files[tensor.path]
    while view:
      try:
        got = os.preadv(file, [view], offset)
      except OSError as e:
        raise errors.CheckpointError(
          f'{tensor.path}: can not be read: {e}.'
        ) from e
      if not got:
        raise errors.CheckpointError(
          f'{tensor.path}: truncated inside {tensor.name}.'
        )
      view, offset = view[got:], offset + got

  def close(self) -> None:
    for file in self._files.values():
      os.close(file)
    self._files.clear()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()


def _files(folder: pathlib.Path) -> dict[pathlib.Path, frozenset[str] | None]:
  """Returns the files to read -> the tensors that the index lists for each.

  None stands for all of a file's tensors, where there is no index.
  """
  if (folder / INDEX).is_file():
    return _index_files(folder)
  found = sorted(folder.glob('*.safetensors'))
  if (folder / SINGLE).is_file():
    found = [folder / SINGLE]
  if len(found) == 1:
    return {found[0]: None}
  if found:
    raise errors.CheckpointError(
      f'{folder}: {len(found)} safetensors files, but no {INDEX}.'
    )
  for path in folder.glob('*.gguf'):
    raise errors.CheckpointError(
      f'{path}: GGUF is not supported. Take the model as it is published in '
      'safetensors; --quantize=int8 makes it as small.'
    )
  pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
  if pickled:
    raise errors.CheckpointError(
      f'{folder / pickled[0]}: a pickled checkpoint, which can run any code '
      'when it is read, is refused. Save the model as safetensors.'
    )
  raise errors.CheckpointError(f'{folder}: holds no safetensors file.')


def _index_files(
  folder: pathlib.Path,
) -> dict[pathlib.Path, frozenset[str] | None]:
  weight_map = json_file.read(folder / INDEX).get('weight_map')
  if not isinstance(weight_map, dict):
    raise errors.CheckpointError(
      f'{folder / INDEX}: not a valid index: weight_map must be an object.'
    )
  shards: dict[str, set[str]] = {}
  for name, shard in weight_map.items():
    if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard:
      raise errors.CheckpointError(
        f'{folder / INDEX}: shard {shard!r} is not a plain file name.'
      )
    shards.setdefault(shard, set()).add(name)
  return {
    folder / shard: frozenset(names) for shard, names in sorted(shards.items())
  }


def _read_header(path: pathlib.Path) -> dict[str, Tensor]:
  try:
    size = path.stat().st_size
    with path.open('rb') as file:
      length = int.from_bytes(file.read(8), 'little')
      if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise errors.CheckpointError(f'{path}: truncated or not safetensors.')
      header = json_file.parse(file.read(length))
    header.pop('__metadata__', None)
    tensors = {
      name: _tensor(path, name, entry, 8 + length)
      for name, entry in header.items()
    }
  except errors.CheckpointError:
    raise
  except FileNotFoundError as e:
    raise errors.CheckpointError(
      f'{path}: missing, though the index {INDEX} names it.'
    ) from e
  except OSError as e:
    raise errors.CheckpointError(f'{path}: can not be read: {e}.') from e
  except (ValueError, KeyError, TypeError) as e:
    raise errors.CheckpointError(f'{path}: damaged header: {e}.') from e
  _check_places(path, tensors.values(), 8 + length, size)
  return tensors


def _check_places(
  path: pathlib.Path, tensors: Iterable[Tensor], start: int, size: int
) -> None:
  """Refuses a file whose bytes are not each of one tensor, as the format does.

  Args:
    path: the file.
    tensors: all of it.
    start: the first byte after the header.
    size: of the file, bytes.
  """
  end, before = start, 'the header'
  for tensor in sorted(tensors, key=lambda t: (t.offset, t.num_bytes)):
    if tensor.offset != end:
      raise errors.CheckpointError(
        f'{path}: damaged header: {tensor.name} begins at byte '
        f'{tensor.offset}, and {before} ends at byte {end}.'
      )
    end, before = end + tensor.num_bytes, tensor.name
  if end > size:
    raise errors.CheckpointError(
      f'{path}: truncated: {before} ends at byte {end} of {size}.'
    )
  if end < size:
    raise errors.CheckpointError(
      f'{path}: damaged header: its tensors end at byte {end} of {size}.'
    )


def _tensor(
  path: pathlib.Path, name: str, entry: Mapping[str, Any], base: int
) -> Tensor:
  (start, stop), shape = entry['data_offsets'], entry['shape']
  if (
    not isinstance(shape, list)
    or not all(type(n) is int and n >= 0 for n in (start, stop, *shape))
    or start > stop
    or not isinstance(entry['dtype'], str)
  ):
    raise ValueError(
      f'{name} has data_offsets={[start, stop]}, shape={shape}, '
      f'dtype={entry["dtype"]}'
    )
  tensor = Tensor(
    name, tuple(shape), entry['dtype'], path, base + start, stop - start
  )
  if tensor.dtype in DTYPES:
    wanted = math.prod(tensor.shape) * tensor.numpy_dtype.itemsize
    if tensor.num_bytes != wanted:
      raise errors.CheckpointError(
        f'{path}: damaged header: {name} of shape {tensor.shape} takes '
        f'{wanted} bytes, not {tensor.num_bytes}.'
      )
  return tensor
