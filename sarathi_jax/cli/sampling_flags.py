# SPDX-License-Identifier: Apache-2.0
"""A flag for each field of `SamplingParams`. No JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from sarathi_jax import json_file
from sarathi_jax import sampling_params

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # They are of the main that asks for them.

_Kind = sampling_params.Kind
_DEFINE: Mapping[_Kind, Callable[..., Any]] = {
  _Kind.INT: flags.DEFINE_integer,
  _Kind.LONG: flags.DEFINE_integer,
  _Kind.FLOAT: flags.DEFINE_float,
  _Kind.BOOL: flags.DEFINE_bool,
  _Kind.STRINGS: flags.DEFINE_multi_string,
  _Kind.NAME: flags.DEFINE_string,
  _Kind.IDS: flags.DEFINE_multi_integer,
  _Kind.BIAS: lambda name, default, help: flags.DEFINE_multi(
    _BiasParser(), flags.ArgumentSerializer(), name, default, help
  ),
  _Kind.OUTPUTS: lambda name, default, help: flags.DEFINE(
    _JsonParser(), name, default, help, serializer=flags.ArgumentSerializer()
  ),
}


class _BiasParser(flags.ArgumentParser[tuple[int, float]]):
  """Parses ID:BIAS."""

  def parse(self, argument: str) -> tuple[int, float]:
    token, colon, bias = argument.partition(':')
    if not colon:
      raise ValueError('must be ID:BIAS')
    return int(token), float(bias)


class _JsonParser(flags.ArgumentParser[Any]):
  """Parses a JSON object."""

  def parse(self, argument: str) -> Any:
    return json_file.parse(argument.encode())


def define(*, but: tuple[str, ...] = ()) -> None:
  """Defines the flags of all fields `but` some, with no default values."""
  for name, field in sampling_params.FIELDS.items():
    if name not in but:
      _DEFINE[field.kind](name, None, field.help)


def said(*, but: tuple[str, ...] = ()) -> dict[str, Any]:
  """Returns the values of the flags that were given, `but` for some."""
  values = {
    name: FLAGS[name].value
    for name in sampling_params.FIELDS
    if name not in but
  }
  return {
    name: dict(value)
    if sampling_params.FIELDS[name].kind is _Kind.BIAS
    else value
    for name, value in values.items()
    if value is not None
  }
