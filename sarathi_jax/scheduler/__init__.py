# SPDX-License-Identifier: Apache-2.0
"""Scheduling: pure Python, the same code for a device and the simulator.

`add(request)`, `remove(request_id)`, `schedule(now) -> ScheduledBatch`,
`complete(batch, sampled) -> events`. Must not import JAX.
"""

from collections.abc import Mapping
from typing import Any

from sarathi_jax import config as config_lib
from sarathi_jax.scheduler import ablations
from sarathi_jax.scheduler import base
from sarathi_jax.scheduler import faster_transformer
from sarathi_jax.scheduler import orca
from sarathi_jax.scheduler import sarathi
from sarathi_jax.scheduler import step_time
from sarathi_jax.scheduler import vllm

Scheduler = base.Scheduler

POLICIES: Mapping[str, type[Scheduler]] = {
  'sarathi': sarathi.SarathiScheduler,
  'vllm': vllm.VllmScheduler,
  'orca': orca.OrcaScheduler,
  'faster_transformer': faster_transformer.FasterTransformerScheduler,
}
# Each is half of sarathi, to show what the other half is good for.
ABLATIONS: Mapping[str, type[Scheduler]] = {
  'hybrid_only': ablations.HybridOnlyScheduler,
  'chunked_only': ablations.ChunkedOnlyScheduler,
}


def class_of(config: config_lib.EngineConfig) -> type[Scheduler]:
  """Returns the configured scheduler's class.

  Raises:
    ConfigError: there is none of that name, or it can't follow tbt_slo_ms.
  """
  config_lib.check(
    config.tbt_slo_ms is None or config.policy == 'sarathi',
    'tbt_slo_ms',
    config.tbt_slo_ms,
    f'policy={config.policy!r} has no budget that could '
    'follow it; only sarathi has',
  )
  return policy_class(config.policy)


def make(
  config: config_lib.EngineConfig,
  num_rows: step_time.NumRows = int,
  **resolved: Any,
) -> Scheduler:
  """Makes the scheduler of an engine.

  Args:
    config: of the engine.
    num_rows: see `Scheduler`.
    resolved: see `SchedulerConfig.of`.

  Raises:
    ConfigError: the configuration can't work.
  """
  return class_of(config)(
    config_lib.SchedulerConfig.of(config, **resolved), num_rows
  )


def max_step_tokens(config: config_lib.EngineConfig, max_model_len: int) -> int:
  """Returns the most tokens that the configured policy puts into a step."""
  return policy_class(config.policy).max_step_tokens(
    config_lib.SchedulerConfig.of(
      config, max_model_len=max_model_len, num_pages=max_model_len
    )
  )


def policy_class(name: str) -> type[Scheduler]:
  """Returns the scheduler class of a policy; raises ConfigError if unknown."""
  known = {**POLICIES, **ABLATIONS}
  config_lib.check(
    name in known, 'policy', name, f'must be one of {", ".join(POLICIES)}'
  )
  return known[name]
