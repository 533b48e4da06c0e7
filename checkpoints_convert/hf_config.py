# SPDX-License-Identifier: Apache-2.0
"""Reads config.json as a closed world.

Every attribute is taken by a family, or known to change nothing (`harmless`);
anything else is refused by name, so that no new variant of a model is ever
converted to something else. Defaults are those of transformers' config
classes, which leave out what equals them. null is as good as absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
import pathlib
from typing import Any

from checkpoints_convert import families
from checkpoints_convert import generation
from checkpoints_convert import harmless
from sarathi_jax import errors
from sarathi_jax import json_file
from sarathi_jax.models import config as config_lib

# Attributes of quantized checkpoints.
_QUANTIZED = ('compression_config', 'quantization', 'quantization_config')

ACTIVATIONS: Mapping[str, str] = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'relu': 'relu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}


class Attributes:
  """The attributes of a config.json, each taken at most once by name."""

  def __init__(self, values: Mapping[str, Any], where: str):
    self._values = dict(values)
    self._where = where

  def take(self, name: str, default: Any = None) -> Any:
    """Takes an attribute; its JSON value, or `default` if absent or null."""
    value = self._values.pop(name, None)
    return default if value is None else value

  def take_or_none(self, name: str, default: Any) -> Any:
    """Takes an attribute whose null has a meaning; `default` if absent."""
    return self._values.pop(name, default)

  def flag(self, name: str, default: bool) -> bool:
    """Takes a boolean; null is false, as transformers reads it."""
    value = self._values.pop(name, default)
    if not isinstance(value, bool | None):
      raise self.refuse(name, value, 'must be true or false')
    return bool(value)

  def require(self, name: str) -> Any:
    """Takes an attribute without a default; returns its JSON value.

    Raises:
      CheckpointError: it is absent or null.
    """
    if self._values.get(name) is None:
      raise self.error(f'{name}: missing')
    return self._values.pop(name)

  def size(
    self, name: str, default: int | None = None, most: int = config_lib.MOST
  ) -> int:
    """Takes an integer >= 1; for sizes that are calculated with here.

    Args:
      name: the attribute.
      default: for when it is absent; None if it must not be.
      most: the largest that it may be.

    Raises:
      CheckpointError: it is missing, or none.
    """
    value = self.take(name, default)
    if value is None:
      raise self.error(f'{name}: missing')
    if type(value) is not int or not 1 <= value <= most:
      raise self.refuse(name, value, f'must be an integer in [1, {most}]')
    return value

  def refuse(self, name: str, value: Any, rule: str) -> errors.CheckpointError:
    """Returns the error for a value that can't be honoured."""
    return self.error(f'{name}={value!r}: {rule}')

  def error(self, message: str) -> errors.CheckpointError:
    return errors.CheckpointError(f'{self._where}: {message}.')

  def finish(self) -> None:
    """Refuses attributes that nobody took and that might change something.

    Raises:
      CheckpointError: there is one; names it.
    """
    remote_code = bool(self._values.get('auto_map'))
    for name, value in self._values.items():
      if value is None or name in generation.NAMES:
        continue
      if name in _QUANTIZED:
        raise self.refuse(
          name, value, 'quantized checkpoints are not supported'
        )
      if not harmless.is_harmless(name, value, remote_code=remote_code):
        raise self.refuse(
          name,
          value,
          'this attribute is not supported, and might change '
          'what the model computes',
        )


def read(
  folder: pathlib.Path,
) -> tuple[config_lib.ModelConfig, Sequence[Any], dict[str, Any]]:
  """Reads the config of a Hugging Face checkpoint.

  Args:
    folder: holds config.json.

  Returns:
    The model, its family's rules, and the decoded config.json.

  Raises:
    CheckpointError: no or damaged config.json, an architecture that is not
      supported, or an attribute that is not, each by name.
  """
  path = folder / 'config.json'
  raw = json_file.read(path)
  family = families.find(_architecture(raw, path))
  attributes = Attributes(raw, str(path))
  try:
    model = family.read_config(attributes)
  except errors.CheckpointError:
    raise
  except errors.ConfigError as e:
    raise attributes.error(str(e).rstrip('.')) from e
  except (ArithmeticError, AttributeError, TypeError, ValueError) as e:
    raise attributes.error(
      f'an attribute is of the wrong type, or out of range: {e}'
    ) from e
  attributes.finish()
  return model, family.rules(model), raw


def _architecture(raw: Mapping[str, Any], path: pathlib.Path) -> str:
  """Returns the named architecture, or that of the model type.

  Does as transformers does.
  """
  names = raw.get('architectures')
  if not names:
    kind = raw.get('model_type')
    names = [families.architecture_of(kind) or kind]
  if not isinstance(names, list) or len(names) != 1 or not names[0]:
    raise errors.CheckpointError(
      f'{path}: architectures={names!r}: must name one architecture, or '
      'model_type must.'
    )
  return str(names[0])


