# SPDX-License-Identifier: Apache-2.0
"""Brings weights to their places, from files or from live arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec
from jax.sharding import Sharding
import numpy as np

from sarathi_jax import errors
from sarathi_jax.checkpoint import params_reader
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import tree
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import settings

Params = Any  # a pytree of arrays
OnLoaded = Callable[[int, int], object]  # (arrays loaded, of how many)

_NUM_READERS = 2  # Each has a shard in memory.


def load(
  model: model_config_lib.ModelConfig,
  mesh: Mesh,
  layout: placement.Layout,
  read: params_reader.Read,
  *,
  old: list[Any] | None = None,
  on_loaded: OnLoaded = lambda done, total: None,
) -> Params:
  """Reads each device's part of the parameters straight onto it.

  A host reads what its own devices need, and has two parts in memory at once.

  Args:
    model: the model.
    mesh: the mesh.
    layout: how they are to lie, whatever `read` gives.
    read: reads the parameters; called from several threads.
    old: the leaves to replace; each is dropped before its successor is read.
    on_loaded: called with the arrays done, and of how many.

  Returns:
    The parameters, shaped as `places`.
  """
  places = placement.places(model, mesh, layout)
  return load_places(places, read, old=old, on_loaded=on_loaded)


def load_places(
  places: Any,
  read: params_reader.Read,
  *,
  old: list[Any] | None = None,
  on_loaded: OnLoaded = lambda done, total: None,
) -> Any:
  """Reads each device's part of what lies at `places`, a tree; see `load`."""
  leaves, treedef = jax.tree.flatten(places)
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
          functools.partial(_read_share, place, read),
          dtype=place.dtype,
        )
      )

  arrays = []
  with futures.ThreadPoolExecutor(_NUM_READERS) as pool:
    for array in pool.map(one, range(len(leaves))):
      arrays.append(array)
      done += 1
      on_loaded(done, len(leaves))
  return jax.tree.unflatten(treedef, arrays)


def _read_share(
  place: placement.Place,
  read: params_reader.Read,
  index: params_reader.Slices | None,
) -> np.ndarray:
  """Reads the part at `index` of an array on the mesh: a device's."""
  assert index is not None
  stage = 0
  if place.has_stages:
    stage = index[0].indices(place.num_stages)[0]
    index = index[1:]
  numbers = [0] * len(index)  # Of all shares along each axis, which one.
  for axis, s, size in zip(place.order, index, place.shape, strict=True):
    shares = placement.num_shares(place.source_axes[axis], place.mesh)
    numbers[axis] = s.indices(size)[0] * shares // size
  whole = _read_whole(place, stage, numbers, read)
  share: np.ndarray = placement.array_of(place.node, place.leaf, whole)
  return share[None] if place.has_stages else share


def _read_whole(
  place: placement.Place,
  stage: int,
  numbers: Sequence[int],
  read: params_reader.Read,
) -> np.ndarray:
  """Reads a device's parts of a place's parameters, side by side.

  Args:
    place: the place.
    stage: the device's.
    numbers: which of all shares along each axis is the device's.
    read: reads a parameter.
  """
  first, *others = place.parts
  if not others:
    return _read_part(place, first, stage, numbers, read)
  widths = [place.share(part)[-1] for part in place.parts]
  whole = np.empty((*place.share(first)[:-1], sum(widths)), place.source_dtype)
  for part, width, end in zip(
    place.parts, widths, itertools.accumulate(widths), strict=True
  ):
    whole[..., end - width : end] = _read_part(
      place, part, stage, numbers, read
    )
  return whole


def _read_part(
  place: placement.Place,
  part: placement.Part,
  stage: int,
  numbers: Sequence[int],
  read: params_reader.Read,
) -> np.ndarray:
  """Reads a device's part of a parameter, heads repeated, and padded."""
  shape = place.share(part)
  name = part.names[stage]
  if name is None:
    return np.zeros(shape, place.source_dtype)
  found = read(
    name,
    tuple(
      _source_span(part, axis, range(number * size, (number + 1) * size))
      for axis, (number, size) in enumerate(zip(numbers, shape, strict=True))
    ),
  )
  found = _cast(found, place.source_dtype, name)
  missing = [
    (0, want - got) for want, got in zip(shape, found.shape, strict=True)
  ]
  return np.pad(found, missing) if any(n for _, n in missing) else found


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


