# SPDX-License-Identifier: Apache-2.0
"""Reads what config.json says of quantized weights, as a closed world.

Two of the formats have weights of 8 bits: compressed-tensors, and that of
DeepSeek and transformers ('fp8'). What they say of activations is known and not
followed: these stay in 16 bits. Which matrices are as they were, their tensors
say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import re
from typing import Any, NamedTuple

from checkpoints_convert import attributes as attributes_lib

NAMES = 'quantization_config', 'compression_config'
REMEDY = (
  'Convert the model as it is published in 16 bits, with --quantize=int8 or '
  '--quantize=fp8.'
)
_SUPPORTED = (
  'supported are weights of 8 bits: compressed-tensors (FP8 and int8 W8A8), '
  'and fp8 of DeepSeek and transformers'
)
_DEFAULT_BLOCK = 128, 128


class Scheme(NamedTuple):
  """How weights are quantized.

  Attributes:
    dtype: of the codes, as safetensors names it.
    strategy: what has a scale: 'tensor', 'channel' or 'block'.
    suffix: how the names of scales end, in place of '.weight'.
    block: rows and columns [out, in] of a block; None if there are none.
  """

  dtype: str
  strategy: str
  suffix: str
  block: tuple[int, int] | None = None

  def block_of(self, rows: int, columns: int) -> tuple[int, int]:
    """Returns the part of a matrix [out, in] that has one scale."""
    return {'tensor': (rows, columns), 'channel': (1, columns)}.get(
      self.strategy
    ) or (self.block or _DEFAULT_BLOCK)


class _Said:
  """A part of config.json, of which each name is taken, or refused."""

  def __init__(
    self, attributes: attributes_lib.Attributes, where: str, values: Any
  ):
    self._attributes = attributes
    self._where = where
    if not isinstance(values, dict):
      raise attributes.refuse(where, values, 'must be an object')
    self._values = dict(values)

  def take(self, name: str, default: Any = None) -> Any:
    value = self._values.pop(name, default)
    return default if value is None else value

  def take_or_none(self, name: str, default: Any) -> Any:
    return self._values.pop(name, default)

  def only(self, name: str, *known: Any) -> Any:
    """Takes a value that must be one of these, or absent."""
    if (value := self._values.pop(name, None)) not in (None, *known):
      raise self.refuse(name, value)
    return value

  def ignore(self, *names: str) -> None:
    for name in names:
      self._values.pop(name, None)

  def within(self, name: str) -> _Said:
    return _Said(
      self._attributes, f'{self._where}.{name}', self._values.pop(name, None)
    )

  def groups(self, name: str) -> list[_Said]:
    """Takes an object of objects."""
    inner = self.within(name)
    return [inner.within(group) for group in list(inner._values)]

  def refuse(self, name: str, value: Any) -> Exception:
    return self._attributes.error(
      f'{self._where}.{name}={value!r}: is not supported; {_SUPPORTED}. '
      + REMEDY.rstrip('.')
    )

  def finish(self) -> None:
    for name, value in self._values.items():
      if value not in (None, [], {}):
        raise self.refuse(name, value)


def read(attributes: attributes_lib.Attributes) -> Scheme | None:
  """Takes what says how weights are quantized; None if nothing does.

  Raises:
    CheckpointError: they are quantized in a way that is not known; names it.
  """
  for name in NAMES:
    if (values := attributes.take(name)) is not None:
      said = _Said(attributes, name, values)
      default = 'compressed-tensors' if name == NAMES[1] else None
      method = said.take('quant_method', default)
      reader = _READERS.get(method) if isinstance(method, str) else None
      if reader is None:
        raise said.refuse('quant_method', method)
      scheme = reader(said)
      said.finish()
      return scheme
  return None


def _fp8(said: _Said) -> Scheme:
  """Reads transformers' FineGrainedFP8Config, with its defaults."""
  said.ignore('modules_to_not_convert', 'ignored_layers', 'dequantize')
  said.only('activation_scheme', 'dynamic', 'static')
  said.only('fmt', 'e4m3')
  said.only('scale_fmt', 'float')
  said.only('expert_dtype', 'fp8')
  block = said.take_or_none('weight_block_size', list(_DEFAULT_BLOCK))
  suffix = '.weight_scale_inv'
  if block is None:
    return Scheme('F8_E4M3', 'tensor', suffix)
  return Scheme('F8_E4M3', 'block', suffix, _block(said, block))


def _compressed(said: _Said) -> Scheme:
  """Reads compressed-tensors' QuantizationConfig."""
  said.ignore(
    'ignore',
    'kv_cache_scheme',
    'quantization_status',
    'global_compression_ratio',
    'version',
  )
  formats = 'float-quantized', 'int-quantized', 'naive-quantized'
  said.only('format', *formats)
  sparsity = said.take('sparsity_config', {})
  if not isinstance(sparsity, dict) or sparsity.get('format') not in (
    None,
    'dense',
  ):
    raise said.refuse('sparsity_config', sparsity)
  schemes = []
  for group in said.groups('config_groups'):
    group.ignore('targets', 'input_activations')
    group.only('format', *formats)
    weights = group.within('weights')
    schemes.append(_weights(weights))
    weights.finish()
    group.finish()
  if len(set(schemes)) != 1:
    raise said.refuse('config_groups', schemes)
  return schemes[0]


def _weights(said: _Said) -> Scheme:
  """Reads compressed-tensors' QuantizationArgs of weights."""
  said.only('num_bits', 8)
  said.only('symmetric', True)
  said.only('dynamic', False)
  said.only('group_size', -1)
  said.only('actorder', False)
  said.ignore('observer', 'observer_kwargs', 'scale_dtype', 'zp_dtype')
  dtype = {'float': 'F8_E4M3', 'int': 'I8'}[
    said.only('type', 'float', 'int') or 'int'
  ]
  strategy = said.only('strategy', 'tensor', 'channel', 'block') or 'tensor'
  block = said.take('block_structure')
  if strategy != 'block':
    return Scheme(dtype, strategy, '.weight_scale')
  if isinstance(block, str):
    sizes = re.fullmatch('([0-9]{1,9})x([0-9]{1,9})', block)
    block = [*map(int, sizes.groups())] if sizes else block
  return Scheme(dtype, strategy, '.weight_scale', _block(said, block))


def _block(said: _Said, value: Any) -> tuple[int, int]:
  if not (
    isinstance(value, list)
    and len(value) == 2
    and all(type(size) is int and 1 <= size < 2**31 for size in value)
  ):
    raise said.refuse('block', value)
  return value[0], value[1]


_READERS: Mapping[str, Callable[[_Said], Scheme]] = {
  'compressed-tensors': _compressed,
  'fp8': _fp8,
}
