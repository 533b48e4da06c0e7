# SPDX-License-Identifier: Apache-2.0
"""Makes parameters of a trainer's, whose tree a table describes.

Leaves that lie as the engine's are served as they are. Others are moved and
made one after another, each in the place of its predecessor, so that no more
than one of them is in memory twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import difflib
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import Sharding

from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import tree as tree_lib
from sarathi_jax.runner import alive
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement

Params = Any  # a pytree of arrays, as models.param_specs says

_LAYERS = 'l'  # The letter of the axis that all layers are stacked on.
# Letters of sizes that are no model's.
_FIXED = {'c': 2}


class Leaf(NamedTuple):
  """Where a parameter is in a trainer's tree, and how it lies there.

    Leaf('layers.{}.attn.q', 'decoder.layers.query.kernel', 'dlnh->d nh')

  Attributes:
    ours: its name in `models.param_specs`, with {} for the number of a layer,
      or of a single one.
    theirs: its name in the trainer's tree, with {} for the same number.
    axes: the axes of theirs, a letter each, or, with spaces between them, of
      one letter or more; a digit takes that element of an axis, and l that of
      the layer. Behind '->' are the axes of ours, of one letter or more;
      without it, ours are the same. A letter that is alone in an axis of ours
      is as long as that; of others `sizes_of` knows.
  """

  ours: str
  theirs: str
  axes: str

  @property
  def source(self) -> tuple[str, ...]:
    """The axes of theirs."""
    return _axes(self.axes.partition('->')[0])

  @property
  def groups(self) -> tuple[str, ...]:
    """The axes of ours."""
    target = self.axes.partition('->')[2]
    return tuple(target.split()) or self._of_layer

  @property
  def is_same(self) -> bool:
    """Whether ours is theirs, or that of a layer, as it lies."""
    return self.groups == self._of_layer

  @property
  def layers_axis(self) -> int | None:
    """The axis of theirs that all layers are stacked on; None without."""
    return self.source.index(_LAYERS) if _LAYERS in self.source else None

  @property
  def _of_layer(self) -> tuple[str, ...]:
    return tuple(axis for axis in self.source if axis != _LAYERS)

  def unstacked(self) -> Leaf:
    """Returns what describes what theirs has of one layer."""
    axes = f'{" ".join(self._of_layer)} ->{" ".join(self.groups)}'
    return self._replace(axes=axes)


def _axes(text: str) -> tuple[str, ...]:
  return tuple(text.split() if ' ' in text else text)


class Row(NamedTuple):
  """A row of a table, for one of a model's parameters.

  Attributes:
    leaf: with names in place of {}.
    layer: the number of the parameter's layer; 0 of what is in none.
  """

  leaf: Leaf
  layer: int


def sizes_of(model: model_config_lib.ModelConfig) -> dict[str, int]:
  """Returns how long the axes are that letters stand for."""
  return {
    'v': model.vocab_size,
    'd': model.hidden_size,
    'f': model.intermediate_size,
    'e': max(model.layer_mlp(i).num_experts for i in range(model.num_layers)),
    'n': model.num_heads,
    'k': model.num_kv_heads,
    'h': model.head_dim,
    'p': model.head_dim // 2,  # pairs of numbers that are rotated, each of c
    'q': model.num_heads * model.head_dim,
    'r': model.num_kv_heads * model.head_dim,
    _LAYERS: model.num_layers,
    **_FIXED,
  }


def rows_of(
  model: model_config_lib.ModelConfig, table: Iterable[Leaf]
) -> dict[str, Row]:
  """Returns the row of each of a model's parameters, by its name.

  Rows of parameters that the model has not are left out.

  Raises:
    ConfigError: there is no row of one that it has.
  """
  by_name = {leaf.ours: leaf for leaf in table}
  rows = {}
  for name in tree_lib.named_leaves(models.param_specs(model)):
    words = name.split('.')
    number = words[1] if words[0] == 'layers' else ''
    words[1:2] = ['{}'] if number else words[1:2]
    general = '.'.join(words)
    leaf = by_name.get(name) or by_name.get(general)
    if leaf is None:
      raise errors.ConfigError(
        f'layout: has no row for {general} of a {model.family}; it has '
        f'{", ".join(sorted(by_name))}.'
      )
    named = leaf._replace(ours=name, theirs=leaf.theirs.format(number))
    rows[name] = Row(named, int(number or 0))
  return rows


def shapes_of(
  model: model_config_lib.ModelConfig, table: Iterable[Leaf]
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a trainer's leaves, by their names.

  Raises:
    ConfigError: the table is not one of this model.
  """
  general = sizes_of(model)
  specs = tree_lib.named_leaves(models.param_specs(model))
  shapes: dict[str, list[int]] = {}
  for name, (leaf, _) in rows_of(model, table).items():
    groups, wanted = leaf.groups, specs[name].shape
    sizes = general | {
      group: size
      for group, size in zip(groups, wanted, strict=False)
      if len(group) == 1
    }
    axes = [int(x) + 1 if x.isdigit() else _size(sizes, x) for x in leaf.source]
    if tuple(_size(sizes, group) for group in groups) != wanted:
      raise errors.ConfigError(
        f'layout: {leaf.axes!r} of {leaf.ours} must make {list(wanted)}, of '
        f'axes whose letters are {general}.'
      )
    shape = shapes.setdefault(leaf.theirs, [0] * len(axes))
    shape[:] = map(max, shape, axes)
  return {name: tuple(shape) for name, shape in shapes.items()}


