# SPDX-License-Identifier: Apache-2.0
"""qwix's quantized arrays, by a description of them: qwix is not needed.

`tests/integrations/qwix_test.py` has those that qwix makes.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import quantization as quantization_lib
from sarathi_jax.models import quantized
from sarathi_jax.runner import params as params_lib
from tests import tiny

DTYPES = {'int8': jnp.int8, 'fp8': jnp.float8_e4m3fn, 'int4': jnp.int4}
NAME = 'params.layers.0.mlp.down'  # [64, 32]


@struct.dataclass
class QArray:
  """As qwix has it."""

  qvalue: Any
  scale: Any
  zero_point: Any = None
  qtype: Any = struct.field(pytree_node=False, default=None)


@struct.dataclass
class WithAux:
  """What qwix.quantize_params has QArrays in."""

  array: Any
  how: Any = struct.field(pytree_node=False, default=None)


def model_of(**fields: Any) -> Any:
  how = quantization_lib.Quantization(**fields)
  return dataclasses.replace(
    tiny.MODEL,
    hidden_size=32,
    intermediate_size=64,
    head_dim=16,
    quantization=how,
  )


def qarray_of(
  codes: str,
  shape: tuple[int, ...],
  tiles: tuple[int, ...],
  *,
  has_zero: bool = False,
  scale: Any = jnp.float32,
) -> QArray:
  """Draws one, with a scale for each of so many tiles along each axis."""
  rng = np.random.default_rng(0)
  least = -8 if codes == 'int4' else -100
  values = rng.integers(least, -least, shape)
  zero = jnp.asarray(rng.integers(-8, 8, tiles), jnp.int4) if has_zero else None
  return QArray(
    jnp.asarray(values, DTYPES[codes]),
    jnp.asarray(rng.uniform(0.5, 1, tiles), scale),
    zero,
  )


def exact(array: QArray) -> np.ndarray:
  """What it stands for, number by number, as qwix says."""
  values = np.asarray(array.qvalue).astype(np.float32)

  def whole(of_tiles: Any) -> np.ndarray:
    of_tiles = np.asarray(of_tiles).astype(np.float32)
    for axis, size in enumerate(values.shape):
      of_tiles = of_tiles.repeat(size // of_tiles.shape[axis], axis)
    return of_tiles

  if array.zero_point is not None:
    values = values - whole(array.zero_point)
  return values * whole(array.scale)


def tree_of(model: Any, tiles: Any, **fields: Any) -> Any:
  """Live parameters: QArrays wherever the model quantizes.

  Args:
    tiles: of each shape, how many there are along each axis.
  """
  plain = models.param_specs(dataclasses.replace(model, quantization=None))

  def one(path: Any, leaf: Any) -> Any:
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    how = model.quantization
    if not leaf.is_factor or not how.covers(name):
      return jnp.ones(leaf.shape)
    return qarray_of(how.codes, leaf.shape, tiles(leaf.shape), **fields)

  return jax.tree.map_with_path(one, plain)


def is_qarray(node: Any) -> bool:
  return isinstance(node, QArray)


def boxed(params: Any, box: Callable[[QArray], Any]) -> Any:
  return jax.tree.map(
    lambda leaf: box(leaf) if is_qarray(leaf) else leaf,
    params,
    is_leaf=is_qarray,
  )


@pytest.mark.parametrize(
  'fields,tiles,more',
  [
    (dict(codes='int8'), lambda s: (1, s[1]), {}),
    (dict(codes='int8'), lambda s: (1, 1), {}),
    (dict(codes='fp8'), lambda s: (1, s[1] // 4), dict(scale=jnp.bfloat16)),
    (dict(codes='fp8', group=16), lambda s: (s[0] // 16, s[1] // 4), {}),
    (dict(codes='int8', group=8), lambda s: (2, s[1]), {}),
    (dict(codes='int4', kept=()), lambda s: (1, s[1]), {}),
    (dict(codes='int4', group=32, kept=()), lambda s: (s[0] // 32, s[1]), {}),
    (
      dict(codes='int4', group=32, zeros=True),
      lambda s: (1, 1),
      dict(has_zero=True),
    ),
    (
      dict(codes='int4', group=32, zeros=True),
      lambda s: (s[0] // 32, s[1]),
      dict(has_zero=True),
    ),
    (dict(codes='int4', zeros=True), lambda s: (1, s[1]), {}),
  ],
)
def test_a_qarray_is_a_node_of_the_same_numbers(fields, tiles, more) -> None:
  """As it is, in qwix's boxes, and in dicts."""
  model = model_of(**fields)
  given = tree_of(model, tiles, **more)
  expected = [
    exact(leaf) if is_qarray(leaf) else np.asarray(leaf)
    for leaf in jax.tree.leaves(given, is_leaf=is_qarray)
  ]

  def in_dict(array: QArray) -> Any:
    found = {'qvalue': array.qvalue, 'scale': array.scale}
    if array.zero_point is not None:
      found['zero_point'] = array.zero_point
    return {'array': found}

  for box in (lambda array: array, WithAux, in_dict):
    taken = params_lib.check_params(
      model,
      boxed(given, box),
    )
    assert jax.tree.structure(taken) == jax.tree.structure(
      models.param_specs(model)
    )
    got = jax.tree.leaves(
      taken, is_leaf=lambda node: isinstance(node, quantized.Quantized)
    )
    for want, node in zip(expected, got, strict=True):
      np.testing.assert_array_equal(
        quantized.dequantize(node, jnp.float32)
        if isinstance(node, quantized.Quantized)
        else node,
        want,
      )


