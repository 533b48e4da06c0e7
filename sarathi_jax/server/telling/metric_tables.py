# SPDX-License-Identifier: Apache-2.0
"""What Prometheus is told of the engine, and how that is read, as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import metrics as metrics_lib
from sarathi_jax.engine import state

_SECONDS = (
  0.001,
  0.0025,
  0.005,
  0.01,
  0.025,
  0.05,
  0.075,
  0.1,
  0.15,
  0.2,
  0.3,
  0.4,
  0.5,
  0.75,
  1.0,
  2.5,
  5.0,
  7.5,
  10.0,
  20.0,
  40.0,
  80.0,
  160.0,
  640.0,
  2560.0,
)

_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))

_PARTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


class Snapshot(NamedTuple):
  """The engine's totals between two steps."""

  totals: metrics_lib.EngineMetrics
  stats: state.EngineStats
  info: engine_lib.EngineInfo
  needed_tbt_s: float | None  # that can be held; None without a target
  adapters: Sequence[state.AdapterState]


class Value(NamedTuple):
  """A number of a snapshot.

  Attributes:
    name, text: what Prometheus is told that it is.
    read: finds it.
  """

  name: str
  text: str
  read: Callable[[Snapshot], float]


class Histogram(NamedTuple):
  """A distribution.

  Attributes:
    name, text: what Prometheus is told that it is.
    field: the field of EngineMetrics.
    bounds: the upper bounds of its buckets.
  """

  name: str
  text: str
  field: str
  bounds: tuple[float, ...]


# The first ones of each table are vLLM's.
GAUGES = (
  Value(
    'num_requests_running',
    'Requests in the batch.',
    lambda s: s.stats.num_running,
  ),
  Value(
    'kv_cache_usage_perc',
    'Part of the KV cache in use, 0 to 1.',
    lambda s: 1 - s.stats.num_free_pages / s.stats.num_pages,
  ),
  Value(
    'token_budget',
    'The most tokens of a step, now.',
    lambda s: s.info.token_budget,
  ),
  Value(
    'padding_waste',
    'Part of all computed rows that was padding.',
    lambda s: s.totals.padding_waste,
  ),
  Value(
    'micro_batch_imbalance',
    'By how much the longest micro-batch in '
    'flight exceeds their mean, as a part of it; mean over steps.',
    lambda s: s.totals.imbalance / max(s.totals.num_steps, 1),
  ),
)

COUNTERS = (
  Value(
    'num_preemptions',
    'Requests whose pages were taken back.',
    lambda s: s.stats.num_preemptions,
  ),
  Value(
    'prompt_tokens',
    'Tokens of prompts whose first token came, found or computed.',
    lambda s: s.totals.num_begun_tokens,
  ),
  Value(
    'prompt_tokens_cached',
    'Those of them that were found in the KV cache.',
    lambda s: s.totals.num_begun_cached,
  ),
  Value(
    'prefix_cache_queries',
    'Tokens of requests that were looked up in the KV cache.',
    lambda s: s.stats.num_looked_up,
  ),
  Value(
    'prefix_cache_hits',
    'Those of them that were there, and not computed.',
    lambda s: s.stats.num_found,
  ),
  Value(
    'generation_tokens', 'Tokens generated.', lambda s: s.totals.num_generated
  ),
  Value(
    'prompt_tokens_computed',
    'Tokens of prompts computed, each counted once.',
    lambda s: s.stats.num_prefilled,
  ),
  Value(
    'prefix_cache_hits_again',
    'Tokens of preempted requests that were still in the KV cache.',
    lambda s: s.stats.num_found_again,
  ),
  Value('steps', 'Steps launched.', lambda s: s.totals.num_steps),
  Value(
    'step_faults', 'Steps that failed.', lambda s: s.totals.num_step_faults
  ),
  Value(
    'scheduled_tokens',
    'Tokens that steps held.',
    lambda s: s.totals.num_scheduled_tokens,
  ),
  Value(
    'padded_tokens',
    'Rows computed to fill compiled shapes.',
    lambda s: s.totals.num_padded_tokens,
  ),
  Value(
    'busy_seconds',
    'Time in which a step was under way.',
    lambda s: s.totals.busy_s,
  ),
  Value(
    'device_wait_seconds',
    'Time that the host waited for the device.',
    lambda s: s.totals.wait_s,
  ),
  Value(
    'decode_stall_seconds',
    'Time that decodes waited while steps ran '
    'without them, summed over decodes.',
    lambda s: s.totals.decode_stall_s,
  ),
)

HISTOGRAMS = (
  Histogram(
    'time_to_first_token_seconds',
    'From arrival to the first token.',
    'ttft_s',
    _SECONDS,
  ),
  Histogram(
    'inter_token_latency_seconds', 'Between two tokens.', 'tbt_s', _SECONDS
  ),
  Histogram(
    'request_time_per_output_token_seconds',
    'Mean between two tokens of a request.',
    'tpot_s',
    _SECONDS,
  ),
  Histogram(
    'e2e_request_latency_seconds', 'From arrival to the end.', 'e2e_s', _SECONDS
  ),
  Histogram(
    'request_queue_time_seconds',
    'From arrival to the first step.',
    'scheduling_delay_s',
    _SECONDS,
  ),
  Histogram(
    'request_prefill_time_seconds',
    'From the first step to the first token.',
    'prefill_s',
    _SECONDS,
  ),
  Histogram(
    'request_decode_time_seconds',
    'From the first token to the end.',
    'decode_s',
    _SECONDS,
  ),
  Histogram(
    'request_prompt_tokens', 'Tokens of a prompt.', 'prompt_len', _TOKENS
  ),
  Histogram(
    'request_generation_tokens',
    'Tokens generated for a request.',
    'output_len',
    _TOKENS,
  ),
  Histogram(
    'iteration_tokens_total', 'Tokens of a step.', 'step_tokens', _TOKENS
  ),
  Histogram(
    'token_budget_use',
    'Part of the token budget that a step used.',
    'budget_use',
    _PARTS,
  ),
)
