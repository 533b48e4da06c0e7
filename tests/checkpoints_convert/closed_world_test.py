# SPDX-License-Identifier: Apache-2.0
"""Whatever is not known about a checkpoint is refused, by name."""

from __future__ import annotations

from collections.abc import Callable
import json
import os
import pathlib
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from checkpoints_convert import convert
from checkpoints_convert import hf_config
from checkpoints_convert import source
from sarathi_jax import errors
from sarathi_jax.models import config as config_lib
from tests.checkpoints_convert import fake_checkpoint as fake


def _refused(folder: pathlib.Path, match: str) -> None:
  before = sorted(os.listdir(folder.parent))
  with pytest.raises(errors.CheckpointError, match=match):
    convert.convert(folder, folder.parent / 'out')
  assert sorted(os.listdir(folder.parent)) == before  # nothing is left


def _with(
  tmp_path: pathlib.Path, change: Callable[[dict[str, np.ndarray]], Any]
) -> pathlib.Path:
  tensors = fake.random_tensors(fake.llama_shapes())
  change(tensors)
  return fake.write(tmp_path / 'hf', fake.llama_config(), tensors)


def test_unknown_tensor(tmp_path: pathlib.Path) -> None:
  folder = _with(
    tmp_path,
    lambda tensors: tensors.update(
      {'model.layers.0.self_attn.sink': np.ones(4, np.float32)}
    ),
  )
  _refused(folder, r'holds model\.layers\.0\.self_attn\.sink, for which')


def test_tensor_of_a_layer_too_many(tmp_path: pathlib.Path) -> None:
  name = 'model.layers.2.mlp.up_proj.weight'
  folder = _with(
    tmp_path,
    lambda tensors: tensors.update(
      {name: np.ones((fake.INNER, fake.WIDTH), np.float32)}
    ),
  )
  _refused(folder, r'holds model\.layers\.2\.mlp\.up_proj\.weight')


def test_bias_that_the_config_denies(tmp_path: pathlib.Path) -> None:
  folder = _with(
    tmp_path,
    lambda tensors: tensors.update(
      {'model.layers.0.self_attn.q_proj.bias': np.ones(16, np.float32)}
    ),
  )
  _refused(folder, r'q_proj\.bias')


def test_missing_tensor(tmp_path: pathlib.Path) -> None:
  name = 'model.layers.1.self_attn.o_proj.weight'
  folder = _with(tmp_path, lambda tensors: tensors.pop(name))
  _refused(folder, r'lacks model\.layers\.1\.self_attn\.o_proj\.weight')


def test_wrong_shape(tmp_path: pathlib.Path) -> None:
  folder = _with(
    tmp_path,
    lambda tensors: tensors.update(
      {'model.layers.1.mlp.up_proj.weight': np.ones((24, 15), np.float32)}
    ),
  )
  _refused(folder, r'up_proj\.weight: shape \(24, 15\)')


