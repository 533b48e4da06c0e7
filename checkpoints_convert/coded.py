# SPDX-License-Identifier: Apache-2.0
"""Tensors that read as the arrays of our quantized matrices.

A format makes of its own tensors of a matrix X.weight [out, in] those that we
have (`sarathi_jax.models.quantized`): codes, named X.weight, and beside it what
`rules.scale_of` and others name. Rows of all but the order are rows of the
matrix, so that the rules of a family hold for them alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import re
from typing import Any, NamedTuple

import numpy as np

from checkpoints_convert import rules as rules_lib
from checkpoints_convert import safetensors_reader
from sarathi_jax import errors
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import quantization as quantization_lib

# How names end of what is left out -> what it is, for people.
_OF_ACTIVATIONS = 'scales of activations'
_OF_CACHE = 'scales of the KV cache'
_LEFT_OUT: Mapping[str, str] = {
  r'\.(input|activation)_(scale|zero_point)': _OF_ACTIVATIONS,
  r'\.([kqv]|output)_(scale|zero_point)': _OF_CACHE,
}


class Made(safetensors_reader.Tensor):
  """A tensor that reads as an array of ours."""

  __slots__ = ()

  @classmethod
  def of(
    cls,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    stored: safetensors_reader.Tensor,
    *fields: Any,
  ) -> Any:
    """Makes one of a stored tensor.

    Args:
      name, shape: of it.
      dtype: for people.
      stored: where errors are said to be.
      *fields: of the class.
    """
    return cls(name, shape, dtype, stored.path, stored.offset, 0, *fields)


@dataclasses.dataclass(frozen=True, slots=True)
class Codes(Made):
  """A matrix's codes."""

  @property
  def numbers(self) -> safetensors_reader.Tensor:
    """What they stand for, float32 [out, in], as the format says."""
    raise NotImplementedError


class Taken(NamedTuple):
  """A checkpoint's tensors, once those of a format are ours.

  Attributes:
    tensors: by name.
    told: a line that says what was done, for people.
    how: matrices are quantized; which are not is not known yet. None: none is.
  """

  tensors: dict[str, safetensors_reader.Tensor]
  told: str
  how: quantization_lib.Quantization | None


def without_others(
  tensors: Mapping[str, safetensors_reader.Tensor],
) -> tuple[dict[str, safetensors_reader.Tensor], str]:
  """Returns the tensors but those that are left out, and a line of these."""
  kept = {}
  dropped = dict.fromkeys(_LEFT_OUT.values(), 0)
  for name, tensor in tensors.items():
    what = next(
      (what for end, what in _LEFT_OUT.items() if re.search(f'{end}$', name)),
      None,
    )
    if what is None:
      kept[name] = tensor
    else:
      dropped[what] += 1
  told = [f'{n:,} {what} are left out.' for what, n in dropped.items() if n]
  if dropped[_OF_CACHE]:
    told.append('A quantized KV cache makes its own.')
  return kept, ' '.join(told)


def all_of(
  tensor: safetensors_reader.Tensor,
  reader: safetensors_reader.Reader,
  dtype: Any,
) -> np.ndarray:
  """Reads a whole tensor, which is small."""
  found = np.empty(tensor.shape, dtype)
  reader.read_rows(tensor, 0, found)
  return found


def settle(
  model: config_lib.ModelConfig,
  tensors: Mapping[str, safetensors_reader.Tensor],
  rules: Sequence[rules_lib.Rule],
  matrices: Iterable[str],
  how: quantization_lib.Quantization,
) -> config_lib.ModelConfig:
  """Returns the model with the quantization that its tensors have.

  Args:
    model: as config.json has it, without.
    tensors: by name, of `Taken`.
    rules: the family's.
    matrices: the paths of parameters that may be quantized.
    how: they are, but for which.

  Raises:
    CheckpointError: what has codes can't be quantized, or a parameter is of
      tensors with codes and of others; by name.
  """
  filled: dict[str, dict[bool, str]] = {}
  for name, tensor in tensors.items():
    for _, path in rules_lib.places(name, rules):
      filled.setdefault(path, {})[isinstance(tensor, Codes)] = name
  matrices = set(matrices)
  for path, names in filled.items():
    if True not in names:
      continue
    if False in names:
      raise errors.CheckpointError(
        f'{path}: {names[True]} is in codes, and {names[False]} is not.'
      )
    if path not in matrices:
      raise errors.CheckpointError(
        f'{names[True]}: dtype={tensors[names[True]].dtype}: only matrices '
        'that multiply can be quantized.'
      )
  kept = [path for path in matrices if True not in filled.get(path, ())]
  return dataclasses.replace(
    model,
    quantization=dataclasses.replace(
      how, kept=_patterns(kept, model.num_layers)
    ),
  )


def _patterns(paths: Iterable[str], num_layers: int) -> tuple[str, ...]:
  """Returns patterns of paths, one for what is so in all layers."""
  by_kind: dict[str, list[str]] = {}
  for path in paths:
    kind = re.sub(r'^layers\.\d+\.', 'layers.*.', path)
    by_kind.setdefault(kind, []).append(path)
  found: list[str] = []
  for kind, members in by_kind.items():
    found += [kind] if len(members) == num_layers > 1 else members
  return tuple(sorted(found))
