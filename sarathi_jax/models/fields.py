# SPDX-License-Identifier: Apache-2.0
"""Rules of the fields of models' configs. Standard library only: no JAX."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from sarathi_jax import config as config_lib
from sarathi_jax import errors

# What is calculated with must fit: positions and sizes into int32, and into
# memory what is made for each layer, or expert, before any weights are read.
MOST = 2**31 - 1
MOST_LAYERS = 10_000


def _up_to(most: int) -> config_lib.Rule:
  return (
    lambda value: config_lib.is_int(value) and 1 <= value <= most,
    f'must be an integer in [1, {most}]',
  )


SIZE = _up_to(MOST)
COUNT = _up_to(MOST_LAYERS)
POSITIVE = (
  lambda value: config_lib.is_real(value) and 2.0**-126 <= value < 2.0**128,
  'must be a number > 0 that float32 can hold',
)


def from_dict(cls: Any, fields: Mapping[str, Any], what: str) -> Any:
  """Calls `cls`, after refusing unknown and missing fields by name."""
  if not isinstance(fields, Mapping):
    raise errors.ConfigError(f'{what}={fields!r}: must be an object.')
  known = {f.name: f for f in dataclasses.fields(cls)}
  for name in fields:
    if name not in known:
      raise errors.ConfigError(
        f'{what}.{name}: unknown field; known: {", ".join(sorted(known))}.'
      )
  for name, field in known.items():
    required = (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    )
    if required and name not in fields:
      raise errors.ConfigError(f'{what}.{name}: missing.')
  return cls(**fields)
