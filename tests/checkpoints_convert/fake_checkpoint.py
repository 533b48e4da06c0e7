# SPDX-License-Identifier: Apache-2.0
"""Tiny Hugging Face checkpoints, made without torch."""

from __future__ import annotations

from collections.abc import Mapping
import json
import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors_numpy

WIDTH, INNER, VOCAB, HEADS, KV_HEADS, LAYERS = 16, 24, 29, 4, 2, 2
HEAD_DIM = WIDTH // HEADS

DTYPES: Mapping[str, np.dtype] = {
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'float16': np.dtype(np.float16),
  'float32': np.dtype(np.float32),
}


def llama_config(**fields: Any) -> dict[str, Any]:
  """A config.json; a field of None is left out."""
  config = dict(
    architectures=['LlamaForCausalLM'],
    model_type='llama',
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    hidden_act='silu',
    bos_token_id=1,
    eos_token_id=2,
  )
  return {
    name: value
    for name, value in {**config, **fields}.items()
    if value is not None
  }


def llama_shapes(tied: bool = False) -> dict[str, tuple[int, ...]]:
  """The tensors of `llama_config`, as transformers names them."""
  shapes = {
    'model.embed_tokens.weight': (VOCAB, WIDTH),
    'model.norm.weight': (WIDTH,),
  }
  if not tied:
    shapes['lm_head.weight'] = (VOCAB, WIDTH)
  for layer in range(LAYERS):
    prefix = f'model.layers.{layer}'
    shapes |= {
      f'{prefix}.input_layernorm.weight': (WIDTH,),
      f'{prefix}.post_attention_layernorm.weight': (WIDTH,),
      f'{prefix}.self_attn.q_proj.weight': (WIDTH, WIDTH),
      f'{prefix}.self_attn.k_proj.weight': (KV_HEADS * HEAD_DIM, WIDTH),
      f'{prefix}.self_attn.v_proj.weight': (KV_HEADS * HEAD_DIM, WIDTH),
      f'{prefix}.self_attn.o_proj.weight': (WIDTH, WIDTH),
      f'{prefix}.mlp.gate_proj.weight': (INNER, WIDTH),
      f'{prefix}.mlp.up_proj.weight': (INNER, WIDTH),
      f'{prefix}.mlp.down_proj.weight': (WIDTH, INNER),
    }
  return shapes


def random_tensors(
  shapes: Mapping[str, tuple[int, ...]], dtype: str = 'float32'
) -> dict[str, np.ndarray]:
  """Any bits at all but infinities and NaN: what a cast would round."""
  rng = np.random.default_rng(0)
  return {
    name: rng.standard_normal(shape).astype(DTYPES[dtype])
    for name, shape in shapes.items()
  }


def write(
  folder: pathlib.Path,
  config: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
  num_shards: int = 1,
) -> pathlib.Path:
  """Writes config.json, and the tensors in one file or in shards."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  if num_shards == 1:
    safetensors_numpy.save_file(dict(tensors), folder / 'model.safetensors')
    return folder
  weight_map: dict[str, str] = {}
  for shard in range(num_shards):
    name = f'model-{shard + 1:05}-of-{num_shards:05}.safetensors'
    part = dict(list(tensors.items())[shard::num_shards])
    safetensors_numpy.save_file(part, folder / name)
    weight_map |= dict.fromkeys(part, name)
  (folder / 'model.safetensors.index.json').write_text(
    json.dumps({'metadata': {}, 'weight_map': weight_map})
  )
  return folder


def llama(
  folder: pathlib.Path, dtype: str = 'float32', **fields: Any
) -> pathlib.Path:
  """A whole tiny Llama checkpoint."""
  tied = bool(fields.get('tie_word_embeddings'))
  return write(
    folder, llama_config(**fields), random_tensors(llama_shapes(tied), dtype)
  )


def write_sparse(
  path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]]
) -> None:
  """bfloat16 zeros of any size, which take no room on the disk."""
  header, offset = {}, 0
  for name, shape in shapes.items():
    end = offset + 2 * math.prod(shape)
    header[name] = dict(dtype='BF16', shape=shape, data_offsets=[offset, end])
    offset = end
  encoded = json.dumps(header).encode()
  with path.open('wb') as file:
    file.write(len(encoded).to_bytes(8, 'little') + encoded)
    file.truncate(8 + len(encoded) + offset)
