# SPDX-License-Identifier: Apache-2.0
"""Rotating and writing, by each implementation, against a loop in NumPy."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
from hypothesis import strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import rotate_and_write as raw
from pallas_kernels import unpacking
from pallas_kernels.ragged_paged_attention import layout
from pallas_kernels.ragged_paged_attention import quantization
from pallas_kernels.rotate_and_write import arg_specs
from pallas_kernels.rotate_and_write import reference

BY_NAME = pytest.mark.parametrize(
  'name',
  [
    'xla',
    pytest.param('pallas_triton', marks=pytest.mark.gpu),
  ],
)
_run = jax.jit(raw.rotate_and_write, static_argnames='implementation')


@BY_NAME
@pytest.mark.parametrize('spec', arg_specs.TESTS.values(), ids=arg_specs.TESTS)
def test_is_what_the_loop_does(spec: arg_specs.ArgSpec, name: str) -> None:
  """And touches nothing else; where nothing is written, nothing is read."""
  args = arg_specs.make(spec)
  want = reference.rotate_and_write(**args)
  got = _run(**args, implementation=name)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    _assert_close(x, y)
  for pages, old in zip(
    got[1], (args['k_pages'], args['v_pages']), strict=True
  ):
    for x, y in zip(*map(jax.tree.leaves, (pages, old)), strict=True):
      assert (x != y).any()
      assert np.isfinite(np.asarray(x, np.float32)).all()


def _assert_close(x: jax.Array, y: jax.Array) -> None:
  """Equal, but for the last bit where a product is summed without rounding."""
  if jnp.issubdtype(x.dtype, jnp.integer):
    # A number at the edge between two bytes may become either.
    away = np.abs(np.asarray(x, np.int32) - np.asarray(y, np.int32))
    assert (away <= 1).all() and (away > 0).mean() < 0.01
    return
  eps = float(jnp.finfo(x.dtype).eps)
  np.testing.assert_allclose(
    np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=eps, atol=4 * eps
  )


@pytest.mark.gpu
@pytest.mark.parametrize(
  'name',
  [
    name
    for name, spec in arg_specs.TESTS.items()
    if spec.dtype == 'float32' and not spec.norms
  ],
)
def test_the_kernel_has_the_bits_of_xla(name: str) -> None:
  """But for norms, which it sums up in another order."""
  spec = arg_specs.TESTS[name]
  args = arg_specs.make(spec, seed=1)
  got, want = (
    _run(**args, implementation=name) for name in ('pallas_triton', 'xla')
  )
  for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.gpu
def test_pieces_of_one_array_are_the_same() -> None:
  """As a merged projection gives them."""
  args = arg_specs.make(arg_specs.TESTS['plain'])
  want = _run(**args, implementation='pallas_triton')
  heads = [args.pop(name) for name in 'qkv']
  widths = np.cumsum([x[0].size for x in heads])[:-1]

  @jax.jit
  def run(merged: jax.Array, args: Any) -> Any:
    pieces = jnp.split(merged, widths, axis=1)
    q, k, v = (x.reshape(y.shape) for x, y in zip(pieces, heads, strict=True))
    return raw.rotate_and_write(q, k, v, **args, implementation='pallas_triton')

  got = run(jnp.concatenate([x.reshape(len(x), -1) for x in heads], 1), args)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@BY_NAME
@hypothesis.given(
  slots=strategies.lists(
    strategies.integers(-3, 60),
    min_size=9,
    max_size=9,
    unique_by=lambda s: s if 0 <= s < 48 else object(),
  )
)
@hypothesis.settings(max_examples=10, deadline=None)
def test_any_slots_are_written(name: str, slots: list[int]) -> None:
  args = arg_specs.make(arg_specs.TESTS['plain'])
  args['slot_mapping'] = jnp.array(slots, jnp.int32)
  args |= {name: jnp.nan_to_num(args[name], nan=5.0) for name in 'kv'}
  _, got = _run(**args, implementation=name)
  _, want = reference.rotate_and_write(**args)
  for x, y in zip(got, want, strict=True):
    _assert_close(x, y)


@BY_NAME
def test_tokens_may_be_none(name: str) -> None:
  args = arg_specs.make(arg_specs.ArgSpec(num_tokens=0))
  q, pages = _run(**args, implementation=name)
  assert q.shape == (0, 4, 16)
  for x, y in zip(pages, (args['k_pages'], args['v_pages']), strict=True):
    np.testing.assert_array_equal(x, y)


@BY_NAME
@pytest.mark.parametrize('kept', ['float32', 'int8', 'float8_e4m3fn'])
def test_is_in_place_when_donated(name: str, kept: str) -> None:
  args = arg_specs.make(arg_specs.ArgSpec(kv_dtype=kept))
  compiled = (
    jax.jit(
      functools.partial(raw.rotate_and_write, implementation=name),
      donate_argnames=('k_pages', 'v_pages'),
    )
    .lower(**args)
    .compile()
  )
  assert compiled.memory_analysis().alias_size_in_bytes == sum(
    x.nbytes for x in jax.tree.leaves((args['k_pages'], args['v_pages']))
  )


@pytest.mark.parametrize('dtype', ['int8', 'float8_e4m3fn'])
def test_bytes_are_as_xla_rounds_them(dtype: str) -> None:
  """Of numbers between all bytes, halves above all, and beyond the largest."""
  kept = quantization.kept_dtype(dtype)
  every = np.arange(256, dtype=np.uint8).view(np.int8)
  numbers = np.asarray(
    unpacking.decode(jnp.asarray(every.astype(kept)), 'float32')
  )
  numbers = np.unique(numbers[np.isfinite(numbers) & (np.abs(numbers) < 449)])
  between = (numbers[1:] + numbers[:-1]) / 2
  rng = np.random.default_rng(0)
  x = np.concatenate(
    [
      numbers,
      between,
      np.nextafter(between, np.float32(np.inf)),
      np.nextafter(between, np.float32(-np.inf)),
      rng.standard_normal(2000).astype(np.float32) * 0.01,
      rng.uniform(-448, 448, 20000).astype(np.float32),
    ]
  )
  if dtype == 'int8':
    x = x[np.abs(x) <= 127]
  most = 127 if dtype == 'int8' else 448
  x = np.append(x, np.float32([0, most, -most])).astype(np.float32)
  # With the largest number in each row, all scales are 1.
  rows = np.stack([x, np.full_like(x, most)], axis=1)
  want = jax.jit(quantization.quantize, static_argnames='dtype')(
    rows, dtype=dtype
  )
  got = jax.jit(quantization.encode, static_argnames='kept')(
    np.append(x, np.float32([1.5 * most, -1.5 * most])), kept=kept
  )
  np.testing.assert_array_equal(want.scales, 1)
  np.testing.assert_array_equal(got[:-2], want.values[:, 0])
  np.testing.assert_array_equal(got[-2:], got[-4:-2])


@pytest.mark.parametrize(
  ('name', 'value', 'match'),
  [
    ('q', jnp.zeros((9, 4, 8)), r'q=\(9, 4, 8\): must be \[9, heads, 16\]'),
    ('q', jnp.zeros((8, 4, 16)), r'q=\(8, 4, 16\): must be \[9, heads'),
    ('k', jnp.zeros((9, 2, 16), jnp.bfloat16), 'k=bfloat16: must be the dtype'),
    ('v', jnp.zeros((9, 2, 16), jnp.int32), 'v=int32: must be a float'),
    ('rows', jnp.zeros(9), r'rows=float32\(9,\): must be int32'),
    (
      'rotation',
      (jnp.zeros((9, 9)),) * 2,
      r'rotation=float32\(9, 9\): must be two of float32\[9, at most 8\]',
    ),
    (
      'norms',
      (raw.HeadNorm(jnp.ones(16), 1e-5), raw.HeadNorm(jnp.ones(8), 1e-5)),
      r'norms=\(8,\): must be \(16,\)',
    ),
    ('implementation', 'cuda', 'implementation=cuda: must be None or one of'),
  ],
)
def test_what_does_not_fit_is_named(name: str, value: Any, match: str) -> None:
  args = arg_specs.make(arg_specs.TESTS['plain']) | {name: value}
  with pytest.raises(ValueError, match=match):
    raw.rotate_and_write(**args)


def _tiles() -> Any:
  return layout.init(layout.TILES, 6, 8, 2, 16, 'float32')


def _many() -> Any:
  """More than int32 can index."""
  return layout.init(layout.ROWS, 2**23, 8, 2, 16, 'int8')


@pytest.mark.parametrize(
  ('pages', 'message'),
  [
    (_tiles, r'k_pages=\(.*\): must be rows'),
    (_many, r'k_pages=\(8388608, .*\): must be less than 2147483648 numbers'),
  ],
)
def test_what_the_kernel_cannot_have_is_named(pages: Any, message: str) -> None:
  args = arg_specs.make(arg_specs.TESTS['plain'])
  k_pages, v_pages = jax.eval_shape(pages)
  with pytest.raises(NotImplementedError, match=f'pallas_triton: {message}'):
    jax.eval_shape(
      functools.partial(raw.rotate_and_write, implementation='pallas_triton'),
      **args | dict(k_pages=k_pages, v_pages=v_pages),
    )


def test_pages_say_what_writes_them() -> None:
  """Tiles are written by XLA; the kernel is for rows."""
  args = arg_specs.make(arg_specs.TESTS['plain'])
  assert 'rotate_and_write' in str(jax.make_jaxpr(raw.rotate_and_write)(**args))
  args['k_pages'], args['v_pages'] = _tiles()
  text = str(jax.make_jaxpr(raw.rotate_and_write)(**args))
  assert 'scatter' in text and 'pallas_call' not in text
