# SPDX-License-Identifier: Apache-2.0
"""The layouts of pages, and writing to them."""

from __future__ import annotations

import functools

import hypothesis
from hypothesis import strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ragged_paged_attention as rpa
from pallas_kernels.ragged_paged_attention import layout

LAYOUTS = layout.ROWS, layout.TILES

_write = jax.jit(rpa.write_kv)
_quantize = jax.jit(rpa.quantize, static_argnames='dtype')


def _pages(name: str, page_size: int = 8, dtype: str = 'float32'):
  return layout.init(name, 6, page_size, 2, 20, dtype)


def _new(num_tokens: int):
  k = jnp.arange(1.0, 1 + num_tokens * 2 * 20).reshape(num_tokens, 2, 20)
  return k, -k


@pytest.mark.parametrize('page_size', [1, 5, 8, 16, 32])
def test_tiles_and_rows_are_the_same_pages(page_size: int):
  rng = np.random.default_rng(0)
  rows = tuple(
    jnp.asarray(x, jnp.float32)
    for x in rng.standard_normal((2, 6, 2, page_size, 20))
  )
  tiles = layout.from_rows(layout.TILES, *rows)
  empty = layout.init(layout.TILES, 6, page_size, 2, 20, 'float32')
  assert [x.shape for x in tiles] == [x.shape for x in empty]
  assert (
    layout.sizes(tiles[0]) == layout.sizes(rows[0]) == (6, 2, page_size, 20)
  )
  for got, want in zip(layout.to_rows(*tiles), rows, strict=True):
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('name', LAYOUTS)
@hypothesis.given(
  slots=strategies.lists(
    strategies.integers(-3, 60),
    min_size=5,
    max_size=5,
    unique_by=lambda s: s if 0 <= s < 48 else object(),
  )
)
@hypothesis.settings(max_examples=25)
def test_writes_slots_and_drops_padding(name: str, slots: list[int]):
  k, v = _new(5)
  pages = _write(*_pages(name), k, v, jnp.array(slots, jnp.int32))
  for got, new in zip(layout.to_rows(*pages), (k, v), strict=True):
    want = np.zeros((6, 2, 8, 20), np.float32)
    for token, slot in enumerate(slots):
      if 0 <= slot < 48:
        want[slot // 8, :, slot % 8] = new[token]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('name', LAYOUTS)
def test_keeps_what_was_there_and_rounds_to_the_cache(name: str):
  k, v = _new(1)
  pages = tuple(x + 7 for x in _pages(name, dtype='bfloat16'))
  got, _ = layout.to_rows(
    *rpa.write_kv(*pages, k / 3, v, jnp.array([9], jnp.int32))
  )
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got[1, :, 1], (k[0] / 3).astype(jnp.bfloat16))
  assert (np.asarray(got.at[1, :, 1].set(7), np.float32) == 7).all()


@pytest.mark.parametrize('name', LAYOUTS)
@pytest.mark.parametrize('dtype', ['int8', 'float8_e4m3fn'])
def test_quantizes_what_it_writes(name: str, dtype: str):
  k, v = _new(2)
  pages = layout.to_rows(
    *_write(
      *_pages(name, dtype=dtype),
      k,
      v,
      jnp.array([9, 60], jnp.int32),
    )
  )
  for got, new in zip(pages, (k, v), strict=True):
    want = _quantize(new[0], dtype=dtype)
    for x, y in zip(got, want, strict=True):
      np.testing.assert_array_equal(x[1, :, 1], y)
      assert np.count_nonzero(x) == np.count_nonzero(y)  # and nothing else


@pytest.mark.parametrize('name', LAYOUTS)
@pytest.mark.parametrize('dtype', ['float32', 'int8', 'float8_e4m3fn'])
def test_is_in_place_when_donated(name: str, dtype: str):
  pages = _pages(name, dtype=dtype)
  k, v = _new(5)
  compiled = (
    jax.jit(
      functools.partial(rpa.write_kv),
      donate_argnums=(0, 1),
    )
    .lower(*pages, k, v, jnp.arange(5, dtype=jnp.int32))
    .compile()
  )
  leaves = jax.tree.leaves(pages)
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes == sum(x.nbytes for x in leaves)
  for x in leaves:
    shape = f'[{",".join(map(str, x.shape))}]'
    copies = [
      line
      for line in compiled.as_text().splitlines()
      if f'{shape}{{' in line.partition(' copy(')[0] and ' copy(' in line
    ]
    assert not copies


def test_write_then_attend_is_in_place():
  """As in a step: the cache is read in the program that updates it."""

  def step(k_pages, v_pages, k, v, slots, ints):
    pages = rpa.write_kv(k_pages, v_pages, k, v, slots)
    return pages, rpa.ragged_paged_attention(
      k, *pages, *ints, scale=1.0, implementation='xla'
    )

  pages = rpa.init_pages(6, 8, 2, 20, 'float32', 'xla')
  k, v = _new(5)
  ints = (
    jnp.array([4, 4], jnp.int32),
    jnp.zeros((2, 2), jnp.int32),
    jnp.array([0, 1, 5], jnp.int32),
    jnp.array([1, 2], jnp.int32),
  )
  compiled = (
    jax.jit(step, donate_argnums=(0, 1))
    .lower(*pages, k, v, jnp.arange(5, dtype=jnp.int32), ints)
    .compile()
  )
  assert compiled.memory_analysis().alias_size_in_bytes == sum(
    x.nbytes for x in pages
  )
  for x in pages:
    shape = f'f32[{",".join(map(str, x.shape))}]'
    assert not [
      line
      for line in compiled.as_text().splitlines()
      if f'= {shape}' in line and ' copy(' in line
    ]


@pytest.mark.parametrize('name', rpa.IMPLEMENTATIONS)
def test_init_pages_is_zero_and_of_the_layout(name: str):
  dtype = jnp.float32 if name == 'llvm' else jnp.bfloat16
  try:
    both = rpa.init_pages(6, 16, 2, 64, dtype, name)
  except NotImplementedError as error:
    assert 'jax=' in str(error) and name == 'pallas_mosaic'
    pytest.skip(str(error))
  for pages in both:
    assert pages.shape[:2] == (6, 2)
    assert pages.size == 6 * 16 * 2 * 64
    assert pages.dtype == dtype
    assert not pages.any()
