# SPDX-License-Identifier: Apache-2.0
"""Facts that several processes must have in common to compute one model.

Facts are names and values that JSON can hold, so that what differs can be
named. Those of `program` are known before the processes join; those of
`weights` once a checkpoint is open.
"""

from __future__ import annotations

from concurrent import futures
import dataclasses
import hashlib
import importlib.metadata
import math
import os
import re
from typing import Any

import jax
import numpy as np

from sarathi_jax import checkpoint as checkpoint_lib
from sarathi_jax import config as config_lib
from sarathi_jax import models
from sarathi_jax.models import tree
from sarathi_jax.runner import source_hash

_VERSIONS = ('jax', 'jaxlib')
# Fields of JAX's configuration that change programs.
_JAX_CONFIG = (
  'jax_platforms',
  'jax_enable_x64',
  'jax_default_prng_impl',
  'jax_default_matmul_precision',
  'jax_threefry_partitionable',
)
# XLA's flags that change none, and may be a host's own.
_OWN_FLAGS = re.compile(
  r'--xla_(dump_\S*|force_host_platform_device_count|gpu_cuda_data_dir)\b.*'
)
_SAMPLE = 64  # values at each end of an array
_READERS = 8


def program(config: config_lib.EngineConfig) -> dict[str, Any]:
  """Returns facts of what is to run: configuration, versions and code."""
  facts: dict[str, Any] = {
    f'config.{field.name}': getattr(config, field.name)
    for field in dataclasses.fields(config)
    if field.name != 'compilation_cache_dir'
  }  # a host's own affair
  facts |= {
    f"{name}'s version": importlib.metadata.version(name) for name in _VERSIONS
  }
  facts |= {name: str(jax.config.values[name]) for name in _JAX_CONFIG}
  facts['XLA_FLAGS'] = ' '.join(
    flag
    for flag in os.environ.get('XLA_FLAGS', '').split()
    if not _OWN_FLAGS.fullmatch(flag)
  )
  facts["the code's hash"] = source_hash.source_hash()
  return facts


def weights(opened: checkpoint_lib.Checkpoint) -> dict[str, Any]:
  """Returns facts of a checkpoint, and of the devices that it is to be on.

  Reads some values at both ends of each parameter, whatever files they are in:
  copies are the same, other trainings of a model are not.

  Raises:
    CheckpointError: a parameter can't be read.
  """
  metadata = opened.metadata
  facts = {
    f'checkpoint.{name}': value
    for name, value in metadata.model.to_dict().items()
  }
  facts['checkpoint.dtype'] = metadata.dtype
  facts["the weights' hash"] = _weights_hash(opened)
  facts['the kind of devices'] = ', '.join(
    sorted({device.device_kind for device in jax.local_devices()})
  )
  return facts


def _weights_hash(opened: checkpoint_lib.Checkpoint) -> str:
  whole = opened.folder / checkpoint_lib.PARAMS / 'manifest.ocdbt'
  if whole.is_file():  # Another's, read in large pieces; this names them all.
    return hashlib.sha256(whole.read_bytes()).hexdigest()[:16]

  def sample(named: tuple[str, tuple[int, ...]]) -> bytes:
    name, shape = named
    first = tuple(slice(0, min(size, 1)) for size in shape[:-1])
    last = tuple(slice(max(size - 1, 0), size) for size in shape[:-1])
    size = shape[-1]
    ends = (
      opened.read(name, (*first, slice(0, min(size, _SAMPLE)))),
      opened.read(name, (*last, slice(max(size - _SAMPLE, 0), size))),
    )
    return b''.join(
      [
        f'{name} {shape}'.encode(),
        *(np.ascontiguousarray(part).tobytes() for part in ends),
      ]
    )

  specs = tree.named_leaves(models.param_specs(opened.metadata.model))
  named = [
    (name, leaf.shape) for name, leaf in specs.items() if math.prod(leaf.shape)
  ]
  digest = hashlib.sha256()
  with futures.ThreadPoolExecutor(_READERS) as pool:
    for part in pool.map(sample, named):
      digest.update(hashlib.sha256(part).digest())
  return digest.hexdigest()[:16]
