# SPDX-License-Identifier: Apache-2.0
"""tunix's models, of google-tunix 0.1.7: their configs, and their leaves.

The engine has to compute what is trained, not what a checkpoint's config.json
says: Llama-3's rotary embedding is not scaled there, and that of Llama-3 and
Qwen3 has the same base whatever `rope_theta` is. What a config has beside these
fields is refused by name. Does not import tunix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

from sarathi_jax import errors
from sarathi_jax.models import config as config_lib

# Fields by which no number changes, but for rounding.
_WITHOUT_EFFECT = frozenset(
  (
    'shd_config',
    'remat_config',
    'dtype',
    'param_dtype',
    'use_flash_attention',
    'flash_attention_block_size',
  )
)
_FIELDS = {
  'vocab_size': 'vocab_size',
  'embed_dim': 'hidden_size',
  'hidden_dim': 'intermediate_size',
  'num_layers': 'num_layers',
  'num_heads': 'num_heads',
  'num_kv_heads': 'num_kv_heads',
  'head_dim': 'head_dim',
}
# Llama3's and Qwen3's modules call apply_rope without their config's
# rope_theta, and this is its default.
_FIXED_THETA = config_lib.RopeConfig(theta=1_000_000.0)
_PERIOD = 6  # Of so many of Gemma3's layers, the last one has no window.


class Family(NamedTuple):
  """One of tunix's models.

  Attributes:
    fields: names of the fields of its config, and of ours.
    made: returns other fields of ours.
    read: the fields of its config that `made` reads, or that nothing reads.
  """

  fields: Mapping[str, str]
  made: Callable[[Any], dict[str, Any]]
  read: tuple[str, ...]


def _llama(config: Any) -> dict[str, Any]:
  del config
  return dict(rope=_FIXED_THETA)


def _qwen2(config: Any) -> dict[str, Any]:
  rope = config_lib.RopeConfig(theta=float(config.rope_theta))
  return dict(qkv_bias=True, rope=rope)


def _qwen3(config: Any) -> dict[str, Any]:
  fields: dict[str, Any] = dict(qk_norm=True, rope=_FIXED_THETA)
  if config.num_experts is not None:
    fields |= dict(
      num_experts=config.num_experts,
      experts_per_token=config.num_experts_per_tok,
    )
  return fields


def _gemma3(config: Any) -> dict[str, Any]:
  if config.vision_config is not None:
    raise errors.ConfigError(
      'vision_config: images are not served; make the model with '
      'text_only=True.'
    )
  width, heads = config.embed_dim, config.num_heads
  norm = config.query_pre_attn_norm.name
  by_width = 'BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS'
  scales = {
    'BY_ONE_OVER_SQRT_HEAD_DIM': None,
    by_width: (width // heads) ** -0.5,
  }
  if norm not in scales:
    raise errors.ConfigError(
      f'query_pre_attn_norm={norm}: must be one of {", ".join(scales)}.'
    )
  return dict(
    norms='around',
    norm_from_one=True,
    norm_eps=1e-6,
    activation='gelu_tanh',
    qk_norm=True,
    tie_word_embeddings=True,
    embed_scale=width**0.5,
    attention_scale=scales[norm],
    overflows_float16=True,
    sliding_window=config.sliding_window_size,
    window_layers=tuple(
      i for i in range(config.num_layers) if i % _PERIOD != _PERIOD - 1
    ),
    window_rope=_scaled(config.local_base_frequency, config.local_scale_factor),
    rope=_scaled(config.global_base_frequency, config.global_scale_factor),
  )


def _scaled(theta: float, factor: float) -> config_lib.RopeConfig:
  if factor == 1:
    return config_lib.RopeConfig(theta=float(theta))
  return config_lib.RopeConfig(
    theta=float(theta), kind='linear', factor=float(factor)
  )


# By the names of their classes.
FAMILIES: Mapping[str, Family] = {
  'tunix.models.llama3.model.Llama3': Family(
    _FIELDS | {'norm_eps': 'norm_eps', 'weight_tying': 'tie_word_embeddings'},
    _llama,
    ('rope_theta',),
  ),
  'tunix.models.qwen2.model.Qwen2': Family(
    _FIELDS
    | {'norm_eps': 'norm_eps', 'use_tied_embedding': 'tie_word_embeddings'},
    _qwen2,
    ('rope_theta',),
  ),
  'tunix.models.qwen3.model.Qwen3': Family(
    _FIELDS
    | {'norm_eps': 'norm_eps', 'use_tied_embedding': 'tie_word_embeddings'},
    _qwen3,
    ('rope_theta', 'num_experts', 'num_experts_per_tok'),
  ),
  'tunix.models.gemma3.model.Gemma3': Family(
    {
      theirs.replace('vocab_size', 'num_embed'): ours
      for theirs, ours in _FIELDS.items()
    },
    _gemma3,
    (
      'sliding_window_size',
      'local_base_frequency',
      'global_base_frequency',
      'local_scale_factor',
      'global_scale_factor',
      'query_pre_attn_norm',
      'vision_config',
    ),
  ),
}


def family_of(kind: type) -> Family:
  """Returns the family of a model's class, or of one that it is made of.

  Raises:
    ConfigError: it is none of these.
  """
  for cls in kind.__mro__:
    if family := FAMILIES.get(f'{cls.__module__}.{cls.__qualname__}'):
      return family
  raise errors.ConfigError(
    f'rollout_actor: is a {kind.__module__}.{kind.__qualname__}; must be one '
    f'of {", ".join(FAMILIES)}.'
  )


def read_config(
  family: Family, config: Any, context: int
) -> config_lib.ModelConfig:
  """Returns the configuration of a trainer's model.

  Args:
    family: of `family_of`.
    config: the model's.
    context: tokens of the longest sequence.

  Raises:
    ConfigError: it has a field that isn't known, or a value that isn't served.
  """
  known = {*family.fields, *family.read, *_WITHOUT_EFFECT}
  names = {field.name for field in dataclasses.fields(config)}
  if unknown := sorted(names - known):
    raise errors.ConfigError(
      f'config.{unknown[0]}: is unknown; the fields of google-tunix 0.1.7 are '
      'known.'
    )
  fields = {
    ours: getattr(config, theirs) for theirs, ours in family.fields.items()
  } | family.made(config)
  kind: type[config_lib.ModelConfig] = (
    config_lib.MixtralConfig
    if 'num_experts' in fields
    else config_lib.LlamaConfig
  )
  return kind(max_position_embeddings=context, **fields)
