# SPDX-License-Identifier: Apache-2.0
"""Takes matrices that a checkpoint has in codes of 8 bits, and their scales.

Of a matrix X.weight [out, in] in FP8 or int8 there is a tensor of scales, one
for all of it, one a row, or one a block; each number is its code times its
scale. Ours have for each row a scale for each block along `in`
(`sarathi_jax.models.quantization`), which loses nothing. What else a checkpoint
has for 8 bits is known by name, and left out or refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
import re

import ml_dtypes
import numpy as np

from checkpoints_convert import quantization_config
from checkpoints_convert import rules as rules_lib
from checkpoints_convert import safetensors_reader
from sarathi_jax import errors
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import quantization as quantization_lib

# What safetensors calls codes -> what we do, and NumPy.
_CODES: Mapping[str, tuple[str, np.dtype]] = {
  'F8_E4M3': ('fp8', np.dtype(ml_dtypes.float8_e4m3fn)),
  'I8': ('int8', np.dtype(np.int8)),
}
_WEIGHT = '.weight'
# How names end of what is left out -> what it is, for people.
_LEFT_OUT: Mapping[str, str] = {
  r'\.(input|activation)_(scale|zero_point)': 'scales of activations',
  r'\.([kqv]|output)_(scale|zero_point)': 'scales of the KV cache',
}
_ZERO_POINT = '.weight_zero_point'


@dataclasses.dataclass(frozen=True, slots=True)
class Scales(safetensors_reader.Tensor):
  """Scales of a matrix's rows, float32 [out, groups], as ours are.

  Attributes:
    stored: the tensor of them, 0 to 2 axes.
    block: (rows, columns) of the matrix that have one in common.
  """

  stored: safetensors_reader.Tensor
  block: tuple[int, int]

  def read(
    self, reader: safetensors_reader.Reader, start: int, rows: np.ndarray
  ) -> None:
    of_rows = np.arange(start, start + len(rows)) // self.block[0]
    first, last = of_rows[0], of_rows[-1]
    found = np.empty((last - first + 1, rows.shape[1]), self.stored.numpy_dtype)
    self.stored.read(reader, int(first), found)
    rows[:] = found[of_rows - first]


@dataclasses.dataclass(frozen=True, slots=True)
class Codes(safetensors_reader.Tensor):
  """A matrix's codes.

  Attributes:
    scales: of the matrix.
  """

  scales: Scales

  @property
  def numpy_dtype(self) -> np.dtype:
    return _CODES[self.dtype][1]

  @property
  def numbers(self) -> Numbers:
    """The numbers that they stand for."""
    return Numbers(
      self.name,
      self.shape,
      'F32',
      self.path,
      self.offset,
      4 * math.prod(self.shape),
      self,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Numbers(safetensors_reader.Tensor):
  """What codes stand for, as the formats say, to check ours by.

  Attributes:
    codes: of the matrix.
  """

  codes: Codes

  def read(
    self, reader: safetensors_reader.Reader, start: int, rows: np.ndarray
  ) -> None:
    scales, stored = self.codes.scales, self.codes.scales.stored
    found = np.empty(math.prod(stored.shape), stored.numpy_dtype)
    stored.read(reader, 0, found)
    grid = found.astype(np.float32).reshape(-1, scales.shape[1])
    codes = np.empty(rows.shape, self.codes.numpy_dtype)
    self.codes.read(reader, start, codes)
    tall, wide = scales.block
    y = np.arange(start, start + len(rows))[:, None]
    x = np.arange(self.shape[1])[None, :]
    rows[:] = codes.astype(np.float32) * grid[y // tall, x // wide]


def take(
  tensors: Mapping[str, safetensors_reader.Tensor],
  scheme: quantization_config.Scheme,
  reader: safetensors_reader.Reader,
) -> tuple[dict[str, safetensors_reader.Tensor], str]:
  """Returns tensors by name: codes, and scales by the name of `scale_of`.

  Args:
    tensors: of the checkpoint.
    scheme: what config.json says of them.
    reader: of them.

  Returns:
    The tensors, and a line that says what is left out.

  Raises:
    CheckpointError: codes have no scales, or such that don't fit them; or there
      are no codes; by name.
  """
  result, dropped = _without_others(tensors, reader)
  num = 0
  for name, tensor in tensors.items():
    if tensor.dtype not in _CODES or name not in result:
      continue
    if tensor.dtype != scheme.dtype or not name.endswith(_WEIGHT):
      raise errors.CheckpointError(
        f'{name}: dtype={tensor.dtype}: is not of what quantization_config '
        f'says, weights in {scheme.dtype}.'
      )
    stored = name.removesuffix(_WEIGHT) + scheme.suffix
    if stored not in result:
      raise errors.CheckpointError(
        f'the checkpoint lacks {stored}, without which {name} means nothing.'
      )
    scales = _scales(name, tensor, result.pop(stored), scheme)
    result[scales.name] = scales
    result[name] = Codes(
      name,
      tensor.shape,
      tensor.dtype,
      tensor.path,
      tensor.offset,
      tensor.num_bytes,
      scales,
    )
    num += 1
  if not num:
    raise errors.CheckpointError(
      'quantization_config: no weights are in '
      f'{scheme.dtype}, of which it says that they are.'
    )
  codes, _ = _CODES[scheme.dtype]
  told = [
    f'{num:,} matrices stay in {codes}, and what they multiply in 16 or 32 '
    'bits.',
    *(f'{n:,} {what} are left out.' for what, n in dropped.items() if n),
  ]
  if dropped[_LEFT_OUT[r'\.([kqv]|output)_(scale|zero_point)']]:
    told.append('A quantized KV cache makes its own.')
  return result, ' '.join(told)


def _without_others(
  tensors: Mapping[str, safetensors_reader.Tensor],
  reader: safetensors_reader.Reader,
) -> tuple[dict[str, safetensors_reader.Tensor], dict[str, int]]:
  """Returns the tensors but those that are left out, and the numbers of these.

  Raises:
    CheckpointError: a zero point of weights is not 0.
  """
  kept = {}
  dropped = dict.fromkeys(_LEFT_OUT.values(), 0)
  for name, tensor in tensors.items():
    what = next(
      (what for end, what in _LEFT_OUT.items() if re.search(f'{end}$', name)),
      None,
    )
    if what is not None:
      dropped[what] += 1
    elif name.endswith(_ZERO_POINT):
      _check_zero(tensor, reader)
    else:
      kept[name] = tensor
  return kept, dropped


def _check_zero(
  tensor: safetensors_reader.Tensor, reader: safetensors_reader.Reader
) -> None:
  found = np.empty(tensor.num_bytes, np.uint8)
  reader.read_rows(tensor, 0, found)
  if found.any():
    raise errors.CheckpointError(
      f'{tensor.name}: is not 0: asymmetric codes are not supported. '
      + quantization_config.REMEDY
    )


def _scales(
  name: str,
  codes: safetensors_reader.Tensor,
  stored: safetensors_reader.Tensor,
  scheme: quantization_config.Scheme,
) -> Scales:
  """Returns a matrix's scales, once they are seen to fit it."""
  if (
    len(codes.shape) != 2
    or 0 in codes.shape
    or codes.num_bytes != math.prod(codes.shape)
  ):
    raise errors.CheckpointError(
      f'{name}: {codes.num_bytes} bytes of shape {codes.shape}: is no matrix '
      f'in {codes.dtype}.'
    )
  rows, columns = codes.shape
  block = scheme.block_of(rows, columns)
  grid = -(-rows // block[0]), -(-columns // block[1])
  # What has no columns may be written without their axis, or as one number.
  fits = [grid, *[grid[:1]] * (grid[1] == 1), *[()] * (grid == (1, 1))]
  if stored.shape not in fits:
    raise errors.CheckpointError(
      f'{stored.name}: shape {stored.shape}: must be {grid}, as {name} has '
      f'shape {codes.shape} and scales by {scheme.strategy}.'
    )
  _ = stored.numpy_dtype  # Raises, by name.
  return Scales(
    rules_lib.scale_of(name),
    (rows, grid[1]),
    'F32',
    stored.path,
    stored.offset,
    4 * rows * grid[1],
    stored,
    block,
  )


def settle(
  model: config_lib.ModelConfig,
  tensors: Mapping[str, safetensors_reader.Tensor],
  rules: Sequence[rules_lib.Rule],
  matrices: Iterable[str],
  group: int | None,
) -> config_lib.ModelConfig:
  """Returns the model with the quantization that its tensors have.

  Args:
    model: as config.json has it, without.
    tensors: by name, of `take`.
    rules: the family's.
    matrices: the paths of parameters that may be quantized.
    group: columns of a matrix [out, in] that a scale is for; None: all.

  Raises:
    CheckpointError: what has codes can't be quantized, or a parameter is of
      tensors with codes and of others; by name.
  """
  filled: dict[str, dict[bool, str]] = {}
  for name, tensor in tensors.items():
    for _, path in rules_lib.places(name, rules):
      filled.setdefault(path, {})[tensor.dtype in _CODES] = name
  matrices, codes = set(matrices), ''
  for path, names in filled.items():
    if True not in names:
      continue
    if False in names:
      raise errors.CheckpointError(
        f'{path}: {names[True]} is in codes, and {names[False]} is not.'
      )
    dtype = tensors[names[True]].dtype
    if path not in matrices:
      raise errors.CheckpointError(
        f'{names[True]}: dtype={dtype}: only matrices that multiply can be '
        'quantized.'
      )
    codes, _ = _CODES[dtype]
  kept = [path for path in matrices if True not in filled.get(path, ())]
  return dataclasses.replace(
    model,
    quantization=quantization_lib.Quantization(
      codes=codes, group=group, kept=_patterns(kept, model.num_layers)
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
