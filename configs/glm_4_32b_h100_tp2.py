# SPDX-License-Identifier: Apache-2.0
r"""GLM-4-32B on two H100-80G, TP2.

  python -m checkpoints_convert \
      --source=zai-org/GLM-4-32B-0414 \
      --target=/checkpoints/glm-4-32b --dtype=bfloat16
  scripts/serve /checkpoints/glm-4-32b --config=configs/glm_4_32b_h100_tp2.py

What it takes of the GPUs, checked without one:

  python -m sarathi_jax.plan --config=configs/glm_4_32b_h100_tp2.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'h100'


def get_config() -> EngineConfig:
  return EngineConfig(tp=2, token_budget=512, max_num_seqs=128)


def get_model() -> config.ModelConfig:
  return published.MODELS['glm-4-32b']
