# SPDX-License-Identifier: Apache-2.0
"""Writes matrices packed in words of 32 bits, as the formats' documents say.

In NumPy, code by code. What these write is compared with what the formats' own
libraries made (`packed_golden`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
import zlib

import numpy as np
import torch

_AWQ_ORDER = 0, 2, 4, 6, 1, 3, 5, 7  # columns of a word's nibbles


class Grid(NamedTuple):
  """A matrix in codes.

  Attributes:
    codes: [out, in], from 0 on.
    scales: [out, groups] float16.
    zeros: [out, groups], codes that stand for 0.
    groups: [in], of each column.
    exact: [out, in] float32, what they stand for.
  """

  codes: np.ndarray
  scales: np.ndarray
  zeros: np.ndarray
  groups: np.ndarray
  exact: np.ndarray


class Packed(NamedTuple):
  """A way to keep a linear layer's weight.

  Attributes:
    config: quantization_config.
    write: makes tensors, by the ends of their names, of a grid.
    bits: of a code.
    group: columns of a group; None: all.
    symmetric: whether all zeros are the middle.
    is_reordered: whether groups are of columns that do not lie together.
  """

  config: dict[str, Any]
  write: Callable[[Grid, int], dict[str, np.ndarray]]
  bits: int = 4
  group: int | None = 32
  symmetric: bool = False
  is_reordered: bool = False

  def tensors_of(
    self, module: str, weight: np.ndarray
  ) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Returns a weight's tensors by name, and what they stand for."""
    grid = quantize(weight, self, zlib.crc32(module.encode()))
    return {
      f'{module}.{end}': torch.from_numpy(np.ascontiguousarray(array))
      for end, array in self.write(grid, self.bits).items()
    }, grid.exact


def quantize(weight: np.ndarray, one: Packed, seed: int) -> Grid:
  """Rounds a matrix, row by row and group by group."""
  out, width = weight.shape
  size = one.group or width
  groups = np.arange(width) // size
  if one.is_reordered:
    groups = np.random.default_rng(seed).permutation(groups)
  num, middle = groups.max() + 1, 2 ** (one.bits - 1)
  codes = np.zeros((out, width), np.int64)
  scales = np.zeros((out, num), np.float16)
  zeros = np.full((out, num), middle)
  for n, g in np.ndindex(out, num):
    part = weight[n, groups == g].astype(np.float64)
    if one.symmetric:
      scale = np.abs(part).max() / (middle - 1)
    else:
      scale = (part.max() - part.min()) / (2 * middle - 1)
    scales[n, g] = scale
    if not one.symmetric:  # 0 has no code of its own in GPTQ's first version.
      zeros[n, g] = np.clip(np.rint(-part.min() / scale), 1, 2 * middle - 1)
    found = np.rint(part / np.float64(scales[n, g])) + zeros[n, g]
    codes[n, groups == g] = np.clip(found, 0, 2 * middle - 1)
  exact = (codes - zeros[:, groups]) * scales.astype(np.float32)[:, groups]
  return Grid(codes, scales, zeros, groups, exact.astype(np.float32))


