# SPDX-License-Identifier: Apache-2.0
r"""gpt-oss-120b on one H100-80G: 128 experts, of which a token takes 4.

Experts stay in MXFP4, as they are published: 65 GB of weights, where bfloat16
would take 234.

  python -m checkpoints_convert --source=openai/gpt-oss-120b \
      --target=/checkpoints/gpt-oss-120b --dtype=bfloat16
  scripts/serve /checkpoints/gpt-oss-120b \
      --config=configs/gpt_oss_120b_h100.py

What it takes of the GPU, checked without one:

  python -m sarathi_jax.plan --config=configs/gpt_oss_120b_h100.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'h100'


def get_config() -> EngineConfig:
  return EngineConfig(token_budget=512, max_num_seqs=64, max_model_len=32768)


def get_model() -> config.ModelConfig:
  return published.MODELS['gpt-oss-120b']
