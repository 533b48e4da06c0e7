# SPDX-License-Identifier: Apache-2.0
"""Weights get to their places: each part read once, from any source."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import transformers

from checkpoints_convert import convert
from checkpoints_convert import direct
from sarathi_jax import checkpoint
from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import llm as llm_lib
from sarathi_jax import models
from sarathi_jax import opening
from sarathi_jax.checkpoint import params_reader
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import matrices
from sarathi_jax.models import parallel
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement

MODEL = model_config_lib.MixtralConfig(
  vocab_size=50,
  hidden_size=16,
  intermediate_size=24,
  num_layers=3,
  num_heads=8,
  num_kv_heads=2,
  head_dim=4,
  max_position_embeddings=64,
  num_experts=2,
  experts_per_token=1,
)
MESHES = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2))  # tp, pp


def mesh_of(tp: int, pp: int) -> Any:
  return mesh_lib.make(parallel.Parallelism(tp=tp, pp=pp))


def named(tree: Any) -> dict[str, np.ndarray]:
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def assert_same(one: Any, other: Any) -> None:
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('transpose', [False, True])
@pytest.mark.parametrize('tp,pp', MESHES)
def test_live_and_read_weights_lie_the_same(tp, pp, transpose):
  params = models.init_params(MODEL, jax.random.key(0), jnp.float32)
  whole = named(params)
  mesh = mesh_of(tp, pp)
  num_read = 0

  def read(name: str, index: Any) -> np.ndarray:
    nonlocal num_read
    part = whole[name][index]
    num_read += part.size
    return part

  told: list[Any] = []
  loaded = placement.load(
    MODEL,
    mesh,
    jnp.dtype(jnp.float32),
    read,
    transpose=transpose,
    on_loaded=lambda *n: told.append(n),
  )
  assert told[-1] == (len(told), len(told))
  assert placement.are_transposed(loaded) == transpose
  assert_same(
    loaded, placement.place_live(MODEL, mesh, params, transpose=transpose)
  )
  # Split parts once, and the rest by each device: norms, routers, and the
  # embedding by each stage, the heads that several devices have by each.
  most = sum(leaf.size for leaf in whole.values())
  copied = sum(
    leaf.size
    for name, leaf in whole.items()
    if leaf.ndim == 1
    or 'router' in name
    or 'embed' in name
    or name.endswith(('.k', '.v'))
  )
  assert most <= num_read <= most + (tp * pp - 1) * copied


@pytest.mark.parametrize('tp,pp', MESHES)
def test_transposed_matrices_are_the_others_transposed(tp, pp):
  mesh = mesh_of(tp, pp)
  params = models.init_params(MODEL, jax.random.key(0), jnp.float32)
  as_they_are, transposed = (
    placement.place_live(MODEL, mesh, params, transpose=transpose)
    for transpose in (False, True)
  )
  back = jax.tree.map(
    lambda node: (
      node.array.swapaxes(-1, -2)
      if isinstance(node, matrices.Transposed)
      else node
    ),
    transposed,
    is_leaf=lambda node: isinstance(node, matrices.Transposed),
  )
  assert jax.tree.structure(back) == jax.tree.structure(as_they_are)
  assert_same(back, as_they_are)
  for name in 'qkvo':
    assert isinstance(
      transposed['layers'][0]['attn'][name], matrices.Transposed
    )
  assert not isinstance(transposed['embed'], matrices.Transposed)


@pytest.mark.parametrize('tp,pp', MESHES)
def test_what_a_device_has_is_told_without_devices(tp, pp):
  """`part_len`, which files are cut by, says what the mesh's shards are."""
  parallelism = parallel.Parallelism(tp=tp, pp=pp)
  for place in jax.tree.leaves(placement.places(MODEL, mesh_of(tp, pp))):
    shard = place.sharding.shard_shape(place.global_shape)
    for axis, size, got in zip(
      place.spec.axes, place.spec.shape, shard[place.has_stages :], strict=True
    ):
      if axis != 'kv_heads' or tp <= MODEL.num_kv_heads:  # no copies
        assert got == parallelism.part_len(axis, size), (place.sources, axis)


