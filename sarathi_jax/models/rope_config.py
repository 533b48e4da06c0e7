# SPDX-License-Identifier: Apache-2.0
"""Configuration of rotary embeddings. Standard library only: no JAX."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from sarathi_jax import config as config_lib
from sarathi_jax.models import fields as fields_lib

# Kind of rotary embedding -> the fields that it takes beside theta.
ROPE_FIELDS: Mapping[str, tuple[str, ...]] = {
  'default': (),
  'none': (),
  'linear': ('factor',),
  'dynamic': ('factor', 'original_max_position'),
  'llama3': (
    'factor',
    'original_max_position',
    'low_freq_factor',
    'high_freq_factor',
  ),
  'yarn': (
    'factor',
    'original_max_position',
    'attention_factor',
    'beta_fast',
    'beta_slow',
    'truncate',
  ),
  'longrope': (
    'original_max_position',
    'attention_factor',
    'short_factors',
    'long_factors',
  ),
}
# Those by which a token's rotation goes by a length, beside its position.
BY_LENGTH = 'dynamic', 'longrope'
_FACTORS = (
  lambda value: (
    isinstance(value, (list, tuple))
    and bool(value)
    and all(map(fields_lib.POSITIVE[0], value))
  ),
  'must be numbers > 0 that float32 can hold',
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
  """Rotary position embedding (https://arxiv.org/abs/2104.09864) and scalings.

  The fields that a kind does not take (see `ROPE_FIELDS`) are None.

  Attributes:
    theta: the base of the wavelengths.
    kind: one of `ROPE_FIELDS`; 'none': nothing is rotated.
    rotary_dim: how many leading numbers of a head are rotated; None for all.
    factor: how much longer the context became, > 0.
    original_max_position: tokens of context before the scaling.
    low_freq_factor: wavelengths above original / this are divided by factor.
    high_freq_factor: wavelengths below original / this are left alone.
    attention_factor: multiplies cos and sin (a temperature).
    beta_fast: rotations within the original context above which a frequency
      is left alone.
    beta_slow: rotations below which it is divided by factor.
    truncate: whether YaRN rounds its range of frequencies to whole ones.
    short_factors: what each frequency is divided by in sequences of up to
      original_max_position tokens (LongRoPE, arXiv 2402.13753).
    long_factors: the same in longer ones, from their first token on.
  """

  theta: float = 10000.0
  kind: str = 'default'
  rotary_dim: int | None = None
  factor: float | None = None
  original_max_position: int | None = None
  low_freq_factor: float | None = None
  high_freq_factor: float | None = None
  attention_factor: float | None = None
  beta_fast: float | None = None
  beta_slow: float | None = None
  truncate: bool | None = None
  short_factors: tuple[float, ...] | None = None
  long_factors: tuple[float, ...] | None = None

  def __post_init__(self) -> None:
    config_lib.check(
      fields_lib.POSITIVE[0](self.theta),
      'rope.theta',
      self.theta,
      fields_lib.POSITIVE[1],
    )
    holds, rule = config_lib.one_of(ROPE_FIELDS)
    config_lib.check(holds(self.kind), 'rope.kind', self.kind, rule)
    config_lib.check(
      self.kind != 'yarn' or self.theta > 1,
      'rope.theta',
      self.theta,
      "must be > 1 with kind='yarn', which divides by its logarithm",
    )
    config_lib.check(
      self.rotary_dim is None
      or (fields_lib.SIZE[0](self.rotary_dim) and self.rotary_dim % 2 == 0),
      'rope.rotary_dim',
      self.rotary_dim,
      'must be even and >= 2, or null',
    )
    takes = ROPE_FIELDS[self.kind]
    special = {
      'original_max_position': fields_lib.SIZE,
      'truncate': config_lib.FLAG,
      'short_factors': _FACTORS,
      'long_factors': _FACTORS,
    }
    for name in sorted(
      {name for names in ROPE_FIELDS.values() for name in names}
    ):
      value = getattr(self, name)
      if name in takes:
        holds, rule = special.get(name, fields_lib.POSITIVE)
        config_lib.check(
          holds(value), f'rope.{name}', value, f'{rule} with kind={self.kind!r}'
        )
      else:
        config_lib.check(
          value is None,
          f'rope.{name}',
          value,
          f'has no meaning with kind={self.kind!r}',
        )
    for name in ('short_factors', 'long_factors'):
      if (factors := getattr(self, name)) is not None:
        object.__setattr__(self, name, tuple(factors))
    if self.low_freq_factor is not None and self.high_freq_factor is not None:
      config_lib.check(
        self.high_freq_factor > self.low_freq_factor,
        'rope.high_freq_factor',
        self.high_freq_factor,
        f'must exceed low_freq_factor={self.low_freq_factor}',
      )

  @classmethod
  def from_dict(
    cls, fields: Mapping[str, Any], what: str = 'rope'
  ) -> RopeConfig:
    """Reads what `dataclasses.asdict` wrote; refuses unknown fields."""
    config: RopeConfig = fields_lib.from_dict(cls, fields, what)
    return config


DEFAULT = RopeConfig()
