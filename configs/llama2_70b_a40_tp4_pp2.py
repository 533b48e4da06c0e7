# SPDX-License-Identifier: Apache-2.0
r"""LLaMA2-70B on eight A40-48G, TP4-PP2: the paper's third deployment.

  python -m checkpoints_convert --source=meta-llama/Llama-2-70b-hf \
      --target=/checkpoints/llama2-70b --dtype=bfloat16
  scripts/serve /checkpoints/llama2-70b \
      --config=configs/llama2_70b_a40_tp4_pp2.py

The paper's strict SLO, P99 TBT of 1 s, asks for a budget of 512 tokens; the
relaxed one, 5 s, for 1536. NVLink joins A40s in
pairs only; two stages of four keep most traffic off PCIe.

What it takes of the GPUs, checked without one:

  python -m sarathi_jax.plan --config=configs/llama2_70b_a40_tp4_pp2.py

Speed: not yet measured.
"""

from sarathi_jax import EngineConfig
from sarathi_jax.models import config
from sarathi_jax.models import published

DEVICE = 'a40'


def get_config() -> EngineConfig:
  return EngineConfig(tp=4, pp=2, token_budget=512, max_num_seqs=128)


def get_model() -> config.ModelConfig:
  return published.MODELS['llama2-70b']
