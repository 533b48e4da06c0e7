# SPDX-License-Identifier: Apache-2.0
"""Weights get to their places: each part read once, from any source."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import transformers

from checkpoints_convert import convert
from checkpoints_convert import direct
from pallas_kernels import panel_matmul
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
from sarathi_jax.models import quantization
from sarathi_jax.models import quantized
from sarathi_jax.models import spec
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import weights

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
LLAMA = model_config_lib.LlamaConfig(
  vocab_size=50,
  hidden_size=16,
  intermediate_size=24,
  num_layers=3,
  num_heads=8,
  num_kv_heads=4,
  head_dim=4,
  max_position_embeddings=64,
)
MODELS: dict[str, model_config_lib.ModelConfig] = {
  'mixtral': MODEL,
  'llama': LLAMA,
  'biases': dataclasses.replace(LLAMA, qkv_bias=True, mlp_bias=True),
}
INT8 = dataclasses.replace(
  LLAMA, quantization=quantization.Quantization(codes='int8', group=2)
)
INT4 = dataclasses.replace(
  LLAMA,
  head_dim=16,
  intermediate_size=128,
  quantization=quantization.Quantization(codes='int4', group=32, zeros=True),
)
FP8 = quantization.Quantization(codes='fp8', activations='fp8')
# tp, pp; a push has each with others, and `--slow` alone.
MESHES = (
  (1, 1),
  (2, 2),
  (4, 2),
  *(
    pytest.param(*mesh, marks=pytest.mark.slow)
    for mesh in ((2, 1), (4, 1), (1, 2))
  ),
)


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


F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
LAYOUTS = {
  'live': placement.of_live(F32),
  'cpu': placement.Layout(F32, placement.in_panels, codes_in_panels=True),
  'kept': placement.Layout(F32, placement.in_panels, given=BF16),
  'turned': placement.Layout(F32, placement.transposed),
  'gpu': placement.Layout(F32, merged=True, codes_by_columns=True),
  'both': placement.Layout(F32, placement.transposed, merged=True),
}


@pytest.mark.parametrize('lies', LAYOUTS)
@pytest.mark.parametrize('tp,pp', MESHES)
def test_live_and_read_weights_lie_the_same(tp, pp, lies):
  params = models.init_params(MODEL, jax.random.key(0), jnp.float32)
  whole = named(params)
  mesh = mesh_of(tp, pp)
  layout = LAYOUTS[lies]
  num_read = 0

  def read(name: str, index: Any) -> np.ndarray:
    nonlocal num_read
    part = whole[name][index]
    num_read += part.size
    return part

  told: list[Any] = []
  loaded = weights.load(
    MODEL, mesh, layout, read, on_loaded=lambda *n: told.append(n)
  )
  assert told[-1] == (len(told), len(told))
  assert_same(loaded, weights.place_live(MODEL, mesh, layout, params))
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


@pytest.mark.parametrize(
  'of,tp,pp', [(LLAMA, 1, 1), (LLAMA, 2, 2), (MODEL, 2, 2)]
)
def test_codes_that_multiply_codes_may_lie_by_columns(of, tp, pp):
  model = dataclasses.replace(of, quantization=FP8)
  params = models.init_params(model, jax.random.key(0), jnp.float32)
  whole = named(params)
  mesh = mesh_of(tp, pp)

  def nodes(by_columns: bool) -> list[Any]:
    layout = placement.Layout(F32, merged=True, codes_by_columns=by_columns)
    placed = weights.place_live(model, mesh, layout, params)
    assert_same(
      weights.load(model, mesh, layout, lambda name, i: whole[name][i]), placed
    )
    found = jax.tree.leaves(
      placed, is_leaf=lambda node: isinstance(node, quantized.Quantized)
    )
    return [one for one in found if isinstance(one, quantized.Quantized)]

  for rows, columns in zip(nodes(False), nodes(True), strict=True):
    assert (rows.by_columns, columns.by_columns) == (False, True)
    for ours, theirs in (
      (columns.values.swapaxes(-1, -2), rows.values),
      (columns.scale, rows.scale),
    ):
      np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def shares(array: jax.Array) -> list[np.ndarray]:
  """A device's part of it after the other."""
  return [np.asarray(shard.data) for shard in array.addressable_shards]


