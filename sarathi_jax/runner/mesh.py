# SPDX-License-Identifier: Apache-2.0
"""The mesh ('pp', 'tp') that a model runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jax.sharding import Sharding
from jax.sharding import SingleDeviceSharding
import numpy as np

from pallas_kernels import devices as devices_lib
from sarathi_jax import config as config_lib
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import parallel
from sarathi_jax.models import sharding

PP, TP = 'pp', 'tp'
# 'tp' or 'pp' -> the axes of a user's mesh that are used as it.
AxisNames = Mapping[str, str | Sequence[str]]


def make(
  parallelism: parallel.Parallelism = parallel.ONE_DEVICE,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Makes a mesh of the first devices, in stages of `tp` neighbours.

  Neighbours are close: of one host, where a host has as many.

  Raises:
    ConfigError: there are too few devices.
  """
  devices = jax.devices() if devices is None else devices
  needed = parallelism.num_devices
  config_lib.check(
    len(devices) >= needed,
    'tp, pp',
    (parallelism.tp, parallelism.pp),
    f'{needed} devices are needed, and there are {len(devices)}',
  )
  grid = np.array(devices[:needed]).reshape(parallelism.pp, parallelism.tp)
  return Mesh(grid, (PP, TP))


def of_users(mesh: Mesh, axis_names: AxisNames | None = None) -> Mesh:
  """Makes a mesh ('pp', 'tp') of the devices of a user's mesh.

  Args:
    mesh: the user's.
    axis_names: for 'tp' and 'pp', the user's axes that are used as it, one or
      several; None: those of the same name. Other axes must be of size 1.

  Raises:
    ConfigError: it is no mesh, or an axis is unknown, named twice, or left
      over.
  """
  config_lib.check(isinstance(mesh, Mesh), 'mesh', mesh, 'must be a Mesh')
  if axis_names is None:
    axis_names = {name: name for name in (PP, TP) if name in mesh.axis_names}
  used: list[str] = []
  sizes = []
  for name in axis_names:
    config_lib.check(
      name in (PP, TP),
      'axis_names',
      dict(axis_names),
      f"{name!r} is neither 'pp' nor 'tp'",
    )
  for ours in (PP, TP):
    theirs = axis_names.get(ours, ())
    theirs = (theirs,) if isinstance(theirs, str) else tuple(theirs)
    for name in theirs:
      config_lib.check(
        name in mesh.axis_names and name not in used,
        'axis_names',
        dict(axis_names),
        f'{name!r} must be an axis of the mesh, {mesh.axis_names}, named once',
      )
      used.append(name)
    sizes.append(math.prod(mesh.shape[name] for name in theirs))
  left = [name for name in mesh.axis_names if name not in used]
  for name in left:
    config_lib.check(
      mesh.shape[name] == 1,
      'mesh',
      dict(mesh.shape),
      f"axis {name!r} is neither 'pp' nor 'tp'; say which with axis_names, or "
      'hand over a mesh without it',
    )
  order = [mesh.axis_names.index(name) for name in (*used, *left)]
  return Mesh(mesh.devices.transpose(order).reshape(sizes), (PP, TP))


def parallelism_of(mesh: Mesh) -> parallel.Parallelism:
  """Returns the degrees of parallelism of a mesh ('pp', 'tp')."""
  return parallel.Parallelism(tp=mesh.shape[TP], pp=mesh.shape[PP])


def shards_of(mesh: Mesh) -> sharding.Shards:
  """Returns the axes of a mesh that have more than one device."""
  return sharding.Shards(
    tp=TP if mesh.shape[TP] > 1 else None, pp=PP if mesh.shape[PP] > 1 else None
  )


def check_deterministic(mesh: Mesh) -> None:
  """Raises ConfigError if sums over a mesh can't be `deterministic`.

  More than two devices sum in an order that depends on the place in the batch
  (rings), but for those of one process's CPU.
  """
  devices = mesh.devices.flat
  is_one_cpu = devices[0].platform == 'cpu' and (
    len({device.process_index for device in devices}) == 1
  )
  config_lib.check(
    mesh.shape[TP] <= 2 or is_one_cpu,
    'tp',
    mesh.shape[TP],
    'must be at most 2 with deterministic, as the order in which more devices '
    'sum depends on the place in the batch; use pp',
  )


def check_activations(mesh: Mesh, model: model_config_lib.ModelConfig) -> None:
  """Raises ConfigError if a mesh can't multiply what the model rounds.

  CPUs compute the same, in the model's dtype.
  """
  how = model.quantization
  if how is None or how.activations is None:
    return
  device = mesh.devices.flat[0]
  capability = devices_lib.capability_of(device)
  config_lib.check(
    device.platform == 'cpu' or capability == '9.0',
    'quantized_activations',
    how.activations,
    f'{device.device_kind} (compute capability {capability or "none"}) has no '
    'matrix units of fp8 that there is a kernel for; Hopper (9.0) has, as H100',
  )


def on(mesh: Mesh, *axes: str | tuple[str, ...] | None) -> Sharding:
  """Returns the sharding of an array whose axes are split over `axes`."""
  if mesh.size == 1:
    return SingleDeviceSharding(mesh.devices.item())
  return NamedSharding(mesh, PartitionSpec(*axes))


def is_of_gpus(mesh: Mesh) -> bool:
  """Whether it has several devices, and these have CUDA graphs."""
  return mesh.size > 1 and mesh.devices.flat[0].platform != 'cpu'
