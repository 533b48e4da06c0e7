# SPDX-License-Identifier: Apache-2.0
r"""Mistral-Small-24B on one H100-80G.

  python -m checkpoints_convert \
      --source=mistralai/Mistral-Small-3.2-24B-Instruct-2506 \
      --target=/checkpoints/mistral-small-24b --dtype=bfloat16
  scripts/serve /checkpoints/mistral-small-24b \
      --config=configs/mistral_small_24b_h100.py

What it takes of the GPU, checked without one:

  python -m sarathi_jax.plan --config=configs/mistral_small_24b_h100.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'h100'


def get_config() -> EngineConfig:
  return EngineConfig(token_budget=512, max_num_seqs=128, max_model_len=32768)


def get_model() -> config.ModelConfig:
  return published.MODELS['mistral-small-24b']
