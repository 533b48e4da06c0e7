# SPDX-License-Identifier: Apache-2.0
"""Loading takes little more memory than the weights that it loads."""

from __future__ import annotations

from collections.abc import Iterator
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from checkpoints_convert import convert
from tests.checkpoints_convert import fake_checkpoint as fake

MIB = 2**20
WIDTH, INNER, LAYERS = 1024, 4096, 8  # half a GiB in float32

_LOAD = """
import json, sys
import jax
import jax.numpy as jnp
from sarathi_jax import opening
from tests import memory
from sarathi_jax.models import parallel
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import weights

opened = opening.open_checkpoint(sys.argv[1], sys.argv[2], convert=False)
mesh = mesh_lib.make(parallel.Parallelism(tp=2, pp=2))
jax.block_until_ready(jnp.zeros(8))  # The backend has all it keeps.
before = memory.peak()
params = weights.load(
  opened.metadata.model, mesh,
  placement.of_checkpoint(mesh, opened.metadata.dtype), opened.read)
leaves = jax.tree.leaves(params)
shards = [shard.data.nbytes for leaf in leaves
          for shard in leaf.addressable_shards]
print(json.dumps({'peak': memory.peak() - before, 'total': sum(shards)}))
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
  folder = tmp_path_factory.mktemp('checkpoints')
  shapes = {
    'model.embed_tokens.weight': (256, WIDTH),
    'lm_head.weight': (256, WIDTH),
    'model.norm.weight': (WIDTH,),
  }
  for layer in range(LAYERS):
    prefix = f'model.layers.{layer}'
    shapes |= {
      **{
        f'{prefix}.{name}_layernorm.weight': (WIDTH,)
        for name in ('input', 'post_attention')
      },
      **{
        f'{prefix}.self_attn.{name}_proj.weight': (WIDTH, WIDTH)
        for name in 'qkvo'
      },
      **{
        f'{prefix}.mlp.{name}_proj.weight': (INNER, WIDTH)
        for name in ('gate', 'up')
      },
      f'{prefix}.mlp.down_proj.weight': (WIDTH, INNER),
    }
  fake.write(
    folder / 'hf',
    fake.llama_config(
      vocab_size=256,
      hidden_size=WIDTH,
      intermediate_size=INNER,
      num_hidden_layers=LAYERS,
      num_attention_heads=8,
      num_key_value_heads=8,
    ),
    fake.random_tensors(shapes),
  )
  convert.convert(folder / 'hf', folder / 'converted')
  yield folder
  shutil.rmtree(folder)  # A gigabyte.


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['converted', 'hf'])
def test_no_more_than_the_parts_being_read(
  kind: str, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """On a CPU the weights themselves are in the host's memory, too."""
  done = subprocess.run(
    [sys.executable, '-c', _LOAD, str(folder / kind), str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
    env={
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
    },
  )
  assert done.returncode == 0, done.stderr
  got = json.loads(done.stdout)
  assert got['total'] >= 512 * MIB
  # What is read, placed and freed again, and what is imported on the way.
  assert got['peak'] - got['total'] <= 256 * MIB, got
