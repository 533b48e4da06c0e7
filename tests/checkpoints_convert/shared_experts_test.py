# SPDX-License-Identifier: Apache-2.0
"""What config.json and tensors of Qwen2-MoE and GLM-4.5 may be."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from checkpoints_convert import convert
from checkpoints_convert import hf_config
from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax.models import config as config_lib
from sarathi_jax.runner import mesh as mesh_lib
from sarathi_jax.runner import placement
from sarathi_jax.runner import weights
from tests.checkpoints_convert import fake_checkpoint as fake

EXPERTS, SIZE = 4, 8


def _read(
  tmp_path: pathlib.Path, config: dict[str, Any]
) -> config_lib.MixtralConfig:
  tmp_path.joinpath('config.json').write_text(json.dumps(config))
  model = hf_config.read(tmp_path).model
  assert isinstance(model, config_lib.MixtralConfig)
  return model


def _qwen2_moe(**fields: Any) -> dict[str, Any]:
  return fake.llama_config(
    architectures=['Qwen2MoeForCausalLM'],
    moe_intermediate_size=SIZE,
    num_experts=EXPERTS,
    num_experts_per_tok=2,
    **fields,
  )


def _glm(**fields: Any) -> dict[str, Any]:
  return fake.llama_config(
    architectures=['Glm4MoeForCausalLM'],
    moe_intermediate_size=SIZE,
    n_routed_experts=EXPERTS,
    num_experts_per_tok=2,
    num_nextn_predict_layers=1,
    **fields,
  )


def test_qwen2_moe_as_it_is_published(tmp_path: pathlib.Path) -> None:
  model = _read(
    tmp_path,
    _qwen2_moe(
      norm_topk_prob=False,
      shared_expert_intermediate_size=20,
      decoder_sparse_step=1,
      use_sliding_window=False,
      sliding_window=32768,
      max_window_layers=21,
      output_router_logits=False,
      router_aux_loss_coef=0.001,
    ),
  )
  assert model.layer_mlp(0) == config_lib.Mlp(
    SIZE,
    num_experts=EXPERTS,
    experts_per_token=2,
    shared_size=20,
    shared_gate=True,
  )
  assert model.router == config_lib.RouterConfig(sums_to_one=False)
  assert model.qkv_bias and not model.o_bias and not model.qk_norm
  assert model.sliding_window is None


def test_glm_as_it_is_published(tmp_path: pathlib.Path) -> None:
  model = _read(
    tmp_path,
    _glm(
      attention_bias=True,
      first_k_dense_replace=1,
      n_group=1,
      topk_group=1,
      n_shared_experts=1,
      norm_topk_prob=True,
      partial_rotary_factor=0.5,
      routed_scaling_factor=2.5,
      use_qk_norm=True,
    ),
  )
  assert model.router == config_lib.RouterConfig(
    score='sigmoid', choice_bias=True, scale=2.5
  )
  assert model.layer_mlp(0) == config_lib.Mlp(fake.INNER)
  assert model.layer_mlp(1) == config_lib.Mlp(
    SIZE, num_experts=EXPERTS, experts_per_token=2, shared_size=SIZE
  )
  assert model.rope.rotary_dim == fake.HEAD_DIM // 2
  assert model.qkv_bias and model.qk_norm and not model.o_bias


@pytest.mark.parametrize(
  ('config', 'match'),
  [
    (_qwen2_moe(mlp_only_layers=['0']), r"mlp_only_layers=\['0'\]: must be"),
    (_qwen2_moe(use_sliding_window=True), 'use_sliding_window=True'),
    (
      _qwen2_moe(layer_types=['full_attention', 'sliding_attention']),
      'there is no window',
    ),
    (_qwen2_moe(n_shared_experts=1), 'n_shared_experts=1'),
    (_glm(first_k_dense_replace=2), r'first_k_dense_replace=2: .*\[0, 2\)'),
    (_glm(n_group=3), r'router\.num_groups=3'),
    (_glm(topk_group=2), r'router\.top_groups=2'),
    (_glm(n_shared_experts=0), 'n_shared_experts=0'),
    (_glm(scoring_func='softmax'), 'scoring_func'),
    (_glm(num_mtp_layers=2), 'num_mtp_layers=2: must be 1'),
    (_glm() | dict(num_nextn_predict_layers=-1), 'num_nextn_predict_layers=-1'),
  ],
)
def test_what_differs_is_refused(
  config: dict[str, Any], match: str, tmp_path: pathlib.Path
) -> None:
  with pytest.raises(errors.CheckpointError, match=match):
    _read(tmp_path, config)


def _glm_tensors() -> dict[str, np.ndarray]:
  """Those of a dense layer, of one with experts, and of one behind it."""
  shapes = fake.llama_shapes()
  dense = [n for n in shapes if n.startswith('model.layers.1.mlp.')]
  wide = {n: shapes.pop(n) for n in dense}
  for name, shape in wide.items():
    size = tuple(SIZE if n == fake.INNER else n for n in shape)
    for module in ('shared_experts', *(f'experts.{i}' for i in range(EXPERTS))):
      shapes[name.replace('.mlp.', f'.mlp.{module}.')] = size
  shapes['model.layers.1.mlp.gate.weight'] = EXPERTS, fake.WIDTH
  shapes['model.layers.1.mlp.gate.e_score_correction_bias'] = (EXPERTS,)
  behind = {
    name.replace('.1.', '.2.', 1): shape
    for name, shape in shapes.items()
    if name.startswith('model.layers.1.')
  }
  shapes |= behind | {'model.layers.2.eh_proj.weight': (fake.WIDTH, 32)}
  tensors = fake.random_tensors(shapes, 'bfloat16')
  for name in tensors:
    if name.endswith('e_score_correction_bias'):
      # Numbers that are the same in 16 bits.
      tensors[name] = np.float32(5 + 1e-3 * np.arange(EXPERTS))
  return tensors


def test_layers_behind_the_last_are_left_out(tmp_path: pathlib.Path) -> None:
  tensors = _glm_tensors()
  num = sum(name.startswith('model.layers.2.') for name in tensors)
  plan = convert.convert(
    fake.write(tmp_path / 'hf', _glm(), tensors), tmp_path / 'out', check=True
  )
  assert 'from model.layers.2 on, which predict' in plan.left_out
  assert f'{num} tensors' in plan.left_out
  # As many as the config tells, and no more.
  tensors['model.layers.3.eh_proj.weight'] = np.ones((2, 2), np.float32)
  with pytest.raises(
    errors.CheckpointError, match=r'holds model\.layers\.3\.eh_proj'
  ):
    convert.convert(
      fake.write(tmp_path / 'more', _glm(), tensors), tmp_path / 'none'
    )


def test_what_chooses_experts_is_never_rounded(tmp_path: pathlib.Path) -> None:
  tensors = _glm_tensors()
  folder = fake.write(tmp_path / 'hf', _glm(), tensors)
  convert.convert(folder, tmp_path / 'out')
  kept = tensors['model.layers.1.mlp.gate.e_score_correction_bias']
  assert len(set(kept.astype(ml_dtypes.bfloat16).tolist())) == 1
  restored = checkpoint.restore_params(tmp_path / 'out')
  opened = checkpoint.open_converted(tmp_path / 'out')
  mesh = mesh_lib.make()
  loaded = weights.load(
    opened.metadata.model,
    mesh,
    placement.of_live(jnp.bfloat16),
    opened.read,
  )
  for params in (restored, loaded):
    layer = params['layers'][1]['moe']
    assert layer['choice_bias'].dtype == jnp.float32
    assert layer['router'].dtype == jnp.bfloat16
    np.testing.assert_array_equal(layer['choice_bias'], kept)
