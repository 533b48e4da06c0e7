# SPDX-License-Identifier: Apache-2.0
r"""Llama-3.1-8B on one H100-80G.

  python -m checkpoints_convert --source=meta-llama/Llama-3.1-8B-Instruct \
      --target=/checkpoints/llama-3-1-8b --dtype=bfloat16
  scripts/serve /checkpoints/llama-3-1-8b --config=configs/llama_3_1_8b_h100.py

For chat, and documents of up to 32k tokens.

What it takes of the GPUs, checked without one:

  python -m sarathi_jax.plan --config=configs/llama_3_1_8b_h100.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'h100'


def get_config() -> EngineConfig:
  return EngineConfig(token_budget=1024, max_num_seqs=256, max_model_len=32768)


def get_model() -> config.ModelConfig:
  return published.MODELS['llama-3.1-8b']
