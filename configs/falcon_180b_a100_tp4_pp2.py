# SPDX-License-Identifier: Apache-2.0
r"""Falcon-180B on two nodes of four A100-80G, TP4-PP2: the paper's largest.

  python -m checkpoints_convert --source=tiiuae/falcon-180B \
      --target=/checkpoints/falcon-180b --dtype=bfloat16
  scripts/serve /checkpoints/falcon-180b \
      --config=configs/falcon_180b_a100_tp4_pp2.py

Its answer to slow Ethernet between the nodes: one hop of hidden states a step,
where tensor parallelism over both nodes would send them 80 times. The strict
SLO is a P99 TBT of 1 s, the relaxed one 5 s.

What it takes of the GPUs, checked without one:

  python -m sarathi_jax.plan --config=configs/falcon_180b_a100_tp4_pp2.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'a100'


def get_config() -> EngineConfig:
  return EngineConfig(tp=4, pp=2, token_budget=512, max_num_seqs=128)


def get_model() -> config.ModelConfig:
  return published.MODELS['falcon-180b']
