# SPDX-License-Identifier: Apache-2.0
"""Configurations that can't work are refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import scheduler

BAD: tuple[tuple[dict[str, Any], str], ...] = (
  ({'token_budget': 0}, 'token_budget=0: must be an integer >= 1'),
  ({'token_budget': 1.5}, 'token_budget=1.5: must be an integer >= 1'),
  ({'token_budget': 64}, 'token_budget=64: must be at least max_num_seqs=128'),
  ({'max_num_seqs': -1}, 'max_num_seqs=-1: must be an integer >= 1'),
  ({'max_num_seqs': '8'}, "max_num_seqs='8': must be an integer >= 1"),
  ({'max_num_seqs': True}, 'max_num_seqs=True: must be an integer >= 1'),
  ({'tp': 0}, 'tp=0: must be an integer >= 1'),
  ({'pp': '2'}, "pp='2': must be an integer >= 1"),
  ({'page_size': 0}, 'page_size=0: must be an integer >= 1'),
  ({'max_model_len': 0}, 'max_model_len=0: must be an integer >= 1'),
  ({'num_pages': 0}, 'num_pages=0: must be an integer >= 1'),
  ({'kv_cache_gib': 0}, 'kv_cache_gib=0: must be > 0'),
  ({'kv_cache_gib': math.nan}, 'kv_cache_gib=nan: must be > 0'),
  ({'memory_utilization': 0}, 'memory_utilization=0: must be in (0, 1]'),
  ({'memory_utilization': 1.1}, 'memory_utilization=1.1: must be in (0, 1]'),
  ({'memory_utilization': '1'}, "memory_utilization='1': must be in (0, 1]"),
  ({'short_prompt_share': 1}, 'short_prompt_share=1: must be in [0, 1)'),
  ({'cache_aware_window': 0}, 'cache_aware_window=0: must be an integer >= 1'),
  ({'short_prompt_share': -0.1}, 'short_prompt_share=-0.1: must be in [0, 1)'),
  ({'look_ahead': 'no'}, "look_ahead='no': must be true or false"),
  (
    {'quantized_activations': 'int8'},
    "quantized_activations='int8': must be one of fp8",
  ),
  ({'seed': -1}, 'seed=-1: must be an integer in [0, 2**63)'),
  (
    {'seed': 2**63},
    'seed=9223372036854775808: must be an integer in [0, 2**63)',
  ),
  ({'seed': 0.5}, 'seed=0.5: must be an integer in [0, 2**63)'),
)


@pytest.mark.parametrize(('fields', 'message'), BAD)
def test_a_bad_value_is_refused(fields: dict[str, Any], message: str) -> None:
  with pytest.raises(errors.ConfigError) as caught:
    config_lib.EngineConfig(**fields)
  assert message in str(caught.value)


def test_the_defaults_are_good() -> None:
  config = config_lib.EngineConfig()
  assert config.token_budget >= config.max_num_seqs


def test_an_unknown_policy_is_refused_and_the_known_are_named() -> None:
  with pytest.raises(errors.ConfigError) as caught:
    scheduler.policy_class('fifo')
  assert str(caught.value) == (
    "policy='fifo': must be one of sarathi, vllm, orca, faster_transformer."
  )


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'tbt_slo_ms': 50}, 'tbt_slo_ms=50: must be None with deterministic'),
    (
      {'attention': 'pallas_mosaic'},
      "attention='pallas_mosaic': must be another with deterministic",
    ),
    ({'deterministic': 1}, 'deterministic=1: must be true or false'),
  ],
)
def test_what_can_not_be_deterministic_is_refused(
  fields: dict[str, Any], said: str
) -> None:
  with pytest.raises(errors.ConfigError, match=said):
    config_lib.EngineConfig(**{'deterministic': True} | fields)


def make_scheduler_config(**fields: Any) -> config_lib.SchedulerConfig:
  defaults = dict(
    token_budget=8, max_num_seqs=4, max_model_len=32, num_pages=8, page_size=4
  )
  return config_lib.SchedulerConfig(**(defaults | fields))


def test_what_both_configs_have_is_the_same_in_both() -> None:
  given: dict[str, Any] = dict(
    token_budget=99,
    max_num_seqs=7,
    max_adjusted_seqs=3,
    page_size=5,
    look_ahead=False,
    short_prompt_share=0.5,
    tbt_slo_ms=30.0,
    ttft_slo_ms=400.0,
    batch_tbt_slo_ms=90.0,
    prefix_cache=False,
    prefix_cache_misses=True,
    cache_aware_window=8,
    max_loras=2,
    seed=3,
  )
  resolved: dict[str, Any] = dict(
    max_model_len=32,
    num_pages=10,
    windows=(None, 7),
    num_stages=2,
    prefix_cost=0.5,
    dynamic_rope_len=7,
    rope_counts_outputs=True,
    eos_token_ids=(1,),
  )
  made = config_lib.SchedulerConfig.of(
    config_lib.EngineConfig(**given, max_model_len=64), **resolved
  )
  assert dataclasses.asdict(made) == given | resolved


def test_a_budget_that_could_leave_out_a_decode_is_refused() -> None:
  with pytest.raises(errors.ConfigError, match='token_budget=3: must be at'):
    make_scheduler_config(token_budget=3)


def test_a_cache_too_small_for_one_sequence_is_refused() -> None:
  with pytest.raises(errors.ConfigError) as caught:
    make_scheduler_config(num_pages=7)
  assert 'num_pages=7: 28 tokens of KV cache are too few' in str(caught.value)
  assert 'max_model_len=32' in str(caught.value)


@pytest.mark.parametrize(
  ('num_stages', 'look_ahead', 'max_in_flight'),
  [(1, False, 1), (1, True, 2), (3, False, 3), (3, True, 4)],
)
def test_batches_in_flight(
  num_stages: int, look_ahead: bool, max_in_flight: int
) -> None:
  config = make_scheduler_config(num_stages=num_stages, look_ahead=look_ahead)
  assert config.max_in_flight == max_in_flight


@pytest.mark.parametrize(
  ('max_model_len', 'pages'), [(1, 1), (4, 1), (5, 2), (32, 8)]
)
def test_pages_per_seq(max_model_len: int, pages: int) -> None:
  assert (
    make_scheduler_config(max_model_len=max_model_len).pages_per_seq == pages
  )
