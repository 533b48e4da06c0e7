# SPDX-License-Identifier: Apache-2.0
"""Says where each parameter lies on the mesh, and how.

On a mesh with stages, layer number i of all stages is one array, whose first
axis is the stages. Axes are split by their names (`_SPLIT`).
Key and value heads are repeated where there are more devices than heads, and
the vocabulary is padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import Sharding

from pallas_kernels import panel_matmul
from sarathi_jax import config as config_lib
from sarathi_jax import models
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import matrices
from sarathi_jax.models import quantization
from sarathi_jax.models import quantized
from sarathi_jax.models import spec
from sarathi_jax.models import tree as tree_lib
from sarathi_jax.runner import mesh as mesh_lib

Params = Any  # a pytree of arrays
Node = type[matrices.Matrix] | None

# Name of a parameter's axis -> the axes of the mesh it is split over.
_SPLIT: Mapping[str | None, Any] = {
  'vocab': mesh_lib.TP,
  'logits': (mesh_lib.TP, mesh_lib.PP),
  'heads': mesh_lib.TP,
  'kv_heads': mesh_lib.TP,
  'mlp': mesh_lib.TP,
  'whole_experts': mesh_lib.TP,
}


def as_array(name: str, leaf: spec.ParamSpec) -> Node:
  """Keeps a parameter as it is."""
  del name, leaf
  return None


def transposed(name: str, leaf: spec.ParamSpec) -> Node:
  """Keeps what rows are multiplied by as `matrices.Transposed`."""
  del name
  return matrices.Transposed if leaf.is_factor else None


def in_panels(name: str, leaf: spec.ParamSpec) -> Node:
  """Keeps what rows are multiplied by as `matrices.Panels`, where it fits."""
  del name
  return matrices.Panels if leaf.is_factor else None


def tables_in_panels(name: str, leaf: spec.ParamSpec) -> Node:
  """Keeps an embedding that is the output matrix in panels, too."""
  return matrices.Table if leaf.is_table else in_panels(name, leaf)


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
  """How the weights of a model lie.

  Attributes:
    dtype: that the model computes in. Parameters are converted to it first, and
      kept in it but for what their nodes keep, and what their specs say.
    node: says which node a parameter is kept as, by its name and spec; None:
      an array. Quantized ones are nodes of the model's, whatever it says.
    merged: whether the matrices of each of `spec.GROUPS` are kept as one.
    codes_by_columns: whether codes that multiply rows of codes lie so; see
      `quantized.Quantized`.
    codes_in_panels: whether codes lie in panels, too, which divide them.
    given: the dtype that parameters come in where it is another, and that
      panels keep.
  """

  dtype: Any
  node: Callable[[str, spec.ParamSpec], Node] = as_array
  merged: bool = False
  codes_by_columns: bool = False
  codes_in_panels: bool = False
  given: Any = None

  @property
  def given_dtype(self) -> Any:
    """The dtype that parameters come in."""
    return self.dtype if self.given is None else self.given

  def converted(self, node: Node) -> Any:
    """Returns the dtype that a node is made of."""
    keeps = isinstance(node, type) and issubclass(node, matrices.Panels)
    return self.given_dtype if keeps else self.dtype


def of_live(dtype: Any) -> Layout:
  """Returns how live arrays lie: as they are, so that none is copied."""
  return Layout(jnp.dtype(dtype))


def of_checkpoint(mesh: Mesh, dtype: Any, given: Any = None) -> Layout:
  """Returns how weights that are read lie on a mesh: as steps are fastest.

  On GPUs, a launch less is worth it, and XLA would merge products itself, of
  matrices that it first copies. On CPUs no gain was seen. Hopper multiplies
  codes by codes where what is summed lies together.

  Args:
    mesh: the devices.
    dtype: that the model computes in.
    given: that the weights are in, for panels to keep; None: `dtype`.
  """
  dtype = jnp.dtype(dtype)
  if mesh.devices.flat[0].platform != 'cpu':
    return Layout(dtype, merged=True, codes_by_columns=True)
  if not panel_matmul.is_available():
    return Layout(dtype, transposed)
  given = None if given is None else jnp.dtype(given)
  return Layout(
    dtype,
    in_panels,
    codes_in_panels=True,
    given=None if given == dtype else given,
  )


def choose_layout(
  model: model_config_lib.ModelConfig, name: str, dtype: Any, mesh: Mesh
) -> Layout:
  """Returns how a checkpoint's weights lie; as `choose_dtype` and its errors.

  What nobody asked to be in a dtype is kept as it is, where panels can.
  """
  chosen = choose_dtype(model, name, dtype, mesh)
  is_open = name == config_lib.AUTO
  layout = of_checkpoint(mesh, chosen, dtype if is_open else None)
  parallelism = mesh_lib.parallelism_of(mesh)
  share, rest = divmod(parallelism.vocab_size(model), parallelism.tp)
  if (
    model.tie_word_embeddings
    and layout.node is in_panels
    and layout.dtype == jnp.float32
    and parallelism.pp == 1  # where each stage multiplies by a part of it
    and not rest
    and share % panel_matmul.COLUMNS == 0
  ):
    return dataclasses.replace(layout, node=tables_in_panels)
  return layout


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
  """A parameter of an array on the mesh.

  Attributes:
    names: of the parameter: one, or one a stage; None for zeros.
    spec: of each parameter.
    shape: of each parameter on the mesh: heads repeated, vocabulary padded.
    head_dim: h.
  """

  names: tuple[str | None, ...]
  spec: spec.ParamSpec
  shape: tuple[int, ...]
  head_dim: int


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
  """One array on the mesh, and the parameters that it is made of.

  A device's share of the array is made of its shares of the parameters.

  Attributes:
    parts: the parameters, side by side if there are several.
    mesh: the mesh.
    dtype: of the array.
    source_dtype: of the parameters that it is made of.
    shape: of the array, without the stages' axis.
    order: for each axis of the array, the one of the parameters it follows.
    node: the node whose array it is; None: it is the parameters themselves.
    leaf: which array of the node.
  """

  parts: tuple[Part, ...]
  mesh: Mesh
  dtype: Any
  source_dtype: Any
  shape: tuple[int, ...]
  order: tuple[int, ...]
  node: Node = None
  leaf: int = 0

  @property
  def num_stages(self) -> int:
    return len(self.parts[0].names)

  @property
  def has_stages(self) -> bool:
    """Whether the array has a first axis, for the stages."""
    return self.num_stages > 1

  @property
  def global_shape(self) -> tuple[int, ...]:
    return (self.num_stages, *self.shape) if self.has_stages else self.shape

  @property
  def source_axes(self) -> tuple[Any, ...]:
    """For each axis of the parameters, the mesh's axes that split it."""
    return _axes_of(self.parts[0].spec)

  @property
  def axes(self) -> tuple[Any, ...]:
    """The same for each axis of the array but the stages'."""
    return tuple(self.source_axes[axis] for axis in self.order)

  @property
  def sharding(self) -> Sharding:
    return mesh_lib.on(self.mesh, *[mesh_lib.PP] * self.has_stages, *self.axes)

  def share(self, part: Part) -> tuple[int, ...]:
    """Returns the shape of a device's share of a parameter."""
    return _share(part, self.mesh)


