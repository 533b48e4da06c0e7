# SPDX-License-Identifier: Apache-2.0
"""Makes matrices by compressed-tensors' own library, to compare with.

  python -m tests.checkpoints_convert.packed_golden

It needs the package compressed-tensors, which nothing else here does, so what
it made is kept (packed_golden.safetensors).
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from safetensors import numpy as safetensors_numpy

from tests.checkpoints_convert import packed_formats

PATH = pathlib.Path(__file__).with_name('packed_golden.safetensors')
SHAPE = 20, 128  # [out, in]: zero points of no whole words
# As `packed_formats.FORMATS` of these names say.
NAMES = (
  'compressed, symmetric',
  'compressed, asymmetric',
  'compressed, by channel',
  'compressed, 8 bits',
)


def grid_of(name: str) -> packed_formats.Grid:
  """Returns what is packed: random codes, as a format has them."""
  weight = np.random.default_rng(0).normal(0, 1, SHAPE).astype(np.float32)
  return packed_formats.quantize(weight, packed_formats.FORMATS[name], 0)


def _compressed(name: str) -> dict[str, Any]:
  from compressed_tensors.compressors.pack_quantized import base
  from compressed_tensors.quantization import QuantizationScheme
  import torch

  one, grid = packed_formats.FORMATS[name], grid_of(name)
  (group,) = one.config['config_groups'].values()
  scheme = QuantizationScheme(targets=['Linear'], weights=group['weights'])
  middle = 2 ** (one.bits - 1)
  given = {
    'weight': torch.tensor(grid.exact),
    'weight_scale': torch.tensor(grid.scales.astype(np.float32)),
  }
  if not one.symmetric:
    zeros = torch.tensor((grid.zeros - middle).astype(np.int8))
    given['weight_zero_point'] = zeros
  compressor = base.PackedQuantizationCompressor
  made = compressor.compress(given, scheme)
  whole = compressor.decompress(made, scheme)
  return {
    f'{name}.{end}': np.ascontiguousarray(tensor.numpy())
    for end, tensor in (made | {'weight': whole['weight']}).items()
  }


def main() -> None:
  tensors: dict[str, Any] = {}
  for name in NAMES:
    tensors |= _compressed(name)
  safetensors_numpy.save_file(tensors, PATH)


if __name__ == '__main__':
  main()
