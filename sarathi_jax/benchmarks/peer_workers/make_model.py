# SPDX-License-Identifier: Apache-2.0
"""Makes a random Llama: make_model.py FOLDER SIZE. Needs transformers, torch.

Weights are wider than transformers' default: at 0.02 greedy outputs are a few
tokens over and over, and agreement on them would prove nothing.
"""

import sys
from typing import Any

import torch
import transformers

SIZES: dict[str, dict[str, Any]] = {
  '43m': {
    'hidden_size': 512,
    'intermediate_size': 1376,
    'num_attention_heads': 8,
  },
  '150m': {
    'hidden_size': 1024,
    'intermediate_size': 2752,
    'num_attention_heads': 16,
  },
}


def main() -> None:
  folder, size = sys.argv[1:]
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=8192,
    num_hidden_layers=12,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    initializer_range=0.06,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    **SIZES[size],
  )
  transformers.LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == '__main__':
  main()
