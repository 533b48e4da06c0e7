# SPDX-License-Identifier: Apache-2.0
r"""Mistral-7B on one A100-80G: the paper's first deployment (tables 1 and 5).

  python -m checkpoints_convert --source=mistralai/Mistral-7B-Instruct-v0.2 \
      --target=/checkpoints/mistral-7b --dtype=bfloat16
  scripts/serve /checkpoints/mistral-7b --config=configs/mistral_7b_a100.py

The paper's strict SLO, P99 TBT of 0.1 s, asks for a budget of 512 tokens; the
relaxed one, 0.5 s, for 2048. Its batches have
at most 128 sequences.

What it takes of the GPUs, checked without one:

  python -m sarathi_jax.plan --config=configs/mistral_7b_a100.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'a100'


def get_config() -> EngineConfig:
  return EngineConfig(token_budget=512, max_num_seqs=128, max_model_len=16384)


def get_model() -> config.ModelConfig:
  return published.MODELS['mistral-7b']
