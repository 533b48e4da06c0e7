# SPDX-License-Identifier: Apache-2.0
r"""The quickstart model on a laptop's CPU: small steps, quick to compile.

  scripts/serve --config=configs/quickstart.py

Ready in some ten seconds after the first start; a token takes milliseconds.
"""

from sarathi_jax import EngineConfig


def get_config() -> EngineConfig:
  return EngineConfig(token_budget=128, max_num_seqs=16, kv_cache_gib=0.25)
