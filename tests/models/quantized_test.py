# SPDX-License-Identifier: Apache-2.0
"""Products with codes are those with what they stand for."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels import panel_matmul
from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.models import codes as codes_lib
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import matrices
from sarathi_jax.models import parallel
from sarathi_jax.models import quantization as quantization_lib
from sarathi_jax.models import quantized
from sarathi_jax.models import tree
from tests import tiny

# codes, rows of a matrix, of a group: whole groups, one that is left, one in
# all; and of what is packed, whole blocks, and not.
CASES = [
  *(
    (codes, 48, group) for codes in ('int8', 'fp8') for group in (None, 16, 20)
  ),
  ('int8', 48, 64),
  *(('int4', *case) for case in ((48, None), (64, 32), (40, 32), (72, 64))),
  *(('mxfp4', *case) for case in ((64, 32), (40, 32))),
]


def _of(w: Any, codes: str, group: int | None) -> quantized.Quantized:
  return quantized.of(
    jnp.asarray(w), quantization_lib.Quantization(codes=codes, group=group)
  )


def _exact(w: quantized.Quantized, rows: int) -> np.ndarray:
  """Row by row, in float64, as `quantization` says."""
  values, scale = np.asarray(w.values), np.asarray(w.scale).astype(np.float64)
  exact = np.zeros((*values.shape[:-2], rows, values.shape[-1]))
  for row in range(rows):
    of_group = np.s_[..., row // (w.group or rows), :]
    if w.codes in ('int8', 'fp8'):
      number = values[..., row, :].astype(np.float64)
    else:
      block, within = divmod(row, 32)
      byte = values[..., 16 * block + within % 16, :].astype(int)
      number = byte // 16 if within >= 16 else byte % 16
      if w.codes == 'int4':
        zero = 8 if w.zero is None else np.asarray(w.zero)[of_group].astype(int)
        number = number - zero
      else:
        sign = np.where(number // 8, -1, 1)
        number = sign * np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[number % 8]
    factor = scale[of_group]
    if w.codes == 'mxfp4':
      factor = 2 ** (factor - 127)
    to = row if w.order is None else int(w.order[row])
    exact[..., to, :] = number * factor
  return exact


def _affine(w: quantized.Quantized, rows: int) -> quantized.Quantized:
  """The codes with other zero points, and rows in another order."""
  rng = np.random.default_rng(1)
  return dataclasses.replace(
    w,
    zero=jnp.asarray(rng.integers(0, 16, w.scale.shape, np.uint8)),
    order=jnp.asarray(rng.permutation(rows).astype(np.int32)),
  )


@pytest.mark.parametrize(
  ('codes', 'rows', 'group', 'is_affine'),
  [
    *((*case, False) for case in CASES),
    *((*case, True) for case in CASES if case[0] == 'int4'),
  ],
)
def test_a_product_is_that_with_what_codes_stand_for(
  codes, rows, group, is_affine
):
  rng = np.random.default_rng(0)
  w = _of(rng.normal(0, 1, (rows, 20)).astype(np.float32), codes, group)
  if is_affine:
    w = _affine(w, rows)
  np.testing.assert_allclose(
    quantized.dequantize(w, jnp.float32, rows), _exact(w, rows), rtol=1e-6
  )
  for num in (1, 3, 40):
    x = rng.normal(0, 1, (num, rows))
    for dtype, error, ratio in (
      ('float32', 1e-5, 1e-6),
      ('bfloat16', 0.2, 0.01),
    ):
      of_x = jnp.asarray(x, dtype)
      got = jax.jit(matrices.matmul)(of_x, w)
      assert got.dtype == dtype and got.shape == (num, 20)
      np.testing.assert_allclose(
        np.asarray(got, np.float64),
        np.asarray(of_x, np.float64) @ _exact(w, rows),
        atol=error,
        rtol=ratio,
      )
    assert matrices.matmul(of_x, w, jnp.float32).dtype == jnp.float32


def _in_panels(w: quantized.Quantized) -> quantized.Quantized:
  arrays = w.arrays()
  arrays.pop('order', None)
  if w.codes in ('int4', 'mxfp4'):
    arrays['values'] = panel_matmul.in_pairs(w.values)
  lie = {name: panel_matmul.to_panels(array) for name, array in arrays.items()}
  return dataclasses.replace(w, **lie, in_panels=True)


@pytest.mark.parametrize(
  ('codes', 'rows', 'group', 'is_affine'),
  [
    *((*case, False) for case in CASES),
    *((*case, True) for case in CASES if case[0] == 'int4'),
  ],
)
def test_codes_in_panels_are_the_same_matrix(codes, rows, group, is_affine):
  rng = np.random.default_rng(0)
  plain = _of(rng.normal(0, 1, (3, rows, 32)).astype(np.float32), codes, group)
  if is_affine:
    plain = jax.tree.map(
      lambda *each: jnp.stack(each),
      *(
        _affine(jax.tree.map(lambda leaf, i=i: leaf[i], plain), rows)
        for i in range(3)
      ),
    )
  w = _in_panels(plain)
  np.testing.assert_array_equal(
    quantized.dequantize(w, jnp.float32, rows),
    quantized.dequantize(plain, jnp.float32, rows),
  )
  x = rng.normal(0, 1, (3, 5, rows)).astype(np.float32)
  exact = np.asarray(quantized.dequantize(plain, jnp.float32, rows))
  expected = np.einsum('gti,gio->gto', x.astype(float), exact)
  got = jax.jit(matrices.matmul)(x, w)
  np.testing.assert_allclose(got, expected, atol=1e-4)
  sizes = np.full(3, 5, np.int32)
  got = jax.jit(matrices.grouped_matmul)(x.reshape(15, rows), (w,), sizes)
  np.testing.assert_allclose(got, expected.reshape(15, 32), atol=1e-4)
  alone = jax.tree.map(lambda leaf: leaf[0], w)
  for dtype, error in (('float32', 1e-4), ('bfloat16', 0.2)):
    got = jax.jit(matrices.matmul)(jnp.asarray(x[0], dtype), alone)
    assert got.dtype == dtype
    np.testing.assert_allclose(
      np.asarray(got, np.float64), expected[0], atol=error
    )


def test_what_codes_in_panels_multiply_may_be_rounded():
  rng = np.random.default_rng(0)
  how = quantization_lib.Quantization(codes='fp8', activations='fp8')
  plain = quantized.of(
    jnp.asarray(rng.normal(0, 1, (48, 32)).astype(np.float32)), how
  )
  x = rng.normal(0, 1, (7, 48)).astype(np.float32)
  np.testing.assert_allclose(
    matrices.matmul(x, _in_panels(plain)),
    matrices.matmul(x, plain),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  ('codes', 'group'), [('int8', None), ('int8', 16), ('int4', 32)]
)
def test_experts_are_multiplied_by_their_own_scales(codes, group):
  rng = np.random.default_rng(0)
  w = _of(rng.normal(0, 1, (4, 48, 20)).astype(np.float32), codes, group)
  x = rng.normal(0, 1, (24, 48)).astype(np.float32)
  keys = rng.integers(0, 4, 24).astype(np.int32)
  groups = grouped_matmul.group(jnp.asarray(keys), 4)
  got = jax.jit(matrices.grouped_matmul)(
    x, (w,), groups.sizes, rows=groups.order
  )
  expected = np.einsum('ri,rio->ro', x, _exact(w, 48)[keys])
  np.testing.assert_allclose(got[groups.places], expected, atol=1e-4)


def test_experts_round_each_row_by_its_own_scale():
  rng = np.random.default_rng(0)
  how = quantization_lib.Quantization(codes='fp8', activations='fp8')
  w = quantized.of(
    jnp.asarray(rng.normal(0, 1, (4, 48, 20)).astype(np.float32)), how
  )
  x = rng.normal(0, 1, (24, 48)).astype(np.float32)
  keys = rng.integers(0, 4, 24).astype(np.int32)
  groups = grouped_matmul.group(jnp.asarray(keys), 4)
  got = jax.jit(matrices.grouped_matmul)(
    x, (w,), groups.sizes, rows=groups.order
  )
  scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(448)
  codes = (x / scale).astype(jnp.float8_e4m3fn).astype(np.float64)
  expected = np.einsum('ri,rio->ro', codes * scale, _exact(w, 48)[keys])
  np.testing.assert_allclose(got[groups.places], expected, atol=1e-4)
  assert (
    np.abs(expected - np.einsum('ri,rio->ro', x, _exact(w, 48)[keys])).max()
    > 0.01
  )


# Of a number; or a half of a step, which is for numbers around 0.
RELATIVE = {'int8': 0, 'fp8': 2**-4, 'int4': 0, 'mxfp4': 1 / 5}


@pytest.mark.parametrize('kind', [np.asarray, jnp.asarray])
@pytest.mark.parametrize(('codes', 'rows', 'group'), CASES)
def test_the_largest_number_of_a_group_is_the_largest_code(
  codes, rows, group, kind
):
  w = np.random.default_rng(0).normal(0, 1, (2, rows, 5)).astype(np.float32)
  w[0, :, 1] = 0
  values, scale = codes_lib.encode(kind(w), codes, group)
  numbers = _exact(quantized.Quantized(values, scale, codes, group), rows)
  assert scale.shape == (2, -(-rows // (group or rows)), 5)
  steps = codes_lib.spread(np.asarray(scale), rows, group).astype(np.float64)
  if codes == 'mxfp4':
    steps = 2 ** (steps - 128)
  most = quantization_lib.CODES[codes].most
  highest = np.abs(numbers[1] / steps[1]).max()
  if codes == 'mxfp4':  # Scales are powers of two, so not all codes may be.
    assert most <= highest <= 2 * most
  else:
    assert highest == pytest.approx(most)
  bound = np.maximum(RELATIVE[codes] * np.abs(w), steps / 2) * (1 + 1e-5)
  assert (np.abs(numbers - w) <= bound).all() and not numbers[0, :, 1].any()


@pytest.mark.parametrize('kind', [np.asarray, jnp.asarray])
def test_tiny_numbers_have_codes_too(kind):
  w = np.full((4, 2), 1e-44, np.float32)
  values, scale = codes_lib.encode(kind(w), 'int8')
  assert np.isfinite(scale).all() and not np.asarray(values).any()


def test_few_rows_of_groups_put_no_matrix_together():
  """Many do, where sums of each group would be more bytes."""
  w = _of(np.ones((256, 64), np.float32), 'int8', 32)
  of_matrix = 'f32[256,64]'
  for num, is_put_together in ((1, False), (32, False), (33, True)):
    made = str(jax.make_jaxpr(matrices.matmul)(jnp.ones((num, 256)), w))
    products = [line for line in made.splitlines() if 'mul ' in line]
    assert any(of_matrix in line for line in products) == is_put_together


MODEL = dataclasses.replace(
  tiny.MODEL, quantization=quantization_lib.Quantization(codes='int8', group=8)
)


def test_a_model_says_what_its_weights_are():
  again = config_lib.from_dict(MODEL.to_dict())
  assert again == MODEL
  specs = tree.named_leaves(models.param_specs(MODEL))
  down = 'layers.0.mlp.down'
  assert specs[f'{down}.values'].shape == (24, 16)
  assert specs[f'{down}.values'].dtype == 'int8'
  assert specs[f'{down}.scale'].shape == (3, 16)
  assert specs[f'{down}.scale'].axes == ('mlp', 'embed')
  assert specs['lm_head.scale'].axes == ('embed', 'logits')
  assert specs['embed'].dtype is specs['final_norm.scale'].dtype is None
  kept = dataclasses.replace(
    MODEL,
    quantization=quantization_lib.Quantization(
      codes='fp8', kept=('lm_head', 'layers.*.attn.?')
    ),
  )
  specs = tree.named_leaves(models.param_specs(kept))
  assert {'lm_head', 'layers.0.attn.q'} < specs.keys()
  assert specs['layers.0.mlp.down.scale'].axes == (None, 'embed')


def test_what_is_not_quantized_is_as_it_was():
  plain = models.init_params(tiny.MODEL, jax.random.key(0))
  drawn = models.init_params(MODEL, jax.random.key(0))
  assert jax.tree.structure(drawn) == jax.tree.structure(
    models.param_specs(MODEL)
  )
  by_name = tree.named_leaves(drawn)
  for name, leaf in tree.named_leaves(plain).items():
    if name in by_name:
      np.testing.assert_array_equal(by_name[name], leaf)
    else:
      values, scale = (
        by_name[f'{name}.{part}'] for part in ('values', 'scale')
      )
      node = quantized.Quantized(values, scale, 'int8', 8)
      numbers = quantized.dequantize(node, jnp.float32)
      assert 0 < np.abs(numbers - leaf).max() <= np.abs(leaf).max() / 127
  assert models.quantize(tiny.MODEL, plain) is plain


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    (dict(codes='int3'), "codes='int3': must be one of int8, fp8, int4"),
    (dict(codes='int4', group=16), 'quantization.group=16: must be a mult'),
    (dict(codes='mxfp4', group=64), 'quantization.group=64: must be 32'),
    (dict(codes='mxfp4'), 'quantization.group=None: must be 32'),
    (dict(codes='int8', zeros=True), 'quantization.zeros=True: only int4'),
    (dict(codes='int4', zeros=1), 'zeros=1: must be true or false'),
    (dict(codes='int8', group=0), 'group=0'),
    (dict(codes='int8', kept=[3]), 'quantization.kept'),
    (dict(codes='int8', odd=1), 'quantization.odd: unknown'),
    (dict(codes='int8', activations='fp8'), 'activations=.fp8.: needs the'),
    (dict(codes='fp8', activations='int8'), 'activations=.int8.: must be one'),
    (dict(codes='fp8', group=128, activations='fp8'), 'each output .group=N'),
    (dict(group=8), 'quantization.codes: missing'),
    (3, 'must be an object'),
  ],
)
def test_other_ways_are_refused(fields, match):
  with pytest.raises(errors.ConfigError, match=match):
    config_lib.from_dict(tiny.MODEL.to_dict() | {'quantization': fields})


def test_devices_share_no_group():
  parallelism = parallel.Parallelism(tp=2)
  model = dataclasses.replace(MODEL, num_kv_heads=2)
  parallelism.check(
    dataclasses.replace(
      model, quantization=quantization_lib.Quantization(codes='int8', group=4)
    )
  )
  with pytest.raises(
    errors.ConfigError,
    match=r'tp=2: leaves 12 rows of mlp.down, of intermediate_size=24, to each '
    'device; must be a multiple of 8',
  ):
    parallelism.check(model)
  alone = quantization_lib.Quantization(codes='int4')  # but for its bytes
  with pytest.raises(
    errors.ConfigError, match=r'16 rows of attn.o.*multiple of 32'
  ):
    parallelism.check(
      dataclasses.replace(model, head_dim=16, quantization=alone)
    )


def test_experts_share_no_group_but_whole():
  """Attention is not quantized, so of `o` nothing is refused."""
  model = config_lib.MixtralConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=96,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    num_experts=4,
    experts_per_token=2,
    quantization=quantization_lib.Quantization(
      codes='mxfp4', group=32, kept=('layers.*.attn.*', 'lm_head')
    ),
  )
  parallelism = parallel.Parallelism(tp=2)
  with pytest.raises(
    errors.ConfigError,
    match=r'tp=2: leaves 48 rows of moe.down, of intermediate_size=96.*or let '
    'devices have whole experts',
  ):
    parallelism.check(model)
  parallelism.check(dataclasses.replace(model, intermediate_size=128))
  parallelism.check(dataclasses.replace(model, whole_experts=True))
