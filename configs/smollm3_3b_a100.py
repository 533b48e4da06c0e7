# SPDX-License-Identifier: Apache-2.0
r"""SmolLM3-3B on one A100-80G.

  python -m checkpoints_convert \
      --source=HuggingFaceTB/SmolLM3-3B \
      --target=/checkpoints/smollm3-3b --dtype=bfloat16
  scripts/serve /checkpoints/smollm3-3b --config=configs/smollm3_3b_a100.py

What it takes of the GPU, checked without one:

  python -m sarathi_jax.plan --config=configs/smollm3_3b_a100.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'a100'


def get_config() -> EngineConfig:
  return EngineConfig(token_budget=512, max_num_seqs=256)


def get_model() -> config.ModelConfig:
  return published.MODELS['smollm3-3b']
