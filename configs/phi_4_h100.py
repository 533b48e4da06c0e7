# SPDX-License-Identifier: Apache-2.0
r"""Phi-4 on one H100-80G.

  python -m checkpoints_convert \
      --source=microsoft/phi-4 \
      --target=/checkpoints/phi-4 --dtype=bfloat16
  scripts/serve /checkpoints/phi-4 --config=configs/phi_4_h100.py

What it takes of the GPU, checked without one:

  python -m sarathi_jax.plan --config=configs/phi_4_h100.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'h100'


def get_config() -> EngineConfig:
  return EngineConfig(token_budget=512, max_num_seqs=128)


def get_model() -> config.ModelConfig:
  return published.MODELS['phi-4']
