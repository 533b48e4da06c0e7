# SPDX-License-Identifier: Apache-2.0
"""Reads what config.json says of quantized weights, as a closed world.

Two of the formats have weights of 8 bits: compressed-tensors, and that of
DeepSeek and transformers ('fp8'). Three have packed ones, of 4 bits and of 8:
compressed-tensors, AWQ and GPTQ. What they say of activations is known and not
followed: these stay in 16 bits. Which matrices are as they were, their tensors
say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import pathlib
import re
from typing import Any, NamedTuple

from checkpoints_convert import attributes as attributes_lib
from sarathi_jax import json_file
from sarathi_jax.models import quantization

NAMES = 'quantization_config', 'compression_config'
REMEDY = (
  'Convert the model as it is published in 16 bits, with --quantize=int4, '
  '--quantize=int8 or --quantize=fp8.'
)
_SUPPORTED = (
  'supported are compressed-tensors (FP8, int8 W8A8, and packed W4A16 and '
  'W8A16), fp8 of DeepSeek and transformers, AWQ (gemm) and GPTQ (4 and 8 bits)'
)
_DEFAULT_BLOCK = 128, 128
_PACKED = 'pack-quantized'
_OWN_FILE = 'quantize_config.json'
# How GPTQ and AWQ found codes, and what others run them by: not what they are.
_HOW_FOUND = (
  'act_group_aware',
  'backend',
  'batch_size',
  'block_name_to_quantize',
  'cache_block_outputs',
  'damp_auto_increment',
  'damp_percent',
  'dataset',
  'desc_act',  # Tensors say it, too.
  'do_fuse',
  'exllama_config',
  'fuse_max_seq_len',
  'is_marlin_format',
  'max_input_length',
  'meta',
  'model_file_base_name',
  'model_name_or_path',
  'model_seqlen',
  'module_name_preceding_first_block',
  'modules_in_block_to_quantize',
  'modules_to_fuse',
  'modules_to_not_convert',
  'mse',
  'pad_token_id',
  'static_groups',
  'tokenizer',
  'true_sequential',
  'use_cuda_fp16',
  'use_exllama',
)


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


class Packing(NamedTuple):
  """How weights are packed in words; see `packed`.

  Attributes:
    method: a key of `packed.LAYOUTS`.
    bits: of a code, 4 or 8.
    group: columns [out, in] of a group; None: all.
    symmetric: whether there are no zero points but the middle.
    less: what zero points are stored without.
  """

  method: str
  bits: int
  group: int | None
  symmetric: bool
  less: int = 0


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


def with_own_file(raw: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  """Returns config.json with what AutoGPTQ says in a file of its own.

  Args:
    raw: what config.json says; if it is of quantization, it counts.
    folder: of the checkpoint.
  """
  path = folder / _OWN_FILE
  if any(raw.get(name) for name in NAMES) or not path.is_file():
    return raw
  return raw | {NAMES[0]: {'quant_method': 'gptq'} | json_file.read(path)}


def read(attributes: attributes_lib.Attributes) -> Scheme | Packing | None:
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


def _compressed(said: _Said) -> Scheme | Packing:
  """Reads compressed-tensors' QuantizationConfig."""
  said.ignore(
    'ignore',
    'kv_cache_scheme',
    'quantization_status',
    'global_compression_ratio',
    'version',
  )
  formats = 'float-quantized', 'int-quantized', 'naive-quantized', _PACKED
  of_all = said.only('format', *formats)
  sparsity = said.take('sparsity_config', {})
  if not isinstance(sparsity, dict) or sparsity.get('format') not in (
    None,
    'dense',
  ):
    raise said.refuse('sparsity_config', sparsity)
  schemes: list[Scheme | Packing] = []
  for group in said.groups('config_groups'):
    group.ignore('targets', 'input_activations')
    is_packed = (group.only('format', *formats) or of_all) == _PACKED
    weights = group.within('weights')
    schemes.append((_packed_weights if is_packed else _weights)(weights))
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


def _packed_weights(said: _Said) -> Packing:
  """Reads compressed-tensors' QuantizationArgs of weights in words."""
  said.only('type', 'int')
  said.only('dynamic', False)
  said.only('actorder', False, 'weight', 'static', 'group', 'dynamic')
  said.ignore('observer', 'observer_kwargs', 'scale_dtype', 'zp_dtype')
  said.only('block_structure')
  bits = said.only('num_bits', 4, 8) or 8
  is_symmetric = said.only('symmetric', True, False)
  strategy = said.only('strategy', 'channel', 'group') or 'group'
  group = _group(said)
  if (strategy == 'group') != (group is not None):
    raise said.refuse('group_size', group)
  return Packing('compressed-tensors', bits, group, is_symmetric is not False)


def _group(said: _Said, default: int = -1) -> int | None:
  """Takes group_size; what is packed has whole blocks in a group."""
  value = said.take('group_size', default)
  if value == -1:
    return None
  if type(value) is not int or value < 1 or value % quantization.BLOCK:
    raise said.refuse('group_size', value)
  return value


def _awq(said: _Said) -> Packing:
  """Reads transformers' AwqConfig, and that of AutoAWQ."""
  said.ignore(*_HOW_FOUND, 'sym')
  for name in ('version', 'format'):
    value = said.take(name)
    if value is not None and str(value).lower() != 'gemm':
      raise said.refuse(name, value)
  said.only('zero_point', True)
  said.only('bits', 4)
  said.only('lm_head', False)
  return Packing('awq', 4, _group(said, 128), symmetric=False)


def _gptq(said: _Said) -> Packing:
  """Reads transformers' GPTQConfig, and those of AutoGPTQ and GPTQModel."""
  said.ignore(*_HOW_FOUND, 'lm_head')
  said.only('pack_dtype', 'int32')
  formats = {
    said.only(name, 'gptq', 'gptq_v2')
    for name in ('checkpoint_format', 'format')
  } - {None}
  if len(formats) > 1:
    raise said.refuse('format', sorted(formats))
  bits = said.only('bits', 4, 8) or 4
  is_symmetric = said.only('sym', True, False) is not False
  return Packing(
    'gptq',
    bits,
    _group(said, 128),
    is_symmetric,
    less=0 if 'gptq_v2' in formats else 1,
  )


def _block(said: _Said, value: Any) -> tuple[int, int]:
  if not (
    isinstance(value, list)
    and len(value) == 2
    and all(type(size) is int and 1 <= size < 2**31 for size in value)
  ):
    raise said.refuse('block', value)
  return value[0], value[1]


_READERS: Mapping[str, Callable[[_Said], Scheme | Packing]] = {
  'awq': _awq,
  'compressed-tensors': _compressed,
  'fp8': _fp8,
  'gptq': _gptq,
}
