# SPDX-License-Identifier: Apache-2.0
"""Checks that what is handed over as an array is one, and still there."""

from __future__ import annotations

from typing import Any

import jax

from sarathi_jax import errors


def check(name: str, leaf: Any) -> None:
  """Checks a leaf of live parameters.

  Args:
    name: of the leaf, for the message.
    leaf: what may be no array.

  Raises:
    ConfigError: it is no jax.Array, or was deleted.
  """
  if not isinstance(leaf, jax.Array):
    raise errors.ConfigError(
      f'params.{name}: is a {type(leaf).__name__}; must be a jax.Array.'
    )
  if leaf.is_deleted():
    raise errors.ConfigError(
      f'params.{name}: is deleted, or donated to a computation; must be alive '
      'while it is served.'
    )
