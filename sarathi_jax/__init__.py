# SPDX-License-Identifier: Apache-2.0
"""sarathi_jax: LLM serving in JAX that never stalls a decode for a prefill.

The life of a request:

1. A front (`llm`, `offline`, `server`) makes a `types.Request` of it; bad ones
   are refused here, at the border (`Engine.check`).
2. `Engine.add` queues it in the `Scheduler`.
3. `Scheduler.schedule` puts its next tokens into a hybrid batch: one token for
   every decode, chunks of prefills in what the token budget leaves
   (`scheduler/sarathi.py`).
4. `DeviceRunner.launch` packs the batch into one array (`runner/batch.py`) and
   starts one compiled step (`runner/step.py`): model, attention over the paged
   KV cache, sampling. While it runs, the next batch is made.
5. `DeviceRunner.fetch` waits for the sampled tokens, `Scheduler.complete`
   appends them, and `Engine.step` returns text and tokens (`OutputDelta`).
6. After its last token, its pages are free again.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from sarathi_jax.config import EngineConfig as EngineConfig
  from sarathi_jax.errors import SarathiError as SarathiError
  from sarathi_jax.in_process.layouts import Layout as Layout
  from sarathi_jax.in_process.scoring import (
    compare_logprobs as compare_logprobs,
  )
  from sarathi_jax.in_process.trees import Leaf as Leaf
  from sarathi_jax.llm import LLM as LLM
  from sarathi_jax.types import Completion as Completion
  from sarathi_jax.types import FinishReason as FinishReason
  from sarathi_jax.types import OutputDelta as OutputDelta
  from sarathi_jax.types import SamplingParams as SamplingParams

__version__ = '0.1.0'

# Loaded when first used: importing the package costs no JAX.
_API = {
  'Completion': 'types',
  'EngineConfig': 'config',
  'FinishReason': 'types',
  'LLM': 'llm',
  'Layout': 'in_process.layouts',
  'Leaf': 'in_process.trees',
  'OutputDelta': 'types',
  'SamplingParams': 'types',
  'SarathiError': 'errors',
  'compare_logprobs': 'in_process.scoring',
}

__all__ = tuple(_API)


def __getattr__(name: str) -> Any:
  if name not in _API:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'{__name__}.{_API[name]}')
  return getattr(module, name)


def __dir__() -> list[str]:
  return sorted([*globals(), *_API])
