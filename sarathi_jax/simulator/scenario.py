# SPDX-License-Identifier: Apache-2.0
"""What is simulated, as one value for other processes; and the shared flags."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from absl import flags

from sarathi_jax import config as config_lib
from sarathi_jax import scheduler
from sarathi_jax.cli import deployment as deployment_lib
from sarathi_jax.cli import flags as engine_flags
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.simulator import cost_model
from sarathi_jax.simulator import hardware as hardware_lib
from sarathi_jax.simulator import hosts
from sarathi_jax.simulator import workload as workload_lib

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # They are of the main that asks for them.

# The most sequences that the paper lets run at once under Orca, which takes
# memory for the longest sequence there may be: by deployment.
ORCA_MAX_NUM_SEQS: Mapping[str, int] = {
  'mistral_7b_a100': 16,
  'yi_34b_a100_tp2': 16,
  'llama2_70b_a40_tp4_pp2': 8,
  'falcon_180b_a100_tp4_pp2': 8,
  'falcon_180b_a100_tp8': 8,
}
# The most of a budget that follows the SLO. Longer steps gain nothing: matmuls
# are at their best by then, and a chunk attends to itself in vain for half.
AUTO_MAX_BUDGET = 2048
# Fields of EngineConfig that flags may set in place of --config.
_FIELDS = (
  'tp',
  'pp',
  'max_num_seqs',
  'max_model_len',
  'look_ahead',
  'kv_cache_dtype',
  'quantized_activations',
  'prefix_cache',
  'cache_aware_window',
  'memory_utilization',
)
# Fields of a configuration that does not follow an SLO.
_UNPACED: Mapping[str, None] = dict.fromkeys(
  ('tbt_slo_ms', 'ttft_slo_ms', 'batch_tbt_slo_ms')
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
  """A deployment and what it has to serve.

  Attributes:
    name: the deployment's.
    model: the model's shape.
    hardware: what it runs on.
    config: the engine's.
    host: what the host costs.
    workload: the requests to serve.
    batch_tbt_slo_ms: see `EngineConfig`; for the budget 'auto'.
  """

  name: str
  model: model_config_lib.ModelConfig
  hardware: hardware_lib.Hardware
  config: config_lib.EngineConfig
  host: hosts.Host
  workload: workload_lib.WorkloadConfig
  batch_tbt_slo_ms: float | None = None

  def cost(self) -> cost_model.CostModel:
    """Makes the model of its steps; ConfigError if tp, pp don't divide it."""
    return cost_model.CostModel(
      self.model,
      self.hardware,
      tp=self.config.tp or 1,
      pp=self.config.pp,
      host=self.host,
      kv_cache_dtype=self.config.kv_cache_dtype,
    )

  def with_policy(
    self,
    policy: str,
    token_budget: int | str | None,
    slo_tbt_p99_s: float | None = None,
  ) -> Scenario:
    """Returns the same scenario under another policy.

    Args:
      policy: a name in scheduler.POLICIES.
      token_budget: for policies that have one; 'auto' follows the SLO; None
        leaves the configuration's.
      slo_tbt_p99_s: the SLO that 'auto' follows, seconds.
    """
    scheduler.policy_class(policy)
    changes: dict[str, Any] = {'policy': policy}
    if token_budget == 'auto':
      config_lib.check(
        slo_tbt_p99_s is not None,
        'token_budget',
        'auto',
        'follows an SLO, so one must be given',
      )
      assert slo_tbt_p99_s is not None
      changes |= {
        'token_budget': AUTO_MAX_BUDGET,
        'tbt_slo_ms': slo_tbt_p99_s * 1e3,
        'batch_tbt_slo_ms': self.batch_tbt_slo_ms,
      }
    elif token_budget is not None:
      changes |= {'token_budget': token_budget, **_UNPACED}
    if not has_budget(policy):
      # As in the paper, which gives vLLM as many as a sequence may have.
      changes |= {
        'token_budget': max(
          self.config.max_model_len or 0, self.config.token_budget
        ),
        **_UNPACED,
      }
    if policy == 'orca':
      changes['max_num_seqs'] = min(
        self.config.max_num_seqs, ORCA_MAX_NUM_SEQS.get(self.name, 16)
      )
    return dataclasses.replace(
      self, config=dataclasses.replace(self.config, **changes)
    )

  def with_prefix_cache(self, is_on: bool) -> Scenario:
    """Returns the same scenario, with or without the prefix cache."""
    return dataclasses.replace(
      self, config=dataclasses.replace(self.config, prefix_cache=is_on)
    )


def has_budget(policy: str) -> bool:
  """Says whether the token budget matters to this policy."""
  return policy in ('sarathi', 'chunked_only')


