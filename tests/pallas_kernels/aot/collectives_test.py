# SPDX-License-Identifier: Apache-2.0
"""Collectives are found in a program's text, with their bytes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from pallas_kernels.aot import collectives

_GPU = """
  %ar = bf16[512,64]{1,0} all-reduce-start(%x), channel_id=1, to_apply=%add
  %d = bf16[512,64]{1,0} all-reduce-done(%ar)
  %ag = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%y), dimensions={0}
  ROOT %cp = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%z)
"""


def test_of_a_gpu_program():
  assert collectives.read(_GPU) == [
    collectives.Collective('all-reduce', 1, 512 * 64 * 2),
    collectives.Collective('all-gather', 1, 16 * 8 * 2),
    collectives.Collective('collective-permute', 1, 16),
  ]
  assert collectives.read('  %p = pred[3]{0} all-gather(%x)') == [
    collectives.Collective('all-gather', 1, 3)
  ]


def test_of_a_program_compiled_here():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ('x',))
  fn = jax.shard_map(
    lambda x: jax.lax.psum(x, 'x') + jax.lax.ppermute(x, 'x', [(0, 1)]),
    mesh=mesh,
    in_specs=PartitionSpec('x'),
    out_specs=PartitionSpec('x'),
  )
  x = jax.ShapeDtypeStruct(
    (16, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec('x'))
  )
  found = {
    c.kind: c.num_bytes
    for c in collectives.read(jax.jit(fn).lower(x).compile().as_text())
  }
  assert found == {'all-reduce': 4 * 8 * 4, 'collective-permute': 4 * 8 * 4}
