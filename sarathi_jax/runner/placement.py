# SPDX-License-Identifier: Apache-2.0
"""Places each parameter on the mesh.

On a mesh with stages, layer number i of all stages is one array, whose first
axis is the stages. Axes are split by their names (`_SPLIT`).
Key and value heads are repeated where there are more devices than heads, and
the vocabulary is padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import Sharding
import numpy as np

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.checkpoint import params_reader
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import matrices
from sarathi_jax.models import spec
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import settings

Params = Any  # a pytree of arrays
OnLoaded = Callable[[int, int], object]  # (arrays loaded, of how many)

# Name of a parameter's axis -> the axes of the mesh it is split over.
_SPLIT: Mapping[str | None, Any] = {
  'vocab': mesh_lib.TP,
  'logits': (mesh_lib.TP, mesh_lib.PP),
  'heads': mesh_lib.TP,
  'kv_heads': mesh_lib.TP,
  'mlp': mesh_lib.TP,
}
_NUM_READERS = 2  # Each has a shard in memory.


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
  """One array on the mesh, and the parameters that it is made of.

  Attributes:
    sources: names of the parameters: one, or one a stage; None for zeros.
    spec: of each parameter.
    shape: of each parameter on the mesh: heads repeated, vocabulary padded.
    head_dim: h.
    has_stages: whether the array has a first axis, for the parameters.
    is_transposed: whether it is the array of a `matrices.Transposed`.
    sharding: of the array.
  """

  sources: tuple[str | None, ...]
  spec: spec.ParamSpec
  shape: tuple[int, ...]
  head_dim: int
  has_stages: bool
  is_transposed: bool
  sharding: Sharding

  @property
  def global_shape(self) -> tuple[int, ...]:
    shape = self.shape[::-1] if self.is_transposed else self.shape
    return (len(self.sources), *shape) if self.has_stages else shape


def transposes(mesh: Mesh) -> bool:
  """Says whether a mesh's devices multiply faster by transposed matrices."""
  return mesh.devices.flat[0].platform == 'cpu'


def choose_dtype(name: str, dtype: Any, mesh: Mesh) -> Any:
  """Returns the dtype that a checkpoint's weights are served in.

  'auto' is its own, except on CPUs: XLA multiplies no 16-bit floats there, and
  widens all of a matrix each time that it is used.

  Args:
    name: `config.dtype`.
    dtype: of the checkpoint.
    mesh: the devices.
  """
  if name != config_lib.AUTO:
    return jnp.dtype(name)
  is_cpu = mesh.devices.flat[0].platform == 'cpu'
  return jnp.dtype(jnp.float32 if is_cpu else dtype)


def places(
  model: model_config_lib.ModelConfig, mesh: Mesh, transpose: bool = False
) -> Any:
  """Returns a tree of Place, shaped as the parameters on the mesh.

  It is shaped as `models.param_specs`, but 'layers' are those of one stage.

  Args:
    model: the model.
    mesh: the mesh.
    transpose: whether rows are to be multiplied by `matrices.Transposed`.
  """
  parallelism = mesh_lib.parallelism_of(mesh)
  sizes: dict[str | None, int] = {
    'vocab': parallelism.vocab_size(model),
    'logits': parallelism.vocab_size(model),
    'kv_heads': parallelism.num_kv_heads(model) * model.head_dim,
  }

  def place(
    path: Any, leaf: spec.ParamSpec, *, layers: tuple[int | None, ...] | None
  ) -> Any:
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    sources: tuple[str | None, ...] = (name,)
    axes = [_SPLIT.get(axis) for axis in leaf.axes]
    if layers is not None:
      sources = tuple(
        None if layer is None else f'layers.{layer}.{name}' for layer in layers
      )
    has_stages = len(sources) > 1
    is_transposed = transpose and leaf.is_factor
    found = Place(
      sources,
      leaf,
      tuple(
        sizes.get(axis, size)
        for axis, size in zip(leaf.axes, leaf.shape, strict=True)
      ),
      model.head_dim,
      has_stages,
      is_transposed,
      mesh_lib.on(
        mesh,
        *[mesh_lib.PP] * has_stages,
        *(axes[::-1] if is_transposed else axes),
      ),
    )
    return matrices.Transposed(found) if is_transposed else found

  def tree(specs: Any, layers: tuple[int | None, ...] | None = None) -> Any:
    return jax.tree_util.tree_map_with_path(
      functools.partial(place, layers=layers), specs
    )

  specs = models.param_specs(model)
  layer_specs = specs.pop('layers')
  return tree(specs) | {
    'layers': [
      tree(layer_specs[0], parallelism.layers_of(model, i))
      for i in range(parallelism.num_layers(model))
    ]
  }


