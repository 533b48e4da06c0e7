# SPDX-License-Identifier: Apache-2.0
r"""OLMo-3-32B on two A100-80G, TP2.

  python -m checkpoints_convert \
      --source=allenai/Olmo-3-32B-Think \
      --target=/checkpoints/olmo-3-32b --dtype=bfloat16
  scripts/serve /checkpoints/olmo-3-32b --config=configs/olmo_3_32b_a100_tp2.py

What it takes of the GPUs, checked without one:

  python -m sarathi_jax.plan --config=configs/olmo_3_32b_a100_tp2.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'a100'


def get_config() -> EngineConfig:
  return EngineConfig(tp=2, token_budget=512, max_num_seqs=128)


def get_model() -> config.ModelConfig:
  return published.MODELS['olmo-3-32b']
