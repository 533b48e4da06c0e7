# SPDX-License-Identifier: Apache-2.0
"""Grouped products, by each implementation, against NumPy."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import arg_specs
from pallas_kernels.grouped_matmul import grouping
from pallas_kernels.grouped_matmul import grouping_triton
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul import tuning

_IMPLEMENTATIONS = [
  pytest.param(name, marks=[pytest.mark.gpu] * name.startswith('pallas'))
  for name in grouped_matmul.IMPLEMENTATIONS
  if name != 'pallas_mosaic'  # It has a test of its own, in bfloat16.
]
_by_name = pytest.mark.parametrize('name', _IMPLEMENTATIONS)


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  return jax.nn.silu(gate) * up


def run(
  name: str,
  args: arg_specs.Args,
  combine: Callable[..., jax.Array] = grouped_matmul.first,
  biases: tuple[np.ndarray, ...] = (),
) -> tuple[np.ndarray, Any]:
  """Returns what each token gets of each group it chose, [T, k, out]."""
  num_tokens, chosen = args.keys.shape

  @jax.jit
  def call(x, matrices, keys):
    groups = grouped_matmul.group(keys.reshape(-1), matrices[0].shape[0])
    out = grouped_matmul.grouped_matmul(
      x,
      matrices,
      groups.sizes,
      rows=groups.order // chosen,
      biases=biases,
      combine=combine,
      implementation=name,
    )
    return out[groups.places].reshape(num_tokens, chosen, -1), groups

  out, groups = call(*args)
  return np.asarray(out), groups


def expect(args: arg_specs.Args, token: int) -> list[np.ndarray]:
  return [
    np.stack([args.x[token] @ matrix[group] for group in args.keys[token]])
    for matrix in args.matrices
  ]


@_by_name
@pytest.mark.parametrize('spec', arg_specs.TESTS, ids=str)
def test_each_row_is_multiplied_by_its_groups_matrix(name, spec):
  args = arg_specs.make(spec)
  got, _ = run(name, args)
  for token in range(spec.num_tokens - spec.num_padding):
    (expected,) = expect(args, token)
    np.testing.assert_allclose(got[token], expected, rtol=1e-4, atol=1e-4)


@_by_name
def test_products_of_several_kinds_are_combined(name):
  args = arg_specs.make(arg_specs.ArgSpec(9, 8, 2), kinds=2)
  got, _ = run(name, args, gated)
  for token in range(9):
    gate, up = expect(args, token)
    expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(got[token], expected, rtol=1e-4, atol=1e-4)


@_by_name
def test_biases_are_those_of_the_group(name):
  """Added before products are combined; NaN where nobody chose a group."""
  args = arg_specs.make(arg_specs.ArgSpec(9, 8, 2, num_out=112), kinds=2)
  rng = np.random.default_rng(1)
  biases = rng.normal(size=(2, 8, 112)).astype(np.float32)
  biases[:, ~np.isin(np.arange(8), args.keys)] = np.nan
  got, _ = run(name, args, gated, tuple(biases))
  for token in range(9):
    gate, up = np.add(expect(args, token), biases[:, args.keys[token]])
    expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(got[token], expected, rtol=1e-4, atol=1e-4)


@_by_name
@pytest.mark.parametrize('chosen', [1, 4])
def test_gradients_are_those_of_the_definition(name, chosen):
  """Training computes with the same functions."""
  args = arg_specs.make(arg_specs.ArgSpec(40, 6, chosen, 16, 32), kinds=2)
  matrices = jax.tree.map(jnp.nan_to_num, args.matrices)
  groups = grouped_matmul.group(args.keys.reshape(-1), 6)
  mixing = np.random.default_rng(0).normal(size=(40 * chosen, 32))

  rows = groups.order // chosen
  biases = tuple(
    np.random.default_rng(1).normal(size=(2, 6, 32)).astype(np.float32)
  )

  def found(x, matrices, biases):
    out = grouped_matmul.grouped_matmul(
      x,
      matrices,
      groups.sizes,
      rows=rows,
      biases=biases,
      combine=gated,
      implementation=name,
    )
    return jnp.sum(out * mixing)

  def defined(x, matrices, biases):
    out = reference.grouped_matmul(
      x, matrices, groups.sizes, rows, gated, jnp.matmul, biases
    )
    return jnp.sum(out * mixing)

  got, expected = (
    jax.grad(total, argnums=(0, 1, 2))(args.x, matrices, biases)
    for total in (found, defined)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
    got,
    expected,
  )


@_by_name
@pytest.mark.parametrize('num_groups,chosen', [(128, 8), (8, 2), (4, 3)])
def test_a_row_has_the_same_bits_whatever_others_choose(
  name, num_groups, chosen
):
  spec = arg_specs.ArgSpec(24, num_groups, chosen)
  args = arg_specs.make(spec)
  rng = np.random.default_rng(1)
  whole = args._replace(
    matrices=(rng.normal(size=args.matrices[0].shape).astype(np.float32),)
  )
  before, _ = run(name, whole)
  for routing in arg_specs.ROUTINGS:
    keys = arg_specs.choose(dataclasses.replace(spec, routing=routing), seed=2)
    keys[7] = whole.keys[7]
    keys[20:] = num_groups
    after, _ = run(name, whole._replace(keys=keys))
    np.testing.assert_array_equal(after[7], before[7], routing)


@_by_name
@pytest.mark.parametrize(
  'sizes',
  [
    # Of few rows each on average, and of more: tiles of 32, of 64 and of 128.
    [1, 0, 16, 17, 33, *[0] * 35],
    [1, 15, 16, 17, 32, 33, 48, 49, 64, 65, 100],
    [1, 16, 17, 32, 33, 64, 65, 128, 129, 300],
  ],
  ids=str,
)
def test_tiles_have_a_way_for_however_many_rows(name, sizes):
  """In bfloat16, by whole numbers, which are exact in whatever order."""
  rng = np.random.default_rng(0)
  x = rng.integers(-3, 4, (sum(sizes), 64)).astype(np.float32)
  matrices = rng.integers(-3, 4, (len(sizes), 64, 32)).astype(np.float32)
  got = grouped_matmul.grouped_matmul(
    jnp.asarray(x, jnp.bfloat16),
    [jnp.asarray(matrices, jnp.bfloat16)],
    jnp.asarray(sizes, jnp.int32),
    implementation=name,
  )
  whose = np.repeat(np.arange(len(sizes)), sizes)
  expected = jnp.asarray(
    np.einsum('ri,rio->ro', x, matrices[whose]), jnp.bfloat16
  )
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
  'sort',
  [
    pytest.param(grouping.sort_by_xla, id='xla'),
    pytest.param(
      grouping_triton.sort, marks=pytest.mark.gpu, id='pallas_triton'
    ),
  ],
)
@pytest.mark.parametrize(
  'keys,num_groups',
  [
    ([1, 0, 3, 1], 3),
    ([5, 5, 5], 5),
    ([0], 1),
    (np.random.default_rng(0).integers(0, 9, 300).tolist(), 8),
    (np.random.default_rng(1).integers(0, 129, 512).tolist(), 128),
  ],
  ids=str,
)
def test_groups_are_sorted_and_their_rows_keep_their_order(
  sort, keys, num_groups
):
  sizes, order, places = sort(jnp.asarray(keys, jnp.int32), num_groups)
  expected = np.argsort(keys, kind='stable')
  np.testing.assert_array_equal(order, expected)
  np.testing.assert_array_equal(places[expected], np.arange(len(keys)))
  np.testing.assert_array_equal(
    sizes, np.bincount(keys, minlength=num_groups)[:num_groups]
  )


@pytest.mark.parametrize('rows_a_group', [1, 8, 16, 64, 65])
def test_on_cpus_no_more_is_computed_than_blocks_take(rows_a_group):
  """And far less than if all groups multiplied all rows."""
  num_groups, tokens = 16, 16 * rows_a_group
  size = tuning.xla_rows(tokens, num_groups)
  turns = 0

  def count(x: jax.Array, w: jax.Array) -> jax.Array:
    def add() -> None:
      nonlocal turns
      turns += 1

    assert x.shape[0] == size
    jax.debug.callback(add)
    return jnp.matmul(x, w)

  keys = arg_specs.choose(arg_specs.ArgSpec(tokens, num_groups, 1))
  sizes = np.bincount(keys[:, 0], minlength=num_groups).astype(np.int32)
  grouped_matmul.grouped_matmul(
    jnp.ones((tokens, 8)),
    (jnp.ones((num_groups, 8, 8)),),
    jnp.asarray(sizes),
    matmul=count,
  ).block_until_ready()
  jax.effects_barrier()
  assert turns == sum(-(-sizes // size))
  assert turns * size <= tokens + num_groups * (size - 1)


def test_on_cpus_a_turn_of_one_row_does_not_look_for_its_group(monkeypatch):
  """Each operation of a turn is a launch, beside products of a few us."""
  turns = []

  def record(start, stop, turn, out):
    turns.append(str(jax.make_jaxpr(turn)(0, out)))
    return out

  monkeypatch.setattr(jax.lax, 'fori_loop', record)
  grouped_matmul.grouped_matmul(
    jnp.ones((16, 8)), (jnp.ones((16, 8, 8)),), jnp.ones(16, jnp.int32)
  )
  (turn,) = turns
  assert 'dot_general' in turn and 'reduce' not in turn


@pytest.mark.parametrize(
  'change,message',
  [
    (dict(implementation='none'), 'implementation='),
    (dict(x=jnp.ones((4, 4, 4))), 'x=.*2 axes'),
    (dict(group_sizes=jnp.ones(2)), 'group_sizes=float32.*int32'),
    (dict(rows=jnp.ones((2, 2), jnp.int32)), 'rows=.*1 axis'),
    (dict(group_sizes=jnp.ones(3, jnp.int32)), 'matrices=.*groups, 3'),
    (dict(biases=[jnp.ones((3, 3))]), 'biases=.*groups, 2'),
    (dict(biases=[jnp.ones((2, 3))] * 2), 'biases=2: must be none, or one'),
    (dict(x=jnp.ones((4, 5))), r'matrices=float32.*float32\[2, 5'),
  ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
  args: dict[str, Any] = dict(
    x=jnp.ones((4, 4)),
    matrices=(jnp.ones((2, 4, 3)),),
    group_sizes=jnp.ones(2, jnp.int32),
  )
  with pytest.raises(ValueError, match=message):
    grouped_matmul.grouped_matmul(**args | change)
