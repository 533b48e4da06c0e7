# SPDX-License-Identifier: Apache-2.0
"""The device that kernels are traced for, and where Triton's can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
from typing import Any, TypeVar

import jax
from jax import lax

from pallas_kernels import gpu_targets

T = TypeVar('T')


def launch(kernel: Callable[..., T], *args: Any) -> T:
  """Calls what launches a kernel; on CPUs Pallas interprets it, for tests.

  Args:
    kernel: takes `args`, and `interpret`, whether to.
    args: trees of arrays.
  """
  out: T = lax.platform_dependent(
    *args,
    cpu=functools.partial(kernel, interpret=True),
    default=functools.partial(kernel, interpret=False),
  )
  return out


def default() -> jax.Device:
  """Returns the device on which JAX computes by default."""
  config: Any = jax.config
  device = config.jax_default_device
  return (
    jax.devices(device)[0]
    if device is None or isinstance(device, str)
    else device
  )


def check_triton(device: Any) -> None:
  """Raises NotImplementedError if Triton's kernels can't run on a device.

  Args:
    device: a jax.Device.
  """
  if device.platform == 'cpu':
    return
  capability = str(getattr(device, 'compute_capability', ''))
  major = capability.partition('.')[0]
  for ok, name, value, rule in (
    (
      device.platform in ('gpu', 'cuda'),
      'platform',
      device.platform,
      'must be gpu, or cpu to be interpreted',
    ),
    (
      major.isdigit() and int(major) >= 8,
      'compute_capability',
      capability,
      'must be 8.0 or above',
    ),
  ):
    if not ok:
      raise NotImplementedError(f'pallas_triton: {name}={value}: {rule}.')


def capability_of(device: Any) -> str:
  """Its compute capability, '9.0' where CUDA says '9.0a'; '' of a CPU."""
  return str(getattr(device, 'compute_capability', '')).rstrip('af')


def target_of(device: Any) -> str:
  """Returns the target whose tile sizes fit a device."""
  return gpu_targets.alike(capability_of(device))


def measured_as(device: Any) -> str:
  """Returns the target whose measurements hold for a device; '' if none's do.

  Such a target has the same multiprocessors, and not just as much room.

  Args:
    device: a jax.Device.
  """
  target = target_of(device)
  major, minor = gpu_targets.get(target).compute_capability
  return target if capability_of(device) == f'{major}.{minor}' else ''


def fastest(measured: Mapping[str, str]) -> str:
  """Returns an operation's fastest implementation, for the default device.

  Args:
    measured: of targets, by their names; others take Triton's where it can run.
  """
  device = default()
  if device.platform == 'cpu':
    return 'xla'
  try:
    check_triton(device)
  except NotImplementedError:
    return 'xla'
  return measured.get(measured_as(device), 'pallas_triton')


def multiprocessors(device: Any) -> int:
  """Returns a device's count, if it says so: an H100 has 114 or 132."""
  count: int | None = getattr(device, 'core_count', None)
  if device.platform == 'cpu' or not count:
    return gpu_targets.get(target_of(device)).multiprocessors
  return count
