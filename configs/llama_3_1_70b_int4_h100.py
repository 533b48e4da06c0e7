# SPDX-License-Identifier: Apache-2.0
r"""Llama-3.1-70B in int4 on one H100-80G.

  python -m checkpoints_convert --dtype=bfloat16 \
      --source=RedHatAI/Meta-Llama-3.1-70B-Instruct-quantized.w4a16 \
      --target=/checkpoints/llama-3-1-70b-int4
  scripts/serve /checkpoints/llama-3-1-70b-int4 \
      --config=configs/llama_3_1_70b_int4_h100.py

Scales of groups of 128 rows; the output matrix stays in 16 bits. AWQ's and
GPTQ's fit as well, as does what `--quantize=int4` makes of the maker's own.

What it takes of the GPU, checked without one:

  python -m sarathi_jax.plan --config=configs/llama_3_1_70b_int4_h100.py

Speed: not yet measured.
"""

import dataclasses

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published
from sarathi_jax.models import quantization

DEVICE = 'h100'


def get_config() -> EngineConfig:
  return EngineConfig(token_budget=512, max_num_seqs=64, max_model_len=32768)


def get_model() -> config.ModelConfig:
  return dataclasses.replace(
    published.MODELS['llama-3.1-70b'],
    quantization=quantization.Quantization.rounding_to('int4', 128),
  )
