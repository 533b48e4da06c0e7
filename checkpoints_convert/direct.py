# SPDX-License-Identifier: Apache-2.0
"""Reads a Hugging Face checkpoint as if it were converted, writing nothing.

A part of a parameter is computed from slices of its tensors whenever it is
asked for: more work at each start, and no second copy on a disk.
"""

from __future__ import annotations

import pathlib

import numpy as np

from checkpoints_convert import convert
from checkpoints_convert import safetensors_reader
from checkpoints_convert import transforms
from sarathi_jax import checkpoint
from sarathi_jax.checkpoint import params_reader

_BLOCK_BYTES = 16 * 2**20  # of a tensor's rows in memory at once


class DirectParams:
  """A `params_reader.Read` of a Hugging Face checkpoint.

  Args:
    folder: of the checkpoint.
    sampling_defaults: see `convert.make_plan`.
    allow_nonfinite: whether they may be NaN or infinite.

  Raises:
    CheckpointError: something about it is not known, or missing.

  Attributes:
    metadata: what sarathi.json would say.
    left_out: see `convert.Plan`.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    *,
    sampling_defaults: bool = True,
    allow_nonfinite: bool = False,
  ) -> None:
    self._allow_nonfinite = allow_nonfinite
    self._reader = safetensors_reader.Reader(folder)
    try:
      plan = convert.make_plan(
        folder, self._reader, None, sampling_defaults=sampling_defaults
      )
      self.metadata: checkpoint.CheckpointMetadata = convert.metadata_of(plan)
      self.left_out = plan.left_out
    except BaseException:
      self._reader.close()
      raise
    self._leaves = {leaf.path: leaf for leaf in plan.all_leaves()}

  def __call__(self, name: str, index: params_reader.Slices) -> np.ndarray:
    leaf = self._leaves[name]
    spans = [
      range(*s.indices(size)) for s, size in zip(index, leaf.shape, strict=True)
    ]
    part = np.empty(tuple(map(len, spans)), leaf.dtype)
    if not leaf.stacked:
      self._fill(part, leaf, leaf.parts[0], spans)
      return part
    for expert, one in zip(spans[0], part, strict=True):
      self._fill(one, leaf, leaf.parts[expert], spans[1:])
    return part

  def close(self) -> None:
    self._reader.close()

  def _fill(
    self,
    result: np.ndarray,
    leaf: transforms.Leaf,
    part: transforms.Part,
    spans: list[range],
  ) -> None:
    """Sets `result` to the spans of one part, some rows at a time."""
    if part.transpose:
      result, spans = result.T, spans[::-1]
    rows, *rest = spans
    tensor = part.tensor
    row_bytes = np.prod(part.row_shape, dtype=int) * tensor.numpy_dtype.itemsize
    step = max(1, _BLOCK_BYTES // max(1, int(row_bytes)))
    columns = tuple(slice(span.start, span.stop) for span in rest)
    for start in range(rows.start, rows.stop, step):
      stop = min(start + step, rows.stop)
      block = np.empty((stop - start, *part.row_shape), tensor.numpy_dtype)
      part.read(self._reader, start, block)
      values = transforms.cast(
        block[(slice(None), *columns)], leaf.dtype, tensor.name
      )
      if not self._allow_nonfinite and (
        count := transforms.count_nonfinite(values)
      ):
        raise transforms.nonfinite_error({tensor.name: count})
      result[start - rows.start : stop - rows.start] = values
