# SPDX-License-Identifier: Apache-2.0
"""Makes matrices by the formats' own libraries, to compare with.

  python -m tests.checkpoints_convert.packed_golden [NAME ...]

It needs their packages, which nothing else here does, so what they made is kept
(packed_golden.safetensors, whose metadata says by which version); without names
all is made anew. Of AutoAWQ and AutoGPTQ it loads the modules that pack and
nothing else: they need neither a GPU nor what the rest of these packages does
(`pip install --no-deps autoawq==0.2.7.post3 auto-gptq==0.7.1 accelerate`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import importlib.metadata
import importlib.util
import pathlib
import sys
import types
from typing import Any, NamedTuple

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from tests.checkpoints_convert import packed_formats

PATH = pathlib.Path(__file__).with_name('packed_golden.safetensors')


def _compressed(one: packed_formats.Packed, grid: packed_formats.Grid) -> Any:
  from compressed_tensors.compressors.pack_quantized import base
  from compressed_tensors.quantization import QuantizationScheme
  import torch

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
  return made | {'weight': whole['weight']}


def _linear(grid: packed_formats.Grid) -> Any:
  import torch

  linear = torch.nn.Linear(*reversed(grid.exact.shape), bias=False)
  linear.weight.data = torch.tensor(grid.exact)
  return linear


def _awq(one: packed_formats.Packed, grid: packed_formats.Grid) -> Any:
  _load_nothing_else('awq', 'awq.modules', 'awq.modules.linear')
  from awq.modules.linear import gemm
  from awq.utils import packing_utils
  import torch

  packed = gemm.WQLinear_GEMM.from_linear(
    _linear(grid),
    one.bits,
    one.group,
    scales=torch.tensor(grid.scales.T.astype(np.float32)),
    zeros=torch.tensor(grid.zeros.T.astype(np.float32)),
  )
  whole = packing_utils.dequantize_gemm(
    packed.qweight, packed.qzeros, packed.scales, one.bits, one.group
  )
  made = {end: getattr(packed, end) for end in ('qweight', 'qzeros', 'scales')}
  return made | {'weight': whole.T}


def _gptq(one: packed_formats.Packed, grid: packed_formats.Grid) -> Any:
  _load_nothing_else('auto_gptq', *_GPTQ_MODULES)
  from auto_gptq.nn_modules.qlinear import qlinear_cuda
  import torch

  out, width = grid.exact.shape
  packed = qlinear_cuda.QuantLinear(one.bits, one.group, width, out, bias=False)
  packed.pack(
    _linear(grid),
    torch.tensor(grid.scales.astype(np.float32)),
    torch.tensor(grid.zeros.astype(np.float32)),
    torch.tensor(grid.groups.astype(np.int32)),
  )
  whole = packed(torch.eye(width))  # What it multiplies by, on a CPU.
  ends = 'qweight', 'qzeros', 'scales', 'g_idx'
  return {end: getattr(packed, end) for end in ends} | {'weight': whole.T}


_GPTQ_MODULES = 'auto_gptq.nn_modules', 'auto_gptq.nn_modules.qlinear'


def _load_nothing_else(*packages: str) -> None:
  """Makes packages folders of modules: their own code imports all they have."""
  if packages[0] in sys.modules:
    return
  root = importlib.util.find_spec(packages[0])
  assert root is not None and root.origin is not None, packages[0]
  folder = pathlib.Path(root.origin).parent
  for package in packages:
    module = types.ModuleType(package)
    module.__path__ = [str(folder.joinpath(*package.split('.')[1:]))]
    sys.modules[package] = module


class Library(NamedTuple):
  """Who packs some formats.

  Attributes:
    distribution: whose version is kept.
    make: makes tensors, by the ends of their names, and 'weight', what they
      stand for to it.
    shape: [out, in] of the matrix.
    dtype: in which it takes codes for numbers.
  """

  distribution: str
  make: Callable[..., Any]
  shape: tuple[int, int]
  dtype: str = 'float32'


_COMPRESSED = Library(  # zero points of no whole words
  'compressed-tensors', _compressed, (20, 128)
)
_AUTOGPTQ = Library('auto-gptq', _gptq, (32, 128))
# As `packed_formats.FORMATS` of these names say.
LIBRARIES: Mapping[str, Library] = {
  'compressed, symmetric': _COMPRESSED,
  'compressed, asymmetric': _COMPRESSED,
  'compressed, by channel': _COMPRESSED,
  'compressed, 8 bits': _COMPRESSED,
  'awq': Library('autoawq', _awq, (32, 128), 'float16'),
  'gptq': _AUTOGPTQ,
  'gptq, symmetric': _AUTOGPTQ,
  'gptq, by activations': _AUTOGPTQ,
  'gptq, 8 bits': _AUTOGPTQ,
}


def grid_of(name: str) -> packed_formats.Grid:
  """Returns what is packed: random codes, as a format has them."""
  shape = LIBRARIES[name].shape
  weight = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
  return packed_formats.quantize(weight, packed_formats.FORMATS[name], 0)


def main(names: list[str]) -> None:
  with safetensors.safe_open(PATH, 'numpy') as file:
    versions = dict(file.metadata() or {})
  tensors = safetensors_numpy.load_file(PATH)
  for name in names or LIBRARIES:
    library = LIBRARIES[name]
    made = library.make(packed_formats.FORMATS[name], grid_of(name))
    versions[name] = ' '.join(
      (library.distribution, importlib.metadata.version(library.distribution))
    )
    tensors |= {
      f'{name}.{end}': np.ascontiguousarray(tensor.detach().numpy())
      for end, tensor in made.items()
    }
  safetensors_numpy.save_file(tensors, PATH, versions)


if __name__ == '__main__':
  main(sys.argv[1:])
