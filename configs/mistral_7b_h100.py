# SPDX-License-Identifier: Apache-2.0
r"""Mistral-7B on one H100-80G: the paper's first model on today's hardware.

  python -m checkpoints_convert --source=mistralai/Mistral-7B-Instruct-v0.2 \
      --target=/checkpoints/mistral-7b --dtype=bfloat16
  scripts/serve /checkpoints/mistral-7b --config=configs/mistral_7b_h100.py

An H100 computes about three times what an A100 does, so a step of 1024 tokens
should meet the SLO that takes 512 there.

What it takes of the GPUs, checked without one:

  python -m sarathi_jax.plan --config=configs/mistral_7b_h100.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'h100'


def get_config() -> EngineConfig:
  return EngineConfig(token_budget=1024, max_num_seqs=256, max_model_len=16384)


def get_model() -> config.ModelConfig:
  return published.MODELS['mistral-7b']
