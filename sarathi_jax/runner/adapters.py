# SPDX-License-Identifier: Apache-2.0
"""Keeps LoRA adapters on the mesh, in slots, beside the matrices they change.

Where these lie is told by where the matrices do: an A has the rows of its
matrix, and a B its columns, shared out, repeated and side by side as theirs
are. All slots of a matrix are one array, of which one is written at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import json
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from sarathi_jax import config as config_lib
from sarathi_jax.checkpoint import params_reader
from sarathi_jax.models import adapters as adapters_lib
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import spec
from sarathi_jax.runner import placement
from sarathi_jax.runner import settings
from sarathi_jax.runner import weights as weights_lib

# Of each matrix that an adapter changes, by its name: A [in, rank] and
# B [rank, out], with the scale in it.
Matrices = Mapping[str, tuple[np.ndarray, np.ndarray]]
DEFAULT_RANK = 16  # vLLM's
_A, _B = '.a', '.b'
_MESSAGE_NUMBERS = 1 << 24  # after which a message to other hosts ends


def slots_of(config: config_lib.EngineConfig) -> adapters_lib.Slots | None:
  """Returns the room for adapters of a deployment; None if there is none."""
  if not config.max_loras:
    return None
  return adapters_lib.Slots(
    config.max_loras, config.max_lora_rank or DEFAULT_RANK
  )


def places(
  model: model_config_lib.ModelConfig,
  mesh: Mesh,
  layout: placement.Layout,
  slots: adapters_lib.Slots,
) -> list[Any]:
  """Returns where adapters lie: for each layer of a stage a tree.

  It ends in `adapters.LowRank` of `placement.Place`, by the names of matrices,
  or of those that are side by side. Experts have none.
  """
  num = slots.num * slots.rank
  # Of quantized matrices the arrays tell neither names nor sizes.
  whole = dataclasses.replace(model, quantization=None)
  apart = placement.of_live(layout.dtype)

  def low_rank(parts: Sequence[placement.Part]) -> adapters_lib.LowRank:
    rows = len(parts) * num
    of_a, of_b = [], []
    for part in parts:
      in_axis, out_axis = part.spec.axes
      (width, columns), (wide, copied) = part.spec.shape, part.shape
      of_a.append(_part(part, _A, (in_axis, None), (width, num), (wide, num)))
      of_b.append(
        _part(part, _B, (None, out_axis), (rows, columns), (rows, copied))
      )
    return adapters_lib.LowRank(
      *(
        placement.place_of(tuple(parts), None, mesh, layout.dtype)
        for parts in (of_a, of_b)
      )
    )

  def tree(params: Mapping[str, Any], matrices: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, node in params.items():
      if isinstance(node, dict):
        found[name] = tree(node, matrices[name])
      elif name in adapters_lib.TARGETS or name in spec.GROUPS:
        parts = [
          matrices[one].parts[0] for one in spec.GROUPS.get(name, (name,))
        ]
        if not parts[0].spec.is_of_experts:
          found[name] = low_rank(parts)
    return {name: inner for name, inner in found.items() if inner}

  return [
    tree(params, matrices)
    for params, matrices in zip(
      placement.places(model, mesh, layout)['layers'],
      placement.places(whole, mesh, apart)['layers'],
      strict=True,
    )
  ]


def _part(
  of: placement.Part,
  end: str,
  axes: tuple[str | None, ...],
  shape: tuple[int, ...],
  on_mesh: tuple[int, ...],
) -> placement.Part:
  names = tuple(name and name + end for name in of.names)
  return placement.Part(
    names, spec.ParamSpec(shape, axes), on_mesh, of.head_dim
  )


def shapes(
  model: model_config_lib.ModelConfig,
  mesh: Mesh,
  layout: placement.Layout,
  slots: adapters_lib.Slots,
) -> list[Any]:
  """Returns the adapters on the mesh as ShapeDtypeStruct, for compiling."""
  return jax.tree.map(placement.shape_of, places(model, mesh, layout, slots))


class DeviceAdapters:
  """The adapters on the mesh; their slots are zeros until one is put there.

  Args:
    model, mesh, layout: of the matrices that they change.
    slots: the room.

  Attributes:
    leaves: their arrays, in the order of `shapes`.
  """

  def __init__(
    self,
    model: model_config_lib.ModelConfig,
    mesh: Mesh,
    layout: placement.Layout,
    slots: adapters_lib.Slots,
  ) -> None:
    self._slots = slots
    self._shapes = shapes(model, mesh, layout, slots)
    self._of_one = places(
      model, mesh, layout, adapters_lib.Slots(1, slots.rank)
    )
    of_one = jax.tree.map(placement.shape_of, self._of_one)
    self._put = (
      jax.jit(
        functools.partial(_put, slots),
        donate_argnums=0,
        out_shardings=jax.tree.map(lambda s: s.sharding, self._shapes),
      )
      .lower(self._shapes, of_one, jax.ShapeDtypeStruct((), jnp.int32))
      .compile()
    )
    self.start()

  def start(self) -> None:
    """Empties all slots."""
    self._arrays = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
      self._shapes,
    )
    self.leaves: list[jax.Array] = jax.tree.leaves(self._arrays)

  def put(self, slot: int, adapter: Matrices) -> None:
    """Puts an adapter in a slot, instead of what is there; compiles nothing.

    Batches that were launched before are computed with what was there.
    """
    read = functools.partial(_read, adapter, self._slots.rank)
    with settings.own():
      one = weights_lib.load_places(self._of_one, read)
      self._arrays = self._put(self._arrays, one, np.int32(slot))
    self.leaves = jax.tree.leaves(self._arrays)


def messages(slot: int, adapter: Matrices) -> Iterator[np.ndarray]:
  """Yields what tells other hosts to put an adapter in a slot, int32.

  A message has some matrices: its bytes of JSON, that, and their numbers.
  """
  left = list(adapter.items())
  while True:
    size = 0
    part: list[tuple[str, tuple[np.ndarray, np.ndarray]]] = []
    while left and (not part or size < _MESSAGE_NUMBERS):
      part.append(left.pop(0))
      size += sum(array.size for array in part[-1][1])
    head = json.dumps(
      {
        'slot': slot,
        'is_last': not left,
        'shapes': [(name, len(a), *b.shape) for name, (a, b) in part],
      }
    ).encode()
    head += b' ' * (-len(head) % 4)
    yield np.concatenate(
      [
        np.array([len(head)], np.int32),
        np.frombuffer(head, np.int32),
        *(
          np.asarray(array, np.float32).reshape(-1).view(np.int32)
          for _, pair in part
          for array in pair
        ),
      ]
    )
    if not left:
      return


class Received:
  """Puts adapters in slots as another host's messages say."""

  def __init__(self) -> None:
    self._matrices: dict[str, tuple[np.ndarray, np.ndarray]] = {}

  def take(self, ints: np.ndarray, into: DeviceAdapters) -> None:
    """Takes one of `messages`, in order; with the last, all is put there."""
    size = int(ints[0])
    head = json.loads(ints[1:].view(np.uint8)[:size].tobytes())
    numbers = ints[1 + size // 4 :].view(np.float32)
    for name, rows, rank, columns in head['shapes']:
      a, b, numbers = np.split(numbers, (rows * rank, (rows + columns) * rank))
      self._matrices[name] = a.reshape(rows, rank), b.reshape(rank, columns)
    if head['is_last']:
      matrices, self._matrices = self._matrices, {}
      into.put(head['slot'], matrices)


def _put(
  slots: adapters_lib.Slots, arrays: Any, one: Any, slot: jax.Array
) -> Any:
  """Returns the arrays of all slots with one's in them."""

  def put(
    into: adapters_lib.LowRank, new: adapters_lib.LowRank
  ) -> adapters_lib.LowRank:
    def along(axis: int, into: jax.Array, new: jax.Array) -> jax.Array:
      """Puts one along an axis of [matrices * slots * rank] numbers."""
      at = into.ndim + axis
      front, back = into.shape[:at], into.shape[at + 1 :]
      apart = into.reshape(*front, -1, slots.num, slots.rank, *back)
      part = new.reshape(*front, -1, 1, slots.rank, *back)
      put = lax.dynamic_update_slice_in_dim(apart, part, slot, axis=at + 1)
      return put.reshape(into.shape)

    return adapters_lib.LowRank(
      along(-1, into.a, new.a), along(-2, into.b, new.b)
    )

  return jax.tree.map(
    put, arrays, one, is_leaf=lambda x: isinstance(x, adapters_lib.LowRank)
  )


def _read(
  adapter: Matrices, rank: int, name: str, index: params_reader.Slices
) -> np.ndarray:
  """Reads a part of what `places` names, for a single slot."""
  matrix, end = name[: -len(_A)], name[-len(_A) :]
  part = np.zeros([s.stop - s.start for s in index], np.float32)
  if matrix not in adapter:
    return part
  a, b = adapter[matrix]
  if end == _A:
    part[:, : a.shape[1]] = a[index[0]]
    return part
  first = 0
  if len(part) > rank:  # There are others side by side.
    leaf = matrix.rpartition('.')[2]
    group = next(names for names in spec.GROUPS.values() if leaf in names)
    first = rank * group.index(leaf)
  part[first : first + len(b)] = b[:, index[1]]
  return part
