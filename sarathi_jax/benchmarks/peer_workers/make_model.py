# SPDX-License-Identifier: Apache-2.0
"""Makes a random model: make_model.py FOLDER SIZE. Needs transformers, torch.

Weights are wider than transformers' default: at 0.02 greedy outputs are a few
tokens over and over, and agreement on them would prove nothing.
"""

import sys
from typing import Any

import torch
import transformers

_LLAMA = 'Llama'
# Of each size its kind, as transformers names it, and its shape.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
  '43m': (
    _LLAMA,
    {'hidden_size': 512, 'intermediate_size': 1376, 'num_attention_heads': 8},
  ),
  '150m': (
    _LLAMA,
    {'hidden_size': 1024, 'intermediate_size': 2752, 'num_attention_heads': 16},
  ),
  # 64 experts, of which a token goes through 4.
  '236m-moe': (
    'Qwen3Moe',
    {
      'hidden_size': 512,
      'intermediate_size': 1376,
      'moe_intermediate_size': 192,
      'num_attention_heads': 8,
      'head_dim': 64,
      'num_experts': 64,
      'num_experts_per_tok': 4,
      'norm_topk_prob': True,
    },
  ),
}


def main() -> None:
  folder, size = sys.argv[1:]
  kind, shape = SIZES[size]
  torch.manual_seed(0)
  config = getattr(transformers, f'{kind}Config')(
    vocab_size=8192,
    num_hidden_layers=12,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    initializer_range=0.06,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    **shape,
  )
  model = getattr(transformers, f'{kind}ForCausalLM')(config)
  model.save_pretrained(folder)


if __name__ == '__main__':
  main()