def pack(
  codes: np.ndarray, bits: int, axis: int, order: tuple[int, ...] = ()
) -> np.ndarray:
  """Packs integers along an axis, from the lowest bits of a word on."""
  codes = np.moveaxis(codes, axis, -1)
  per = 32 // bits
  missing = -codes.shape[-1] % per
  codes = np.pad(codes, [(0, 0), (0, missing)]).astype(np.uint32)
  words = np.zeros((len(codes), codes.shape[1] // per), np.uint32)
  for i in range(per):
    words |= codes[:, (order or range(per))[i] :: per] << np.uint32(bits * i)
  return np.moveaxis(words, -1, axis).view(np.int32)


def compressed(grid: Grid, bits: int) -> dict[str, np.ndarray]:
  """As compressed-tensors' PackedQuantizationCompressor writes it."""
  tensors = {
    'weight_packed': pack(grid.codes, bits, 1),
    'weight_scale': grid.scales,
    'weight_shape': np.array(grid.codes.shape, np.int64),
  }
  if (grid.zeros != 2 ** (bits - 1)).any():
    tensors['weight_zero_point'] = pack(grid.zeros, bits, 0)
  if not np.array_equal(grid.groups, np.sort(grid.groups)):
    tensors['weight_g_idx'] = grid.groups.astype(np.int32)
  return tensors


def awq(grid: Grid, bits: int) -> dict[str, np.ndarray]:
  """As AutoAWQ's WQLinear_GEMM keeps it."""
  return {
    'qweight': pack(grid.codes.T, bits, 1, _AWQ_ORDER),
    'qzeros': pack(grid.zeros.T, bits, 1, _AWQ_ORDER),
    'scales': grid.scales.T,
  }


def gptq(grid: Grid, bits: int, less: int = 1) -> dict[str, np.ndarray]:
  """As AutoGPTQ's QuantLinear keeps it; GPTQModel's second version, less=0."""
  return {
    'qweight': pack(grid.codes.T, bits, 0),
    'qzeros': pack(grid.zeros.T - less, bits, 1),
    'scales': grid.scales.T,
    'g_idx': grid.groups.astype(np.int32),
    'bias': np.zeros(len(grid.codes), np.float16),
  }


def _gptq_2(grid: Grid, bits: int) -> dict[str, np.ndarray]:
  tensors = gptq(grid, bits, less=0)
  return {name: x for name, x in tensors.items() if name != 'bias'}


def _of_compressed(**weights: Any) -> dict[str, Any]:
  """As llm-compressor writes it."""
  return {
    'quant_method': 'compressed-tensors',
    'format': 'pack-quantized',
    'config_groups': {
      'group_0': {
        'targets': ['Linear'],
        'weights': {
          'num_bits': 4,
          'type': 'int',
          'strategy': 'group',
          'group_size': 32,
          'symmetric': True,
          'dynamic': False,
          'actorder': None,
          'observer': 'minmax',
          'observer_kwargs': {},
          **weights,
        },
        'input_activations': None,
        'output_activations': None,
        'format': 'pack-quantized',
      }
    },
    'ignore': ['lm_head'],
    'quantization_status': 'compressed',
  }


_AWQ = {
  'quant_method': 'awq',
  'bits': 4,
  'group_size': 32,
  'zero_point': True,
  'version': 'gemm',
  'modules_to_not_convert': None,
}
_GPTQ = {
  'quant_method': 'gptq',
  'bits': 4,
  'group_size': 32,
  'damp_percent': 0.1,
  'desc_act': False,
  'static_groups': False,
  'sym': True,
  'true_sequential': True,
  'model_name_or_path': None,
  'model_file_base_name': 'model',
}
_ACT_ORDER = _GPTQ | dict(desc_act=True, sym=False)

FORMATS: dict[str, Packed] = {
  'compressed, symmetric': Packed(
    _of_compressed(group_size=64), compressed, group=64, symmetric=True
  ),
  'compressed, asymmetric': Packed(_of_compressed(symmetric=False), compressed),
  'compressed, by channel': Packed(
    _of_compressed(strategy='channel', group_size=None),
    compressed,
    group=None,
    symmetric=True,
  ),
  'compressed, 8 bits': Packed(
    _of_compressed(num_bits=8), compressed, bits=8, symmetric=True
  ),
  'compressed, by activations': Packed(
    _of_compressed(actorder='group'),
    compressed,
    symmetric=True,
    is_reordered=True,
  ),
  'awq': Packed(_AWQ, awq),
  'gptq': Packed(_GPTQ | dict(sym=False), gptq),
  'gptq, symmetric': Packed(_GPTQ, gptq, symmetric=True),
  'gptq, by activations': Packed(_ACT_ORDER, gptq, is_reordered=True),
  'gptq, second version': Packed(
    _GPTQ | dict(sym=False, checkpoint_format='gptq_v2'), _gptq_2
  ),
  'gptq, 8 bits': Packed(_GPTQ | dict(bits=8), gptq, bits=8, symmetric=True),
}