def _source_span(part: placement.Part, axis: int, span: range) -> slice:
  """Returns the part of a parameter that a span of the array comes from."""
  size = part.spec.shape[axis]
  start = span.start
  copies = part.shape[axis] // size
  if part.spec.axes[axis] == 'kv_heads' and copies > 1:
    start = start // part.head_dim // copies * part.head_dim
  return slice(min(start, size), min(start + len(span), size))


def place_live(
  model: model_config_lib.ModelConfig,
  mesh: Mesh,
  layout: placement.Layout,
  params: Params,
  old: list[Any] | None = None,
) -> Params:
  """Puts live arrays where the model is to run.

  Takes an array that lies there already as it is, without a copy. Moves others
  one after another, so that no more than one is in memory twice.

  Args:
    model: the model.
    mesh: the mesh.
    layout: how they are to lie; nodes and groups need copies.
    params: the weights, as the tree of `models.param_specs`.
    old: the leaves to replace; each is dropped before its successor is made.

  Returns:
    The parameters, shaped as `places`.
  """
  named = tree.named_leaves(params)
  leaves, treedef = jax.tree.flatten(placement.places(model, mesh, layout))
  arrays = []
  for i, place in enumerate(leaves):
    if old is not None:
      old[i] = None
    arrays.append(_place_one(place, named))
  return jax.tree.unflatten(treedef, arrays)


def _place_one(
  place: placement.Place, named: Mapping[str, jax.Array]
) -> jax.Array:
  as_parts = mesh_lib.on(place.mesh, *place.source_axes)
  ready = []
  for names in zip(*(part.names for part in place.parts), strict=True):
    parts = [
      jnp.zeros(part.shape, place.source_dtype, device=as_parts)
      if name is None
      else jax.device_put(_shaped(place, part, named[name]), as_parts)
      for part, name in zip(place.parts, names, strict=True)
    ]
    if place.node is not None or len(parts) > 1:
      make = _maker(
        place.node, place.leaf, place.mesh, place.source_axes, place.axes
      )
      parts = [make(*parts)]
    ready += parts
  if not place.has_stages:
    return ready[0]
  return _stack(place.sharding)(*ready)


def _shaped(
  place: placement.Place, part: placement.Part, source: jax.Array
) -> jax.Array:
  """Returns a parameter in its dtype, with heads repeated, and padded."""
  if part.spec.dtype is None:
    source = source.astype(place.source_dtype)
  padding = tuple(
    want - size for want, size in zip(part.shape, part.spec.shape, strict=True)
  )
  for axis, name in enumerate(part.spec.axes):
    if name == 'kv_heads' and padding[axis]:
      copies = part.shape[axis] // part.spec.shape[axis]
      return _repeat_heads(source, axis, copies, part.head_dim)
  return _pad(source, padding) if any(padding) else source


@functools.cache
def _maker(
  node: placement.Node,
  leaf: int,
  mesh: Mesh,
  source_axes: tuple[Any, ...],
  axes: tuple[Any, ...],
) -> Callable[..., jax.Array]:
  """Returns what makes an array on the mesh of parameters on the mesh.

  Args:
    node, leaf, mesh, source_axes, axes: of a `placement.Place`.
  """

  def make(*parts: jax.Array) -> jax.Array:
    whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    array: jax.Array = placement.array_of(node, leaf, whole)
    return array

  if mesh.size == 1:
    return jax.jit(make)
  return jax.jit(
    jax.shard_map(
      make,
      mesh=mesh,
      in_specs=PartitionSpec(*source_axes),
      out_specs=PartitionSpec(*axes),
      check_vma=False,
    )
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
def _stack(sharding: Sharding) -> Callable[..., jax.Array]:
  """Returns a function that stacks arrays."""
  return jax.jit(lambda *arrays: jnp.stack(arrays), out_shardings=sharding)