def array_of(node: Node, leaf: int, whole: Any) -> Any:
  """Makes a device's share of an array.

  Args:
    node, leaf: of its Place.
    whole: the device's shares of the place's parameters, side by side.
  """
  return whole if node is None else jax.tree.leaves(node.of(whole))[leaf]


def choose_dtype(
  model: model_config_lib.ModelConfig, name: str, dtype: Any, mesh: Mesh
) -> Any:
  """Returns the dtype that a checkpoint's weights are served in.

  'auto' is its own, except on CPUs: these compute in float32, and XLA would
  widen all of a matrix of 16 bits each time that it is used.

  Args:
    model: the model.
    name: `config.dtype`.
    dtype: of the checkpoint.
    mesh: the devices.

  Raises:
    ConfigError: the model can't be computed in it.
  """
  if name == config_lib.AUTO:
    is_cpu = mesh.devices.flat[0].platform == 'cpu'
    name = 'float32' if is_cpu else jnp.dtype(dtype).name
  model.check_dtype(name)
  return jnp.dtype(name)


def places(
  model: model_config_lib.ModelConfig, mesh: Mesh, layout: Layout
) -> Any:
  """Returns a tree of Place, shaped as the parameters on the mesh.

  It is shaped as `models.param_specs`, but 'layers' are those of one stage, and
  there are the nodes and groups of the layout.

  Raises:
    ConfigError: layers of a kind are one array, and are kept in several ways.
  """
  parallelism = mesh_lib.parallelism_of(mesh)
  sizes: dict[str | None, int] = {
    'vocab': parallelism.vocab_size(model),
    'logits': parallelism.vocab_size(model),
    'kv_heads': parallelism.num_kv_heads(model) * model.head_dim,
  }

  def part(
    name: str, leaf: spec.ParamSpec, layers: tuple[int | None, ...]
  ) -> Part:
    shape = tuple(
      sizes.get(axis, size)
      for axis, size in zip(leaf.axes, leaf.shape, strict=True)
    )
    names = tuple(
      None if layer is None else name.format(layer) for layer in layers
    )
    return Part(names, leaf, shape, model.head_dim)

  def placed(
    paths: Sequence[str],
    specs: Sequence[Any],
    node: Node,
    layers: tuple[int | None, ...],
  ) -> Any:
    """Returns the Place of parameters side by side, or of each array of them.

    These are quantized, all alike: codes are side by side, and scales.
    """
    first = specs[0]

    def one(path: Any, *leaves: spec.ParamSpec) -> Any:
      names = [tree_lib.joined(of, path) for of in paths]
      parts = tuple(map(part, names, leaves, itertools.repeat(layers)))
      of_leaf = nodes.get(id(leaves[0]), node)
      return place_of(parts, of_leaf, mesh, layout.converted(of_leaf))

    nodes: dict[int, Node] = {}
    if not isinstance(first, quantized.Quantized):
      return jax.tree.map_with_path(one, *specs)
    by_columns = layout.codes_by_columns and first.activations is not None
    in_panels = layout.codes_in_panels and all(
      _share(part('', of.values, layers), mesh)[-1] % panel_matmul.COLUMNS == 0
      for of in specs
    )
    if by_columns:
      nodes[id(first.values)] = matrices.Transposed
    if in_panels:
      is_packed = quantization.CODES[first.codes].bits == 4
      of_values = matrices.PackedPanels if is_packed else matrices.Panels
      nodes |= dict.fromkeys(
        map(id, (first.scale, first.zero)), matrices.Panels
      )
      nodes[id(first.values)] = of_values
    made = jax.tree.map_with_path(one, *specs)
    kept = {
      name: getattr(place, 'array', place)
      for name, place in made.arrays().items()
    }
    return dataclasses.replace(
      made, **kept, by_columns=by_columns, in_panels=in_panels
    )

  def kind(path: str, specs: Any) -> Any:
    """Returns what parameters that are to be one have in common."""
    if isinstance(specs, spec.ParamSpec):
      return layout.node(path, specs)
    if specs.order is not None:  # Each has its own, of what it multiplies.
      return path
    return jax.tree.structure(specs)

  def tree(specs: Any, path: str, layers: tuple[int | None, ...]) -> Any:
    if isinstance(specs, spec.ParamSpec):
      return placed([path], [specs], layout.node(path, specs), layers)
    if isinstance(specs, quantized.Quantized):
      return placed([path], [_with_gathered(specs, mesh)], None, layers)
    paths = {name: f'{path}.{name}' if path else name for name in specs}
    groups = {}

    def merge(group: str, names: tuple[str, ...], node: Node) -> None:
      matrix = placed(
        [paths.pop(n) for n in names], [specs[n] for n in names], node, layers
      )
      first: Place = jax.tree.leaves(matrix)[0]
      groups[group] = matrices.SideBySide(
        matrix, tuple(first.share(one)[-1] for one in first.parts)
      )

    for group, names in spec.GROUPS.items() if layout.merged else ():
      if not specs.keys() >= set(names) or _is_of_experts(specs[names[0]]):
        continue
      kinds = {kind(paths[name], specs[name]) for name in names}
      if len(kinds) > 1:  # Some are kept otherwise, so all stay apart.
        continue
      (node,) = kinds
      merge(group, names, node if isinstance(node, type) else None)
      biases = tuple(f'{name}_bias' for name in names)
      if biases[0] in specs:
        merge(f'{group}_bias', biases, None)
    return groups | {
      name: tree(specs[name], inner, layers) for name, inner in paths.items()
    }

  specs = models.param_specs(model)
  layer_specs = specs.pop('layers')

  def stages(index: int) -> Any:
    layers = parallelism.layers_of(model, index)
    return tree(_specs_of_all(layer_specs, layers), 'layers.{}', layers)

  return tree(specs, '', (0,)) | {
    'layers': [stages(i) for i in range(parallelism.num_layers(model))]
  }


