# SPDX-License-Identifier: Apache-2.0
"""Pages are copied as they would be one by one, on each stage its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax.models import parallel
from sarathi_jax.runner import copying
from sarathi_jax.runner import kv_cache
from sarathi_jax.runner import mesh as mesh_lib
from tests import tiny

NUM_PAGES = 40
# More than a message holds; a page that was copied is copied to, too.
MANY = (*((20 + i % 5, i) for i in range(19)), (3, 30), (21, 3))


def make(mesh: jax.sharding.Mesh, dtype: Any) -> tuple[Any, Any]:
  """Pages of random content, and how they lie."""
  shapes = kv_cache.shapes(
    tiny.MODEL, mesh, NUM_PAGES, 8, jnp.dtype(dtype), None
  )
  rng = np.random.default_rng(0)
  kv = jax.tree.map(
    lambda leaf: jax.device_put(
      rng.integers(-99, 99, leaf.shape).astype(leaf.dtype), leaf.sharding
    ),
    shapes,
  )
  return kv, jax.tree.map(lambda leaf: leaf.sharding, shapes)


@pytest.mark.parametrize('dtype', ['float32', 'int8'])
@pytest.mark.parametrize(
  ('tp', 'pp', 'copies'),
  [
    (1, 1, [MANY]),
    (1, 1, [((1, 2),)]),
    (2, 1, [MANY]),
    (1, 2, [((1, 2),), ()]),
    (1, 2, [(), ((1, 2), (3, 4))]),
    (2, 2, [((5, 6),), MANY]),
  ],
)
def test_each_stage_copies_its_own(
  tp: int, pp: int, copies: list[copying.Copies], dtype: str
) -> None:
  mesh = mesh_lib.make(parallel.Parallelism(tp=tp, pp=pp))
  kv, lies = make(mesh, dtype)
  expected = [np.array(leaf) for leaf in jax.tree.leaves(kv)]
  for leaf in expected:
    stages = np.split(leaf, pp)  # views
    for pages, some in zip(stages, copies, strict=True):
      for source, target in some:
        pages[target] = pages[source]
  run = jax.jit(
    lambda kv, ints: copying.copy(kv, ints, mesh, lies), donate_argnums=0
  )
  for message in copying.messages(copies):
    assert message.shape == (copying.size(pp),)
    kv = run(kv, message)
  got = jax.tree.leaves(kv)
  assert len(got) == len(expected)
  for mine, right in zip(got, expected, strict=True):
    np.testing.assert_array_equal(np.asarray(mine), right)
