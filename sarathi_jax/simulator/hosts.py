# SPDX-License-Identifier: Apache-2.0
"""What the software around a model costs, which is not the device's."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

from sarathi_jax.simulator import operators


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Host:
  """What the software around the model adds to a step, in each stage.

  Attributes:
    launch_s: the least time of a layer, seconds, because its kernels are
      launched one by one; hidden behind them where they take longer.
    sum_s: the same of each all-reduce in it, beside that.
    step_s: seconds added to each step, when the device waits for the host.
    workers_s: seconds added to it where several processes serve.
    seq_s: seconds added for each sequence of the step.
    context_s: seconds added for each token of its decodes' contexts.
    appending: see `operators.prefill_attention`.
    lockstep: whether pipeline stages begin together and wait for the slowest,
      as in one SPMD program; else each goes on by itself.
  """

  launch_s: float = 0.0
  sum_s: float = 0.0
  step_s: float = 0.0
  workers_s: float = 0.0
  seq_s: float = 0.0
  context_s: float = 0.0
  appending: float = 0.0
  lockstep: bool = False


# Sarathi-Serve's: eager PyTorch, a process for each device, Ray between them, a
# scheduler and a sampler that the device waits for. step_s, workers_s and seq_s
# were measured: Vidur's tables of that engine's CPU time (A100, 8 to 128
# sequences). Launches were chosen by hand: steps of few decodes then take 17 ms
# with Mistral-7B, on one device, and 40 with Yi-34B, on two, near what the
# paper says, and vLLM's and Orca's capacities of these two come out.
_SARATHI = Host(
  launch_s=0.43e-3,
  sum_s=0.05e-3,
  step_s=1.2e-3,
  workers_s=6.8e-3,
  seq_s=0.047e-3,
  appending=operators.APPENDING,
)
HOSTS: Mapping[str, Host] = {
  # The whole step is one program, and the next one is launched meanwhile.
  'none': Host(lockstep=True),
  # This was fitted to capacities, those of chats in figure 10.
  'paper': dataclasses.replace(_SARATHI, context_s=0.09e-6),
  # The steps timed one by one in its artifact (Yi-34B), and its figure 1, whose
  # decodes take so much longer: `calibrate --artifact`.
  'artifact': dataclasses.replace(
    _SARATHI, launch_s=0.56e-3, step_s=4.3e-3, context_s=0.99e-6
  ),
}