def _size(sizes: Mapping[str, int], axis: str) -> int:
  """Returns the size of an axis; 0 if a letter of it is unknown."""
  return math.prod(sizes.get(letter, 0) for letter in axis)


def check(
  found: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], what: str
) -> None:
  """Checks that a trainer's leaves are those that a table describes.

  Raises:
    ConfigError: one is missing, unknown, deleted, or of another shape.
  """
  for names, is_what, others, are_what in (
    (wanted.keys() - found.keys(), 'missing', found, 'Found is'),
    (found.keys() - wanted.keys(), 'unknown', wanted, 'Known is'),
  ):
    if names:
      name = min(names)
      (near,) = difflib.get_close_matches(name, sorted(others), 1, 0) or ('',)
      raise errors.ConfigError(
        f'params.{name}: {is_what} in a {what}.'
        + (f' {are_what} params.{near}.' if near else '')
      )
  for name, leaf in found.items():
    alive.check(name, leaf)
    if leaf.shape != wanted[name]:
      raise errors.ConfigError(
        f'params.{name}: has the shape {list(leaf.shape)}; must have '
        f'{list(wanted[name])}.'
      )


class Converter:
  """Makes a model's parameters of a trainer's, again and again.

  What it makes stays its own: the next call deletes it, leaf by leaf, before
  its successor is made. So nothing may use it meanwhile, and if a call fails
  there, call again.
  """

  def __init__(
    self,
    model: model_config_lib.ModelConfig,
    table: Iterable[Leaf],
    mesh: Mesh,
    dtype: Any,
    what: str,
  ) -> None:
    """Says what is to be made.

    Args:
      model: the model.
      table: describes the trainer's tree.
      mesh: ('pp', 'tp'), that the model runs on.
      dtype: to serve in.
      what: a name for the trainer's model.
    """
    table = tuple(table)
    self._what = what
    self._specs = models.param_specs(model)
    self._rows = rows_of(model, table)
    self._shapes = shapes_of(model, table)
    self._places: dict[str, placement.Place] = {
      name: place
      for place in jax.tree.leaves(
        placement.places(model, mesh, placement.of_live(dtype))
      )
      for part in place.parts
      for name in part.names
      if name is not None
    }
    self._made: dict[str, jax.Array] = {}

  def __call__(self, leaves: Mapping[str, jax.Array]) -> Params:
    """Returns the tree of `models.param_specs`.

    Args:
      leaves: the trainer's, by their names.

    Raises:
      ConfigError: they are not those of the table; nothing was deleted.
    """
    check(leaves, self._shapes, self._what)
    made = {
      name: self._one(name, row, leaves[row.leaf.theirs])
      for name, row in self._rows.items()
    }
    return tree_lib.with_leaves(self._specs, made)

  def _one(self, name: str, row: Row, array: jax.Array) -> jax.Array:
    place = self._places[name]
    (part, *_) = place.parts
    lies_so = not place.has_stages and part.shape == part.spec.shape
    wanted = place.sharding if lies_so else None
    leaf, axis = row.leaf, row.leaf.layers_axis
    is_kept = leaf.is_same and array.dtype == place.dtype

    def lies_there(array: jax.Array) -> bool:
      return is_kept and (
        wanted is None or array.sharding.is_equivalent_to(wanted, array.ndim)
      )

    if axis is None and lies_there(array):
      return array
    if (old := self._made.pop(name, None)) is not None:
      old.delete()
    if axis is not None:
      array, leaf = _layer_of(array, axis, row.layer), leaf.unstacked()
    if axis is None or not lies_there(array):
      near = jax.device_put(
        array,
        _source_sharding(leaf, place, array.shape),
        may_alias=False if is_kept else None,  # It will be deleted.
      )
      array = _maker(leaf.axes, place.dtype, wanted)(near)
    if wanted is not None:
      self._made[name] = array
    return array


