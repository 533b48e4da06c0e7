# SPDX-License-Identifier: Apache-2.0
"""Scheduling: pure Python, the same code for a device and the simulator.

`add(request)`, `remove(request_id)`, `schedule(now) -> ScheduledBatch`,
`complete(batch, sampled) -> events`. Must not import JAX.
"""

from collections.abc import Mapping

from sarathi_jax import config as config_lib
from sarathi_jax.scheduler import base
from sarathi_jax.scheduler import faster_transformer
from sarathi_jax.scheduler import orca
from sarathi_jax.scheduler import sarathi
from sarathi_jax.scheduler import vllm

Scheduler = base.Scheduler

POLICIES: Mapping[str, type[Scheduler]] = {
  'sarathi': sarathi.SarathiScheduler,
  'vllm': vllm.VllmScheduler,
  'orca': orca.OrcaScheduler,
  'faster_transformer': faster_transformer.FasterTransformerScheduler,
}


def policy_class(name: str) -> type[Scheduler]:
  """The scheduler of a policy; ConfigError for a name that is none."""
  config_lib.check(name in POLICIES, 'policy', name,
                   f'must be one of {", ".join(POLICIES)}')
  return POLICIES[name]
