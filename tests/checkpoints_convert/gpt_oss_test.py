# SPDX-License-Identifier: Apache-2.0
"""What config.json and tensors of gpt-oss may be, and what MXFP4 is."""

from __future__ import annotations

import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers.integrations import mxfp4 as theirs

from checkpoints_convert import convert
from checkpoints_convert import direct
from checkpoints_convert import mxfp4
from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import quantized
from tests.checkpoints_convert import fake_checkpoint as fake

WIDTH, INNER, EXPERTS, HEADS = 64, 32, 3, 4
PACKING = dict(
  quant_method='mxfp4',
  modules_to_not_convert=['model.layers.*.self_attn', 'lm_head'],
)
EXPERT = 'model.layers.1.mlp.experts'


def _config(**fields: Any) -> dict[str, Any]:
  return fake.llama_config(
    **dict(
      architectures=['GptOssForCausalLM'],
      model_type='gpt_oss',
      hidden_size=WIDTH,
      intermediate_size=INNER,
      head_dim=8,
      num_local_experts=EXPERTS,
      num_experts_per_tok=2,
      experts_per_token=2,
      initial_context_length=4096,
      max_position_embeddings=131072,
      rope_theta=150000,
      rope_scaling=dict(
        rope_type='yarn',
        factor=32.0,
        beta_fast=32.0,
        beta_slow=1.0,
        original_max_position_embeddings=4096,
        truncate=False,
      ),
      sliding_window=128,
      swiglu_limit=7.0,
      router_aux_loss_coef=0.9,
      output_router_logits=False,
      attention_dropout=0.0,
    )
    | fields
  )


def _tensors() -> dict[str, np.ndarray]:
  """All but the experts' matrices."""
  shapes = {
    'model.embed_tokens.weight': (fake.VOCAB, WIDTH),
    'model.norm.weight': (WIDTH,),
    'lm_head.weight': (fake.VOCAB, WIDTH),
  }
  for layer in range(fake.LAYERS):
    prefix = f'model.layers.{layer}'
    for name, size in (('q', 32), ('k', 16), ('v', 16)):
      shapes[f'{prefix}.self_attn.{name}_proj.weight'] = (size, WIDTH)
      shapes[f'{prefix}.self_attn.{name}_proj.bias'] = (size,)
    shapes |= {
      f'{prefix}.self_attn.o_proj.weight': (WIDTH, 32),
      f'{prefix}.self_attn.o_proj.bias': (WIDTH,),
      f'{prefix}.self_attn.sinks': (HEADS,),
      f'{prefix}.input_layernorm.weight': (WIDTH,),
      f'{prefix}.post_attention_layernorm.weight': (WIDTH,),
      f'{prefix}.mlp.router.weight': (EXPERTS, WIDTH),
      f'{prefix}.mlp.router.bias': (EXPERTS,),
      f'{prefix}.mlp.experts.gate_up_proj_bias': (EXPERTS, 2 * INNER),
      f'{prefix}.mlp.experts.down_proj_bias': (EXPERTS, WIDTH),
    }
  return fake.random_tensors(shapes, 'bfloat16')


def _packed() -> dict[str, np.ndarray]:
  """The experts' matrices as they are published."""
  rng = np.random.default_rng(0)
  tensors = {}
  for layer in range(fake.LAYERS):
    for name, rows, columns in (
      ('gate_up', 2 * INNER, WIDTH),
      ('down', WIDTH, INNER),
    ):
      path = f'model.layers.{layer}.mlp.experts.{name}_proj'
      shape = EXPERTS, rows, columns // 32
      tensors |= {
        f'{path}_blocks': rng.integers(0, 256, (*shape, 16), np.uint8),
        f'{path}_scales': rng.integers(100, 140, shape, np.uint8),
      }
  return tensors


