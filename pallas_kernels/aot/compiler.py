# SPDX-License-Identifier: Apache-2.0
"""Has XLA compile for a GPU that is not here."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import math
import re
from typing import Any

import jax
from jax.experimental import topologies

from pallas_kernels import gpu_targets
from pallas_kernels.aot import toolkit

_HLO_TYPES = {
  'bfloat16': 'bf16',
  'float16': 'f16',
  'float32': 'f32',
  'int8': 's8',
  'uint8': 'u8',
}


@functools.cache
def devices_for(name: str, count: int = 1) -> tuple[Any, ...]:
  """Returns `count` jax.Devices to compile for; they can't run anything.

  Args:
    name: 'a100', 'a40' or 'h100'.
    count: the number of devices.

  Raises:
    ValueError: the name is unknown.
    toolkit.UnavailableError: there is no plugin, or no CUDA toolkit.
  """
  target = gpu_targets.get(name)
  if reason := toolkit.missing():
    raise toolkit.UnavailableError(reason)
  return tuple(
    topologies.get_topology_desc(
      platform='cuda',
      target_config=target.text_proto(),
      topology=f'1x1x{count}',
    ).devices
  )


@contextlib.contextmanager
def on(device: str) -> Iterator[None]:
  """Makes a GPU that is not here JAX's default device within the block."""
  with jax.default_device(devices_for(device)[0]):
    yield


def placed(args: Any, device: str) -> Any:
  """Returns a tree of ShapeDtypeStruct, placed on this device."""
  sharding = jax.sharding.SingleDeviceSharding(devices_for(device)[0])
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    args,
  )


def in_place_problems(compiled: Any, donated: Any, kv: Any) -> list[str]:
  """Lists signs that a program does not update its cache in place.

  Args:
    compiled: the program, a jax.stages.Compiled.
    donated: its donated arguments, a tree of ShapeDtypeStruct.
    kv: the cache among them, a tree of ShapeDtypeStruct.

  Returns:
    One sentence a problem; none if it updates in place.
  """
  problems = []
  aliased = compiled.memory_analysis().alias_size_in_bytes
  if aliased != (expected := num_bytes(donated)):
    problems.append(
      f'{aliased:,} bytes are updated in place; all that is '
      f'donated, the KV cache above all, is {expected:,}'
    )
  text = compiled.as_text()
  for shape in sorted(hlo_types(kv)):
    copies = re.findall(
      rf'^.*= \(?{re.escape(shape)}\S* .*?copy(?:-start)?\(.*$', text, re.M
    )
    if copies:
      problems.append(
        f'{len(copies)} copies of the KV cache, {shape}: '
        f'{copies[0].strip()[:100]}'
      )
  return problems


def num_bytes(tree: Any) -> int:
  """Counts the bytes on one device of a tree of arrays or ShapeDtypeStruct."""
  return sum(
    math.prod(_local_shape(leaf)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def hlo_types(tree: Any) -> set[str]:
  """Returns the types of arrays as HLO writes them, such as 'bf16[8,128]'.

  Args:
    tree: of arrays or ShapeDtypeStruct.
  """
  return {
    f'{_HLO_TYPES[leaf.dtype.name]}[{",".join(map(str, _local_shape(leaf)))}]'
    for leaf in jax.tree.leaves(tree)
  }


def _local_shape(leaf: Any) -> tuple[int, ...]:
  shape: tuple[int, ...] = leaf.shape
  sharding = getattr(leaf, 'sharding', None)
  return shape if sharding is None else sharding.shard_shape(shape)
