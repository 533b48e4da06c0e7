# SPDX-License-Identifier: Apache-2.0
"""Writes checkpoints in 8 bits, as the formats' documents say, in NumPy.

What a format's weights stand for is said here by itself, in another way than
the converter has.
"""

from __future__ import annotations

from collections.abc import Callable
import json
import pathlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import torch as safetensors_torch
import torch

BLOCK = 16, 32  # [out, in]; not square, so that its axes can't be swapped.
_MOST = {'F8': 448.0, 'I8': 127.0}
_NUMPY: dict[str, Any] = {'F8': ml_dtypes.float8_e4m3fn, 'I8': np.int8}
_TORCH = {'F8': torch.float8_e4m3fn, 'I8': torch.int8}


class Format(NamedTuple):
  """A way to keep a linear layer's weight.

  Attributes:
    codes: 'F8' or 'I8'.
    strategy: what has a scale: 'tensor', 'channel' or 'block'.
    suffix: of the scales' names.
    config: quantization_config.
    scale_dtype: torch's, of scales.
    shape: of scales, if it is no grid [out / tall, in / wide].
    others: tensors beside a weight [out, in], by the ends of their names.
  """

  codes: str
  strategy: str
  suffix: str
  config: dict[str, Any]
  scale_dtype: Any = torch.float32
  shape: tuple[int, ...] | None = None
  others: Callable[[int, int], dict[str, Any]] = lambda rows, columns: {}

  def tensors_of(
    self, module: str, weight: np.ndarray
  ) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Returns a weight's tensors by name, and what they stand for."""
    codes, grid, exact = quantize(weight, self)
    scales = torch.from_numpy(grid).to(self.scale_dtype)
    if self.shape is not None:
      scales = scales.reshape(self.shape)
    others = self.others(*codes.shape)
    return {
      f'{module}.weight': _as_torch(codes, self),
      f'{module}.{self.suffix}': scales,
      **{f'{module}.{end}': other for end, other in others.items()},
    }, exact


def _compressed(strategy: str, kind: str, **fields: Any) -> dict[str, Any]:
  """As llm-compressor writes it."""
  block = {'block_structure': list(BLOCK)} if strategy == 'block' else {}
  return {
    'quant_method': 'compressed-tensors',
    'format': 'float-quantized' if kind == 'float' else 'int-quantized',
    'config_groups': {
      'group_0': {
        'targets': ['Linear'],
        'weights': {
          'num_bits': 8,
          'type': kind,
          'strategy': strategy,
          'symmetric': True,
          'dynamic': False,
          'group_size': None,
          'actorder': None,
          'observer': 'minmax',
          'observer_kwargs': {},
          **block,
        },
        'input_activations': {
          'num_bits': 8,
          'type': kind,
          'strategy': 'token',
          'symmetric': True,
          'dynamic': True,
        },
        'output_activations': None,
      }
    },
    'ignore': ['lm_head', 're:.*mlp.gate$'],
    'kv_cache_scheme': None,
    'quantization_status': 'compressed',
    'global_compression_ratio': 1.5,
    **fields,
  }


_DEEPSEEK = {
  'quant_method': 'fp8',
  'fmt': 'e4m3',
  'activation_scheme': 'dynamic',
  'weight_block_size': list(BLOCK),
  'modules_to_not_convert': ['lm_head'],
}
_STATIC = _DEEPSEEK | dict(activation_scheme='static', weight_block_size=None)

FORMATS: dict[str, Format] = {
  'compressed fp8, by channel': Format(
    'F8',
    'channel',
    'weight_scale',
    _compressed('channel', 'float'),
    torch.bfloat16,
  ),
  'compressed fp8, by tensor': Format(
    'F8',
    'tensor',
    'weight_scale',
    _compressed(
      'tensor',
      'float',
      kv_cache_scheme={'num_bits': 8, 'type': 'float', 'strategy': 'tensor'},
    ),
    shape=(1,),
    others=lambda rows, columns: {'input_scale': torch.ones(1)},
  ),
  'compressed fp8, by block': Format(
    'F8', 'block', 'weight_scale', _compressed('block', 'float')
  ),
  'compressed int8, by channel': Format(
    'I8',
    'channel',
    'weight_scale',
    _compressed('channel', 'int'),
    others=lambda rows, columns: {
      'weight_zero_point': torch.zeros(rows, 1, dtype=torch.int8)
    },
  ),
  'fp8, by block': Format('F8', 'block', 'weight_scale_inv', _DEEPSEEK),
  'fp8, by tensor': Format(
    'F8',
    'tensor',
    'weight_scale_inv',
    _STATIC,
    shape=(),
    others=lambda rows, columns: {'activation_scale': torch.tensor(0.5)},
  ),
}