def _source_sharding(
  leaf: Leaf, place: placement.Place, shape: tuple[int, ...]
) -> Sharding:
  """Returns how theirs lies on the mesh where making ours moves nothing."""
  by_letter = {
    group[0]: axes
    for group, axes in zip(leaf.groups, place.source_axes, strict=True)
  }
  return mesh_lib.on(
    place.mesh,
    *(
      axes
      if size % placement.num_shares(axes := by_letter.get(axis[0]), place.mesh)
      == 0
      else None
      for axis, size in zip(leaf.source, shape, strict=True)
    ),
  )


def _layer_of(array: jax.Array, axis: int, layer: int) -> jax.Array:
  """Returns a copy of a layer's part, on the devices where all lie."""
  sharding = array.sharding
  if isinstance(sharding, NamedSharding):
    # Explicit axes may not be sliced where they are sharded. Nothing is moved.
    mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
    array = jax.device_put(array, NamedSharding(mesh, sharding.spec))
  taken: jax.Array = _taker(axis)(array, layer)
  return taken


@functools.cache
def _taker(axis: int) -> Any:
  """Returns what takes a layer's part, compiled once for all of a shape."""
  return jax.jit(
    lambda array, layer: jax.lax.dynamic_index_in_dim(
      array, layer, axis, keepdims=False
    )
  )


@functools.cache
def _maker(axes: str, dtype: Any, sharding: Sharding | None) -> Any:
  """Returns what makes ours of theirs, compiled once for all alike."""

  def make(array: jax.Array) -> jax.Array:
    leaf = Leaf('', '', axes)
    sizes: dict[str, int] = {}
    for i, axis in enumerate(leaf.source):
      if axis.isdigit():
        array = jax.lax.index_in_dim(array, int(axis), i)
        continue
      free, *fixed = sorted(axis, key=_FIXED.__contains__)
      sizes |= {letter: _FIXED[letter] for letter in fixed}
      sizes[free] = array.shape[i] // math.prod(_FIXED[x] for x in fixed)
    letters = [x for axis in leaf.source for x in axis if not x.isdigit()]
    array = array.reshape([sizes[letter] for letter in letters])
    order = [letters.index(letter) for group in leaf.groups for letter in group]
    array = array.transpose(order)
    return jnp.reshape(
      array,
      [math.prod(sizes[letter] for letter in group) for group in leaf.groups],
    ).astype(dtype)

  return jax.jit(make, out_shardings=sharding)
