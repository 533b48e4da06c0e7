# SPDX-License-Identifier: Apache-2.0
"""A product is the same, however the matrix lies in memory."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels import panel_matmul
from sarathi_jax import models
from sarathi_jax.models import layers
from sarathi_jax.models import matrices
from tests import naive
from tests import parallel_test


@pytest.mark.parametrize(
  'num_rows', [1, 2, 8, 32, matrices._FEW_ROWS, matrices._FEW_ROWS + 1]
)
@pytest.mark.parametrize(
  'dtype,out_dtype',
  [('float32', None), ('bfloat16', None), ('bfloat16', 'float32')],
)
def test_a_product_does_not_depend_on_how_a_matrix_lies(
  num_rows, dtype, out_dtype
):
  x, w = (
    jax.random.normal(jax.random.key(i), shape, jnp.dtype(dtype))
    for i, shape in enumerate(((num_rows, 48), (48, 20)))
  )
  got, expected = (
    jax.jit(lambda x, w: matrices.matmul(x, w, out_dtype))(x, lies)
    for lies in (matrices.Transposed(w.T), w)
  )
  assert got.dtype == expected.dtype == (out_dtype or dtype)
  assert got.shape == (num_rows, 20)
  exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  rounding = 0.05 if expected.dtype == 'bfloat16' else 1e-4
  for result in (got, expected):
    np.testing.assert_allclose(result, exact, atol=rounding, rtol=0.01)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Opaque:
  """A matrix that can do nothing but multiply."""

  hidden: Any

  def multiply(self, x: jax.Array, dtype: Any) -> jax.Array:
    return jnp.matmul(x, self.hidden, preferred_element_type=dtype)


@pytest.mark.parametrize('name', parallel_test.FAMILIES)
def test_every_matrix_is_multiplied_by_matmul(name):
  """Experts' and routers', and the output's: nothing else looks into one."""
  model = parallel_test.MODELS[name]
  params = models.init_params(model, jax.random.key(0))
  opaque = jax.tree.map(
    lambda leaf, x: Opaque(x) if leaf.is_factor else x,
    models.param_specs(model),
    params,
  )
  tokens = jnp.arange(8, dtype=jnp.int32)

  @jax.jit
  def logits(params):
    hidden = naive.hidden_of(model, params, tokens)
    return models.unembed(model, params, hidden)

  np.testing.assert_array_equal(logits(opaque), logits(params))


@pytest.mark.parametrize('num_rows', [1, 8, 40, 300])
def test_experts_products_do_not_depend_on_how_matrices_lie(num_rows):
  x, w = (
    jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate(((num_rows, 48), (4, 48, 20)))
  )
  keys = jax.random.randint(jax.random.key(2), num_rows, 0, 4, jnp.int32)
  groups = grouped_matmul.group(keys, 4)
  for lies in (w, matrices.Transposed.of(w), Opaque(w)):
    got = jax.jit(matrices.grouped_matmul)(
      x, (lies,), groups.sizes, rows=groups.order
    )
    expected = np.einsum('ri,rio->ro', x, w[keys])
    np.testing.assert_allclose(got[groups.places], expected, atol=1e-4)


@pytest.mark.parametrize('num_rows', [1, 8, 32])
def test_experts_of_few_rows_are_not_copied(num_rows):
  """On a CPU, where a step would take the longer for each that is."""
  experts = matrices.Transposed(jnp.ones((8, 256, 512)))
  compiled = (
    jax.jit(matrices.grouped_matmul)
    .lower(jnp.ones((num_rows, 512)), (experts,), jnp.ones(8, jnp.int32))
    .compile()
  )
  one = experts.array[0].nbytes
  assert compiled.memory_analysis().temp_size_in_bytes < one / 2


def test_matrices_side_by_side_are_multiplied_as_one():
  x, *parts = (
    jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate(((3, 16), (16, 8), (16, 4), (16, 4)))
  )
  group = matrices.SideBySide(jnp.concatenate(parts, axis=1), (8, 4, 4))
  lowered = jax.jit(lambda x, g: g.multiply(x)).lower(x, group)
  assert lowered.as_text().count('dot_general') == 1
  for got, part in zip(group.multiply(x), parts, strict=True):
    np.testing.assert_allclose(got, x @ part, rtol=1e-5, atol=1e-5)


def test_biases_of_a_group_are_added_before_the_product_is_cut():
  """So a GPU adds them where it multiplies, however many there are."""
  names, widths = ('q', 'k', 'v'), (8, 4, 4)
  x, *arrays = (
    jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate(
      [(3, 16), *((16, n) for n in widths), *((n,) for n in widths)]
    )
  )
  parts, biases = arrays[:3], arrays[3:]
  apart = {
    **dict(zip(names, parts, strict=True)),
    **{f'{n}_bias': b for n, b in zip(names, biases, strict=True)},
  }
  merged = {
    'qkv': matrices.SideBySide(jnp.concatenate(parts, axis=1), widths),
    'qkv_bias': matrices.SideBySide(jnp.concatenate(biases), widths),
  }
  project = functools.partial(layers.project_group, group='qkv', x=x)
  for got, want in zip(project(merged), project(apart), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  lowered = jax.jit(lambda g: layers.project_group(g, 'qkv', x)).lower(merged)
  assert lowered.as_text().count('stablehlo.add') == 1


def test_few_rows_are_not_multiplied_by_a_copy_of_the_matrix():
  """On a CPU, where it is what transposing is for."""
  x, w = jnp.ones((8, 256)), jnp.ones((512, 256))
  compiled = jax.jit(matrices.matmul).lower(x, matrices.Transposed(w)).compile()
  (dot,) = (line for line in compiled.as_text().splitlines() if ' dot(' in line)
  assert 'f32[512,8]{1,0} dot(' in dot
  assert 'lhs_contracting_dims={1}, rhs_contracting_dims={0}' in dot
  assert compiled.memory_analysis().temp_size_in_bytes < w.nbytes / 4


@pytest.mark.skipif(not panel_matmul.is_available(), reason='no such processor')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_table_in_panels_has_the_same_rows(dtype):
  w = jax.random.normal(jax.random.key(0), (48, 20), jnp.dtype(dtype))
  table = matrices.Table.of(w)
  assert table.num_rows == 48 and table.array.dtype == dtype
  tokens = jnp.array([0, 47, 15, 16, 17, 48, -1], jnp.int32)  # cut to 0..47
  expected = jnp.take(w, tokens, axis=0, mode='clip').astype(jnp.float32)
  np.testing.assert_array_equal(
    jax.jit(matrices.Table.rows)(table, tokens), expected
  )
  x = jax.random.normal(jax.random.key(1), (5, 20))
  np.testing.assert_allclose(
    matrices.matmul(x, table), x @ w.astype(jnp.float32).T, atol=1e-5
  )