def test_inv_freq_of_old_checkpoints_is_known(tmp_path: pathlib.Path) -> None:
  folder = _with(
    tmp_path,
    lambda tensors: tensors.update(
      {'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(2, np.float32)}
    ),
  )
  convert.convert(folder, tmp_path / 'out')


def test_quantized_tensor(tmp_path: pathlib.Path) -> None:
  folder = _with(
    tmp_path,
    lambda tensors: tensors.update(
      {'model.layers.1.mlp.up_proj.weight': np.ones((24, 16), np.int8)}
    ),
  )
  _refused(folder, r'up_proj\.weight: dtype=I8')


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    (dict(logit_scale=0.5), 'logit_scale=0.5'),
    (dict(quantization_config={'bits': 4}), 'quant_method=None'),
    (dict(hidden_act='mish'), "hidden_act='mish'"),
    (dict(num_key_value_heads=3), 'num_kv_heads=3'),
    (dict(hidden_size='16'), "hidden_size='16'"),
    (dict(vocab_size='16'), "vocab_size='16'"),
    (dict(rope_scaling='linear'), 'wrong type'),
    (dict(rope_scaling=dict(type='yarn', factor='4')), 'wrong type'),
    (dict(rope_scaling=dict(type='longrope', factor=2.0)), "'longrope'"),
    (dict(rope_scaling=dict(type='linear', factor=2.0, odd=1)), 'odd'),
    (dict(rope_scaling=dict(type='linear')), 'rope.factor'),
    (dict(rope_scaling=dict(type='linear', factor='2')), 'rope.factor'),
    (
      dict(rope_parameters=dict(full_attention=dict(rope_type='default'))),
      'full_attention',
    ),
    (dict(partial_rotary_factor=0.5), 'partial_rotary_factor'),
    (
      dict(architectures=['BloomForCausalLM']),
      "'BloomForCausalLM' is not supported; supported: .*LlamaForCausalLM",
    ),
    (
      dict(architectures=['Qwen3_5MoeForConditionalGeneration']),
      r"'Qwen3_5Moe.*' is not supported, as it has layers of linear attention",
    ),
    (
      dict(architectures=['DeepseekV3ForCausalLM']),
      r'is not supported, as it attends through latent vectors \(MLA\)',
    ),
    (dict(architectures=['A', 'B']), 'architectures'),
    (dict(hidden_size=None), 'hidden_size: missing'),
  ],
)
def test_config_attribute(
  fields: dict[str, Any], match: str, tmp_path: pathlib.Path
) -> None:
  folder = fake.llama(tmp_path / 'hf')
  config = fake.llama_config(**fields)
  (folder / 'config.json').write_text(json.dumps(config))
  _refused(folder, match)


def _falcon(**fields: Any) -> dict[str, Any]:
  return dict(
    architectures=['FalconForCausalLM'],
    vocab_size=29,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    **fields,
  )


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    (dict(alibi=True), 'alibi=True: only Falcon models with rotary'),
    (dict(new_decoder_architecture=True, parallel_attn=False), 'parallel_attn'),
    (dict(num_ln_in_parallel_attn=2), 'num_ln_in_parallel_attn=2'),
    (dict(n_layer=2), 'n_layer=2'),
  ],
)
def test_falcon_config_attribute(
  fields: dict[str, Any], match: str, tmp_path: pathlib.Path
) -> None:
  folder = fake.llama(tmp_path / 'hf')
  (folder / 'config.json').write_text(json.dumps(_falcon(**fields)))
  _refused(folder, match)


def _read(
  tmp_path: pathlib.Path, config: dict[str, Any]
) -> config_lib.ModelConfig:
  tmp_path.joinpath('config.json').write_text(json.dumps(config))
  return hf_config.read(tmp_path)[0]


def test_both_ways_to_write_rope(tmp_path: pathlib.Path) -> None:
  """transformers 4 and 5, and the name of before."""
  old = _read(
    tmp_path,
    fake.llama_config(
      rope_theta=5e5, rope_scaling=dict(type='linear', factor=2.0)
    ),
  )
  new = _read(
    tmp_path,
    fake.llama_config(
      rope_theta=None,
      torch_dtype='bfloat16',
      rope_parameters=dict(rope_type='linear', factor=2.0, rope_theta=5e5),
    ),
  )
  assert old == new
  assert old.rope == config_lib.RopeConfig(theta=5e5, kind='linear', factor=2.0)
  assert old.max_position_embeddings == 128  # 64, stretched
  assert old.context_len == 128


def test_defaults_are_those_of_transformers(tmp_path: pathlib.Path) -> None:
  """config.json leaves out what equals the library's default."""
  bare = fake.llama_config(
    architectures=['MistralForCausalLM'],
    rope_theta=None,
    hidden_act=None,
    max_position_embeddings=None,
    rms_norm_eps=None,
  )
  mistral = _read(tmp_path, bare)
  assert mistral.sliding_window == 4096
  assert mistral.max_position_embeddings == 131072
  assert mistral.norm_eps == 1e-6
  mixtral = _read(tmp_path, {**bare, 'architectures': ['MixtralForCausalLM']})
  assert mixtral.rope.theta == 1e6
  assert mixtral.sliding_window is None
  qwen3 = _read(tmp_path, {**bare, 'architectures': ['Qwen3ForCausalLM']})
  assert qwen3.head_dim == 128
  falcon = _read(tmp_path, _falcon())
  assert falcon.tie_word_embeddings and falcon.num_kv_heads == 1
  assert falcon.intermediate_size == 64


