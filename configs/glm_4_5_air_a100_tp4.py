# SPDX-License-Identifier: Apache-2.0
r"""GLM-4.5-Air on four A100-80G, TP4: 128 experts, of which a token takes 8.

  python -m checkpoints_convert --source=zai-org/GLM-4.5-Air \
      --target=/checkpoints/glm-4.5-air --dtype=bfloat16
  scripts/serve /checkpoints/glm-4.5-air \
      --config=configs/glm_4_5_air_a100_tp4.py

What it takes of the GPUs, checked without one:

  python -m sarathi_jax.plan --config=configs/glm_4_5_air_a100_tp4.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'a100'


def get_config() -> EngineConfig:
  return EngineConfig(tp=4, token_budget=512, max_num_seqs=128)


def get_model() -> config.ModelConfig:
  return published.MODELS['glm-4.5-air']
