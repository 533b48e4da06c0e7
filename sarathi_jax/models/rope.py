# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings, as Hugging Face transformers computes them.

The arithmetic follows transformers/modeling_rope_utils.py step by step in
float32, so that the frequencies agree to the last bit or so: at position
100,000 a relative error of 1e-7 in one is an angle of 0.01.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from sarathi_jax.models import config as config_lib
from sarathi_jax.models import rope_config

Rotation = tuple[Array, Array]  # cos, sin [T, rotary_dim / 2] float32


def tables(
  config: config_lib.RopeConfig,
  head_dim: int,
  positions: Int[Array, ' T'],
  rope_lens: Int[Array, ' T'] | None,
) -> Rotation:
  """Returns the cosine and sine of every token's angles.

  Args:
    config: the kind of embedding and its fields.
    head_dim: h.
    positions: of the tokens in their sequences.
    rope_lens: needed, and read, by kinds of `rope_config.BY_LENGTH` only.
      'dynamic': transformers rotates all of a prompt with the base for the
      prompt's length, and each later token with the base for the length so
      far, itself included; keys stay as they were cached. So this is
      max(prompt length, position + 1) for every token, whatever chunks it is
      computed in. 'longrope': the most tokens that the sequence may come to,
      the same for all of its tokens; transformers computes a sequence anew
      that grows beyond the original context.

  Returns:
    cos and sin, [T, rotary_dim / 2] float32.
  """
  dim = config.rotary_dim or head_dim
  if config.kind in rope_config.BY_LENGTH:
    if rope_lens is None:
      raise ValueError(
        f'rope_lens=None: rope.kind={config.kind!r} needs lengths.'
      )
    frequencies = _BY_LENGTH[config.kind](config, dim, rope_lens)
  else:
    frequencies = jnp.asarray(_STATIC[config.kind](config, dim))[None, :]
  angles = positions.astype(jnp.float32)[:, None] * frequencies
  factor = config.attention_factor or 1.0
  cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
  return lax.platform_dependent(
    (cos, sin),
    cpu=functools.partial(_computed_once, positions[0] >= 0),
    default=lambda rotation: rotation,
  )


def query_factors(
  config: config_lib.ModelConfig, positions: Int[Array, ' T']
) -> Float[Array, ' T'] | None:
  """Returns what each token's queries are multiplied by; None for 1."""
  if config.query_growth is None:
    return None
  assert config.rope.original_max_position
  turns = positions // config.rope.original_max_position
  return 1 + config.query_growth * jnp.log1p(turns.astype(jnp.float32))


def _computed_once(always: Array, rotation: Rotation) -> Rotation:
  """Keeps XLA's CPU backend from computing sines in each layer and head.

  It would fuse them with all that reads them, through any barrier but a
  branch that it can't foresee.
  """
  return lax.cond(
    always, lambda x: x, lambda x: jax.tree.map(jnp.zeros_like, x), rotation
  )


def _exponents(dim: int) -> np.ndarray:
  return np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)


def _default(config: config_lib.RopeConfig, dim: int) -> np.ndarray:
  return np.float32(1) / np.float32(config.theta) ** _exponents(dim)


def _none(config: config_lib.RopeConfig, dim: int) -> np.ndarray:
  """Returns frequencies of 0: angles of 0, which change nothing."""
  del config
  return np.zeros(dim // 2, np.float32)


def _linear(config: config_lib.RopeConfig, dim: int) -> np.ndarray:
  assert config.factor is not None
  return _default(config, dim) / np.float32(config.factor)


def _llama3(config: config_lib.RopeConfig, dim: int) -> np.ndarray:
  """Divides low frequencies, keeps high ones, blends between (Llama 3.1)."""
  assert config.factor and config.low_freq_factor and config.high_freq_factor
  assert config.original_max_position
  frequencies = _default(config, dim)
  low, high = config.low_freq_factor, config.high_freq_factor
  length = config.original_max_position
  wavelengths = np.float32(2 * math.pi) / frequencies
  factor = np.float32(config.factor)
  blend = (np.float32(length) / wavelengths - np.float32(low)) / np.float32(
    high - low
  )
  blended = (1 - blend) * frequencies / factor + blend * frequencies
  return np.where(
    wavelengths > length / low,
    frequencies / factor,
    np.where(wavelengths < length / high, frequencies, blended),
  )


def _yarn(config: config_lib.RopeConfig, dim: int) -> np.ndarray:
  """Returns frequencies by YaRN (https://arxiv.org/abs/2309.00071)."""
  assert config.factor and config.original_max_position
  length, theta = config.original_max_position, config.theta

  def dimension(rotations: float | None) -> float:
    """Returns the (fractional) pair that makes so many rotations.

    They are counted over the original context.
    """
    assert rotations
    return (
      dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))
    )

  first, last = dimension(config.beta_fast), dimension(config.beta_slow)
  if config.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, dim - 1)
  width = (last - first) or 0.001
  ramp = np.arange(dim // 2, dtype=np.float32) - np.float32(first)
  keep = 1 - np.clip(ramp / np.float32(width), 0, 1)
  powers = np.float32(theta) ** _exponents(dim)
  return (
    1 / (np.float32(config.factor) * powers) * (1 - keep) + 1 / powers * keep
  )


_STATIC: Mapping[str, Callable[[config_lib.RopeConfig, int], np.ndarray]] = {
  'default': _default,
  'none': _none,
  'linear': _linear,
  'llama3': _llama3,
  'yarn': _yarn,
}


def _dynamic(
  config: config_lib.RopeConfig, dim: int, lens: Int[Array, ' T']
) -> Float[Array, 'T pairs']:
  """Returns frequencies by dynamic NTK: a longer length has a larger base."""
  assert config.factor and config.original_max_position
  original = config.original_max_position
  length = jnp.maximum(lens, original).astype(jnp.float32)
  growth = config.factor * length / original - (config.factor - 1)
  base = config.theta * growth ** (dim / (dim - 2))
  return 1 / base[:, None] ** jnp.asarray(_exponents(dim))[None, :]


def _longrope(
  config: config_lib.RopeConfig, dim: int, lens: Int[Array, ' T']
) -> Float[Array, 'T pairs']:
  """Returns frequencies by LongRoPE: longer sequences have others."""
  assert config.original_max_position
  powers = np.float32(config.theta) ** _exponents(dim)
  short, long = (
    jnp.asarray(1 / (np.array(factors, np.float32) * powers))[None, :]
    for factors in (config.short_factors, config.long_factors)
  )
  return jnp.where(lens[:, None] > config.original_max_position, long, short)


_BY_LENGTH: Mapping[str, Callable[..., Float[Array, 'T pairs']]] = {
  'dynamic': _dynamic,
  'longrope': _longrope,
}
