# SPDX-License-Identifier: Apache-2.0
"""Reads rotary embeddings from config.json.

transformers 5 writes `rope_parameters`, older versions write `rope_theta` and
`rope_scaling`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

from checkpoints_convert import attributes as attributes_lib
from sarathi_jax import errors
from sarathi_jax.models import config as config_lib

FULL, SLIDING = 'full_attention', 'sliding_attention'
Fields = dict[str, Any]  # of a config
_Rope = tuple[config_lib.RopeConfig, int]  # and the context length
# Takes numbers out of the first, a rotation's; then theta, and positions.
Kind = Callable[[dict[str, Any], float, int], _Rope]


def read(
  attributes: attributes_lib.Attributes,
  theta: float,
  positions: int,
  *,
  partial: float | None = None,
  head_dim: int = 0,
  kinds: Mapping[str, Kind] | None = None,
  absent: Mapping[str, Any] | None = None,
) -> Fields:
  """Reads the rotary embedding of all layers, and the context length.

  Args:
    attributes: to take from.
    theta: the default of rope_theta.
    positions: max_position_embeddings.
    partial: the default of partial_rotary_factor; None: there is no such.
    head_dim: of which that many are rotated.
    kinds: reads each kind of rotation; None for `KINDS`.
    absent: rope_parameters, if there are none.

  Returns:
    `rope`, and `max_position_embeddings`, the tokens of context that it is good
    for: `positions`, times the factor where `positions` is the length before
    scaling.
  """
  theta = attributes.take('rope_theta', theta)
  scaling = attributes.take('rope_scaling')
  both = attributes.take('rope_parameters') or {}
  values = {**both, **(scaling or {})} or dict(absent or {})
  rotary_dim = None
  if partial is not None:
    partial = attributes.take('partial_rotary_factor', partial)
    partial = values.pop('partial_rotary_factor', None) or partial
    if type(partial) not in (int, float) or not 0 < partial <= 1:
      raise attributes.refuse(
        'partial_rotary_factor', partial, 'must be a number in (0, 1]'
      )
    rotary_dim = int(head_dim * partial) if partial < 1 else None
  rope, length = _read_one(attributes, values, theta, positions, kinds or KINDS)
  rope = dataclasses.replace(rope, rotary_dim=rotary_dim)
  return dict(rope=rope, max_position_embeddings=length)


def read_by_type(
  attributes: attributes_lib.Attributes,
  thetas: Mapping[str, float],
  positions: int,
) -> Fields:
  """Reads those of layers without and with a window, which may differ.

  `rope_scaling` is of layers without a window alone.

  Args:
    attributes: to take from.
    thetas: for `FULL` and `SLIDING`, rope_theta where none is told.
    positions: max_position_embeddings.

  Returns:
    `rope`, `window_rope`, and `max_position_embeddings`: `positions`, which
    these models tell as they are once scaled.
  """
  both = attributes.take('rope_parameters') or {}
  scaling = attributes.take('rope_scaling') or {}
  if unknown := sorted(both.keys() - {FULL, SLIDING}):
    raise attributes.refuse(
      'rope_parameters', both, f'{unknown[0]} is of no type of layers'
    )
  full, sliding = (
    _read_one(
      attributes,
      {**(both.get(name) or {}), **(scaling if name == FULL else {})},
      thetas[name],
      positions,
      KINDS,
    )[0]
    for name in (FULL, SLIDING)
  )
  return dict(rope=full, window_rope=sliding, max_position_embeddings=positions)


def _read_one(
  attributes: attributes_lib.Attributes,
  values: Mapping[str, Any],
  theta: float,
  positions: int,
  kinds: Mapping[str, Kind],
) -> _Rope:
  values = dict(values)
  for name, value in values.items():
    if isinstance(value, dict):
      raise attributes.refuse(
        f'rope_parameters.{name}', value, 'one for all layers is supported'
      )
  old_name = values.pop('type', None)
  kind = values.pop('rope_type', None) or old_name or 'default'
  if kind not in kinds:
    raise attributes.refuse(
      'rope_type', kind, f'must be one of {", ".join(kinds)}'
    )
  if values.pop('partial_rotary_factor', 1.0) not in (None, 1.0):
    raise attributes.error('partial_rotary_factor: only 1 is supported')
  if (own := values.pop('rope_theta', None)) is not None:
    theta = own
  if type(theta) not in (int, float):  # `float` takes texts, and true, too.
    raise attributes.refuse('rope_theta', theta, 'must be a number')
  numbers = {name: value for name, value in values.items() if value is not None}
  rope, length = kinds[kind](numbers, theta, positions)
  if numbers:
    raise attributes.error(
      f'rope_type={kind!r} with {", ".join(sorted(numbers))}: not supported'
    )
  return rope, length


def default(numbers: dict[str, Any], theta: float, positions: int) -> _Rope:
  """Reads what is not scaled; scalings are sometimes switched off by type."""
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


def yarn(numbers: dict[str, Any], theta: float, positions: int) -> _Rope:
  """Reads YaRN's."""
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


def longrope(
  numbers: dict[str, Any], theta: float, positions: int, *, original: int
) -> _Rope:
  """Reads LongRoPE's, whose original context the config has beside it."""
  if numbers.pop('original_max_position_embeddings', original) != original:
    raise errors.ConfigError(
      'rope_parameters.original_max_position_embeddings: must be '
      f'original_max_position_embeddings={original}'
    )
  factor = numbers.pop('factor', None) or positions / original
  attention_factor = numbers.pop('attention_factor', None)
  if attention_factor is None:
    attention_factor = 1.0
    if factor > 1:
      attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
  rope = config_lib.RopeConfig(
    theta=float(theta),
    kind='longrope',
    original_max_position=original,
    attention_factor=attention_factor,
    short_factors=numbers.pop('short_factor', None),
    long_factors=numbers.pop('long_factor', None),
  )
  return rope, positions


def _temperature(factor: float, mscale: float = 1.0) -> float:
  """Returns what YaRN multiplies cos and sin with by default."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


KINDS: Mapping[str, Kind] = {
  'default': default,
  'linear': _linear,
  'dynamic': _dynamic,
  'llama3': _llama3,
  'yarn': yarn,
}
