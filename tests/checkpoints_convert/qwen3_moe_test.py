# SPDX-License-Identifier: Apache-2.0
"""What config.json and tensors of Qwen3-MoE may be."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from checkpoints_convert import convert
from checkpoints_convert import hf_config
from sarathi_jax import errors
from sarathi_jax.models import config as config_lib
from tests.checkpoints_convert import fake_checkpoint as fake


def _read(
  tmp_path: pathlib.Path, config: dict[str, Any]
) -> config_lib.ModelConfig:
  tmp_path.joinpath('config.json').write_text(json.dumps(config))
  return hf_config.read(tmp_path).model


def _qwen3_moe(**fields: Any) -> dict[str, Any]:
  return fake.llama_config(
    architectures=['Qwen3MoeForCausalLM'],
    moe_intermediate_size=20,
    num_experts=4,
    num_experts_per_tok=2,
    head_dim=fake.HEAD_DIM,
    **fields,
  )


def test_experts_have_a_width_of_their_own(
  tmp_path: pathlib.Path,
) -> None:
  model = _read(
    tmp_path,
    _qwen3_moe(
      norm_topk_prob=True,
      mlp_only_layers=[],
      decoder_sparse_step=1,
      use_sliding_window=False,
      sliding_window=4096,
      max_window_layers=48,
      router_aux_loss_coef=0.001,
      output_router_logits=False,
    ),
  )
  assert isinstance(model, config_lib.MixtralConfig)
  assert model.layer_mlp(0) == config_lib.Mlp(
    20, num_experts=4, experts_per_token=2
  )
  assert model.qk_norm and model.router.sums_to_one
  assert model.sliding_window is None
  # As transformers 5 writes it; by default, weights are as they are.
  other = _qwen3_moe() | dict(num_experts=None, num_local_experts=4)
  assert _read(tmp_path, other) == dataclasses.replace(
    model, router=config_lib.RouterConfig(sums_to_one=False)
  )


@pytest.mark.parametrize(
  ('fields', 'dense'),
  [
    (dict(mlp_only_layers=[0]), [0]),
    (dict(decoder_sparse_step=2), [0, 2]),
    (dict(decoder_sparse_step=2, mlp_only_layers=[1, 0]), [0, 1, 2]),
    (dict(decoder_sparse_step=3), [0, 1, 3]),
  ],
  ids=str,
)
def test_layers_may_be_without_experts(
  fields: dict[str, Any], dense: list[int], tmp_path: pathlib.Path
) -> None:
  config = _qwen3_moe(**fields) | dict(num_hidden_layers=4)
  model = _read(tmp_path, config)
  mlps = [model.layer_mlp(i) for i in range(4)]
  assert [i for i, mlp in enumerate(mlps) if mlp.num_experts == 1] == dense
  assert {mlps[i] for i in dense} == {config_lib.Mlp(fake.INNER)}


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    (dict(mlp_only_layers=[2]), r'mlp_only_layers=\[2\]: .* in \[0, 2\)'),
    (dict(mlp_only_layers=0), 'mlp_only_layers=0'),
    (dict(decoder_sparse_step=0), 'decoder_sparse_step=0'),
    (dict(decoder_sparse_step=3), r'dense_sizes=.*fewer than num_layers=2'),
    (dict(use_sliding_window=True), 'use_sliding_window=True'),
    (dict(num_experts_per_tok=5), 'experts_per_token=5'),
    (dict(shared_expert_intermediate_size=8), 'shared_expert_intermediate'),
  ],
)
def test_what_has_no_experts_is_refused(
  fields: dict[str, Any], match: str, tmp_path: pathlib.Path
) -> None:
  with pytest.raises(errors.CheckpointError, match=match):
    _read(tmp_path, _qwen3_moe() | fields)


def test_an_expert_that_is_missing_is_told(tmp_path: pathlib.Path) -> None:
  shapes = fake.llama_shapes()
  for layer in range(fake.LAYERS):
    prefix = f'model.layers.{layer}'
    for name in ('gate', 'up', 'down'):
      whole = shapes.pop(f'{prefix}.mlp.{name}_proj.weight')
      shapes |= {
        f'{prefix}.mlp.experts.{expert}.{name}_proj.weight': tuple(
          size if size == fake.WIDTH else 20 for size in whole
        )
        for expert in range(4)
      }
    shapes[f'{prefix}.mlp.gate.weight'] = (4, fake.WIDTH)
    shapes |= {
      f'{prefix}.self_attn.{name}_norm.weight': (fake.HEAD_DIM,)
      for name in 'qk'
    }
  tensors = fake.random_tensors(shapes)
  convert.convert(
    fake.write(tmp_path / 'whole', _qwen3_moe(), tensors),
    tmp_path / 'out',
  )
  del tensors['model.layers.1.mlp.experts.2.up_proj.weight']
  with pytest.raises(
    errors.CheckpointError, match=r'layers\.1\.moe\.up: .*wants 4'
  ):
    convert.convert(
      fake.write(tmp_path / 'less', _qwen3_moe(), tensors),
      tmp_path / 'none',
    )