def test_codes_of_8_bits_and_scales_that_fit_are_not_copied() -> None:
  model = model_of(codes='int8')
  given = tree_of(model, lambda shape: (1, shape[1]))
  taken = params_lib.check_params(model, given)
  down, expected = (tree['layers'][0]['mlp']['down'] for tree in (taken, given))
  assert down.values is expected.qvalue
  assert down.scale.unsafe_buffer_pointer() == (
    expected.scale.unsafe_buffer_pointer()
  )


def test_experts_have_tiles_of_their_own() -> None:
  """Or one for all, and are not the first axis of the matrix."""
  model = config_lib.MixtralConfig(
    vocab_size=30,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    num_experts=4,
    experts_per_token=2,
    quantization=quantization_lib.Quantization(codes='int8'),
  )
  for num in (1, 4):
    given = tree_of(model, lambda s, n=num: (n,) * (len(s) - 2) + (1, s[-1]))
    taken = params_lib.check_params(model, given)
    down, expected = (
      tree['layers'][0]['moe']['down'] for tree in (taken, given)
    )
    np.testing.assert_array_equal(
      quantized.dequantize(down, jnp.float32), exact(expected)
    )


@pytest.mark.parametrize(
  'fields,change,message',
  [
    ({}, dict(qvalue=jnp.ones((64, 32), jnp.int4)), 'int4.*of int8'),
    (
      dict(codes='fp8'),
      dict(qvalue=jnp.ones((64, 32), jnp.float8_e5m2)),
      r'QArray of float8_e5m2\[64, 32\]; must be of float8_e4m3fn\[64, 32\]',
    ),
    (
      dict(codes='int4', group=32),
      dict(qvalue=jnp.ones((64, 32), jnp.uint4)),
      'uint4.*of int4',
    ),
    ({}, dict(qvalue=jnp.ones((32, 64), jnp.int8)), r'of int8\[64, 32\]'),
    ({}, dict(qvalue=np.ones((64, 32), np.int8)), '.qvalue: is a ndarray'),
    ({}, dict(scale=None), '.scale: is a NoneType'),
    ({}, dict(scale=jnp.ones((2, 32))), 'scale is.*in tiles of all rows'),
    ({}, dict(scale=jnp.ones((1, 5))), 'scale is.*in tiles'),
    ({}, dict(scale=jnp.ones(32)), 'scale is.*in tiles'),
    (
      dict(group=32),
      dict(scale=jnp.ones((4, 32))),
      'a multiple of the 32 that quantization.group',
    ),
    (
      {},
      dict(scale=jnp.ones((1, 32), jnp.float8_e8m0fnu)),
      'scale is float8_e8m0fnu; must be',
    ),
    ({}, dict(zero_point=jnp.ones((1, 32), jnp.int8)), 'with zero_point'),
    (
      dict(codes='int4', group=32),
      dict(zero_point=jnp.ones((1, 32), jnp.int4)),
      'with zero_point; must be without',
    ),
    (dict(codes='mxfp4', group=32), {}, 'a QArray has no mxfp4'),
    (dict(codes='int4', reordered=True), {}, 'no int4 with rows in another'),
    (dict(kept=('layers.*.down',)), {}, "an array.*kept=.'layers.*.down'"),
  ],
)
def test_what_a_node_can_not_hold_is_refused_by_name(
  fields, change, message
) -> None:
  model = model_of(**dict(codes='int8') | fields)
  codes = model.quantization.codes
  array = qarray_of('int4' if codes == 'mxfp4' else codes, (64, 32), (1, 32))
  given = tree_of(model_of(codes='int8'), lambda shape: (1, shape[1]))
  given['layers'][0]['mlp'] = {'down': dataclasses.replace(array, **change)}
  with pytest.raises(errors.ConfigError, match=f'{NAME}.*{message}'):
    params_lib.check_params(
      model, {'layers': [{'mlp': given['layers'][0]['mlp']}]}
    )


def test_a_model_that_is_not_quantized_takes_none() -> None:
  given = tree_of(model_of(codes='int8'), lambda shape: (1, shape[1]))
  model = dataclasses.replace(model_of(codes='int8'), quantization=None)
  with pytest.raises(
    errors.ConfigError, match='must be an array, as the model has no quant'
  ):
    params_lib.check_params(model, given)


def test_a_deleted_qarray_is_named() -> None:
  model = model_of(codes='int4', group=32)
  given = tree_of(model, lambda shape: (shape[0] // 32, shape[1]))
  given['layers'][0]['mlp']['down'].qvalue.delete()
  with pytest.raises(errors.ConfigError, match=r'down\.qvalue: is deleted'):
    params_lib.check_params(model, given)
