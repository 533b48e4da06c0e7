# SPDX-License-Identifier: Apache-2.0
"""Reads adapters, of files or live arrays, and checks them."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import os
from typing import Any

import jax
import numpy as np

from sarathi_jax import checkpoint
from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.models import adapters as adapters_lib
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import tree
from sarathi_jax.runner import adapters as on_mesh
from sarathi_jax.runner import settings

Matrices = on_mesh.Matrices
_MOST_CHARS = 256  # of a name


class Source:
  """Reads adapters for a model.

  Args:
    model: the model.
    metadata: of its checkpoint; None if its weights are live arrays.
  """

  def __init__(
    self,
    model: model_config_lib.ModelConfig,
    metadata: checkpoint.CheckpointMetadata | None = None,
  ) -> None:
    self._model = model
    self._metadata = metadata
    self._config = config_lib.EngineConfig()

  def read(self, name: str, adapter: Any) -> Matrices:
    """Returns what an adapter adds to each matrix; any thread may ask.

    Args:
      name: by which requests ask for it.
      adapter: the folder or hub id of one of PEFT; or a tree, shaped as the
        model's parameters as far as it goes, with {'a': [in, rank], 'b':
        [rank, out]} in place of a matrix W, to which it adds a @ b.

    Raises:
      ConfigError: it can't be served, by name; or there is no room for it.
    """
    matrices = self._read(name, adapter)
    _check_room(self._config, name, matrices)
    return matrices

  def _read(self, name: str, adapter: Any) -> Matrices:
    config_lib.check(
      isinstance(name, str) and 0 < len(name) <= _MOST_CHARS,
      'adapters',
      errors.shown(name),
      f'names must be texts of 1 to {_MOST_CHARS} characters',
    )
    if not isinstance(adapter, (str, os.PathLike)):
      return _of_tree(self._model, name, adapter)
    if self._metadata is None:
      raise errors.ConfigError(
        f'adapters[{name!r}]={os.fspath(adapter)!r}: must be arrays, as the '
        "model's are; files are read beside a checkpoint."
      )
    # It takes a second to import.
    from checkpoints_convert import adapters as files

    return files.read(os.fspath(adapter), self._metadata)

  def begin(
    self, config: config_lib.EngineConfig, adapters: Mapping[str, Any] | None
  ) -> tuple[config_lib.EngineConfig, dict[str, Matrices]]:
    """Reads those that are there at the start, and makes room.

    Args:
      config: of the engine.
      adapters: of each name, see `read`.

    Returns:
      The config, with the room for adapters resolved, and these.

    Raises:
      ConfigError: one can't be served, or has a higher rank than
        `max_lora_rank`.
    """
    found = {name: self._read(name, a) for name, a in (adapters or {}).items()}
    if num := config.max_loras or len(found):
      rank = max(map(_rank_of, found.values()), default=on_mesh.DEFAULT_RANK)
      config = dataclasses.replace(
        config, max_loras=num, max_lora_rank=config.max_lora_rank or rank
      )
    self._config = config
    least = max(config.max_loras or 1, len(found))
    config_lib.check(
      config.max_cpu_loras is None
      or (config.max_loras is not None and config.max_cpu_loras >= least),
      'max_cpu_loras',
      config.max_cpu_loras,
      f'must be at least {least}, as many as a step or the start may have, and '
      'there must be room for adapters (max_loras)',
    )
    for name, matrices in found.items():
      _check_room(config, name, matrices)
    return config, found


def _check_room(
  config: config_lib.EngineConfig, name: str, matrices: Matrices
) -> None:
  """Raises ConfigError if there is no room for an adapter."""
  config_lib.check(
    config.max_loras is not None,
    'max_loras',
    None,
    'must be at least 1 at the start for adapters to be loaded',
  )
  rank, most = _rank_of(matrices), config.max_lora_rank or 0
  config_lib.check(
    rank <= most,
    'max_lora_rank',
    most,
    f'must be at least the rank of adapter {name!r}, {rank}',
  )


def _rank_of(matrices: Matrices) -> int:
  """Returns the highest rank that an adapter has."""
  return max((len(b) for _, b in matrices.values()), default=1)


def _of_tree(
  model: model_config_lib.ModelConfig, name: str, adapter: Any
) -> Matrices:
  plain = dataclasses.replace(model, quantization=None)
  specs = tree.named_leaves(models.param_specs(plain))
  found: dict[str, dict[str, np.ndarray]] = {}
  for path, leaf in tree.named_leaves(adapter).items():
    matrix, _, end = path.rpartition('.')
    field = f'adapters[{name!r}].{path}'
    spec = specs.get(matrix)
    config_lib.check(
      end in ('a', 'b')
      and spec is not None
      and matrix.rpartition('.')[2] in adapters_lib.TARGETS
      and not spec.is_of_experts,
      field,
      getattr(leaf, 'shape', leaf),
      'must be a or b of a linear layer of attention or of an MLP, such as '
      'layers.0.attn.q.a',
    )
    with settings.own():
      numbers = np.asarray(jax.device_get(leaf), np.float32)
    config_lib.check(
      bool(np.isfinite(numbers).all()),
      field,
      numbers.shape,
      'has numbers that are NaN or infinite, which would reach others',
    )
    found.setdefault(matrix, {})[end] = numbers
  return {
    matrix: _pair(f'adapters[{name!r}].{matrix}', specs[matrix].shape, ends)
    for matrix, ends in found.items()
  }


def _pair(
  field: str, shape: tuple[int, ...], ends: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  config_lib.check(
    len(ends) == 2, field, sorted(ends), 'must have both a and b'
  )
  a, b = ends['a'], ends['b']
  config_lib.check(
    a.ndim == b.ndim == 2
    and a.shape[1] == b.shape[0] > 0
    and (a.shape[0], b.shape[1]) == shape,
    field,
    (a.shape, b.shape),
    f'must be [in, rank] and [rank, out], of a matrix {list(shape)}',
  )
  return a, b