def _specs_of_all(specs: Sequence[Any], layers: tuple[int | None, ...]) -> Any:
  """Returns the specs that one layer of each stage has, which are one array."""
  first, *others = [layer for layer in layers if layer is not None]
  for other in others:
    config_lib.check(
      specs[other] == specs[first],
      'pp',
      len(layers),
      f'layers {first} and {other} are to be one array, and only one of them '
      'has a matrix that is not quantized (quantization.kept)',
    )
  return specs[first]


def _with_gathered(
  specs: quantized.Quantized, mesh: Mesh
) -> quantized.Quantized:
  """Returns the specs with what is to be gathered before they multiply."""
  if specs.order is None:
    return specs
  axis = _SPLIT.get(specs.order.axes[-1])
  if axis is None or mesh.shape.get(axis, 1) == 1:
    return specs
  return dataclasses.replace(specs, gathered=axis)


def _is_of_experts(specs: Any) -> bool:
  leaf: spec.ParamSpec = jax.tree.leaves(specs)[0]
  return leaf.is_of_experts


def place_of(
  parts: tuple[Part, ...], node: Node, mesh: Mesh, dtype: Any
) -> Any:
  """Returns the Place of parameters side by side, or their node of Places."""
  axes = _axes_of(parts[0].spec)
  assert all(_axes_of(part.spec) == axes for part in parts)
  dtype = jnp.dtype(parts[0].spec.dtype or dtype)
  shares = [_share(part, mesh) for part in parts]
  share = (*shares[0][:-1], sum(share[-1] for share in shares))

  def place(array: Any, order: tuple[int, ...], leaf: int = 0) -> Place:
    shape = tuple(
      size * num_shares(axes[axis], mesh)
      for axis, size in zip(order, array.shape, strict=True)
    )
    return Place(parts, mesh, array.dtype, dtype, shape, order, node, leaf)

  order = tuple(range(len(axes)))
  if node is None:
    return place(jax.ShapeDtypeStruct(share, dtype), order)
  made = _shapes_of(node, share, dtype)
  arrays: list[Any]
  treedef: Any
  arrays, treedef = jax.tree.flatten(made)
  return treedef.unflatten(
    place(array, (*order[:-2], *(order[axis] for axis in last)), leaf)
    for leaf, (array, last) in enumerate(
      zip(arrays, treedef.flatten_up_to(made.axes()), strict=True)
    )
  )


