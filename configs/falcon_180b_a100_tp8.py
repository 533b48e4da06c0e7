# SPDX-License-Identifier: Apache-2.0
r"""Falcon-180B on eight A100-80G, TP8: what the paper compares TP4-PP2 with.

  python -m checkpoints_convert --source=tiiuae/falcon-180B \
      --target=/checkpoints/falcon-180b --dtype=bfloat16
  scripts/serve /checkpoints/falcon-180b \
      --config=configs/falcon_180b_a100_tp8.py

On one node with NVLink it has the lower latency; over Ethernet its all-reduces
take most of a step (section 5.3 of the paper).

What it takes of the GPUs, checked without one:

  python -m sarathi_jax.plan --config=configs/falcon_180b_a100_tp8.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'a100'


def get_config() -> EngineConfig:
  return EngineConfig(tp=8, token_budget=512, max_num_seqs=128)


def get_model() -> config.ModelConfig:
  return published.MODELS['falcon-180b']
