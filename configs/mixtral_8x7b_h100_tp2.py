# SPDX-License-Identifier: Apache-2.0
r"""Mixtral-8x7B on two H100-80G, TP2.

  python -m checkpoints_convert --source=mistralai/Mixtral-8x7B-Instruct-v0.1 \
      --target=/checkpoints/mixtral-8x7b --dtype=bfloat16
  scripts/serve /checkpoints/mixtral-8x7b \
      --config=configs/mixtral_8x7b_h100_tp2.py

A step reads the experts that its tokens choose, and computes no others.

What it takes of the GPUs, checked without one:

  python -m sarathi_jax.plan --config=configs/mixtral_8x7b_h100_tp2.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'h100'


def get_config() -> EngineConfig:
  return EngineConfig(tp=2, token_budget=512, max_num_seqs=128)


def get_model() -> config.ModelConfig:
  return published.MODELS['mixtral-8x7b']
