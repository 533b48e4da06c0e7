# SPDX-License-Identifier: Apache-2.0
"""Writes parameters that are not in memory as an orbax checkpoint.

Orbax asks the TypeHandler of a leaf's type to write it. The one here computes
and writes a `Leaf` chunk by chunk, so what orbax's public API restores needs
no more memory to make than a few chunks. One folder of uncompressed zarr
chunks an array, and not OCDBT: its size on disk is known in advance, and a
missing or truncated array can be told by name.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import errno
import fcntl
import os
import pathlib
import threading
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from checkpoints_convert import safetensors_reader
from checkpoints_convert import transforms
from sarathi_jax.models import tree

Progress = Callable[[int], object]  # called with bytes done since the last

# For one chunk: its tensor's name, and the count of its numbers that are not
# finite.
_Written = futures.Future[tuple[str, int]]

_NUM_THREADS = min(4, os.cpu_count() or 1)
_BLOCK = 4096  # bytes; what direct writes are multiples of, in memory, too


def write(
  folder: pathlib.Path,
  leaves: Any,
  reader: safetensors_reader.Reader,
  progress: Progress,
) -> Mapping[str, int]:
  """Writes an orbax checkpoint of a tree of Leaf.

  Args:
    folder: the folder to make; an absolute path.
    leaves: the parameters, a tree of `transforms.Leaf`.
    reader: of their tensors.
    progress: called with the bytes just written, from any thread.

  Returns:
    Tensor name -> its count of numbers that are NaN or infinite, for tensors
    that hold any.
  """
  writer = _LeafHandler(reader, progress)
  registry = ocp.type_handlers.create_type_handler_registry(
    (transforms.Leaf, writer)
  )
  handler = ocp.PyTreeCheckpointHandler(
    use_ocdbt=False, use_zarr3=False, type_handler_registry=registry
  )
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(folder, args=ocp.args.PyTreeSave(tree.as_dicts(leaves)))
  return +writer.nonfinite


class _LeafHandler(ocp.type_handlers.TypeHandler):
  """Writes leaves; they are restored by orbax's own handlers."""

  def __init__(self, reader: safetensors_reader.Reader, progress: Progress):
    self._reader = reader
    self._progress = progress
    self.nonfinite: Counter[str] = Counter()

  def typestr(self) -> str:
    return 'np.ndarray'  # what a restore without arguments makes of them

  async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
    raise NotImplementedError('Leaves are only written.')

  async def deserialize(
    self, infos: Sequence[Any], args: Sequence[Any] | None = None
  ) -> Sequence[Any]:
    raise NotImplementedError('Leaves are only written.')

  async def serialize(
    self,
    values: Sequence[transforms.Leaf],
    infos: Sequence[Any],
    args: Sequence[Any] | None = None,
  ) -> Sequence[Any]:
    return [
      ocp.future.CommitFutureAwaitingContractedSignals(
        self._write_all(values, infos), name='leaves'
      )
    ]

  async def _write_all(
    self, leaves: Sequence[transforms.Leaf], infos: Sequence[Any]
  ) -> None:
    for info in infos:
      await info.await_path_creation()
    folders = [pathlib.Path(info.path) for info in infos]
    await asyncio.to_thread(self._write_chunks, leaves, folders)

  def _write_chunks(
    self, leaves: Sequence[transforms.Leaf], folders: Sequence[pathlib.Path]
  ) -> None:
    """Writes all chunks by a few threads.

    Each thread has one chunk in memory, before and after it is laid out.
    """
    scratch = _ThreadScratch()

    def work(
      leaf: transforms.Leaf, folder: pathlib.Path, chunk: transforms.Chunk
    ) -> tuple[str, int]:
      values = leaf.compute(self._reader, chunk, scratch.own)
      write_chunk(folder, leaf, chunk, values)
      self._progress(leaf.chunk_bytes(chunk))
      return chunk.part.tensor.name, transforms.count_nonfinite(values)

    with futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
      pending: set[_Written] = set()
      try:
        for leaf, folder in zip(leaves, folders, strict=True):
          create(folder, leaf)
          for chunk in leaf.chunks():
            if len(pending) > 2 * _NUM_THREADS:
              pending = self._reap(pending)
            pending.add(pool.submit(work, leaf, folder, chunk))
        while pending:
          pending = self._reap(pending)
      except BaseException:
        pool.shutdown(cancel_futures=True)
        raise

  def _reap(self, pending: set[_Written]) -> set[_Written]:
    """Waits until at least one is done, and raises what those done raised.

    Returns the rest.
    """
    done, rest = futures.wait(pending, return_when=futures.FIRST_COMPLETED)
    for future in done:
      name, count = future.result()
      self.nonfinite[name] += count
    return rest


class _ThreadScratch(threading.local):
  """A `Scratch` for each thread that asks."""

  def __init__(self) -> None:
    self.own = transforms.Scratch()


def create(folder: pathlib.Path, leaf: transforms.Leaf) -> None:
  """Makes an empty array: a folder, and zarr's metadata."""
  ts.open(
    {
      'driver': 'zarr',
      'kvstore': {'driver': 'file', 'path': f'{folder}/'},
      'metadata': {
        'shape': leaf.shape,
        'chunks': leaf.chunk_shape,
        'compressor': None,
        'order': 'C',
        'dimension_separator': '.',
      },
    },
    # The caller of `write` syncs everything at the end.
    context=ts.Context({'file_io_sync': False}),
    dtype=ts.dtype(leaf.dtype.name),
    create=True,
    open=False,
  ).result()


def write_chunk(
  folder: pathlib.Path,
  leaf: transforms.Leaf,
  chunk: transforms.Chunk,
  values: np.ndarray,
) -> None:
  """Writes a chunk's file; without a compressor it holds just the bytes.

  tensorstore would copy them once more, to freshly allocated memory each time.
  """
  index = (
    piece.start // size
    for piece, size in zip(chunk.index, leaf.chunk_shape, strict=True)
  )
  _write_file(
    folder / '.'.join(map(str, index)), values.reshape(-1).view(np.uint8).data
  )


def _write_file(path: pathlib.Path, content: memoryview) -> None:
  """Writes a file past the page cache, where the file system can.

  What is written is not read again soon, and all of it is synced at the end.
  """
  file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
  try:
    blocks = len(content) // _BLOCK * _BLOCK
    done = _write_direct(file, content[:blocks]) if blocks else 0
    while done < len(content):
      done += os.write(file, content[done:])
  finally:
    os.close(file)


def _write_direct(file: int, blocks: memoryview) -> int:
  """Writes whole blocks past the page cache; returns the bytes written.

  Writes fewer than all where the file system has no direct writes.
  """
  done = 0
  try:
    fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)
    while done < len(blocks) and not done % _BLOCK:
      done += os.write(file, blocks[done:])
  except OSError as e:
    if e.errno != errno.EINVAL:
      raise
  finally:
    fcntl.fcntl(file, fcntl.F_SETFL, 0)
  return done


def read_chunk(folder: pathlib.Path, index: tuple[slice, ...]) -> np.ndarray:
  """Reads a piece of an array that `write` wrote, through tensorstore."""
  array = ts.open(
    {
      'driver': 'zarr',
      'kvstore': {'driver': 'file', 'path': f'{folder}/'},
      'fill_missing_data_reads': False,
    },
    open=True,
  ).result()
  values: np.ndarray = array[index].read().result()
  return values
