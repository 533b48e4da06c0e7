# SPDX-License-Identifier: Apache-2.0
r"""Yi-34B on two A100-80G with NVLink, TP2: the paper's second deployment.

  python -m checkpoints_convert --source=01-ai/Yi-34B-200K \
      --target=/checkpoints/yi-34b --dtype=bfloat16
  scripts/serve /checkpoints/yi-34b --config=configs/yi_34b_a100_tp2.py

The paper's strict SLO, P99 TBT of 0.2 s, asks for a budget of 512 tokens; the
relaxed one, 1 s, for 2048.

What it takes of the GPUs, checked without one:

  python -m sarathi_jax.plan --config=configs/yi_34b_a100_tp2.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'a100'


def get_config() -> EngineConfig:
  return EngineConfig(
    tp=2, token_budget=512, max_num_seqs=128, max_model_len=16384
  )


def get_model() -> config.ModelConfig:
  return published.MODELS['yi-34b']