def _unpacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The same in bfloat16, by transformers, as it writes them."""
  return {
    name.removesuffix('_blocks'): theirs.convert_moe_packed_tensors(
      torch.tensor(blocks),
      torch.tensor(tensors[name.replace('blocks', 'scales')]),
      dtype=torch.float32,
    )
    .numpy()
    .astype(ml_dtypes.bfloat16)
    for name, blocks in tensors.items()
    if name.endswith('_blocks')
  }


def _convert(
  folder: pathlib.Path,
  tensors: dict[str, np.ndarray],
  keep_mxfp4: bool | None = None,
  **fields: Any,
) -> Any:
  source = fake.write(folder / 'hf', _config(**fields), tensors)
  return convert.convert(
    source, folder / 'out', check=True, keep_mxfp4=keep_mxfp4
  )


def _refused(
  folder: pathlib.Path,
  match: str,
  tensors: dict[str, np.ndarray],
  **fields: Any,
) -> None:
  with pytest.raises(errors.CheckpointError, match=match):
    _convert(folder, _tensors() | tensors, **fields)


def test_every_byte_and_scale_is_what_transformers_reads() -> None:
  blocks = np.arange(256, dtype=np.uint8).reshape(16, 1, 16)
  blocks = np.tile(
    blocks, (1, 253, 1)
  )  # Larger ones are too large for float32.
  scales = np.tile(np.arange(253, dtype=np.uint8), (16, 1))
  got = mxfp4.unpack(blocks, scales)
  expected = theirs.convert_moe_packed_tensors(
    torch.tensor(blocks[None]), torch.tensor(scales[None]), dtype=torch.float64
  )
  np.testing.assert_array_equal(got, expected[0].T.numpy().astype(np.float32))
  # And bfloat16 holds it.
  np.testing.assert_array_equal(got.astype(ml_dtypes.bfloat16), got)
  last = mxfp4.unpack(blocks[:1, :1], np.array([[255]], np.uint8))
  assert np.isnan(last).all()


def test_packed_experts_are_those_in_bfloat16(tmp_path: pathlib.Path) -> None:
  packed = _packed()
  plan = _convert(
    tmp_path / 'packed',
    _tensors() | packed,
    keep_mxfp4=False,
    quantization_config=PACKING,
  )
  assert plan.dtype == 'bfloat16'
  whole = _tensors() | _unpacked(packed)
  assert _convert(tmp_path / 'whole', whole).model == plan.model
  got, expected = (
    checkpoint.restore_params(tmp_path / name / 'out')
    for name in ('packed', 'whole')
  )
  gate_up = whole[f'{EXPERT}.gate_up_proj']
  layer = expected['layers'][1]['moe']
  np.testing.assert_array_equal(layer['gate'], gate_up[..., ::2])
  np.testing.assert_array_equal(layer['up'], gate_up[..., 1::2])
  biases = whole[f'{EXPERT}.gate_up_proj_bias']
  np.testing.assert_array_equal(layer['up_bias'], biases[:, 1::2])
  for name in layer:
    np.testing.assert_array_equal(got['layers'][1]['moe'][name], layer[name])
  # Read without being converted, a part at a time.
  params = direct.DirectParams(tmp_path / 'whole' / 'hf')
  index = slice(1, 3), slice(5, 60), slice(3, 20)
  part = params('layers.1.moe.gate', index)
  np.testing.assert_array_equal(part, np.asarray(layer['gate'])[index])
  index = slice(0, 2), slice(5, 20), slice(3, 60)
  part = params('layers.1.moe.down', index)
  np.testing.assert_array_equal(part, np.asarray(layer['down'])[index])
  params.close()


def test_experts_stay_in_their_codes(tmp_path: pathlib.Path) -> None:
  packed = _packed()
  plan = _convert(tmp_path, _tensors() | packed)
  assert plan.dtype == 'bfloat16' and 'stay in MXFP4' in plan.left_out
  how = plan.model.quantization
  assert how is not None and (how.codes, how.group) == ('mxfp4', 32)
  assert 'layers.*.attn.q' in how.kept and 'layers.*.moe.gate' not in how.kept
  params = checkpoint.restore_params(tmp_path / 'out')
  whole = _unpacked(packed)
  moe = params['layers'][1]['moe']
  gate_up = whole[f'{EXPERT}.gate_up_proj']
  for name, expected in (
    ('gate', gate_up[..., ::2]),
    ('up', gate_up[..., 1::2]),
    ('down', whole[f'{EXPERT}.down_proj']),
  ):
    np.testing.assert_array_equal(
      quantized.dequantize(moe[name], np.float32),
      expected.astype(np.float32),
    )
  # A fourth of bfloat16's, and a scale for 32 numbers.
  assert moe['down'].values.nbytes == expected.nbytes // 4
  assert moe['down'].scale.nbytes == expected.nbytes // 64
  # Read without being converted, a part at a time.
  direct_params = direct.DirectParams(tmp_path / 'hf')
  assert direct_params.metadata.model == plan.model
  index = slice(1, 3), slice(5, 20), slice(3, 20)
  for name in ('gate', 'down'):
    part = direct_params(f'layers.1.moe.{name}.values', index)
    np.testing.assert_array_equal(part, np.asarray(moe[name].values)[index])
  direct_params.close()


def test_what_can_not_stay_in_mxfp4_is_told(tmp_path: pathlib.Path) -> None:
  whole = fake.write(
    tmp_path / 'whole', _config(), _tensors() | _unpacked(_packed())
  )
  packed = _packed()
  packed[f'{EXPERT}.down_proj_scales'][2, 3] = 253
  infinite = fake.write(tmp_path / 'infinite', _config(), _tensors() | packed)
  for source, options, match in (
    (whole, {}, 'keep_mxfp4: no tensor'),
    (infinite, {}, 'down_proj_scales: has scales of more than'),
    (infinite, dict(quantize='int8'), 'is quantized already'),
  ):
    with pytest.raises(errors.CheckpointError, match=match):
      convert.convert(source, tmp_path / 'out', keep_mxfp4=True, **options)


def test_the_published_config(tmp_path: pathlib.Path) -> None:
  model = _convert(tmp_path, _tensors() | _packed()).model
  assert isinstance(model, config_lib.MixtralConfig)
  assert [model.layer_window(i) for i in range(2)] == [128, None]
  assert model.rope.truncate is False and model.context_len == 131072
  assert model.attention_sinks and model.mlp_bias and model.router.bias
  assert (model.gate_limit, model.activation) == (7.0, 'quick_gelu')


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    (dict(quantization_config=dict(quant_method='fp8')), "'fp8'.*mxfp4"),
    (
      dict(quantization_config=PACKING | dict(group_size=16)),
      "'group_size'.*mxfp4",
    ),
    (dict(swiglu_alpha=2.0), r'swiglu_alpha=2\.0'),
    (dict(experts_per_token=4), 'experts_per_token=4: must be 2'),
    (dict(initial_context_length=8192), 'initial_context_length=8192'),
    (dict(hidden_act='gelu'), "hidden_act='gelu'"),
    (dict(swiglu_limit=-1.0), r'gate_limit=-1\.0'),
    (dict(final_logit_softcapping=30.0), 'final_logit_softcapping'),
  ],
)
def test_attributes_that_are_others(
  fields: dict[str, Any], match: str, tmp_path: pathlib.Path
) -> None:
  _refused(tmp_path, match, _packed(), **fields)


def _without(name: str) -> dict[str, np.ndarray]:
  return {key: x for key, x in _packed().items() if key != name}


@pytest.mark.parametrize(
  ('tensors', 'match'),
  [
    (_without(f'{EXPERT}.down_proj_scales'), 'lacks .*1.*down_proj_scales'),
    (
      _without(f'{EXPERT}.down_proj_blocks'),
      r'1\.mlp\.experts\.down_proj_scales: dtype=U8 can not be',
    ),
    (
      _packed()
      | {f'{EXPERT}.down_proj_scales': np.zeros((EXPERTS, 1), np.uint8)},
      'down_proj_scales: U8 of shape',
    ),
    (
      _packed()
      | {f'{EXPERT}.down_proj_scales': np.zeros((EXPERTS, WIDTH, 1), np.int8)},
      'down_proj_scales: I8 of shape',
    ),
    (
      _packed()
      | {f'{EXPERT}.down_proj_scales': np.full((3, WIDTH, 1), 255, np.uint8)},
      'down_proj_scales: has scales of more than',
    ),
    (
      _packed()
      | {f'{EXPERT}.down_proj': np.zeros((EXPERTS, INNER, WIDTH), np.float32)},
      'down_proj_blocks is in codes, and .*down_proj is not',
    ),
    (
      _without(f'{EXPERT}.down_proj_scales')
      | {
        f'{EXPERT}.down_proj_blocks': np.zeros((2, WIDTH, 1, 16), np.uint8),
        f'{EXPERT}.down_proj_scales': np.zeros((2, WIDTH, 1), np.uint8),
      },
      'is no stack of matrices of 3 experts',
    ),
    (
      _packed() | {'model.layers.1.mlp.experts.up_proj': np.zeros((2, 2), 'f')},
      r'holds .*experts\.up_proj, for which',
    ),
  ],
  ids=range(8),
)
def test_tensors_that_are_others(
  tensors: dict[str, np.ndarray], match: str, tmp_path: pathlib.Path
) -> None:
  _refused(tmp_path, match, tensors)


def test_a_sink_that_is_missing_is_named(tmp_path: pathlib.Path) -> None:
  tensors = _tensors() | _packed()
  del tensors['model.layers.1.self_attn.sinks']
  with pytest.raises(errors.CheckpointError, match=r'lacks .*1.*attn\.sinks'):
    _convert(tmp_path, tensors)
