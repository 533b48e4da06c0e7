# SPDX-License-Identifier: Apache-2.0
"""Mosaic's grouped products, interpreted, against NumPy.

The interpreter knows neither mma nor cp.async: in Ampere's kernel it computes
and copies plainly in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels import mosaic_devices
from pallas_kernels.grouped_matmul import arg_specs
from pallas_kernels.grouped_matmul import mosaic_sizes
from pallas_kernels.grouped_matmul import pallas_mosaic
from pallas_kernels.grouped_matmul import tuning
from tests.pallas_kernels.grouped_matmul import grouped_matmul_test

needs_jax = pytest.mark.skipif(
  jax.__version_info__ < (0, 12), reason='needs JAX 0.12'
)
SPECS = (
  # Fewer rows than a tile has, and more.
  arg_specs.ArgSpec(3, 8, 2, 64, 128),
  arg_specs.ArgSpec(40, 5, 3, 128, 192, routing='skewed', num_padding=7),
  # Tiles of two warpgroups.
  arg_specs.ArgSpec(160, 2, 1, 64, 64, routing='skewed', num_padding=3),
)


@pytest.fixture(params=mosaic_devices.SERVES)
def capability(
  request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
  monkeypatch.setattr(mosaic_devices, '_INTERPRETED_AS', request.param)
  jax.clear_caches()
  yield
  jax.clear_caches()


def check(
  spec: arg_specs.ArgSpec,
  combine: Callable[..., Any],
  kinds: int,
  *,
  biases: bool = False,
) -> None:
  """Compares what is not padding."""
  args = arg_specs.make(spec, kinds)
  small = jax.tree.map(
    lambda a: a if a.dtype == np.int32 else jnp.asarray(a, jnp.bfloat16), args
  )
  args = jax.tree.map(
    lambda a: np.asarray(a, np.int32 if a.dtype == np.int32 else np.float32),
    small,
  )
  added = np.zeros((kinds, spec.num_groups, spec.num_out), np.float32)
  if biases:
    added += np.random.default_rng(1).integers(-3, 4, added.shape)
  got, _ = grouped_matmul_test.run(
    'pallas_mosaic',
    small,
    combine,
    tuple(jnp.asarray(added, jnp.bfloat16)) if biases else (),
  )
  for token in range(spec.num_tokens - spec.num_padding):
    products = grouped_matmul_test.expect(args, token)
    expected = combine(*np.add(products, added[:, args.keys[token]]))
    np.testing.assert_allclose(
      np.asarray(got[token], np.float32), expected, rtol=1e-2, atol=1e-2
    )


@needs_jax
@pytest.mark.usefixtures('capability')
@pytest.mark.parametrize('spec', SPECS, ids=str)
def test_each_row_is_multiplied_by_its_groups_matrix(
  spec: arg_specs.ArgSpec,
) -> None:
  check(spec, grouped_matmul.first, kinds=1)


@needs_jax
@pytest.mark.usefixtures('capability')
def test_biased_products_of_several_kinds_are_combined() -> None:
  check(SPECS[0], grouped_matmul_test.gated, kinds=2, biases=True)


@needs_jax
@pytest.mark.usefixtures('capability')
def test_groups_of_several_tiles_and_of_none() -> None:
  """A tile of 64 rows has 56 of a group, wherever that begins."""
  sizes = np.array([0, 57, 1, 0, 113, 7, 0], np.int32)
  rng = np.random.default_rng(0)
  x, w = (
    jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    for shape in ((sizes.sum() + 3, 64), (len(sizes), 64, 64))
  )
  got = pallas_mosaic.grouped_matmul(
    x,
    (w,),
    jnp.asarray(sizes),
    jnp.arange(len(x), dtype=jnp.int32)[::-1],
    grouped_matmul.first,
    sizes=mosaic_sizes.Sizes(warpgroups=1, columns=64, num_stages=2),
  )
  x, w = (np.asarray(a, np.float32) for a in (x, w))
  group = np.repeat(np.arange(len(sizes)), sizes)
  expected = np.einsum('ri,rio->ro', x[::-1][: len(group)], w[group])
  np.testing.assert_allclose(
    np.asarray(got[: len(group)], np.float32), expected, rtol=1e-2, atol=0.1
  )


@pytest.mark.parametrize('kinds', [1, 2, 3])
def test_tiles_have_columns_that_divide_a_matrix(
  kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(mosaic_devices, 'SERVES', {'9.0': (0, 10)})
  shape = tuning.Shape('bfloat16', 8, 4, 64, 512, kinds)
  assert 512 % mosaic_sizes.choose(shape).columns == 0
  assert 512 % tuning.Sizes(16, 128, 64, 4, 4).for_shape(shape).columns == 0


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(dtype='float32'), 'dtype=float32'),
    (dict(num_in=96), 'num_in=96: must be a multiple of 64'),
    (dict(num_out=80), 'num_out=80'),
  ],
)
def test_what_it_can_not_do_is_refused_by_name(
  change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(mosaic_devices, 'SERVES', {'9.0': (0, 10)})
  shape: dict[str, Any] = dict(
    dtype='bfloat16',
    num_rows=8,
    num_groups=4,
    num_in=64,
    num_out=64,
    num_kinds=1,
  )
  assert mosaic_sizes.choose(tuning.Shape(**shape)).columns == 64
  with pytest.raises(NotImplementedError, match=message):
    mosaic_sizes.choose(tuning.Shape(**shape | change))


def test_an_old_jax_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(mosaic_devices, 'SERVES', {'9.0': (9, 0)})
  with pytest.raises(NotImplementedError, match=r'jax=.*: must be 9\.0 or new'):
    mosaic_devices.capability()
