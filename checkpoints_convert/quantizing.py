# SPDX-License-Identifier: Apache-2.0
"""Quantizes matrices of 16 or 32 bits while they are converted.

A row of a tensor [out, in] has scales of its own, by the largest numbers, so
each row is read and rounded by itself, and no matrix is ever in memory whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
import re
import threading

import numpy as np
import rich.box
import rich.table

from checkpoints_convert import rules as rules_lib
from checkpoints_convert import safetensors_reader
from checkpoints_convert import transforms
from sarathi_jax import errors
from sarathi_jax.models import codes as codes_lib
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import quantization as quantization_lib
from sarathi_jax.models import quantized as quantized_lib

_ROWS_BYTES = 4 * 2**20  # of rows that are rounded at once, in float32
# The names of a layer's modules: its number, and their own names.
_OF_LAYER = re.compile(r'.*?\.(\d+)\.(?:.*\.)?(\w+)')
ALL = 'all'


class Errors:
  """Sums of squares, of each tensor and of what it lost; threads may add.

  Args:
    names: of the tensors, in order.
  """

  def __init__(self, names: Iterable[str]) -> None:
    self._lock = threading.Lock()
    self._sums = {name: np.zeros(2) for name in names}

  def add(self, name: str, exact: np.ndarray, rounded: np.ndarray) -> None:
    """Adds rows of a tensor, as they were and as they are."""
    sums = np.array(
      [
        np.vdot(values, values)
        for values in ((rounded - exact).ravel(), exact.ravel())
      ],
      np.float64,
    )
    with self._lock:
      self._sums[name] += sums

  def ratios(self) -> dict[str, dict[str, float]]:
    """Returns for each layer, and each of its matrices, what it lost.

    That is the root of the sum of squares of all errors, of the experts of a
    layer together, by that of the matrix. What is in no layer is a row, too;
    the last row and column are of all.
    """
    by: dict[str, dict[str, np.ndarray]] = {}
    for name, sums in self._sums.items():
      layer, module = _layer_of(name)
      for row in (layer, ALL):
        for column in (module, ALL):
          cells = by.setdefault(row, {})
          cells[column] = cells.get(column, 0) + sums
    rows = sorted(by, key=lambda row: int(row) if row.isdecimal() else -1)
    rows.sort(key=ALL.__eq__)
    return {
      row: {
        column: math.sqrt(lost / whole) if whole else 0.0
        for column, (lost, whole) in by[row].items()
      }
      for row in rows
    }

  def table(self, title: str) -> rich.table.Table:
    """Makes a table of `ratios`, in percent."""
    ratios = self.ratios()
    columns = [c for c in ratios[ALL] if c != ALL and c not in ratios]
    table = rich.table.Table('layer', title=title, box=rich.box.SIMPLE_HEAD)
    for column in (*columns, ALL):
      table.add_column(column, justify='right')
    for row, cells in ratios.items():
      table.add_row(
        row,
        *(
          f'{100 * cells[column]:.2f}' if column in cells else ''
          for column in (*columns, ALL)
        ),
      )
    return table


def _layer_of(name: str) -> tuple[str, str]:
  """Returns a tensor's row and column of the table."""
  module = re.sub(r'(\.weight|_blocks)$', '', name)
  if match := _OF_LAYER.fullmatch(module):
    return match[1], match[2].removesuffix('_proj')
  return module, module


@dataclasses.dataclass(frozen=True, slots=True)
class _Rounded(safetensors_reader.Tensor):
  """The codes [out, ...], or the scales [out, groups], of a tensor [out, in].

  Attributes:
    exact: the tensor.
    how: it is rounded.
    lost: adds what is lost, where codes are read; None: nothing does.
  """

  exact: safetensors_reader.Tensor
  how: quantization_lib.Quantization
  lost: Errors | None

  @property
  def numpy_dtype(self) -> np.dtype:
    kind = self.how.kind
    return np.dtype(kind.scale if self.lost is None else kind.dtype)

  def item(self, index: int) -> _Rounded:
    return dataclasses.replace(
      self,
      shape=self.shape[1:],
      num_bytes=self.num_bytes // self.shape[0],
      exact=self.exact.item(index),
    )

  def read(
    self, reader: safetensors_reader.Reader, start: int, rows: np.ndarray
  ) -> None:
    width = self.exact.shape[-1]
    step = max(1, _ROWS_BYTES // (4 * width))
    for first in range(0, len(rows), step):
      part = rows[first : first + step]
      exact = np.empty((len(part), width), self.exact.numpy_dtype)
      self.exact.read(reader, start + first, exact)
      if count := transforms.count_nonfinite(exact):
        raise errors.CheckpointError(
          f'{self.exact.name}: holds {count:,} numbers that are NaN or '
          'infinite, for which there are no codes.'
        )
      exact = exact.astype(np.float32)
      codes, group = self.how.codes, self.how.group
      values, scale = codes_lib.encode(exact.T, codes, group)
      part[:] = scale.T if self.lost is None else values.T
      if self.lost is not None:
        node = quantized_lib.Quantized(values, scale, codes, group)
        rounded = quantized_lib.dequantize(node, np.float32, width)
        self.lost.add(self.exact.name, exact, rounded.T)


def apply(
  model: config_lib.ModelConfig,
  tensors: Mapping[str, safetensors_reader.Tensor],
  rules: Sequence[rules_lib.Rule],
  matrices: Iterable[str],
  how: quantization_lib.Quantization,
) -> tuple[
  config_lib.ModelConfig, dict[str, safetensors_reader.Tensor], Errors
]:
  """Returns the model and its tensors in codes, and what that will lose.

  Each has its scales beside it. Nothing is read yet.

  Args:
    model, tensors, rules: of the checkpoint.
    matrices: the paths of parameters that may be quantized.
    how: they are rounded, and which.

  Raises:
    CheckpointError: a tensor has its rows along `in`; names it.
  """
  covered = {path for path in matrices if how.covers(path)}
  found = {
    name: used
    for name in tensors
    if (
      used := [
        rule for rule, path in rules_lib.places(name, rules) if path in covered
      ]
    )
  }
  # As families list them: q, k, v, o, gate, up, down.
  lost = Errors(sorted(found, key=lambda name: rules.index(found[name][0])))
  result = dict(tensors)
  for name, used in found.items():
    tensor = tensors[name]
    if not all(rule.transpose for rule in used):
      raise errors.CheckpointError(
        f'{name}: is [in, out], and is not quantized here; convert it without '
        '--quantize.'
      )
    of_scales = rules_lib.scale_of(name)
    *out, width = tensor.shape
    for key, columns, size, errors_of in (
      (name, how.kind.rows_of(width), 1, lost),
      (of_scales, how.num_groups(width), how.kind.scale_bytes, None),
    ):
      shape = (*out, columns)
      result[key] = _Rounded(
        key,
        shape,
        how.codes,
        tensor.path,
        tensor.offset,
        size * math.prod(shape),
        tensor,
        how,
        errors_of,
      )
  return dataclasses.replace(model, quantization=how), result, lost
