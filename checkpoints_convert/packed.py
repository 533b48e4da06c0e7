# SPDX-License-Identifier: Apache-2.0
"""Takes matrices whose codes a checkpoint has packed in words of 32 bits.

These are compressed-tensors' (pack-quantized), AWQ's and GPTQ's. They differ in
names, in which axis is packed and which comes first, and in what is said of
zero points (`LAYOUTS`). A number of row n and column k of X.weight [out, in] is

  (code[n, k] - zero[n, g]) * scale[n, g]

where g is the group of k: k // size, or what GPTQ says of each k if it rounded
those first that matter most (`desc_act`). Ours then have the columns in the
order of their groups, and that order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from checkpoints_convert import coded
from checkpoints_convert import packed_tensors
from checkpoints_convert import quantization_config
from checkpoints_convert import rules as rules_lib
from checkpoints_convert import safetensors_reader
from sarathi_jax import errors
from sarathi_jax.models import quantization as quantization_lib
from sarathi_jax.models import tree

_WORDS, _SHAPE_DTYPES = 'I32', ('I64', 'I32')


class Layout(NamedTuple):
  """How a format lays out a matrix.

  Attributes:
    codes, scales, zeros, groups, shape: how the names of its tensors end; None
      if it has no such.
    is_transposed: whether tensors are [in, out].
    codes_along, zeros_along: the axis along which words have several, 'in' (for
      zeros, groups) or 'out'.
    order: in which a word has its codes; () from the lowest bits on.
  """

  codes: str
  scales: str
  zeros: str
  groups: str | None
  shape: str | None
  is_transposed: bool
  codes_along: str
  zeros_along: str
  order: tuple[int, ...] = ()


LAYOUTS: Mapping[str, Layout] = {
  'compressed-tensors': Layout(
    '.weight_packed',
    '.weight_scale',
    '.weight_zero_point',
    '.weight_g_idx',
    '.weight_shape',
    is_transposed=False,
    codes_along='in',
    zeros_along='out',
  ),
  'awq': Layout(
    '.qweight',
    '.scales',
    '.qzeros',
    None,
    None,
    is_transposed=True,
    codes_along='out',
    zeros_along='out',
    order=(0, 4, 1, 5, 2, 6, 3, 7),
  ),
  'gptq': Layout(
    '.qweight',
    '.scales',
    '.qzeros',
    '.g_idx',
    None,
    is_transposed=True,
    codes_along='in',
    zeros_along='out',
  ),
}


def take(
  tensors: Mapping[str, safetensors_reader.Tensor],
  packing: quantization_config.Packing,
  reader: safetensors_reader.Reader,
) -> coded.Taken:
  """Returns tensors by name: those of packed matrices as ours.

  Args:
    tensors: of the checkpoint.
    packing: what config.json says of them.
    reader: of them.

  Raises:
    CheckpointError: a matrix lacks a tensor, or has one that does not fit it,
      or none is packed; by name.
  """
  layout = LAYOUTS[packing.method]
  result, told = coded.without_others(tensors)
  modules = [
    name.removesuffix(layout.codes)
    for name in result
    if name.endswith(layout.codes)
  ]
  if not modules:
    raise errors.CheckpointError(
      f'quantization_config: no tensor is named *{layout.codes}, as packed '
      'weights are, of which it says that they are there.'
    )
  matrices = {
    module: _Reading(module, layout, packing, reader).take(result)
    for module in modules
  }
  reordered = any(m.groups is not None for m in matrices.values())
  zeros = any(m.zeros is not None for m in matrices.values())
  for module, matrix in matrices.items():
    _add(result, f'{module}.weight', matrix, zeros, reordered)
  codes = packed_tensors.CODES[packing.bits]
  how = quantization_lib.Quantization(
    codes=codes, group=packing.group, zeros=zeros, reordered=reordered
  )
  kept = (
    f'{len(modules):,} matrices stay in {codes}, and what they multiply in 16 '
    f'or 32 bits. {told}'
  )
  return coded.Taken(result, kept.strip(), how)


def without_empty_biases(
  tensors: Mapping[str, safetensors_reader.Tensor],
  rules: Sequence[rules_lib.Rule],
  specs: Any,
  reader: safetensors_reader.Reader,
) -> dict[str, safetensors_reader.Tensor]:
  """Returns the tensors but biases of zeros, for which a model has no place.

  AutoGPTQ writes one of each matrix.

  Args:
    tensors: by name.
    rules: the family's.
    specs: of the model's parameters.
    reader: of the tensors.
  """
  wanted = tree.named_leaves(specs)

  def is_empty(name: str, tensor: safetensors_reader.Tensor) -> bool:
    of = tensors.get(f'{name.removesuffix(".bias")}.weight')
    if not isinstance(of, coded.Codes) or not name.endswith('.bias'):
      return False
    if any(path in wanted for _, path in rules_lib.places(name, rules)):
      return False
    return not coded.all_of(tensor, reader, tensor.numpy_dtype).any()

  return {
    name: tensor
    for name, tensor in tensors.items()
    if not is_empty(name, tensor)
  }


def _add(
  result: dict[str, safetensors_reader.Tensor],
  name: str,
  matrix: packed_tensors.Matrix,
  zeros: bool,
  reordered: bool,
) -> None:
  """Adds the tensors of a matrix, by their names.

  Args:
    result: to add to.
    name: of the matrix.
    matrix: of the checkpoint.
    zeros: whether any matrix has zero points, so that all have.
    reordered: the same of orders.
  """
  stored = matrix.codes.stored
  out, width = _size_of(matrix)
  kind = quantization_lib.CODES[packed_tensors.CODES[matrix.bits]]
  groups = out, matrix.scales.width
  made: tuple[tuple[bool, str, tuple[int, ...], type[coded.Made]], ...] = (
    (True, name, (out, kind.rows_of(width)), packed_tensors.Codes),
    (True, rules_lib.scale_of(name), groups, packed_tensors.Scales),
    (zeros, rules_lib.zero_of(name), groups, packed_tensors.Zeros),
    (reordered, rules_lib.order_of(name), (width,), packed_tensors.Order),
  )
  for is_there, key, shape, cls in made:
    if is_there:
      result[key] = cls.of(key, shape, cls.__name__, stored, matrix)


def _size_of(matrix: packed_tensors.Matrix) -> tuple[int, int]:
  shape = matrix.scales.stored.shape
  return shape[1 if matrix.scales.is_transposed else 0], matrix.codes.width


@dataclasses.dataclass(frozen=True, slots=True)
class _Reading:
  """Takes the tensors of one matrix, and checks them.

  Attributes:
    module: the beginning of their names.
    layout, packing, reader: of the checkpoint.
  """

  module: str
  layout: Layout
  packing: quantization_config.Packing
  reader: safetensors_reader.Reader

  def take(
    self, tensors: dict[str, safetensors_reader.Tensor]
  ) -> packed_tensors.Matrix:
    """Takes them out of the checkpoint's.

    Raises:
      CheckpointError: one is missing, or does not fit; by name.
    """
    layout, packing = self.layout, self.packing
    codes = tensors.pop(self.module + layout.codes)
    scales = self._pop(tensors, layout.scales)
    for tensor in (codes, scales):
      if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise self._error(tensor, 'must be of a matrix')
    _ = scales.numpy_dtype  # Raises, by name.
    out, width = self._size(tensors, codes, scales)
    num_groups = 1 if packing.group is None else -(-width // packing.group)
    turned = layout.is_transposed
    matrix = packed_tensors.Matrix(
      packed_tensors.Grid(
        codes, width, turned, packing.bits, layout.codes_along, layout.order
      ),
      packed_tensors.Grid(scales, num_groups, turned),
      self._zeros(tensors, num_groups),
      packing.less,
      self._groups(tensors, width, num_groups),
      packing.group,
    )
    grids = [matrix.codes, matrix.scales]
    if matrix.zeros is not None:
      grids.append(matrix.zeros)
    for grid in grids:
      wanted = _WORDS if grid.bits else grid.stored.dtype
      shape = grid.shape_for(out)
      if grid.stored.shape != shape or grid.stored.dtype != wanted:
        raise self._error(
          grid.stored,
          f'must be {wanted} of shape {shape}, as {self.module} is '
          f'[{out}, {width}] in groups of {packing.group or width}',
        )
    return self._settled(matrix, out)

  def _size(
    self,
    tensors: dict[str, safetensors_reader.Tensor],
    codes: safetensors_reader.Tensor,
    scales: safetensors_reader.Tensor,
  ) -> tuple[int, int]:
    """Returns [out, in]."""
    layout, per = self.layout, packed_tensors.WORD // self.packing.bits
    if layout.shape is not None:
      stored = self._pop(tensors, layout.shape)
      if stored.dtype not in _SHAPE_DTYPES or stored.shape != (2,):
        raise self._error(stored, 'must be two integers')
      dtype = np.int64 if stored.dtype == 'I64' else np.int32
      found = coded.all_of(stored, self.reader, dtype)
      return int(found[0]), int(found[1])
    rows, columns = codes.shape
    if layout.codes_along == 'in':
      return columns, rows * per
    return columns * per, rows

  def _zeros(
    self, tensors: dict[str, safetensors_reader.Tensor], num_groups: int
  ) -> packed_tensors.Grid | None:
    layout = self.layout
    name = self.module + layout.zeros
    if self.packing.symmetric and name not in tensors:
      return None
    return packed_tensors.Grid(
      self._pop(tensors, layout.zeros),
      num_groups,
      layout.is_transposed,
      self.packing.bits,
      layout.zeros_along,
      layout.order,
    )

  def _groups(
    self,
    tensors: dict[str, safetensors_reader.Tensor],
    width: int,
    num_groups: int,
  ) -> safetensors_reader.Tensor | None:
    """Takes the groups of columns, once they are seen to be whole.

    Returns None if they are in order.
    """
    end = self.layout.groups
    if end is None or (stored := tensors.pop(self.module + end, None)) is None:
      return None
    if stored.dtype != 'I32' or stored.shape != (width,):
      raise self._error(stored, f'must be I32 of shape {(width,)}')
    found = coded.all_of(stored, self.reader, np.int32)
    in_order = np.arange(width) // (self.packing.group or width)
    if np.array_equal(found, in_order):
      return None
    if not np.array_equal(np.sort(found), in_order):
      raise self._error(
        stored,
        f'must have {self.packing.group} columns of each of {num_groups} '
        'groups; others are not supported',
      )
    return stored

  def _settled(
    self, matrix: packed_tensors.Matrix, out: int
  ) -> packed_tensors.Matrix:
    """Returns the matrix, without zero points where all are the middle one."""
    if matrix.zeros is None:
      return matrix
    zeros = matrix.zeros
    stored = zeros.rows(self.reader, 0, out).astype(np.int32) + matrix.less
    if self.packing.symmetric or self.packing.bits == 8:
      if (stored != matrix.middle).any():
        raise self._error(
          zeros.stored,
          f'has zero points that are not {matrix.middle}: '
          + (
            'quantization_config says that there are none (sym)'
            if self.packing.symmetric
            else 'those of 8 bits are not supported'
          ),
        )
      return dataclasses.replace(matrix, zeros=None)
    if (stored > 2 * matrix.middle - 1).any():
      raise self._error(
        zeros.stored,
        f'has a zero point of {2 * matrix.middle}, which some readers of this '
        'format take for 0: not supported',
      )
    return matrix

  def _pop(
    self, tensors: dict[str, safetensors_reader.Tensor], end: str
  ) -> safetensors_reader.Tensor:
    tensor = tensors.pop(self.module + end, None)
    if tensor is None:
      raise errors.CheckpointError(
        f'the checkpoint lacks {self.module}{end}, without which '
        f'{self.module}{self.layout.codes} means nothing.'
      )
    return tensor

  def _error(
    self, tensor: safetensors_reader.Tensor, rule: str
  ) -> errors.CheckpointError:
    return errors.CheckpointError(
      f'{tensor.name}: {tensor.dtype} of shape {tensor.shape}: {rule}.'
    )
