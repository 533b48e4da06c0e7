# SPDX-License-Identifier: Apache-2.0
r"""Gemma-3-27B, its text part, on two A100-80G, TP2.

  python -m checkpoints_convert \
      --source=google/gemma-3-27b-it \
      --target=/checkpoints/gemma-3-27b --dtype=bfloat16
  scripts/serve /checkpoints/gemma-3-27b \
      --config=configs/gemma_3_27b_a100_tp2.py

What it takes of the GPUs, checked without one:

  python -m sarathi_jax.plan --config=configs/gemma_3_27b_a100_tp2.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'a100'


def get_config() -> EngineConfig:
  return EngineConfig(tp=2, token_budget=512, max_num_seqs=128)


def get_model() -> config.ModelConfig:
  return published.MODELS['gemma-3-27b']
