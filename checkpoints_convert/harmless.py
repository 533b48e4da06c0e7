# SPDX-License-Identifier: Apache-2.0
"""Attributes of config.json that don't change what a model computes.

They are of three kinds: those ignored by name; those that every config of
transformers has, at their default; and those that no model of the installed
transformers reads. A name that one of its models reads is not harmless: a
config with it may be of a variant that is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import functools
import importlib.util
import pathlib
import re
from typing import Any

# They say nothing about inference, or are read elsewhere.
IGNORED = frozenset(
  (
    '_attn_implementation',
    '_attn_implementation_autoset',
    '_attn_implementation_internal',
    '_commit_hash',
    '_name_or_path',
    'architectures',
    'attention_dropout',
    'attn_implementation',
    'auto_map',
    'bos_token_id',
    'dtype',
    'eos_token_id',
    'gradient_checkpointing',
    'hidden_dropout',
    'id2label',
    'initializer_range',
    'label2id',
    'model_type',
    'num_labels',
    'output_attentions',
    'output_hidden_states',
    'output_router_logits',
    'pad_token_id',
    'pretraining_tp',
    'problem_type',
    'return_dict',
    'router_aux_loss_coef',
    'router_jitter_noise',
    'torch_dtype',
    'transformers_version',
    'unsloth_fixed',
    'unsloth_version',
    'use_cache',
  )
)

# Attribute -> the values that change nothing: attributes of all configs of
# transformers 4 and 5, and of our families.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
  'add_cross_attention': (False,),
  'apply_residual_connection_post_layernorm': (False,),
  'chunk_size_feed_forward': (0,),
  'is_decoder': (False, True),
  'is_encoder_decoder': (False,),
  'partial_rotary_factor': (1,),
  'prefix': ('',),
  'pruned_heads': ({},),
  'tf_legacy_loss': (False,),
  'tie_encoder_decoder': (False,),
  'torchscript': (False,),
  'use_bfloat16': (False,),
  'use_bidirectional_attention': (False,),
}


def is_harmless(name: str, value: Any, *, remote_code: bool) -> bool:
  """Says whether an attribute that no family takes may be left out.

  Args:
    name: the attribute.
    value: its JSON value; not None, which changes nothing.
    remote_code: whether the checkpoint brings a model's code of its own, which
      may read what no model of transformers does.
  """
  if name in IGNORED or value in NEUTRAL.get(name, ()):
    return True
  return not (name in NEUTRAL or remote_code or name in _read_by_models())


@functools.cache
def _read_by_models() -> frozenset[str]:
  return names_in(
    ('modeling_*.py', 'models/*/modeling_*.py'),
    r'config\.(\w+)|["\'](\w+)["\']',
  )


def names_in(globs: Iterable[str], pattern: str) -> frozenset[str]:
  """Collects what a pattern's groups match in transformers' sources.

  Reads the sources as text: that takes half a second and imports none of them.

  Args:
    globs: of files below the package.
    pattern: a regular expression; its groups match names.
  """
  found = importlib.util.find_spec('transformers')
  assert found is not None and found.submodule_search_locations
  root = pathlib.Path(found.submodule_search_locations[0])
  return frozenset(
    name
    for glob in globs
    for path in root.glob(glob)
    for groups in re.finditer(pattern, path.read_text(encoding='utf-8'))
    for name in groups.groups()
    if name
  )
