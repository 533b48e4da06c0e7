# SPDX-License-Identifier: Apache-2.0
"""Where Mosaic's kernels can run, by the device and JAX's version."""

from __future__ import annotations

import jax

from pallas_kernels import devices

# Compute capability -> the JAX it takes.
SERVES = {'8.0': (0, 12), '8.6': (0, 12), '9.0': (0, 11)}
HOPPER = '9.0'
_INTERPRETED_AS = HOPPER  # on CPUs


def has_kernels() -> bool:
  """Whether this JAX has Mosaic's kernels for the default device."""
  oldest = SERVES.get(devices.capability_of(devices.default()))
  return oldest is not None and jax.__version_info__ >= oldest


def capability() -> str:
  """Returns the compute capability to compile for, on the default device.

  Raises:
    NotImplementedError: there are no kernels for it, or not in this JAX.
  """
  device = devices.default()
  found = (
    _INTERPRETED_AS
    if device.platform == 'cpu'
    else devices.capability_of(device)
  )
  if found not in SERVES:
    raise NotImplementedError(
      f'pallas_mosaic: compute_capability={found}: must be one of '
      f'{", ".join(SERVES)}.'
    )
  oldest = SERVES[found]
  if jax.__version_info__ < oldest:
    raise NotImplementedError(
      f'pallas_mosaic: jax={jax.__version__}: must be '
      f'{".".join(map(str, oldest))} or newer.'
    )
  return found
