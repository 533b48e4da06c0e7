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
from jax.sharding import Sharding

from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import tree as tree_lib
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement

Params = Any  # a pytree of arrays, as models.param_specs says


class Leaf(NamedTuple):
  """Where a parameter is in a trainer's tree, and how it lies there.

  Attributes:
    ours: its name in `models.param_specs`, with {} for the number of a layer.
    theirs: its name in the trainer's tree.
    axes: the axes of theirs, a letter each (`sizes_of`); a digit takes that
      element of an axis. Behind '->' are the axes of ours, each of one letter
      or more; without it, ours are the same.
  """

  ours: str
  theirs: str
  axes: str

  @property
  def source(self) -> str:
    """The axes of theirs."""
    return self.axes.partition('->')[0]

  @property
  def groups(self) -> tuple[str, ...]:
    """The axes of ours."""
    source, _, target = self.axes.partition('->')
    return tuple(target.split()) or tuple(source)

  @property
  def is_same(self) -> bool:
    """Whether ours is theirs, as it lies."""
    return self.groups == tuple(self.source)


def sizes_of(model: model_config_lib.ModelConfig) -> dict[str, int]:
  """Returns the size of each axis that a table may name."""
  return {
    'v': model.vocab_size,
    'd': model.hidden_size,
    'f': model.intermediate_size,
    'e': max(model.layer_mlp(i).num_experts for i in range(model.num_layers)),
    'n': model.num_heads,
    'k': model.num_kv_heads,
    'h': model.head_dim,
    'q': model.num_heads * model.head_dim,
    'r': model.num_kv_heads * model.head_dim,
  }


def rows_of(
  model: model_config_lib.ModelConfig, table: Iterable[Leaf]
) -> dict[str, Leaf]:
  """Returns the row of each of a model's parameters, by its name.

  Rows of parameters that the model has not are left out.
  """
  by_name = {leaf.ours: leaf for leaf in table}
  rows = {}
  for name in tree_lib.named_leaves(models.param_specs(model)):
    words = name.split('.')
    number = words[1] if words[0] == 'layers' else ''
    words[1:2] = ['{}'] if number else words[1:2]
    leaf = by_name['.'.join(words)]
    rows[name] = leaf._replace(ours=name, theirs=leaf.theirs.format(number))
  return rows


def shapes_of(
  model: model_config_lib.ModelConfig, table: Iterable[Leaf]
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a trainer's leaves, by their names."""
  sizes = sizes_of(model)
  shapes: dict[str, list[int]] = {}
  for leaf in rows_of(model, table).values():
    shape = shapes.setdefault(leaf.theirs, [0] * len(leaf.source))
    for axis, letter in enumerate(leaf.source):
      size = int(letter) + 1 if letter.isdigit() else sizes[letter]
      shape[axis] = max(shape[axis], size)
  return {name: tuple(shape) for name, shape in shapes.items()}


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
    if not isinstance(leaf, jax.Array) or leaf.is_deleted():
      is_what = (
        'deleted, or donated to a computation'
        if isinstance(leaf, jax.Array)
        else f'a {type(leaf).__name__}'
      )
      raise errors.ConfigError(
        f'params.{name}: is {is_what}; must be a jax.Array that is alive.'
      )
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
      name: self._one(name, row, leaves[row.theirs])
      for name, row in self._rows.items()
    }
    return tree_lib.with_leaves(self._specs, made)

  def _one(self, name: str, row: Leaf, leaf: jax.Array) -> jax.Array:
    place = self._places[name]
    (part, *_) = place.parts
    lies_so = not place.has_stages and part.shape == part.spec.shape
    wanted = place.sharding if lies_so else None
    is_kept = row.is_same and leaf.dtype == place.dtype
    if is_kept and (
      wanted is None or leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    ):
      return leaf
    if (old := self._made.pop(name, None)) is not None:
      old.delete()
    near = jax.device_put(
      leaf,
      _source_sharding(row, place, leaf.shape),
      may_alias=False if is_kept else None,  # It will be deleted.
    )
    made: jax.Array = _maker(row.axes, place.dtype, wanted)(near)
    if wanted is not None:
      self._made[name] = made
    return made


def _source_sharding(
  row: Leaf, place: placement.Place, shape: tuple[int, ...]
) -> Sharding:
  """Returns how theirs lies on the mesh where making ours moves nothing."""
  by_letter = {
    group[0]: axes
    for group, axes in zip(row.groups, place.source_axes, strict=True)
  }
  return mesh_lib.on(
    place.mesh,
    *(
      axes
      if size % placement.num_shares(axes := by_letter.get(letter), place.mesh)
      == 0
      else None
      for letter, size in zip(row.source, shape, strict=True)
    ),
  )


@functools.cache
def _maker(axes: str, dtype: Any, sharding: Sharding | None) -> Any:
  """Returns what makes ours of theirs, compiled once for all alike."""

  def make(leaf: jax.Array) -> jax.Array:
    row = Leaf('', '', axes)
    for axis, letter in enumerate(row.source):
      if letter.isdigit():
        leaf = jax.lax.index_in_dim(leaf, int(letter), axis)
    letters = [letter for letter in row.source if not letter.isdigit()]
    sizes = dict(zip(row.source, leaf.shape, strict=True))
    leaf = leaf.reshape([sizes[letter] for letter in letters])
    order = [letters.index(letter) for group in row.groups for letter in group]
    leaf = leaf.transpose(order)
    return jnp.reshape(
      leaf,
      [math.prod(sizes[letter] for letter in group) for group in row.groups],
    ).astype(dtype)

  return jax.jit(make, out_shardings=sharding)