def budget_of(text: str | None) -> int | str | None:
  """Reads what --token_budget says: a number, 'auto', or nothing.

  Raises:
    ConfigError: the text is none of these.
  """
  config_lib.check(
    text is None or text == 'auto' or text.isdecimal(),
    'token_budget',
    text,
    'must be a number, or auto',
  )
  return int(text) if text and text.isdecimal() else text


def define_flags() -> None:
  """Defines the flags that all programs of the simulator share."""
  flags.DEFINE_string(
    'config', None, 'Deployment to simulate: a file of configs/.'
  )
  flags.DEFINE_string(
    'device',
    None,
    'Device to simulate: a name in simulator/devices, or a '
    'JSON file like those. Default: the device that --config names.',
  )
  flags.DEFINE_enum(
    'host',
    'paper',
    list(hosts.HOSTS),
    'What the host costs: as in the '
    "paper (eager PyTorch), as in its artifact's tables, or none.",
  )
  engine_flags.define_fields(**dict.fromkeys(_FIELDS))
  define_workload_flags('openchat_sharegpt4')
  flags.DEFINE_float(
    'batch_share',
    0.0,
    'Fraction of the requests that are of '
    'the tier batch; see --batch_tbt_slo_ms.',
  )
  flags.DEFINE_float(
    'batch_tbt_slo_ms',
    None,
    'Time between tokens that '
    '--token_budget=auto aims at for requests of the tier '
    'batch, milliseconds. Default: none.',
  )
  flags.DEFINE_integer(
    'num_requests',
    None,
    'Number of requests. Default: all of a trace, or 2048.',
  )

  flags.DEFINE_float(
    'turns',
    1.0,
    'Mean number of turns of a chat. Lengths are those of what a turn adds, '
    'as --workload=chat_turns has them. Default: no chats.',
    lower_bound=1.0,
  )
  flags.DEFINE_float(
    'think_s', 10.0, 'Mean time between an answer and the next turn, seconds.'
  )
  flags.DEFINE_integer(
    'system_len', 0, 'Tokens that the prompts of all chats begin with.'
  )
  flags.DEFINE_integer(
    'max_chat_len', 8192, 'The most tokens of a chat; it ends before.'
  )


def define_workload_flags(source: str) -> None:
  """Defines the flags of a workload, whose lengths are those of `source`."""
  flags.DEFINE_string('workload', source, workload_lib.SOURCES)
  flags.DEFINE_enum(
    'arrivals',
    'poisson',
    list(workload_lib.ARRIVALS),
    'Process by which requests arrive; trace: as the trace says.',
  )
  flags.DEFINE_float(
    'cv',
    2.0,
    'Coefficient of variation of the gaps between '
    'requests, with --arrivals=gamma.',
  )
  flags.DEFINE_float(
    'length_scale',
    1.0,
    'Factor that lengths of prompts and outputs are multiplied by.',
  )
  flags.DEFINE_integer('seed', 0, 'Seed of arrivals, lengths and prompts.', 0)


def from_flags(qps: float | None = 1.0) -> Scenario:
  """Makes the scenario that the flags describe.

  Raises:
    ConfigError: the scenario can't work.
  """
  config_lib.check(
    FLAGS.config is not None,
    'config',
    FLAGS.config,
    'must be given, a file of configs/',
  )
  deployment = deployment_lib.read(FLAGS.config)
  device = FLAGS.device or deployment.device
  config_lib.check(
    device is not None,
    'device',
    device,
    f'must be given: {FLAGS.config} names none',
  )
  assert device is not None
  changes: dict[str, Any] = {
    name: value for name in _FIELDS if (value := FLAGS[name].value) is not None
  }
  config = dataclasses.replace(deployment.config, **changes)
  return Scenario(
    name=deployment.name,
    model=deployment.known_model().divided(config),
    hardware=hardware_lib.load(device),
    host=hosts.HOSTS[FLAGS.host],
    batch_tbt_slo_ms=FLAGS.batch_tbt_slo_ms,
    config=config,
    workload=workload_from_flags(
      qps=qps,
      **simulated_fields(),
    ),
  )


def simulated_fields() -> dict[str, Any]:
  """Returns the fields of a workload whose flags only `define_flags` has."""
  names = (
    'num_requests',
    'batch_share',
    'turns',
    'think_s',
    'system_len',
    'max_chat_len',
  )
  return {name: FLAGS[name].value for name in names}


def workload_from_flags(**more: Any) -> workload_lib.WorkloadConfig:
  """Makes the workload that the flags describe, with `more` of its fields.

  Raises:
    ConfigError: there can be no such workload.
  """
  return workload_lib.WorkloadConfig(
    source=FLAGS.workload,
    arrivals=FLAGS.arrivals,
    cv=FLAGS.cv,
    length_scale=FLAGS.length_scale,
    seed=FLAGS.seed,
    **more,
  )
