# SPDX-License-Identifier: Apache-2.0
"""Writes a Llama and its tokenizer as a Hugging Face checkpoint.

Transformers, and anything else that reads such a folder, can load it.
`checkpoints_convert` converts it back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors
import tokenizers

from sarathi_jax.models import config as config_lib
from sarathi_jax.models import tree
from sarathi_jax.quickstart import text
from sarathi_jax.quickstart import tokenizer as tokenizer_lib

Params = Any  # pytree of arrays

# Our names -> Hugging Face's, outside and inside of layers. Matrices of layers,
# and the head, are [out, in] there.
_TOP: Mapping[str, str] = {
  'embed': 'model.embed_tokens.weight',
  'final_norm.scale': 'model.norm.weight',
  'lm_head': 'lm_head.weight',
}
_LAYER: Mapping[str, str] = {
  'attn_norm.scale': 'input_layernorm.weight',
  'attn.q': 'self_attn.q_proj.weight',
  'attn.k': 'self_attn.k_proj.weight',
  'attn.v': 'self_attn.v_proj.weight',
  'attn.o': 'self_attn.o_proj.weight',
  'mlp_norm.scale': 'post_attention_layernorm.weight',
  'mlp.gate': 'mlp.gate_proj.weight',
  'mlp.up': 'mlp.up_proj.weight',
  'mlp.down': 'mlp.down_proj.weight',
}


def write(
  folder: pathlib.Path,
  config: config_lib.LlamaConfig,
  params: Params,
  tokenizer: tokenizers.Tokenizer,
) -> None:
  """Writes the model, in bfloat16, and everything needed to serve it.

  Args:
    folder: is made if need be; files of the same names are replaced.
    config: without biases, q and k norms, sliding window or rope scaling.
    params: as `models.param_specs(config)` says.
    tokenizer: with `text.SPECIAL_TOKENS`.
  """
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {
    name: np.ascontiguousarray(value.astype(ml_dtypes.bfloat16))
    for name, value in _tensors(params)
  }
  # safetensors' save_file would make a file that only its owner can read.
  (folder / 'model.safetensors').write_bytes(
    safetensors.save(tensors, metadata={'format': 'pt'})
  )
  write_tokenizer(folder, tokenizer)
  end = tokenizer_lib.end_id(tokenizer)
  _write_json(folder / 'config.json', _config(config, end))
  _write_json(
    folder / 'generation_config.json',
    {
      'do_sample': True,
      'temperature': 0.3,
      'top_p': 0.9,
      'eos_token_id': end,
      'pad_token_id': end,
    },
  )


def write_tokenizer(
  folder: pathlib.Path, tokenizer: tokenizers.Tokenizer
) -> None:
  """Writes tokenizer.json, its configuration and the template of chats."""
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / 'tokenizer.json'))
  _write_json(
    folder / 'tokenizer_config.json',
    {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'eos_token': text.END,
      'pad_token': text.END,
      'clean_up_tokenization_spaces': False,
    },
  )
  (folder / 'chat_template.jinja').write_text(text.CHAT_TEMPLATE)


def _tensors(params: Params) -> Iterator[tuple[str, np.ndarray]]:
  for name, value in tree.named_leaves(params).items():
    if name in _TOP:
      transposed = name == 'lm_head'
      theirs = _TOP[name]
    else:
      _, layer, leaf = name.split('.', 2)
      transposed = np.ndim(value) == 2
      theirs = f'model.layers.{layer}.{_LAYER[leaf]}'
    array = np.asarray(value)
    yield theirs, array.T if transposed else array


def _config(config: config_lib.LlamaConfig, end: int) -> dict[str, Any]:
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': config.vocab_size,
    'hidden_size': config.hidden_size,
    'intermediate_size': config.intermediate_size,
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_dim,
    'hidden_act': 'silu',
    'max_position_embeddings': config.max_position_embeddings,
    'rms_norm_eps': config.norm_eps,
    'rope_theta': config.rope.theta,
    'tie_word_embeddings': config.tie_word_embeddings,
    'torch_dtype': 'bfloat16',
    'bos_token_id': None,
    'eos_token_id': end,
    'pad_token_id': end,
  }


def _write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(fields, indent=2) + '\n')
