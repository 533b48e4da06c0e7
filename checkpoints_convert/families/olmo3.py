# SPDX-License-Identifier: Apache-2.0
"""OLMo-3: OLMo-2 with a window in three of four layers."""

from __future__ import annotations

from checkpoints_convert import hf_config
from checkpoints_convert import hf_rope
from checkpoints_convert.families import olmo2
from sarathi_jax.models import config as config_lib

rules = olmo2.rules

_THETA = 500000.0


def read_config(attributes: hf_config.Attributes) -> config_lib.LlamaConfig:
  """Reads what transformers' Olmo3Config reads, with its defaults."""
  theta = attributes.take('rope_theta', _THETA)
  if theta != _THETA:
    raise attributes.refuse(
      'rope_theta',
      theta,
      f'must be {_THETA:.0f} (transformers takes that for layers with a window '
      'whatever is said); rope_parameters may have others',
    )
  fields = hf_config.common(
    attributes,
    kv_heads=None,
    theta={hf_rope.FULL: theta, hf_rope.SLIDING: theta},
    eps=1e-5,
    positions=2048,
  )
  window = attributes.take_or_none('sliding_window', 4096)
  return config_lib.LlamaConfig(
    **olmo2.switches(attributes),
    **hf_config.with_windows(attributes, fields, window, lambda i: i % 4 != 3),
  )
