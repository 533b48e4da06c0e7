# SPDX-License-Identifier: Apache-2.0
"""Models as pure functions over nested dicts of arrays.

  from sarathi_jax import models
  params = models.init_params(config, jax.random.key(0), jnp.float32)
  hidden, kv = models.forward(
    config, params, kv, tokens, positions, rope_lens, attend)
  logits = models.unembed(config, params, hidden[last_rows])

`config` is a `models.config.ModelConfig`, and `param_specs(config)` describes
`params`. `attend` is the one thing that a model does not know: where keys and
values are kept. `causal_attend` is the one for a sequence without a cache.

These letters stand for the same in the whole project:

  T  tokens of a batch          D  model width
  S  sequences                  H  query heads
  P  pages a sequence           K  key and value heads
  N  pages in the pool          G  = H / K
  L  layers                     h  numbers a head
  V  vocabulary                 F  MLP width
  E  experts

Importing this package loads no JAX; first use of one of its functions does.
"""

from __future__ import annotations

from collections.abc import Mapping
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from sarathi_jax.models.attention import Attend
  from sarathi_jax.models.attention import LayerContext
  from sarathi_jax.models.attention import causal_attend
  from sarathi_jax.models.spec import ParamSpec
  from sarathi_jax.models.transformer import embed
  from sarathi_jax.models.transformer import final_norm
  from sarathi_jax.models.transformer import forward
  from sarathi_jax.models.transformer import init_params
  from sarathi_jax.models.transformer import param_specs
  from sarathi_jax.models.transformer import quantize
  from sarathi_jax.models.transformer import run_layers
  from sarathi_jax.models.transformer import unembed

__all__ = [
  'FAMILIES',
  'Attend',
  'LayerContext',
  'ParamSpec',
  'causal_attend',
  'embed',
  'final_norm',
  'forward',
  'init_params',
  'param_specs',
  'quantize',
  'run_layers',
  'unembed',
]

# ModelConfig.family -> the module with its block.
FAMILIES: Mapping[str, str] = {
  'falcon': 'sarathi_jax.models.falcon',
  'llama': 'sarathi_jax.models.llama',
  'mixtral': 'sarathi_jax.models.mixtral',
}

_HOMES: Mapping[str, str] = {
  'Attend': 'attention',
  'LayerContext': 'attention',
  'causal_attend': 'attention',
  'ParamSpec': 'spec',
  'embed': 'transformer',
  'final_norm': 'transformer',
  'forward': 'transformer',
  'init_params': 'transformer',
  'param_specs': 'transformer',
  'quantize': 'transformer',
  'run_layers': 'transformer',
  'unembed': 'transformer',
}


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)