def test_null_window_is_no_window(tmp_path: pathlib.Path) -> None:
  config = fake.llama_config(architectures=['MistralForCausalLM'])
  assert (
    _read(tmp_path, config | {'sliding_window': None}).sliding_window is None
  )


@pytest.mark.parametrize(
  ('fields', 'windows'),
  [
    (dict(use_sliding_window=False, sliding_window=8), [None, None]),
    (
      dict(use_sliding_window=True, sliding_window=8, max_window_layers=1),
      [None, 8],
    ),
    (
      dict(use_sliding_window=True, sliding_window=8, max_window_layers=0),
      [8, 8],
    ),
    (
      dict(
        use_sliding_window=True,
        sliding_window=8,
        layer_types=['sliding_attention', 'full_attention'],
      ),
      [8, None],
    ),
  ],
)
def test_qwen_windows(
  fields: dict[str, Any], windows: list[int | None], tmp_path: pathlib.Path
) -> None:
  model = _read(
    tmp_path, fake.llama_config(architectures=['Qwen2ForCausalLM'], **fields)
  )
  assert [model.layer_window(i) for i in range(2)] == windows


def _gemma3(**fields: Any) -> dict[str, Any]:
  return fake.llama_config(
    architectures=['Gemma3ForCausalLM'], rope_theta=None, **fields
  )


def _nested(
  folder: pathlib.Path,
  config: dict[str, Any],
  tensors: dict[str, np.ndarray],
) -> pathlib.Path:
  text = _gemma3() | dict(head_dim=fake.HEAD_DIM)
  return fake.write(
    folder,
    dict(
      architectures=['Gemma3ForConditionalGeneration'],
      text_config=text,
      eos_token_id=[2, 3],
      mm_tokens_per_image=256,
      vision_config=dict(hidden_size=8),
      **config,
    ),
    tensors,
  )


def _gemma3_tensors(beginning: str) -> dict[str, np.ndarray]:
  shapes = fake.llama_shapes(tied=True)
  for layer in range(fake.LAYERS):
    prefix = f'model.layers.{layer}'
    shapes |= {
      f'{prefix}.{side}_feedforward_layernorm.weight': (fake.WIDTH,)
      for side in ('pre', 'post')
    } | {
      f'{prefix}.self_attn.{name}_norm.weight': (fake.HEAD_DIM,)
      for name in 'qk'
    }
  tensors = fake.random_tensors(shapes)
  return {
    beginning + name.removeprefix('model.'): x for name, x in tensors.items()
  }


@pytest.mark.parametrize(
  ('beginning', 'of_images'),
  [
    ('language_model.model.', 'vision_tower.a.weight'),
    ('model.language_model.', 'model.multi_modal_projector.a.weight'),
  ],
)
def test_what_is_of_images_is_left_out(
  beginning: str, of_images: str, tmp_path: pathlib.Path
) -> None:
  """By name, and said; texts' names are those of the hub, or of version 5."""
  tensors = _gemma3_tensors(beginning)
  tensors[of_images] = np.ones((2, 3), np.float32)
  plan = convert.convert(
    _nested(tmp_path / 'hf', {}, tensors), tmp_path / 'out', check=True
  )
  assert f'1 tensors of {of_images.split(".")[-3]}, 24 bytes' in plan.left_out
  assert plan.generation.eos_token_ids == (2, 3)
  assert plan.model.tie_word_embeddings and plan.model.num_layers == 2


@pytest.mark.parametrize(
  ('config', 'tensors', 'match'),
  [
    (
      {},
      {'audio_tower.a': np.ones(2, np.float32)},
      r'holds audio_tower\.a, for which',
    ),
    (
      {},
      {'model.norm.weight': np.ones(fake.WIDTH, np.float32)},
      r'norm\.weight and model\..*norm\.weight: are the same',
    ),
    ({'audio_config': {'a': 1}}, {}, 'audio_config='),
    ({'text_config': None}, {}, 'text_config=None'),
  ],
)
def test_what_may_be_of_the_text_is_not_left_out(
  config: dict[str, Any],
  tensors: dict[str, np.ndarray],
  match: str,
  tmp_path: pathlib.Path,
) -> None:
  folder = _nested(
    tmp_path / 'hf', {}, _gemma3_tensors('model.language_model.') | tensors
  )
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | config))
  _refused(folder, match)


