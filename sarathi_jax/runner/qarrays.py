# SPDX-License-Identifier: Apache-2.0
"""Takes qwix's quantized arrays for matrices in codes. Does not import qwix.

A `qwix.QArray` [..., in, out] stands for (qvalue - zero_point) * scale, where
each number of a scale is for a tile of the matrix. Only names count, as for all
live parameters: the leaves may be in QArrays, in these in qwix's boxes
(`WithAux`), or in dicts.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.models import codes as codes_lib
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import quantization as quantization_lib
from sarathi_jax.models import quantized
from sarathi_jax.models import tree as tree_lib
from sarathi_jax.runner import alive

_VALUES = '.qvalue'
_BOX = '.array'  # of qwix's `WithAux`
# Codes -> the dtype of a QArray's values that are the same numbers.
_DTYPES: Mapping[str, str] = {
  'int8': 'int8',
  'fp8': 'float8_e4m3fn',
  'int4': 'int4',
}
_SCALES = 'float32', 'bfloat16', 'float16'  # float32 holds all of these
_IN, _OUT = -2, -1


def adopt(
  model: model_config_lib.ModelConfig, leaves: Mapping[str, Any]
) -> Mapping[str, Any]:
  """Returns leaves with those of the model's nodes for those of QArrays.

  Values of 8 bits are taken as they are, without a copy; those of 4 are packed,
  two in a byte. Scales are spread where a tile has several columns.

  Args:
    model: the model, which says how matrices are quantized.
    leaves: of live parameters, by their names.

  Raises:
    ConfigError: a QArray is of what is not quantized, or a node can't hold it:
      its dtype, tiles or zero points. Names it, and says what can be.
  """
  boxes = [name.removesuffix(_VALUES) for name in leaves if _ends(name)]
  if not boxes:
    return leaves
  nodes = {
    tree_lib.joined('', path): node
    for path, node in jax.tree.leaves_with_path(
      models.param_specs(model), is_leaf=_is_node
    )
    if _is_node(node)
  }
  plain = tree_lib.named_leaves(
    models.param_specs(dataclasses.replace(model, quantization=None))
  )
  made = dict(leaves)
  for box in boxes:
    name = box.removesuffix(_BOX)
    if name not in plain:
      continue  # It is unknown, by whatever it is.
    found = _QArray(
      name, **{end: made.pop(f'{box}.{end}', None) for end in _PARTS}
    )
    if name not in nodes:
      how = model.quantization
      found.fail(
        'is a QArray',
        'an array, as the model has '
        + (
          'no quantization' if how is None else f'quantization.kept={how.kept}'
        ),
      )
    node = found.as_node(nodes[name], plain[name].shape)
    made |= {f'{name}.{part}': leaf for part, leaf in node.arrays().items()}
  return made


def _ends(name: str) -> bool:
  return name.endswith(_VALUES)


def _is_node(node: Any) -> bool:
  return isinstance(node, quantized.Quantized)


@dataclasses.dataclass(frozen=True, slots=True)
class _QArray:
  """What is in a QArray, and the name of its matrix."""

  name: str
  qvalue: Any
  scale: Any
  zero_point: Any

  def fail(self, is_what: str, must_be: str) -> None:
    raise errors.ConfigError(
      f'params.{self.name}: {is_what}; must be {must_be}.'
    )

  def as_node(
    self, wanted: quantized.Quantized, shape: tuple[int, ...]
  ) -> quantized.Quantized:
    """Returns the node.

    Args:
      wanted: its specs.
      shape: of the matrix.
    """
    for part in _PARTS:
      if (leaf := getattr(self, part)) is not None or part == 'scale':
        alive.check(f'{self.name}.{part}', leaf)
    dtype = _DTYPES.get(wanted.codes)
    if dtype is None or wanted.order is not None:
      order = '' if wanted.order is None else ' with rows in another order'
      self.fail(
        'is a QArray',
        f'values and scale, as a QArray has no {wanted.codes}{order}',
      )
    if (self.qvalue.dtype.name, self.qvalue.shape) != (dtype, shape):
      self.fail(
        f'is a QArray of {self.qvalue.dtype}{list(self.qvalue.shape)}',
        f'of {dtype}{list(shape)}',
      )
    if self.zero_point is not None and wanted.zero is None:
      self.fail(
        'is a QArray with zero_point',
        'without, as only int4 has zero points, where quantization.zeros says '
        'so',
      )
    if self.scale.dtype.name not in _SCALES:
      self.fail(
        f'is a QArray whose scale is {self.scale.dtype}',
        f'one whose scale is {" or ".join(_SCALES)}',
      )
    values, zero = self.qvalue, None
    if wanted.codes == 'int4':
      values = _packed(values)
    if wanted.zero is not None:
      zero = jnp.full(wanted.zero.shape, quantization_lib.INT4_ZERO, jnp.uint8)
      if self.zero_point is not None:
        zero = _codes_of(self._of_groups('zero_point', wanted))
    scale = self._of_groups('scale', wanted).astype(jnp.float32)
    return dataclasses.replace(wanted, values=values, scale=scale, zero=zero)

  def _of_groups(self, part: str, wanted: quantized.Quantized) -> Any:
    """Returns a number for each column and group, of one for each tile."""
    tiles, shape = getattr(self, part), self.qvalue.shape
    rows = shape[_IN]
    group = wanted.group or rows
    fits = tiles.ndim == len(shape) and not any(
      size % of for size, of in zip(shape, tiles.shape, strict=True)
    )
    rows_of_tile = rows // tiles.shape[_IN] if fits else 0
    if not fits or (rows_of_tile % group and rows_of_tile != rows):
      self.fail(
        f'is a QArray {list(shape)} whose {part} is {list(tiles.shape)}',
        f'one in tiles of all rows, or of a multiple of the {group} that '
        'quantization.group says',
      )
    if tiles.shape == wanted.scale.shape:
      return tiles
    return _spread(tiles, shape, wanted.group)


_PARTS = 'qvalue', 'scale', 'zero_point'


def _codes_of(values: jax.Array) -> jax.Array:
  """Returns the codes, 0 to 15, that stand for numbers of int4."""
  zero = jnp.int8(quantization_lib.INT4_ZERO)
  return (values.astype(jnp.int8) + zero).astype(jnp.uint8)


@jax.jit
def _packed(values: jax.Array) -> jax.Array:
  packed: jax.Array = codes_lib.pack(
    _codes_of(values), quantization_lib.INT4_ZERO
  )
  return packed


@functools.partial(jax.jit, static_argnums=(1, 2))
def _spread(
  tiles: jax.Array, shape: tuple[int, ...], group: int | None
) -> jax.Array:
  """Returns what each group of a matrix of a shape has, of what tiles have."""
  rows = shape[_IN]
  groups = range(0, rows, group or rows)
  rows_of_tile = rows // tiles.shape[_IN]
  of_groups = jnp.take(
    tiles, jnp.asarray([row // rows_of_tile for row in groups]), axis=_IN
  )
  for axis, size in enumerate(shape):
    if axis != len(shape) + _IN:
      of_groups = jnp.repeat(
        of_groups, size // of_groups.shape[axis], axis=axis
      )
  return of_groups
