# SPDX-License-Identifier: Apache-2.0
r"""Granite-3.1-8B on one A100-80G.

  python -m checkpoints_convert \
      --source=ibm-granite/granite-3.1-8b-instruct \
      --target=/checkpoints/granite-3.1-8b --dtype=bfloat16
  scripts/serve /checkpoints/granite-3.1-8b \
      --config=configs/granite_3_1_8b_a100.py

What it takes of the GPU, checked without one:

  python -m sarathi_jax.plan --config=configs/granite_3_1_8b_a100.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'a100'


def get_config() -> EngineConfig:
  return EngineConfig(token_budget=512, max_num_seqs=128)


def get_model() -> config.ModelConfig:
  return published.MODELS['granite-3.1-8b']
