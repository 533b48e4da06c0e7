# SPDX-License-Identifier: Apache-2.0
r"""gpt-oss-20b on one A100-80G: 32 experts, of which a token takes 4.

Experts stay in MXFP4, as they are published: 14 GB of weights, where bfloat16
would take 42.

  python -m checkpoints_convert --source=openai/gpt-oss-20b \
      --target=/checkpoints/gpt-oss-20b --dtype=bfloat16
  scripts/serve /checkpoints/gpt-oss-20b \
      --config=configs/gpt_oss_20b_a100.py

What it takes of the GPU, checked without one:

  python -m sarathi_jax.plan --config=configs/gpt_oss_20b_a100.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'a100'


def get_config() -> EngineConfig:
  return EngineConfig(token_budget=512, max_num_seqs=128)


def get_model() -> config.ModelConfig:
  return published.MODELS['gpt-oss-20b']
