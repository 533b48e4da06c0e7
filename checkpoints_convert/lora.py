# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint as if a LoRA adapter had been merged into it.

As PEFT keeps them (https://huggingface.co/docs/peft): of a linear layer with
the weight W [out, in], x.weight, there are x.lora_A.weight, A [r, in], and
x.lora_B.weight, B [out, r]. What is served is W + s * B @ A, where s is
alpha / r, or alpha / sqrt(r) of rank-stabilized ones, computed in float32 and
rounded once, to W's dtype. Nothing of an adapter is ignored: what isn't this is
refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import math
import pathlib
import re
from typing import Any, NamedTuple, Self

import numpy as np

from checkpoints_convert import attributes
from checkpoints_convert import safetensors_reader
from sarathi_jax import errors
from sarathi_jax import json_file

_CONFIG = 'adapter_config.json'
_PREFIX = 'base_model.model.'
_A, _B = '.lora_A.weight', '.lora_B.weight'
_MOST = 1e9  # a factor or a rank
_MOST_KEPT = 16  # matrices of an adapter, in memory
# What says how it was trained, where from, or which tensors there are: these
# are looked at themselves.
_IGNORED = (
  'auto_mapping',
  'base_model_name_or_path',
  'eva_config',
  'exclude_modules',
  'inference_mode',
  'layers_pattern',
  'layers_to_transform',
  'lora_dropout',
  'loftq_config',
  'megatron_config',
  'megatron_core',
  'peft_version',
  'qalora_group_size',
  'revision',
  'runtime_config',
  'target_modules',
  'task_type',
)
# Those that start from other matrices than the checkpoint's are refused.
_STARTS = (True, False, 'gaussian', 'orthogonal', 'eva')


class Pair(NamedTuple):
  """What an adapter adds to a linear layer: factor * B @ A.

  Attributes:
    module: the layer's name.
    a: [rank, in].
    b: [out, rank].
    rank, factor: see above.
  """

  module: str
  a: safetensors_reader.Tensor
  b: safetensors_reader.Tensor
  rank: int
  factor: float


class Adapter:
  """An open adapter.

  Args:
    folder: holds adapter_config.json and its tensors in safetensors.

  Raises:
    CheckpointError: it is none, or of a kind that is not supported; by name.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    if not (folder / _CONFIG).is_file():
      raise errors.CheckpointError(f'{folder}: holds no {_CONFIG}.')
    self.folder = folder
    config = attributes.Attributes(
      json_file.read(folder / _CONFIG), str(folder / _CONFIG)
    )
    for name in _IGNORED:
      config.take(name)
    config.only(
      peft_type='LORA', bias='none', fan_in_fan_out=False, use_dora=False
    )
    start = config.take('init_lora_weights', True)
    if start not in _STARTS:
      raise config.refuse(
        'init_lora_weights',
        start,
        'changes the matrices that it starts from; save the adapter as plain '
        'LoRA, or the merged model',
      )
    self._rank = config.size('r')
    self._alpha = _number(config, 'lora_alpha', config.require('lora_alpha'))
    self._is_stabilized = config.flag('use_rslora', False)
    self._ranks = _patterns(config, 'rank_pattern')
    self._alphas = _patterns(config, 'alpha_pattern')
    _refuse_rest(config)
    self._reader = safetensors_reader.Reader(folder)
    self._numbers = functools.lru_cache(_MOST_KEPT)(self._read)

  def merged(
    self, tensors: Mapping[str, safetensors_reader.Tensor]
  ) -> dict[str, safetensors_reader.Tensor]:
    """Returns a checkpoint's tensors, with this merged into them.

    Raises:
      CheckpointError: a tensor of the adapter has none that it belongs to, or
        doesn't fit it, or is of another kind; by name.
    """
    result = dict(tensors)
    for pair in self.pairs():
      a, b = pair.a, pair.b
      target = f'{pair.module}.weight'
      base = tensors.get(target)
      if base is None:
        raise errors.CheckpointError(
          f'{self.folder}: {a.name}: the checkpoint has no {target}.'
        )
      self.check(pair, base.shape, target)
      _ = base.numpy_dtype  # raises, by name
      result[target] = _Merged(
        base.name,
        base.shape,
        base.dtype,
        base.path,
        base.offset,
        base.num_bytes,
        base,
        self,
        a,
        b,
        pair.factor,
      )
    return result

  def pairs(self) -> Iterator[Pair]:
    """Yields the matrices that it has, by the names of modules.

    Raises:
      CheckpointError: a tensor is of another kind, or lacks its other; by name.
    """
    parts = dict(self._reader.tensors)
    while parts:
      name = min(parts)
      module = _module_of(name, self.folder)
      pair = [parts.pop(name[: -len(_A)] + end, None) for end in (_A, _B)]
      if (a := pair[0]) is None or (b := pair[1]) is None:
        end = _A if pair[0] is None else _B
        raise errors.CheckpointError(
          f'{self.folder}: lacks {name[: -len(_A)]}{end}.'
        )
      rank = _first(self._ranks, module, self._rank)
      alpha = _first(self._alphas, module, self._alpha)
      factor = alpha / (math.sqrt(rank) if self._is_stabilized else rank)
      yield Pair(module, a, b, rank, factor)

  def check(self, pair: Pair, shape: tuple[int, ...], target: str) -> None:
    """Raises CheckpointError if a pair does not fit a matrix [out, in].

    Args:
      pair: of `pairs`.
      shape: of the matrix.
      target: its name.
    """
    a, b = pair.a, pair.b
    for name, got, wanted in (
      (target, shape, (b.shape[0], *a.shape[1:])),
      (a.name, a.shape, (pair.rank, *shape[1:])),
      (b.name, b.shape, (shape[0], pair.rank)),
    ):
      if got != wanted or len(wanted) != 2:
        raise errors.CheckpointError(
          f'{self.folder}: {name}: shape {got}; must be {wanted}, for rank '
          f'{pair.rank} and the shape {shape} of {target}.'
        )
    for tensor in (a, b):
      _ = tensor.numpy_dtype  # raises, by name

  def numbers(self, tensor: safetensors_reader.Tensor) -> np.ndarray:
    """Returns a matrix of the adapter, in float32."""
    return self._numbers(tensor)

  @property
  def reader(self) -> safetensors_reader.Reader:
    """The reader of its tensors."""
    return self._reader

  def _read(self, tensor: safetensors_reader.Tensor) -> np.ndarray:
    values = np.empty(tensor.shape, tensor.numpy_dtype)
    tensor.read(self._reader, 0, values)
    return values.astype(np.float32)

  def close(self) -> None:
    self._reader.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()


@dataclasses.dataclass(frozen=True, slots=True)
class _Merged(safetensors_reader.Tensor):
  """A matrix with an adapter's product added.

  Attributes:
    base: the matrix.
    adapter: has the others.
    a: [r, in].
    b: [out, r].
    factor: what their product is multiplied by.
  """

  base: safetensors_reader.Tensor
  adapter: Adapter
  a: safetensors_reader.Tensor
  b: safetensors_reader.Tensor
  factor: float

  def read(
    self, reader: safetensors_reader.Reader, start: int, rows: np.ndarray
  ) -> None:
    self.base.read(reader, start, rows)
    b = self.adapter.numbers(self.b)[start : start + len(rows)]
    added = (b * np.float32(self.factor)) @ self.adapter.numbers(self.a)
    rows[:] = (rows.astype(np.float32) + added).astype(rows.dtype)


def _module_of(name: str, folder: pathlib.Path) -> str:
  if not name.endswith((_A, _B)):
    raise errors.CheckpointError(
      f'{folder}: {name}: is not supported; must be the {_A[1:]} or {_B[1:]} '
      'of a linear layer.'
    )
  return name[: -len(_A)].removeprefix(_PREFIX)


def _number(config: attributes.Attributes, name: str, value: Any) -> float:
  if type(value) in (int, float) and abs(value) < _MOST:
    return float(value)
  raise config.refuse(name, value, f'must be a number below {_MOST:g}')


def _patterns(config: attributes.Attributes, name: str) -> dict[str, Any]:
  """Takes what modules whose names end so have for the usual value."""
  patterns = config.take(name, {})
  if not isinstance(patterns, dict):
    raise config.refuse(name, patterns, 'must be an object')
  for pattern, value in patterns.items():
    if _number(config, f'{name}[{pattern!r}]', value) <= 0:
      raise config.refuse(f'{name}[{pattern!r}]', value, 'must be above 0')
    try:
      re.compile(pattern)
    except re.error as error:
      raise config.refuse(name, pattern, f'is no pattern: {error}') from error
  return patterns


def _first(patterns: Mapping[str, Any], module: str, usual: Any) -> Any:
  """Returns the value of the first pattern that a module's name ends with."""
  for pattern, value in patterns.items():
    if re.fullmatch(rf'(.*\.)?({pattern})', module):
      return value
  return usual


def _refuse_rest(config: attributes.Attributes) -> None:
  """Refuses what is left and is said to be so."""
  for name, value in config.rest().items():
    if value not in (None, False, [], {}):
      raise config.refuse(name, value, 'is not supported')