def quantize(
  weight: np.ndarray, one: Format
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns codes, a grid of scales, and what they stand for, block by block.

  Each scale is of a size of its own, so that no two can be swapped unnoticed.
  """
  rows, columns = weight.shape
  tall, wide = {'tensor': (rows, columns), 'channel': (1, columns)}.get(
    one.strategy, BLOCK
  )
  codes = np.zeros(weight.shape, _NUMPY[one.codes])
  grid = np.zeros((-(-rows // tall), -(-columns // wide)), np.float32)
  exact = np.zeros(weight.shape, np.float32)
  for y, x in np.ndindex(*grid.shape):
    at = np.s_[y * tall : (y + 1) * tall, x * wide : (x + 1) * wide]
    scale = np.abs(weight[at]).max() / _MOST[one.codes] * (1 + 0.1 * (x % 3))
    scale = torch.tensor(scale).to(one.scale_dtype).float().numpy()
    part = np.clip(weight[at] / scale, -_MOST[one.codes], _MOST[one.codes])
    codes[at] = np.rint(part) if one.codes == 'I8' else part
    grid[y, x] = scale
    exact[at] = codes[at].astype(np.float32) * scale
  return codes, grid, exact


def _as_torch(codes: np.ndarray, one: Format) -> torch.Tensor:
  raw = torch.from_numpy(codes.view(np.uint8).copy())
  return raw.view(_TORCH[one.codes])


def save(
  model: Any,
  folder: pathlib.Path,
  one: Any,
  *,
  kept: tuple[str, ...] = ('lm_head', '.mlp.gate.', 'embed_tokens', 'norm'),
  change: Callable[[dict[str, Any]], Any] = lambda tensors: None,
) -> None:
  """Saves a model in a format, and makes its own weights what that stands for.

  Args:
    model: of transformers, float32.
    folder: to make.
    one: the format, a `Format` or another that has these two of it: `config`
      and `tensors_of`.
    kept: parts of names of what is not quantized.
    change: changes the tensors before they are written.
  """
  model.save_pretrained(folder)
  tensors = safetensors_torch.load_file(folder / 'model.safetensors')
  exact = {}
  for name, weight in list(tensors.items()):
    if weight.ndim != 2 or any(part in name for part in kept):
      continue
    module = name.removesuffix('.weight')
    made, exact[name] = one.tensors_of(module, tensors.pop(name).numpy())
    tensors |= made
  if one.config.get('kv_cache_scheme'):
    for which in 'kv':
      tensors[f'model.layers.0.self_attn.{which}_scale'] = torch.ones(1)
  _reload(model, tensors, exact, folder)
  change(tensors)
  safetensors_torch.save_file(tensors, folder / 'model.safetensors')
  path = folder / 'config.json'
  config = json.loads(path.read_text())
  path.write_text(json.dumps(config | {'quantization_config': one.config}))


def _reload(
  model: Any, tensors: Any, exact: dict[str, Any], folder: pathlib.Path
) -> None:
  """Has transformers read what the codes stand for, as it would in float32."""
  plain = {
    name: tensor
    for name, tensor in tensors.items()
    if name.endswith(('.weight', '.bias')) and name not in exact
  }
  plain |= {name: torch.from_numpy(weight) for name, weight in exact.items()}
  safetensors_torch.save_file(
    plain, folder / 'model.safetensors', {'format': 'pt'}
  )
  loaded = type(model).from_pretrained(folder, dtype=torch.float32)
  model.load_state_dict(loaded.state_dict())
