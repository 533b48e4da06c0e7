# SPDX-License-Identifier: Apache-2.0
r"""Qwen3-32B in fp8 on one H100-80G.

  python -m checkpoints_convert --source=Qwen/Qwen3-32B-FP8 \
      --target=/checkpoints/qwen3-32b-fp8 --dtype=bfloat16
  scripts/serve /checkpoints/qwen3-32b-fp8 \
      --config=configs/qwen3_32b_fp8_h100.py

Scales of blocks of 128 x 128; the output matrix stays in 16 bits.

What it takes of the GPU, checked without one:

  python -m sarathi_jax.plan --config=configs/qwen3_32b_fp8_h100.py

Speed: not yet measured.
"""

import dataclasses

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published
from sarathi_jax.models import quantization

DEVICE = 'h100'


def get_config() -> EngineConfig:
  return EngineConfig(token_budget=1024, max_num_seqs=128, max_model_len=32768)


def get_model() -> config.ModelConfig:
  return dataclasses.replace(
    published.MODELS['qwen3-32b'],
    quantization=quantization.Quantization(
      codes='fp8', group=128, kept=('lm_head',)
    ),
  )
