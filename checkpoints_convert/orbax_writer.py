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
from collections.abc import Callable, Sequence
from concurrent import futures
import os
import pathlib
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from checkpoints_convert import safetensors_reader
from checkpoints_convert import transforms

Progress = Callable[[int], object]  # called with bytes done since the last

_NUM_THREADS = min(4, os.cpu_count() or 1)


def write(folder: pathlib.Path, leaves: Any,
          reader: safetensors_reader.Reader, progress: Progress) -> None:
  """Writes an orbax checkpoint of a tree of Leaf.

  Args:
    folder: is made; absolute.
    leaves: the parameters.
    reader: of their tensors.
    progress: told of bytes written, from any thread.
  """
  registry = ocp.type_handlers.create_type_handler_registry(
    (transforms.Leaf, _LeafHandler(reader, progress)))
  handler = ocp.PyTreeCheckpointHandler(
    use_ocdbt=False, use_zarr3=False, type_handler_registry=registry)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(folder, args=ocp.args.PyTreeSave(leaves))


class _LeafHandler(ocp.type_handlers.TypeHandler):
  """Writes leaves; they are restored by orbax's own handlers."""

  def __init__(self, reader: safetensors_reader.Reader, progress: Progress):
    self._reader = reader
    self._progress = progress

  def typestr(self) -> str:
    return 'np.ndarray'  # what a restore without arguments makes of them

  async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
    raise NotImplementedError('Leaves are only written.')

  async def deserialize(self, infos: Sequence[Any],
                        args: Sequence[Any] | None = None) -> Sequence[Any]:
    raise NotImplementedError('Leaves are only written.')

  async def serialize(self, values: Sequence[transforms.Leaf],
                      infos: Sequence[Any],
                      args: Sequence[Any] | None = None) -> Sequence[Any]:
    return [ocp.future.CommitFutureAwaitingContractedSignals(
      self._write_all(values, infos), name='leaves')]

  async def _write_all(self, leaves: Sequence[transforms.Leaf],
                       infos: Sequence[Any]) -> None:
    for info in infos:
      await info.await_path_creation()
    folders = [pathlib.Path(info.path) for info in infos]
    await asyncio.to_thread(self._write_chunks, leaves, folders)

  def _write_chunks(self, leaves: Sequence[transforms.Leaf],
                    folders: Sequence[pathlib.Path]) -> None:
    """Each thread has one chunk in memory, before and after it is laid out."""
    def work(leaf: transforms.Leaf, array: ts.TensorStore,
             chunk: transforms.Chunk) -> None:
      values = leaf.compute(self._reader, chunk)
      array[chunk.index].write(
        values, can_reference_source_data_indefinitely=True).result()
      self._progress(values.nbytes)

    with futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
      pending: set[futures.Future[None]] = set()
      try:
        for leaf, folder in zip(leaves, folders, strict=True):
          array = create(folder, leaf)
          for chunk in leaf.chunks():
            if len(pending) > 2 * _NUM_THREADS:
              pending = _reap(pending)
            pending.add(pool.submit(work, leaf, array, chunk))
        while pending:
          pending = _reap(pending)
      except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def _reap(pending: set[futures.Future[None]]) -> set[futures.Future[None]]:
  """Waits for one at least; raises what they raised."""
  done, rest = futures.wait(pending, return_when=futures.FIRST_COMPLETED)
  for future in done:
    future.result()
  return rest


def create(folder: pathlib.Path, leaf: transforms.Leaf) -> ts.TensorStore:
  """An empty array; synced once, at the end, by who calls `write`."""
  return ts.open(
    {
      'driver': 'zarr',
      'kvstore': {'driver': 'file', 'path': f'{folder}/'},
      'metadata': {
        'shape': leaf.shape,
        'chunks': leaf.chunk_shape,
        'compressor': None,
      },
      # Or a chunk of zeros would not be stored, and be reported as missing.
      'store_data_equal_to_fill_value': True,
    },
    context=ts.Context({'file_io_sync': False}),
    dtype=ts.dtype(leaf.dtype.name), create=True, open=False,
  ).result()


def read_chunk(folder: pathlib.Path, index: tuple[slice, ...]) -> np.ndarray:
  """Reads a piece of an array that `write` wrote, through tensorstore."""
  array = ts.open(
    {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': f'{folder}/'},
     'fill_missing_data_reads': False}, open=True).result()
  values: np.ndarray = array[index].read().result()
  return values
