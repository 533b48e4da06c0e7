# SPDX-License-Identifier: Apache-2.0
"""Model configs validate themselves, and go through JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from sarathi_jax import errors
from sarathi_jax.models import config as config_lib

_SIZES: dict[str, Any] = dict(
  vocab_size=50,
  hidden_size=32,
  intermediate_size=48,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_position_embeddings=64,
)

_YARN = config_lib.RopeConfig(
  kind='yarn',
  factor=4.0,
  original_max_position=32,
  attention_factor=1.1,
  beta_fast=32,
  beta_slow=1,
  truncate=True,
)

_EXAMPLES = (
  config_lib.LlamaConfig(**_SIZES),
  config_lib.LlamaConfig(
    **_SIZES,
    rope=_YARN,
    qkv_bias=True,
    qk_norm=True,
    sliding_window=7,
    window_layers=(0, 2),
    tie_word_embeddings=True,
  ),
  config_lib.LlamaConfig(
    **_SIZES,
    norms='after',
    qk_norm=True,
    qk_norm_is_wide=True,
    sliding_window=7,
    window_layers=(1,),
    window_rope=config_lib.RopeConfig(theta=500.0),
    unrotated_layers=(1,),
    rope=_YARN,
  ),
  config_lib.LlamaConfig(
    **_SIZES,
    norms='around',
    norm_from_one=True,
    qk_norm=True,
    sliding_window=7,
    window_layers=(1,),
    window_rope=config_lib.RopeConfig(theta=500.0),
    embed_scale=4.0,
    attention_scale=0.3,
    attention_soft_cap=2.0,
    logit_soft_cap=5.0,
    activation='gelu_tanh',
    tie_word_embeddings=True,
  ),
  config_lib.LlamaConfig(
    **_SIZES,
    rope=config_lib.RopeConfig(
      kind='longrope',
      rotary_dim=4,
      original_max_position=32,
      attention_factor=1.1,
      short_factors=(1.0, 1.5),
      long_factors=(2.0, 3.0),
    ),
  ),
  config_lib.LlamaConfig(
    **_SIZES,
    rope=config_lib.RopeConfig(
      kind='yarn',
      rotary_dim=4,
      factor=4.0,
      original_max_position=8,
      attention_factor=1.1,
      beta_fast=32.0,
      beta_slow=1.0,
      truncate=True,
    ),
    query_growth=0.5,
    embed_scale=3.0,
    residual_scale=0.5,
    logit_scale=2.0,
  ),
  config_lib.MixtralConfig(**_SIZES, num_experts=4, experts_per_token=2),
  config_lib.MixtralConfig(
    **_SIZES,
    num_experts=4,
    experts_per_token=2,
    router=config_lib.RouterConfig(
      score='sigmoid', choice_bias=True, num_groups=2, top_groups=1, scale=2.5
    ),
    shared_size=24,
    shared_gate=True,
    dense_sizes=(40, 40),
  ),
  config_lib.MixtralConfig(
    **_SIZES,
    num_experts=4,
    experts_per_token=2,
    dense_sizes=(40, 56),
    dense_layers=(0, 2),
  ),
  config_lib.FalconConfig(**_SIZES, num_norms=2, activation='gelu'),
)


@pytest.mark.parametrize('config', _EXAMPLES)
def test_round_trip(config: config_lib.ModelConfig) -> None:
  fields = json.loads(json.dumps(config.to_dict()))
  assert config_lib.from_dict(fields) == config
  assert hash(config) == hash(config_lib.from_dict(fields))


def test_closed_world() -> None:
  fields = _EXAMPLES[0].to_dict()
  for bad, match in (
    ({**fields, 'alibi': True}, r'model\.alibi: unknown'),
    ({**fields, 'rope': {'base': 3}}, r'rope\.base: unknown'),
    ({**fields, 'rope': 3}, 'rope=3'),
    ({**fields, 'window_rope': {'base': 3}}, r'window_rope\.base: unknown'),
    ({**_EXAMPLES[-2].to_dict(), 'router': {'top': 3}}, r'router\.top: unkn'),
    ({**_EXAMPLES[-2].to_dict(), 'router': None}, 'router=None'),
    ({**fields, 'family': 'gpt'}, "family='gpt'"),
    ({**fields, 'num_experts': 3}, r'model\.num_experts'),
    ({k: v for k, v in fields.items() if k != 'family'}, 'family=None'),
    (
      {k: v for k, v in fields.items() if k != 'num_heads'},
      r'model\.num_heads: missing',
    ),
    ([], r'model=\[\]'),
  ):
    with pytest.raises(errors.ConfigError, match=match):
      config_lib.from_dict(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
  ('cls', 'fields', 'match'),
  [
    (config_lib.LlamaConfig, dict(hidden_size='32'), "hidden_size='32'"),
    (config_lib.LlamaConfig, dict(num_layers=0), 'num_layers=0'),
    (config_lib.LlamaConfig, dict(num_layers=True), 'num_layers=True'),
    (config_lib.LlamaConfig, dict(num_kv_heads=3), 'num_kv_heads=3'),
    (config_lib.LlamaConfig, dict(head_dim=7), 'rotary_dim=7'),
    (config_lib.LlamaConfig, dict(norm_eps=0.0), r'norm_eps=0\.0'),
    (config_lib.LlamaConfig, dict(norm_eps=float('nan')), 'norm_eps=nan'),
    (config_lib.LlamaConfig, dict(activation='mish'), "activation='mish'"),
    (config_lib.LlamaConfig, dict(sliding_window=0), 'sliding_window=0'),
    (config_lib.LlamaConfig, dict(qk_norm=1), 'qk_norm=1'),
    (config_lib.LlamaConfig, dict(embed_scale=0.0), r'embed_scale=0\.0'),
    (config_lib.LlamaConfig, dict(logit_soft_cap=-1.0), 'logit_soft_cap=-1'),
    (config_lib.LlamaConfig, dict(attention_scale='1'), "attention_scale='1'"),
    (
      config_lib.LlamaConfig,
      dict(
        rope=config_lib.RopeConfig(
          kind='longrope',
          original_max_position=8,
          attention_factor=1.0,
          short_factors=(1.0,) * 4,
          long_factors=(1.0, 2.0),
        )
      ),
      r'rope\.long_factors=.*must be 4 numbers',
    ),
    (config_lib.LlamaConfig, dict(query_growth=0.1), 'needs rope.original'),
    (
      config_lib.LlamaConfig,
      dict(rope=_YARN, query_growth=0.1, qk_norm=True),
      'query_growth=0.1: is not supported with norms of heads',
    ),
    (
      config_lib.LlamaConfig,
      dict(
        sliding_window=3,
        window_layers=(0,),
        window_rope=config_lib.RopeConfig(rotary_dim=4),
      ),
      'rotary_dim=None: must be that of all',
    ),
    (config_lib.LlamaConfig, dict(residual_scale=0), 'residual_scale=0'),
    (config_lib.LlamaConfig, dict(unrotated_layers=(3,)), 'unrotated_layers'),
    (config_lib.LlamaConfig, dict(unrotated_layers=None), 'unrotated_layers'),
    (config_lib.LlamaConfig, dict(norms='none'), "norms='none'"),
    (config_lib.LlamaConfig, dict(qk_norm_is_wide=True), 'without qk_norm'),
    (config_lib.LlamaConfig, dict(window_rope=_YARN), 'without sliding_window'),
    (
      config_lib.LlamaConfig,
      dict(sliding_window=3, window_rope=config_lib.RopeConfig(rotary_dim=16)),
      r'window_rope\.rotary_dim=16',
    ),
    (config_lib.LlamaConfig, dict(window_layers=(3,)), r'window_layers=\(3,\)'),
    (config_lib.LlamaConfig, dict(window_layers=(1, 0)), 'window_layers'),
    (config_lib.LlamaConfig, dict(rope={'kind': 'default'}), 'rope='),
    (
      config_lib.LlamaConfig,
      dict(rope=config_lib.RopeConfig(rotary_dim=16)),
      r'rotary_dim=16.*head_dim=8',
    ),
    (
      config_lib.MixtralConfig,
      dict(num_experts=2, experts_per_token=3),
      'experts_per_token=3',
    ),
    (
      config_lib.MixtralConfig,
      dict(num_experts=2, experts_per_token=1, gate_limit=0.0),
      'gate_limit=0.0',
    ),
    (
      config_lib.MixtralConfig,
      dict(num_experts=2, experts_per_token=1, activation='gelu'),
      "activation='gelu'",
    ),
    *(
      (
        config_lib.MixtralConfig,
        dict(num_experts=6, experts_per_token=3) | fields,
        match,
      )
      for fields, match in (
        (dict(router={'score': 'softmax'}), 'must be a RouterConfig'),
        (
          dict(router=config_lib.RouterConfig(num_groups=4)),
          r'router\.num_groups=4: must divide num_experts=6',
        ),
        (
          dict(router=config_lib.RouterConfig(num_groups=6, top_groups=3)),
          'groups of at least two',
        ),
        (
          dict(router=config_lib.RouterConfig(num_groups=3, top_groups=1)),
          r'router\.top_groups=1: .*enough for experts_per_token=3',
        ),
        (
          dict(router=config_lib.RouterConfig(top_groups=2)),
          'at most num_groups=1',
        ),
        (dict(shared_size=0), 'shared_size=0'),
        (dict(shared_gate=True), 'without shared_size'),
        (dict(dense_sizes=(8, 8, 8)), 'fewer than num_layers=3'),
        (dict(dense_sizes=(0,)), r'dense_sizes=\(0,\)'),
        (dict(dense_sizes=3), 'dense_sizes=3'),
        (dict(dense_sizes=(8,), dense_layers=(3,)), r'dense_layers=\(3,\)'),
        (dict(dense_sizes=(8,), dense_layers=()), r'as many as dense_sizes'),
      )
    ),
    (config_lib.FalconConfig, dict(num_norms=3), 'num_norms=3'),
    (config_lib.FalconConfig, dict(parallel=False), 'num_norms=1'),
  ],
)
def test_bad_value(cls: Any, fields: dict[str, Any], match: str) -> None:
  with pytest.raises(errors.ConfigError, match=match):
    cls(**{**_SIZES, **fields})


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    (dict(kind='ntk'), "kind='ntk'"),
    (
      dict(
        kind='longrope',
        original_max_position=8,
        attention_factor=1.0,
        short_factors=(1.0, 'x'),
        long_factors=(1.0, 2.0),
      ),
      'short_factors',
    ),
    (dict(theta=-1.0), r'theta=-1\.0'),
    (dict(rotary_dim=3), 'rotary_dim=3'),
    (dict(kind='linear'), 'factor=None'),
    (dict(kind='linear', factor=2.0, beta_fast=1), 'beta_fast=1: has no'),
    (dict(factor=2.0), 'factor=2.0: has no'),
    (
      dict(kind='dynamic', factor=2.0, original_max_position=2.5),
      r'original_max_position=2\.5',
    ),
    (
      dict(
        kind='llama3',
        factor=2.0,
        original_max_position=8,
        low_freq_factor=4.0,
        high_freq_factor=1.0,
      ),
      'high_freq_factor',
    ),
  ],
)
def test_bad_rope(fields: dict[str, Any], match: str) -> None:
  with pytest.raises(errors.ConfigError, match=match):
    config_lib.RopeConfig(**fields)


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    (dict(score='tanh'), "score='tanh'"),
    (dict(score=[]), r'score=\[\]'),
    (dict(bias=1), 'bias=1'),
    (dict(num_groups=0), 'num_groups=0'),
    (dict(scale=0.0), r'scale=0\.0'),
  ],
)
def test_bad_router(fields: dict[str, Any], match: str) -> None:
  with pytest.raises(errors.ConfigError, match=match):
    config_lib.RouterConfig(**fields)


def test_first_layers_without_experts() -> None:
  mlps = [_EXAMPLES[-3].layer_mlp(i) for i in range(3)]
  assert [mlp.num_experts for mlp in mlps] == [1, 1, 4]
  assert [mlp.shared_size for mlp in mlps] == [0, 0, 24]
  assert [mlp.size for mlp in mlps] == [40, 40, 48]
  mlps = [_EXAMPLES[-2].layer_mlp(i) for i in range(3)]
  assert [mlp.size for mlp in mlps] == [40, 48, 56]


def test_layer_window() -> None:
  assert [_EXAMPLES[1].layer_window(i) for i in range(3)] == [7, None, 7]
  everywhere = config_lib.LlamaConfig(**_SIZES, sliding_window=7)
  assert [everywhere.layer_window(i) for i in range(3)] == [7, 7, 7]


def test_needs_no_jax() -> None:
  script = (
    'import sys; from sarathi_jax import models; '
    'from sarathi_jax.models import config; '
    'print("jax" in sys.modules, "numpy" in sys.modules)'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=True
  )
  assert done.stdout == 'False False\n'
