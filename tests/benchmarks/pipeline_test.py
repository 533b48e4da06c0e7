# SPDX-License-Identifier: Apache-2.0
"""The benchmark of pipelines computes all that it asks for."""

from __future__ import annotations

import itertools

from sarathi_jax import config as config_lib
from sarathi_jax.benchmarks import pipeline


def test_no_prompt_is_found_in_the_cache() -> None:
  config = config_lib.SchedulerConfig(
    token_budget=256,
    max_num_seqs=8,
    max_model_len=8192,
    num_pages=8 * 128,
    page_size=64,
    num_stages=2,
  )
  requests = pipeline.chat_requests(10, seed=0)
  loads = itertools.chain(*pipeline.run(config, 'sarathi', requests))
  # The last output is not computed on; steps before it is full are left out.
  asked = sum(
    len(r.prompt_token_ids) + (r.sampling.max_tokens or 0) - 1 for r in requests
  )
  computed = sum(load[-1] for load in loads)
  assert asked - 2 * config.token_budget <= computed <= asked