def common(
  attributes: Attributes,
  *,
  kv_heads: int | None,
  theta: float,
  eps: float,
  positions: int,
) -> dict[str, Any]:
  """Takes the attributes that Llama-like families share; returns the fields.

  Args:
    attributes: to take from.
    kv_heads: the default of num_key_value_heads; None for num_attention_heads.
    theta: the default of rope_theta.
    eps: the default of rms_norm_eps.
    positions: the default of max_position_embeddings.
  """
  num_heads = attributes.size('num_attention_heads')
  hidden_size = attributes.size('hidden_size')
  rope, length = read_rope(
    attributes, theta, attributes.size('max_position_embeddings', positions)
  )
  return dict(
    vocab_size=attributes.require('vocab_size'),
    hidden_size=hidden_size,
    intermediate_size=attributes.require('intermediate_size'),
    num_layers=attributes.size(
      'num_hidden_layers', most=config_lib.MOST_LAYERS
    ),
    num_heads=num_heads,
    num_kv_heads=attributes.take('num_key_value_heads', kv_heads or num_heads),
    head_dim=attributes.take('head_dim', hidden_size // num_heads),
    max_position_embeddings=length,
    norm_eps=attributes.take('rms_norm_eps', eps),
    activation=activation(attributes, 'hidden_act', 'silu'),
    rope=rope,
    tie_word_embeddings=attributes.flag('tie_word_embeddings', False),
  )


def activation(attributes: Attributes, name: str, default: str) -> str:
  """Takes an activation function; returns our name of it."""
  value = attributes.take(name, default)
  if value not in ACTIVATIONS:
    raise attributes.refuse(
      name, value, f'must be one of {", ".join(ACTIVATIONS)}'
    )
  return ACTIVATIONS[value]


def read_rope(
  attributes: Attributes, theta: float, positions: int
) -> tuple[config_lib.RopeConfig, int]:
  """Reads the rotary embedding and the context length.

  transformers 5 writes `rope_parameters`, older versions write `rope_theta`
  and `rope_scaling`.

  Args:
    attributes: to take from.
    theta: the default of rope_theta.
    positions: max_position_embeddings.

  Returns:
    The embedding, and the tokens of context that it is good for: `positions`,
    times the factor where `positions` is the length before scaling.
  """
  theta = attributes.take('rope_theta', theta)
  scaling = attributes.take('rope_scaling')
  both = attributes.take('rope_parameters') or {}
  values = {**both, **(scaling or {})}
  for name, value in values.items():
    if isinstance(value, dict):
      raise attributes.refuse(
        f'rope_parameters.{name}', value, 'one for all layers is supported'
      )
  old_name = values.pop('type', None)
  kind = values.pop('rope_type', None) or old_name or 'default'
  if kind not in _ROPES:
    raise attributes.refuse(
      'rope_type', kind, f'must be one of {", ".join(_ROPES)}'
    )
  if values.pop('partial_rotary_factor', 1.0) not in (None, 1.0):
    raise attributes.error('partial_rotary_factor: only 1 is supported')
  if (own := values.pop('rope_theta', None)) is not None:
    theta = own
  if type(theta) not in (int, float):  # `float` takes texts, and true, too.
    raise attributes.refuse('rope_theta', theta, 'must be a number')
  numbers = {name: value for name, value in values.items() if value is not None}
  rope, length = _ROPES[kind](numbers, theta, positions)
  if numbers:
    raise attributes.error(
      f'rope_type={kind!r} with {", ".join(sorted(numbers))}: not supported'
    )
  return rope, length


_Rope = tuple[config_lib.RopeConfig, int]


def _default(numbers: dict[str, Any], theta: float, positions: int) -> _Rope:
  # Scalings are sometimes switched off by their type alone.
  numbers.pop('factor', None)
  numbers.pop('original_max_position_embeddings', None)
  return config_lib.RopeConfig(theta=float(theta)), positions


def _linear(numbers: dict[str, Any], theta: float, positions: int) -> _Rope:
  factor = numbers.pop('factor', None)
  rope = config_lib.RopeConfig(theta=float(theta), kind='linear', factor=factor)
  return rope, int(positions * rope.factor)  # type: ignore[operator]


def _dynamic(numbers: dict[str, Any], theta: float, positions: int) -> _Rope:
  # transformers scales from max_position_embeddings, whatever else is said.
  numbers.pop('original_max_position_embeddings', None)
  rope = config_lib.RopeConfig(
    theta=float(theta),
    kind='dynamic',
    factor=numbers.pop('factor', None),
    original_max_position=positions,
  )
  return rope, int(positions * rope.factor)  # type: ignore[operator]


def _llama3(numbers: dict[str, Any], theta: float, positions: int) -> _Rope:
  rope = config_lib.RopeConfig(
    theta=float(theta),
    kind='llama3',
    factor=numbers.pop('factor', None),
    original_max_position=numbers.pop(
      'original_max_position_embeddings', positions
    ),
    low_freq_factor=numbers.pop('low_freq_factor', None),
    high_freq_factor=numbers.pop('high_freq_factor', None),
  )
  return rope, positions


def _yarn(numbers: dict[str, Any], theta: float, positions: int) -> _Rope:
  factor = numbers.pop('factor', None)
  original = numbers.pop('original_max_position_embeddings', positions)
  if factor is None:
    factor = positions / (original or 1)  # 0 is refused by name.
  mscale = numbers.pop('mscale', None)
  mscale_all_dim = numbers.pop('mscale_all_dim', None)
  attention_factor = numbers.pop('attention_factor', None)
  if attention_factor is None:
    attention_factor = _temperature(factor)
    if mscale and mscale_all_dim:
      attention_factor = _temperature(factor, mscale) / _temperature(
        factor, mscale_all_dim
      )
  rope = config_lib.RopeConfig(
    theta=float(theta),
    kind='yarn',
    factor=factor,
    original_max_position=original,
    attention_factor=attention_factor,
    beta_fast=numbers.pop('beta_fast', None) or 32,
    beta_slow=numbers.pop('beta_slow', None) or 1,
    truncate=numbers.pop('truncate', True),
  )
  return rope, int(original * factor)


def _temperature(factor: float, mscale: float = 1.0) -> float:
  """Returns what YaRN multiplies cos and sin with by default."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


_ROPES = {
  'default': _default,
  'linear': _linear,
  'dynamic': _dynamic,
  'llama3': _llama3,
  'yarn': _yarn,
}
