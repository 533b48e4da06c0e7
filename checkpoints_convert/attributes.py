# SPDX-License-Identifier: Apache-2.0
"""Takes attributes of config.json by name, and refuses what nobody took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints_convert import generation
from checkpoints_convert import harmless
from sarathi_jax import errors
from sarathi_jax.models import fields as fields_lib

# Of checkpoints that are quantized, as no format that is known here says it.
_QUANTIZED = 'quantization'


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

  def require(self, name: str, default: Any = None) -> Any:
    """Takes an attribute that must be there, or have a default; its JSON value.

    Raises:
      CheckpointError: it is absent or null, and has no default.
    """
    if (value := self.take(name, default)) is None:
      raise self.error(f'{name}: missing')
    return value

  def only(self, **values: Any) -> None:
    """Takes attributes that are known at one value each, and absent else.

    Raises:
      CheckpointError: one has another value; names it.
    """
    for name, known in values.items():
      if (value := self.take(name, known)) != known:
        raise self.refuse(name, value, f'only {known!r} is supported')

  def rest(self) -> Mapping[str, Any]:
    """Returns what nobody took yet."""
    return dict(self._values)

  def size(
    self, name: str, default: int | None = None, most: int = fields_lib.MOST
  ) -> int:
    """Takes an integer >= 1; for sizes that are calculated with here.

    Args:
      name: the attribute.
      default: for when it is absent; None if it must not be.
      most: the largest that it may be.

    Raises:
      CheckpointError: it is missing, or none.
    """
    value = self.require(name, default)
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
      if name == _QUANTIZED:
        raise self.refuse(
          name, value, 'checkpoints that are quantized so are not supported'
        )
      if not harmless.is_harmless(name, value, remote_code=remote_code):
        raise self.refuse(
          name,
          value,
          'this attribute is not supported, and might change '
          'what the model computes',
        )