@functools.cache  # Layers are alike, and tracing takes time.
def _shapes_of(
  node: type[matrices.Matrix], share: tuple[int, ...], dtype: Any
) -> Any:
  """Returns a node with the shapes of its arrays."""
  return jax.eval_shape(node.of, jax.ShapeDtypeStruct(share, dtype))


def _axes_of(leaf: spec.ParamSpec) -> tuple[Any, ...]:
  return tuple(_SPLIT.get(axis) for axis in leaf.axes)


def num_shares(axes: Any, mesh: Mesh) -> int:
  """Returns how many shares there are along what the mesh's axes split."""
  names = axes if isinstance(axes, tuple) else (axes,)
  return math.prod(mesh.shape[name] for name in names if name is not None)


def _share(part: Part, mesh: Mesh) -> tuple[int, ...]:
  return tuple(
    size // num_shares(axes, mesh)
    for size, axes in zip(part.shape, _axes_of(part.spec), strict=True)
  )


def shapes(
  model: model_config_lib.ModelConfig, mesh: Mesh, layout: Layout
) -> Params:
  """Returns the parameters on the mesh as ShapeDtypeStruct, for compiling."""
  return jax.tree.map(shape_of, places(model, mesh, layout))


def shape_of(place: Place) -> jax.ShapeDtypeStruct:
  """Returns the array of a place, for compiling."""
  return jax.ShapeDtypeStruct(
    place.global_shape, place.dtype, sharding=place.sharding
  )


def bytes_of(tree: Any) -> int:
  """Counts one device's bytes of a tree of ShapeDtypeStruct with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )
