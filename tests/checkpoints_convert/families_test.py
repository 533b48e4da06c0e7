# SPDX-License-Identifier: Apache-2.0
"""What families' config.json may say, and what it means."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from checkpoints_convert import convert
from checkpoints_convert import hf_config
from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import parallel
from tests.checkpoints_convert import fake_checkpoint as fake


def _read(
  tmp_path: pathlib.Path, config: dict[str, Any]
) -> config_lib.ModelConfig:
  tmp_path.joinpath('config.json').write_text(json.dumps(config))
  return hf_config.read(tmp_path).model


def _olmo3(**fields: Any) -> dict[str, Any]:
  return fake.llama_config(
    architectures=['Olmo3ForCausalLM'], rope_theta=None, **fields
  )


def test_olmo3_has_two_rotations(tmp_path: pathlib.Path) -> None:
  """transformers 4 and 5; what is scaled has no window."""
  yarn = dict(rope_type='yarn', factor=8.0, original_max_position_embeddings=64)
  old = _read(tmp_path, _olmo3(rope_scaling=yarn, num_hidden_layers=4))
  new = _read(
    tmp_path,
    _olmo3(
      num_hidden_layers=4,
      rope_parameters=dict(
        full_attention=yarn | dict(rope_theta=5e5),
        sliding_attention=dict(rope_type='default', rope_theta=5e5),
      ),
    ),
  )
  assert old == new
  kinds = [old.layer_kind(i) for i in range(4)]
  assert [kind.attention.window for kind in kinds] == [4096] * 3 + [None]
  assert [kind.rope.kind for kind in kinds] == ['default'] * 3 + ['yarn']
  assert {kind.rope.theta for kind in kinds} == {5e5}


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    (dict(rope_theta=1e6), 'rope_theta=1000000.0: must be 500000'),
    (dict(rope_parameters=dict(chunked_attention={})), 'chunked_attention'),
    (dict(rope_parameters=dict(rope_type='default')), 'rope_type is of no'),
    (dict(layer_types=['full_attention']), 'layer_types'),
  ],
)
def test_olmo3_config_attribute(
  fields: dict[str, Any], match: str, tmp_path: pathlib.Path
) -> None:
  with pytest.raises(errors.CheckpointError, match=match):
    _read(tmp_path, _olmo3() | fields)


def _gemma3(**fields: Any) -> dict[str, Any]:
  return fake.llama_config(
    architectures=['Gemma3ForCausalLM'], rope_theta=None, **fields
  )


def test_gemma3_has_two_rotations(tmp_path: pathlib.Path) -> None:
  old = _read(
    tmp_path,
    _gemma3(
      num_hidden_layers=6,
      rope_local_base_freq=1e4,
      rope_scaling=dict(rope_type='linear', factor=8.0),
      sliding_window=8,
      sliding_window_pattern=3,
      hidden_activation='gelu_pytorch_tanh',
      max_position_embeddings=None,
    )
    | dict(rope_theta=1e6),
  )
  kinds = [old.layer_kind(i) for i in range(6)]
  assert [kind.attention.window for kind in kinds] == [8, 8, None] * 2
  assert [kind.rope for kind in kinds[1:3]] == [
    config_lib.RopeConfig(theta=1e4),
    config_lib.RopeConfig(theta=1e6, kind='linear', factor=8.0),
  ]
  assert old.context_len == 131072  # Told as it is once scaled.
  assert old.activation == 'gelu_tanh'  # hidden_act is not read.
  assert old.embed_scale == fake.WIDTH**0.5
  assert old.overflows_float16 and old.tie_word_embeddings


def test_gemma2_without_caps(tmp_path: pathlib.Path) -> None:
  """null means none; what is absent has a default."""
  config = _gemma3() | dict(architectures=['Gemma2ForCausalLM'])
  model = _read(tmp_path, config | dict(attn_logit_softcapping=None))
  assert (model.attention_soft_cap, model.logit_soft_cap) == (None, 30.0)


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    (dict(attn_logit_softcapping=50.0), 'attn_logit_softcapping=50.0'),
    (dict(use_bidirectional_attention=True), 'use_bidirectional_attention'),
    (dict(query_pre_attn_scalar=0), 'query_pre_attn_scalar=0'),
    (dict(rope_local_base_freq='1'), "rope_theta='1'"),
    (dict(sliding_window=None), 'there is no window'),
  ],
)
def test_gemma3_config_attribute(
  fields: dict[str, Any], match: str, tmp_path: pathlib.Path
) -> None:
  with pytest.raises(errors.CheckpointError, match=match):
    _read(tmp_path, _gemma3() | fields)


def _phi3(**fields: Any) -> dict[str, Any]:
  return fake.llama_config(architectures=['Phi3ForCausalLM'], **fields)


_LONGROPE = dict(type='longrope', short_factor=[1.5], long_factor=[3.0])


def test_phi3_has_its_context_beside_the_rotation(
  tmp_path: pathlib.Path,
) -> None:
  """As in Phi-4-mini; its window is longer than its context."""
  model = _read(
    tmp_path,
    _phi3(
      original_max_position_embeddings=16,
      partial_rotary_factor=0.5,
      rope_scaling=_LONGROPE,
      sliding_window=64,
      auto_map={'AutoConfig': 'configuration_phi3.Phi3Config'},
      attention_bias=False,
      full_attn_mod=1,
      interpolate_factor=1,
      lm_head_bias=False,
      mlp_bias=False,
      embd_pdrop=0.1,
      resid_pdrop=0.1,
    ),
  )
  assert model.rope == config_lib.RopeConfig(
    kind='longrope',
    rotary_dim=2,
    original_max_position=16,
    attention_factor=model.rope.attention_factor,
    short_factors=(1.5,),
    long_factors=(3.0,),
  )
  assert model.rope.attention_factor == pytest.approx(1.5**0.5)
  assert model.context_len == 64 and model.sliding_window is None
  older = _read(
    tmp_path,
    _phi3(
      original_max_position_embeddings=16,
      partial_rotary_factor=0.5,
      rope_scaling=_LONGROPE | dict(type='su'),
    ),
  )
  assert older == model


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    (dict(interpolate_factor=2), 'interpolate_factor=2: only 1 is supported'),
    (dict(attention_bias=True), 'attention_bias=True'),
    (dict(rope_scaling=dict(type='linear', factor=2.0)), "rope_type='linear'"),
    (dict(rope_scaling=_LONGROPE), r'rope\.short_factors=.*must be 2 numbers'),
    (dict(partial_rotary_factor=0.25), r'rope\.rotary_dim=1'),
    (dict(partial_rotary_factor=1.5), 'partial_rotary_factor=1.5'),
    (
      dict(
        rope_scaling=_LONGROPE | dict(original_max_position_embeddings=8),
        original_max_position_embeddings=16,
      ),
      'must be original_max_position_embeddings=16',
    ),
  ],
)
def test_phi3_config_attribute(
  fields: dict[str, Any], match: str, tmp_path: pathlib.Path
) -> None:
  with pytest.raises(errors.CheckpointError, match=match):
    _read(tmp_path, _phi3(**fields))


def _phi3_shapes() -> dict[str, tuple[int, ...]]:
  fused = {
    f'model.layers.{layer}.{name}.weight': (rows, fake.WIDTH)
    for layer in range(fake.LAYERS)
    for name, rows in (
      ('self_attn.qkv_proj', fake.WIDTH + 2 * fake.KV_HEADS * fake.HEAD_DIM),
      ('mlp.gate_up_proj', 2 * fake.INNER),
    )
  }
  apart = ('q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj')
  return fused | {
    name: shape
    for name, shape in fake.llama_shapes().items()
    if name.split('.')[-2] not in apart
  }


@pytest.mark.parametrize('tp', [1, 2])
def test_fused_matrices_are_taken_apart(
  tp: int, tmp_path: pathlib.Path
) -> None:
  """Also into chunks that are of one device each."""
  tensors = fake.random_tensors(_phi3_shapes())
  folder = fake.write(tmp_path / 'hf', _phi3(), tensors)
  plan = convert.convert(
    folder,
    tmp_path / 'out',
    parallelism=parallel.Parallelism(tp=tp),
    check=True,
  )
  assert {leaf.path: leaf.shape for leaf in plan.all_leaves()}[
    'layers.1.attn.v'
  ] == (fake.WIDTH, fake.KV_HEADS * fake.HEAD_DIM)


def test_rows_of_a_fused_matrix_that_are_too_many(
  tmp_path: pathlib.Path,
) -> None:
  shapes = _phi3_shapes()
  name = 'model.layers.1.self_attn.qkv_proj.weight'
  shapes[name] = (shapes[name][0] + 1, fake.WIDTH)
  folder = fake.write(tmp_path / 'hf', _phi3(), fake.random_tensors(shapes))
  with pytest.raises(errors.CheckpointError, match=r'qkv_proj\.weight: has'):
    convert.convert(folder, tmp_path / 'out')


@pytest.mark.parametrize(
  ('architecture', 'fields', 'match'),
  [
    ('SmolLM3ForCausalLM', dict(no_rope_layers=[1]), r'no_rope_layers=\[1\]'),
    ('SmolLM3ForCausalLM', dict(no_rope_layers=[1, 2]), 'must be 0 or 1'),
    (
      'SmolLM3ForCausalLM',
      dict(layer_types=['sliding_attention'] * 2, sliding_window=8),
      'there is no window',
    ),
    ('GraniteForCausalLM', dict(logits_scaling=0), 'logits_scaling=0'),
    ('GraniteForCausalLM', dict(residual_multiplier='a'), "residual_scale='a'"),
    ('Glm4ForCausalLM', dict(partial_rotary_factor='a'), "rotary_factor='a'"),
    (
      'Ministral3ForCausalLM',
      dict(rope_parameters=dict(rope_type='yarn', factor=2.0)),
      'llama_4_scaling_beta: missing',
    ),
    (
      'Ministral3ForCausalLM',
      dict(rope_parameters=dict(rope_type='linear', factor=2.0)),
      "rope_type='linear'",
    ),
  ],
)
def test_config_attribute(
  architecture: str,
  fields: dict[str, Any],
  match: str,
  tmp_path: pathlib.Path,
) -> None:
  with pytest.raises(errors.CheckpointError, match=match):
    _read(tmp_path, fake.llama_config(architectures=[architecture], **fields))


def test_smollm3_rotates_in_three_of_four_layers(
  tmp_path: pathlib.Path,
) -> None:
  config = fake.llama_config(
    architectures=['SmolLM3ForCausalLM'], num_hidden_layers=8
  )
  model = _read(tmp_path, config)
  kinds = [model.layer_kind(i).rope.kind for i in range(8)]
  assert kinds == (['default'] * 3 + ['none']) * 2


def test_mistral3_reads_by_the_texts_type(tmp_path: pathlib.Path) -> None:
  text = fake.llama_config(rope_theta=None, head_dim=fake.HEAD_DIM)
  outer = dict(architectures=['Mistral3ForConditionalGeneration'])
  growth = []
  for kind in ('mistral', 'ministral3'):
    model = _read(
      tmp_path, outer | dict(text_config=text | dict(model_type=kind))
    )
    growth.append(model.query_growth)
  assert growth == [None, 0.1]
  with pytest.raises(errors.CheckpointError, match="model_type='llama'"):
    _read(tmp_path, outer | dict(text_config=text))


def test_pairs_side_by_side_are_put_apart(tmp_path: pathlib.Path) -> None:
  """In the first half of each head, as only that is rotated."""
  config = fake.llama_config(
    architectures=['GlmForCausalLM'], head_dim=8, attention_bias=False
  )
  shapes = fake.llama_shapes() | {
    f'model.layers.{layer}.{name}.weight': shape
    for layer in range(fake.LAYERS)
    for name, shape in (
      ('self_attn.q_proj', (fake.HEADS * 8, fake.WIDTH)),
      ('self_attn.k_proj', (fake.KV_HEADS * 8, fake.WIDTH)),
      ('self_attn.v_proj', (fake.KV_HEADS * 8, fake.WIDTH)),
      ('self_attn.o_proj', (fake.WIDTH, fake.HEADS * 8)),
      ('mlp.gate_up_proj', (2 * fake.INNER, fake.WIDTH)),
    )
  }
  shapes = {
    name: shape
    for name, shape in shapes.items()
    if name.split('.')[-2] not in ('gate_proj', 'up_proj')
  }
  tensors = fake.random_tensors(shapes)
  folder = fake.write(tmp_path / 'hf', config, tensors)
  for tp in (1, 2):
    out = tmp_path / f'out{tp}'
    convert.convert(
      folder, out, parallelism=parallel.Parallelism(tp=tp), check=True
    )
    k = checkpoint.restore_params(out)['layers'][1]['attn']['k']
    whole = tensors['model.layers.1.self_attn.k_proj.weight']
    order = [0, 2, 1, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 14, 15]
    np.testing.assert_array_equal(k, whole[order].T)
