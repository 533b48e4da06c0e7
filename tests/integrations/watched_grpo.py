# SPDX-License-Identifier: Apache-2.0
"""Trains as examples/grpo_tunix.py does, and says what steps leave behind.

  python -m tests.integrations.watched_grpo --steps=100

Before each rollout, a line of JSON on the bytes of all live arrays, those that
the process has, and what was compiled since the last one.
"""

from __future__ import annotations

import json
from typing import Any

from absl import app
import jax

from examples import grpo_tunix
from sarathi_jax.benchmarks import rollouts
from tests import tiny


def main() -> None:
  compiled: list[str] = []

  def listen(event: str, duration_secs: float, **fields: Any) -> None:
    del duration_secs
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(fields['fun_name'])

  jax.monitoring.register_event_duration_secs_listener(listen)
  generate = grpo_tunix.Says.generate

  def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
    left = {
      'live_bytes': rollouts.live_bytes(),
      'resident_bytes': rollouts.resident_bytes(),
      'compiled': list(compiled),
    }
    compiled.clear()
    print(json.dumps(left), flush=True)
    return generate(self, *args, **kwargs)

  grpo_tunix.Says.generate = watched  # type: ignore[method-assign]
  with tiny.few_sizes():
    app.run(grpo_tunix.main)


if __name__ == '__main__':
  main()