def test_layers_and_heads_are_where_they_belong():
  params = models.init_params(MODEL, jax.random.key(0), jnp.float32)
  placed = placement.place_live(MODEL, mesh_of(4, 2), params)
  q, k = (np.asarray(placed['layers'][1]['attn'][name]) for name in 'qk')
  np.testing.assert_array_equal(q[0], params['layers'][1]['attn']['q'])
  assert not q[1].any()  # There are three layers: the fourth is of zeros.
  # Two heads for four devices: each has a copy of one.
  heads = np.asarray(params['layers'][1]['attn']['k']).reshape(16, 2, 4)
  np.testing.assert_array_equal(k[0].reshape(16, 4, 4), heads[:, [0, 0, 1, 1]])
  head = np.asarray(placed['lm_head'])
  assert head.shape == (16, 56) and not head[:, 50:].any()


# What is fused, and what is stacked.
_THEIRS: dict[str, Any] = {
  'falcon': lambda: transformers.FalconConfig(
    vocab_size=98,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    new_decoder_architecture=True,
  ),
  'mixtral': lambda: transformers.MixtralConfig(
    vocab_size=98,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
  ),
}


@pytest.fixture(scope='module', params=_THEIRS)
def folders(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
  pytest.importorskip('torch')  # transformers writes the checkpoint with it.
  folder = tmp_path_factory.mktemp(request.param)
  transformers.AutoModelForCausalLM.from_config(
    _THEIRS[request.param]()
  ).save_pretrained(folder / 'hf')
  convert.convert(folder / 'hf', folder / 'out')
  return folder / 'hf', folder / 'out'


@pytest.mark.parametrize('tp,pp', [(1, 1), (2, 1), (2, 2)])
def test_a_checkpoint_is_read_alike_from_all_that_keep_it(
  folders, tmp_path, monkeypatch, tp, pp
):
  """Converted, by tensorstore as another wrote it, and not converted."""
  source, converted = folders
  monkeypatch.setattr(direct, '_BLOCK_BYTES', 64)
  opened = opening.open_checkpoint(converted, tmp_path)
  model, dtype = opened.metadata.model, jnp.dtype(opened.metadata.dtype)
  mesh = mesh_of(tp, pp)
  expected = placement.place_live(
    model, mesh, checkpoint.restore_params(converted)
  )
  assert_same(placement.load(model, mesh, dtype, opened.read), expected)
  unconverted = opening.open_checkpoint(source, tmp_path, convert=False)
  assert unconverted.metadata == opened.metadata
  assert_same(placement.load(model, mesh, dtype, unconverted.read), expected)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    checkpointer.save(
      tmp_path / 'theirs',
      args=ocp.args.PyTreeSave(checkpoint.restore_params(converted)),
    )
  assert (tmp_path / 'theirs' / 'manifest.ocdbt').exists()
  theirs = params_reader.open_params(tmp_path / 'theirs')
  assert_same(placement.load(model, mesh, dtype, theirs), expected)


def test_what_cant_be_read_is_named(folders):
  _, converted = folders
  read = params_reader.open_params(converted / 'params')
  with pytest.raises(errors.CheckpointError, match=r'nothing: can not be read'):
    read('nothing', (slice(0, 1),))


def test_old_weights_are_forgotten_one_by_one():
  """So there is memory for the new ones."""
  params = models.init_params(MODEL, jax.random.key(0), jnp.float32)
  mesh = mesh_of(2, 1)
  old = jax.tree.leaves(placement.place_live(MODEL, mesh, params))
  count = len(old)
  placement.place_live(MODEL, mesh, params, old)
  assert old == [None] * count


def test_weights_that_dont_fit_are_refused_before_any_is_read(
  folders, monkeypatch
):
  monkeypatch.setattr(
    type(jax.devices()[0]),
    'memory_stats',
    lambda self: dict(bytes_limit=10_000, bytes_in_use=0),
  )
  monkeypatch.setattr(placement, 'load', None)  # It is not called.
  with pytest.raises(
    errors.ConfigError,
    match=(r'tp, pp=\(2, 1\): the weights take .* GiB of each device, and'),
  ):
    llm_lib.LLM.from_checkpoint(
      folders[1], config=config_lib.EngineConfig(tp=2)
    )