def shapes(
  model: model_config_lib.ModelConfig,
  mesh: Mesh,
  dtype: Any,
  transpose: bool = False,
) -> Params:
  """Returns the parameters on the mesh as ShapeDtypeStruct, for compiling."""
  return jax.tree.map(
    lambda place: jax.ShapeDtypeStruct(
      place.global_shape, dtype, sharding=place.sharding
    ),
    places(model, mesh, transpose),
  )


def are_transposed(params: Params) -> bool:
  """Says whether parameters on a mesh are transposed, as by `places`."""
  return any(
    isinstance(leaf, matrices.Transposed)
    for leaf in jax.tree.leaves(
      params, is_leaf=lambda node: isinstance(node, matrices.Transposed)
    )
  )


def bytes_of(tree: Any) -> int:
  """Counts one device's bytes of a tree of ShapeDtypeStruct with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def load(
  model: model_config_lib.ModelConfig,
  mesh: Mesh,
  dtype: Any,
  read: params_reader.Read,
  *,
  transpose: bool = False,
  old: list[Any] | None = None,
  on_loaded: OnLoaded = lambda done, total: None,
) -> Params:
  """Reads each device's part of the parameters straight onto it.

  A host reads what its own devices need, and has two parts in memory at once.

  Args:
    model: the model.
    mesh: the mesh.
    dtype: of the arrays, whatever `read` gives.
    read: reads the parameters; called from several threads.
    transpose: see `places`.
    old: the leaves to replace; each is dropped before its successor is read.
    on_loaded: called with the arrays done, and of how many.

  Returns:
    The parameters, shaped as `places`.
  """
  leaves, treedef = jax.tree.flatten(places(model, mesh, transpose))
  done = 0

  def one(i: int) -> jax.Array:
    place = leaves[i]
    if old is not None:
      old[i] = None
    with settings.own():  # Settings are per thread.
      return jax.block_until_ready(
        jax.make_array_from_callback(
          place.global_shape,
          place.sharding,
          functools.partial(_read_part, place, read, dtype),
          dtype=dtype,
        )
      )

  arrays = []
  with futures.ThreadPoolExecutor(_NUM_READERS) as pool:
    for array in pool.map(one, range(len(leaves))):
      arrays.append(array)
      done += 1
      on_loaded(done, len(leaves))
  return jax.tree.unflatten(treedef, arrays)


def _read_part(
  place: Place,
  read: params_reader.Read,
  dtype: Any,
  index: params_reader.Slices | None,
) -> np.ndarray:
  """Reads the part at `index` of an array on the mesh."""
  assert index is not None
  source = place.sources[0]
  if place.has_stages:
    source = place.sources[index[0].indices(len(place.sources))[0]]
    index = index[1:]
  if place.is_transposed:
    index = index[::-1]
  spans = [
    range(*s.indices(size)) for s, size in zip(index, place.shape, strict=True)
  ]
  shape = tuple(map(len, spans))
  if source is None:
    part = np.zeros(shape, dtype)
  else:
    part = read(
      source,
      tuple(_source_span(place, axis, span) for axis, span in enumerate(spans)),
    )
    part = _cast(part, dtype, source)
    missing = [
      (0, want - got) for want, got in zip(shape, part.shape, strict=True)
    ]
    if any(n for _, n in missing):
      part = np.pad(part, missing)
  if place.is_transposed:
    part = part.T
  return part[None] if place.has_stages else part


def _cast(part: np.ndarray, dtype: Any, name: str) -> np.ndarray:
  """Rounds to the nearest.

  Raises:
    CheckpointError: a finite number is too large for `dtype`.
  """
  if part.dtype == dtype:
    return part
  with np.errstate(over='ignore'):  # reported below, by name
    cast = part.astype(dtype)
  is_narrower = jnp.finfo(dtype).max < jnp.finfo(part.dtype).max
  if is_narrower and np.isinf(cast).sum() > np.isinf(part).sum():
    raise errors.CheckpointError(
      f'params.{name}: holds numbers too large for dtype={jnp.dtype(dtype)}.'
    )
  return cast


def _source_span(place: Place, axis: int, span: range) -> slice:
  """Returns the part of a parameter that a span of the array comes from."""
  size = place.spec.shape[axis]
  start = span.start
  copies = place.shape[axis] // size
  if place.spec.axes[axis] == 'kv_heads' and copies > 1:
    start = start // place.head_dim // copies * place.head_dim
  return slice(min(start, size), min(start + len(span), size))


def place_live(
  model: model_config_lib.ModelConfig,
  mesh: Mesh,
  params: Params,
  old: list[Any] | None = None,
  transpose: bool = False,
) -> Params:
  """Puts live arrays where the model is to run.

  Takes an array that lies there already as it is, without a copy. Moves others
  one after another, so that no more than one is in memory twice.

  Args:
    model: the model.
    mesh: the mesh.
    params: the weights, as the tree of `models.param_specs`.
    old: the leaves to replace; each is dropped before its successor is made.
    transpose: see `places`; it needs a copy.

  Returns:
    The parameters, shaped as `places`.
  """
  named = dict(_named_leaves(params))
  leaves, treedef = jax.tree.flatten(places(model, mesh, transpose))
  arrays = []
  for i, place in enumerate(leaves):
    if old is not None:
      old[i] = None
    arrays.append(
      _place_one(
        place, [None if name is None else named[name] for name in place.sources]
      )
    )
  return jax.tree.unflatten(treedef, arrays)


def _place_one(place: Place, sources: list[jax.Array | None]) -> jax.Array:
  padding = tuple(
    want - size
    for want, size in zip(place.shape, place.spec.shape, strict=True)
  )
  repeats = [
    (axis, place.shape[axis] // place.spec.shape[axis])
    for axis, name in enumerate(place.spec.axes)
    if name == 'kv_heads' and padding[axis]
  ]

  def shaped(source: jax.Array) -> jax.Array:
    if repeats:
      source = _repeat_heads(source, *repeats[0], place.head_dim)
    elif any(padding):
      source = _pad(source, padding)
    return source.T if place.is_transposed else source

  ready = [shaped(source) for source in sources if source is not None]
  if not place.has_stages:
    return jax.device_put(ready[0], place.sharding)
  assert isinstance(place.sharding, jax.sharding.NamedSharding)
  each = jax.sharding.NamedSharding(
    place.sharding.mesh, jax.sharding.PartitionSpec(*place.sharding.spec[1:])
  )
  return _stack(place.sharding, len(place.sources))(
    *(jax.device_put(source, each) for source in ready)
  )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _repeat_heads(
  x: jax.Array, axis: int, copies: int, head_dim: int
) -> jax.Array:
  shape = x.shape
  split = (*shape[:axis], -1, head_dim, *shape[axis + 1 :])
  x = jnp.repeat(x.reshape(split), copies, axis=axis)
  return x.reshape(*shape[:axis], -1, *shape[axis + 1 :])


@functools.partial(jax.jit, static_argnums=1)
def _pad(x: jax.Array, padding: tuple[int, ...]) -> jax.Array:
  return jnp.pad(x, [(0, n) for n in padding])


@functools.cache
def _stack(sharding: Sharding, num_stages: int) -> Callable[..., jax.Array]:
  """Returns a function that stacks arrays, and zeros for the last stages."""

  def stack(*arrays: jax.Array) -> jax.Array:
    zeros = [jnp.zeros_like(arrays[0])] * (num_stages - len(arrays))
    return jnp.stack([*arrays, *zeros])

  return jax.jit(stack, out_shardings=sharding)


def _named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator='.'), leaf
