# SPDX-License-Identifier: Apache-2.0
r"""Qwen3-30B-A3B on one A100-80G: 128 experts, of which a token takes 8.

  python -m checkpoints_convert \
      --source=Qwen/Qwen3-30B-A3B \
      --target=/checkpoints/qwen3-30b-a3b --dtype=bfloat16
  scripts/serve /checkpoints/qwen3-30b-a3b \
      --config=configs/qwen3_30b_a3b_a100.py

What it takes of the GPU, checked without one:

  python -m sarathi_jax.plan --config=configs/qwen3_30b_a3b_a100.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'a100'


def get_config() -> EngineConfig:
  return EngineConfig(token_budget=512, max_num_seqs=128)


def get_model() -> config.ModelConfig:
  return published.MODELS['qwen3-30b-a3b']