def apart(params: Any) -> Any:
  """Each device's arrays, of nodes and groups made into plain matrices."""

  def node_shares(node: Any) -> list[np.ndarray]:
    if isinstance(node, matrices.Transposed):
      return [share.swapaxes(-1, -2) for share in shares(node.array)]
    if isinstance(node, matrices.Panels):
      return [panel_matmul.from_panels(share) for share in shares(node.array)]
    return shares(node)

  def walk(tree: Any) -> Any:
    if isinstance(tree, list):
      return [walk(inner) for inner in tree]
    if not isinstance(tree, dict):
      return node_shares(tree)
    found = {}
    for name, inner in tree.items():
      if isinstance(inner, matrices.SideBySide):
        ends = np.cumsum(inner.widths)[:-1]
        split = [np.split(s, ends, -1) for s in node_shares(inner.matrix)]
        of, bias, _ = name.partition('_bias')
        for i, member in enumerate(spec.GROUPS[of]):
          found[member + bias] = [parts[i] for parts in split]
      else:
        found[name] = walk(inner)
    return found

  return walk(params)


@pytest.mark.parametrize('tp,pp', MESHES)
@pytest.mark.parametrize('name', MODELS)
def test_a_device_has_the_same_columns_however_they_lie(name, tp, pp):
  """Transposed and side by side, each device has its own columns."""
  model, mesh = MODELS[name], mesh_of(tp, pp)
  params = models.init_params(model, jax.random.key(0), jnp.float32)
  live, *_, read = (
    weights.place_live(model, mesh, layout, params)
    for layout in LAYOUTS.values()
  )
  jax.tree.map(np.testing.assert_array_equal, apart(read), apart(live))
  layer = read['layers'][0]
  biased = {'qkv_bias'} if name == 'biases' else set()
  assert layer['attn'].keys() == {'qkv', 'o'} | biased
  assert ('gate_up' in layer.get('mlp', {})) == (name != 'mixtral')
  for matrix in (layer['attn']['qkv'].matrix, layer['attn']['o']):
    assert isinstance(matrix, matrices.Transposed)
  assert not isinstance(read['embed'], matrices.Transposed)


@pytest.mark.parametrize('quantized_model', [INT8, INT4], ids=['int8', 'int4'])
@pytest.mark.parametrize('tp,pp', MESHES)
def test_scales_lie_with_their_codes(tp, pp, quantized_model):
  """Read or live, together or apart: dequantized, it is the same matrix."""
  model = quantized_model
  params = models.init_params(model, jax.random.key(0))
  whole, mesh = named(params), mesh_of(tp, pp)

  def read(name: str, index: Any) -> np.ndarray:
    return whole[name][index]

  plain = dataclasses.replace(model, quantization=None)
  dequantized = jax.tree.map(
    lambda leaf, node: (
      quantized.dequantize(node, F32, leaf.shape[-2])
      if isinstance(node, quantized.Quantized)
      else node
    ),
    models.param_specs(plain),
    params,
  )
  num_in_panels = 0
  for layout in (
    LAYOUTS['live'],
    LAYOUTS['gpu'],
    placement.Layout(F32, codes_in_panels=True),
  ):
    placed = weights.place_live(model, mesh, layout, params)
    assert_same(weights.load(model, mesh, layout, read), placed)
    expected = weights.place_live(plain, mesh, layout, dequantized)
    attn, exact = (p['layers'][1]['attn'] for p in (placed, expected))
    assert attn.keys() == exact.keys()
    for key in attn:
      node, matrix = attn[key], exact[key]
      if isinstance(node, matrices.SideBySide):
        assert node.widths == matrix.widths
        node, matrix = node.matrix, matrix.matrix
      arrays = node.arrays()
      num_in_panels += node.in_panels
      for *of_device, w in zip(
        *map(shares, arrays.values()), shares(matrix), strict=True
      ):
        share = dataclasses.replace(
          node, **dict(zip(arrays, of_device, strict=True))
        )
        np.testing.assert_array_equal(
          quantized.dequantize(share, F32, w.shape[-2]), w
        )
  assert num_in_panels
  assert placement.bytes_of(
    placement.shapes(model, mesh, LAYOUTS['live'])
  ) < placement.bytes_of(placement.shapes(plain, mesh, LAYOUTS['live']))