def test_pickled_weights(tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf')
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  _refused(folder, r'pytorch_model\.bin: a pickled checkpoint, .* any code')


def test_no_weights(tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf')
  (folder / 'model.safetensors').unlink()
  _refused(folder, 'holds no safetensors file')


def test_two_files_and_no_index(tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf')
  (folder / 'model.safetensors').rename(folder / 'a.safetensors')
  safetensors_numpy.save_file({'b': np.ones(2)}, folder / 'b.safetensors')
  _refused(folder, 'no model.safetensors.index.json')


def _sharded(tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  folder = fake.write(
    tmp_path / 'hf',
    fake.llama_config(),
    fake.random_tensors(fake.llama_shapes()),
    2,
  )
  return folder, folder / 'model.safetensors.index.json'


def test_missing_shard(tmp_path: pathlib.Path) -> None:
  folder, _ = _sharded(tmp_path)
  (folder / 'model-00002-of-00002.safetensors').unlink()
  _refused(folder, r'model-00002-of-00002\.safetensors: missing')


def test_index_that_lies(tmp_path: pathlib.Path) -> None:
  folder, index = _sharded(tmp_path)
  content = json.loads(index.read_text())
  del content['weight_map']['model.norm.weight']
  index.write_text(json.dumps(content))
  _refused(folder, r'first difference: model\.norm\.weight')


@pytest.mark.parametrize(
  'content',
  [
    '{',
    '[]',
    '{"weight_map": 3}',
    '{"weight_map": {"a": 3}}',
    '{"weight_map": {"a": "../b"}}',
  ],
)
def test_damaged_index(content: str, tmp_path: pathlib.Path) -> None:
  folder, index = _sharded(tmp_path)
  index.write_text(content)
  _refused(folder, 'index')


@pytest.mark.parametrize('keep', [4, 100, 3000, -1])
def test_truncated_file(keep: int, tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf')
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:keep])
  _refused(folder, r'model\.safetensors: truncated')


def test_damaged_header(tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf')
  path = folder / 'model.safetensors'
  content = path.read_bytes()
  path.write_bytes(content[:8] + b'!' + content[9:])
  _refused(folder, 'damaged header')


def test_a_tensor_that_begins_within_the_header(tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf')
  header = json.dumps(
    {'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [-8, 0]}}
  ).encode()
  (folder / 'model.safetensors').write_bytes(
    len(header).to_bytes(8, 'little') + header
  )
  _refused(folder, 'damaged header: a has data_offsets')


@pytest.mark.parametrize('shape', [(), (0, fake.WIDTH)])
def test_tied_tables_that_are_none(
  shape: tuple[int, ...], tmp_path: pathlib.Path
) -> None:
  table = np.ones(shape, np.float32)
  tensors = fake.random_tensors(fake.llama_shapes()) | {
    'model.embed_tokens.weight': table,
    'lm_head.weight': table,
  }
  _refused(
    fake.write(
      tmp_path / 'hf', fake.llama_config(tie_word_embeddings=True), tensors
    ),
    r'shape \(.*does not fit',
  )


@pytest.mark.parametrize('content', [None, '{', '[]'])
def test_damaged_config(content: str | None, tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf')
  (folder / 'config.json').unlink()
  if content is not None:
    (folder / 'config.json').write_text(content)
  _refused(folder, r'config\.json')


def test_unknown_dtype(tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf')
  with pytest.raises(errors.CheckpointError, match="dtype='int8'"):
    convert.convert(folder, tmp_path / 'out', dtype='int8')


@pytest.mark.parametrize(
  'name', ['/no/such/folder', 'a/b/c', 'a b', 'org/none']
)
def test_source_that_is_nothing(name: str) -> None:
  with pytest.raises(errors.CheckpointError, match='no such folder'):
    source.locate(name)


def test_source_that_is_a_file(tmp_path: pathlib.Path) -> None:
  path = tmp_path / 'file'
  path.touch()
  with pytest.raises(errors.CheckpointError, match='is not a folder'):
    source.locate(str(path))