def test_stages_whose_layers_differ_are_refused():
  some = quantization.Quantization(codes='int8', kept=('layers.2.mlp.up',))
  model = dataclasses.replace(LLAMA, num_layers=4, quantization=some)
  placement.places(model, mesh_of(2, 1), LAYOUTS['live'])
  with pytest.raises(
    errors.ConfigError, match='pp=2: layers 0 and 2 are to be'
  ):
    placement.places(model, mesh_of(2, 2), LAYOUTS['live'])


@pytest.mark.parametrize('tp,pp', MESHES)
def test_what_a_device_has_is_told_without_devices(tp, pp):
  """`part_len`, which files are cut by, says what the mesh's shards are."""
  parallelism = parallel.Parallelism(tp=tp, pp=pp)
  for place in jax.tree.leaves(
    placement.places(MODEL, mesh_of(tp, pp), LAYOUTS['live'])
  ):
    (part,) = place.parts
    shard = place.sharding.shard_shape(place.global_shape)
    for axis, size, got in zip(
      part.spec.axes, part.spec.shape, shard[place.has_stages :], strict=True
    ):
      if axis != 'kv_heads' or tp <= MODEL.num_kv_heads:  # no copies
        assert got == parallelism.part_len(axis, size), (part.names, axis)


def test_layers_and_heads_are_where_they_belong():
  params = models.init_params(MODEL, jax.random.key(0), jnp.float32)
  placed = weights.place_live(MODEL, mesh_of(4, 2), LAYOUTS['live'], params)
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
  model, mesh = opened.metadata.model, mesh_of(tp, pp)
  layout = LAYOUTS['both']
  expected = weights.place_live(
    model, mesh, layout, checkpoint.restore_params(converted)
  )
  assert_same(weights.load(model, mesh, layout, opened.read), expected)
  unconverted = opening.open_checkpoint(source, tmp_path, convert=False)
  assert unconverted.metadata == opened.metadata
  assert_same(weights.load(model, mesh, layout, unconverted.read), expected)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    checkpointer.save(
      tmp_path / 'theirs',
      args=ocp.args.PyTreeSave(checkpoint.restore_params(converted)),
    )
  assert (tmp_path / 'theirs' / 'manifest.ocdbt').exists()
  theirs = params_reader.open_params(tmp_path / 'theirs')
  assert_same(weights.load(model, mesh, layout, theirs), expected)


def test_what_cant_be_read_is_named(folders):
  _, converted = folders
  read = params_reader.open_params(converted / 'params')
  with pytest.raises(errors.CheckpointError, match=r'nothing: can not be read'):
    read('nothing', (slice(0, 1),))


def test_old_weights_are_forgotten_one_by_one():
  """So there is memory for the new ones."""
  params = models.init_params(MODEL, jax.random.key(0), jnp.float32)
  mesh = mesh_of(2, 1)
  layout = LAYOUTS['both']
  old = jax.tree.leaves(weights.place_live(MODEL, mesh, layout, params))
  count = len(old)
  weights.place_live(MODEL, mesh, layout, params, old)
  assert old == [None] * count


def test_weights_that_dont_fit_are_refused_before_any_is_read(
  folders, monkeypatch
):
  monkeypatch.setattr(
    type(jax.devices()[0]),
    'memory_stats',
    lambda self: dict(bytes_limit=10_000, bytes_in_use=0),
  )
  monkeypatch.setattr(weights, 'load', None)  # It is not called.
  with pytest.raises(
    errors.ConfigError,
    match=(r'tp, pp=\(2, 1\): the weights take .* GiB of each device, and'),
  ):
    llm_lib.LLM.from_checkpoint(
      folders[1], config=config_lib.EngineConfig(tp=2)
    )


def test_what_is_read_lies_as_its_devices_are_fastest() -> None:
  class Gpu:
    platform = 'gpu'

  class Mesh:
    devices = np.array([Gpu()])

  mesh: Any = Mesh()
  assert placement.of_checkpoint(mesh, F32) == LAYOUTS['gpu']
  for dtype in (None, F32):
    assert placement.of_checkpoint(mesh_of(2, 1), F32, dtype) == LAYOUTS['cpu']
