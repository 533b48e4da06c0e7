# SPDX-License-Identifier: Apache-2.0
"""Weights of 8 bits mean what their formats say, or are refused by name."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from checkpoints_convert import convert
from checkpoints_convert import direct
from checkpoints_convert import quantized as converter
from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax.models import quantized
from sarathi_jax.models import tree
from tests.checkpoints_convert import fake_checkpoint as fake
from tests.checkpoints_convert import quantized_formats
from tests.models import hf_cases
from tests.models import hf_parity_test as parity

FORMATS = quantized_formats.FORMATS
BLOCKS = FORMATS['fp8, by block']
TOLERANCE = 1e-5  # of the largest logit


def _mixture() -> Any:
  return transformers.Qwen3MoeConfig(
    **hf_cases._GATED,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    norm_topk_prob=True,
  )


def _llama(folder: pathlib.Path, one: Any = BLOCKS, **options: Any) -> Any:
  model = parity.make_model(hf_cases.llama())
  quantized_formats.save(model, folder, one, **options)
  return model


def _plain(node: Any) -> np.ndarray:
  """A matrix, dequantized in NumPy, [in, out]."""
  if not isinstance(node, quantized.Quantized):
    return np.asarray(node)
  rows = node.values.shape[-2]
  scale = np.repeat(np.asarray(node.scale), node.group or rows, axis=-2)
  codes = np.asarray(node.values).astype(np.float32)
  return codes * scale[..., :rows, :]


@pytest.mark.parametrize('name', FORMATS)
def test_each_number_is_what_the_format_says(
  name: str, tmp_path: pathlib.Path
) -> None:
  one = FORMATS[name]
  model = _llama(tmp_path / 'hf', one)
  plan = convert.convert(tmp_path / 'hf', tmp_path / 'out', check=True)
  params = checkpoint.restore_params(tmp_path / 'out')
  state = model.state_dict()
  for i, layer in enumerate(params['layers']):
    for branch, theirs in (('attn', 'self_attn'), ('mlp', 'mlp')):
      for key, node in layer[branch].items():
        assert isinstance(node, quantized.Quantized)
        expected = state[f'model.layers.{i}.{theirs}.{key}_proj.weight']
        np.testing.assert_array_equal(_plain(node), expected.numpy().T)
  np.testing.assert_array_equal(
    params['lm_head'], state['lm_head.weight'].numpy().T
  )
  how = plan.model.quantization
  assert how is not None and how.kept == ('lm_head',)
  assert how.codes == {'F8': 'fp8', 'I8': 'int8'}[one.codes]
  assert 'stay in' in plan.left_out
  assert ('scales of activations are left out' in plan.left_out) == (
    'by tensor' in name
  )
  assert ('2 scales of the KV cache' in plan.left_out) == (
    name == 'compressed fp8, by tensor'
  )
  unconverted = direct.DirectParams(tmp_path / 'hf')
  assert unconverted.metadata == checkpoint.load_metadata(tmp_path / 'out')
  for key, leaf in tree.named_leaves(params).items():
    part = tuple(slice(size // 3, size - size // 4) for size in leaf.shape)
    np.testing.assert_array_equal(
      unconverted(key, part).astype(np.float32),
      np.asarray(leaf)[part].astype(np.float32),
    )
  unconverted.close()


def _error(config: Any, params: Any, model: Any) -> float:
  """The largest difference of logits from transformers', by the largest."""
  prompt = parity._prompt_of(model)
  with torch.no_grad():
    expected = model(prompt).logits[0].numpy()
  ours = parity._logits(config, params, jnp.asarray(prompt[0].numpy()))
  return float(np.abs(ours - expected).max() / np.abs(expected).max())


CASES: dict[str, tuple[Any, Any]] = {
  'by channel': (hf_cases.llama, FORMATS['compressed int8, by channel']),
  'experts by block': (_mixture, BLOCKS),
  'fused, by tensor': (
    hf_cases._phi3,
    FORMATS['compressed fp8, by tensor'],
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_logits_are_those_of_the_dequantized_model(
  name: str, tmp_path: pathlib.Path
) -> None:
  config, one = CASES[name]
  model = parity.make_model(config())
  quantized_formats.save(model, tmp_path / 'hf', one)
  convert.convert(tmp_path / 'hf', tmp_path / 'out', check=True)
  ours = checkpoint.load_metadata(tmp_path / 'out').model
  params = checkpoint.restore_params(tmp_path / 'out')
  assert _error(ours, params, model) <= TOLERANCE
  node = params['layers'][0]['attn']['o']
  wrong = {
    'rows of scales': node.scale[:, ::-1],
    'one scale': node.scale.at[0, 3].multiply(1.5),
  }
  if name == 'by channel':
    for scale in wrong.values():
      params['layers'][0]['attn']['o'] = quantized.Quantized(
        node.values, scale, node.codes, node.group
      )
      assert _error(ours, params, model) > 100 * TOLERANCE
  if name == 'experts by block':  # as served, too
    theirs = parity.run_reference(model)
    assert len(set(theirs.tokens.tolist())) >= 5, 'proves nothing'
    done = parity.run_served(ours, params, theirs.prompt)
    parity.check_logprobs(
      done, parity.check_tokens(done.token_ids, theirs), theirs
    )


def _refused(folder: pathlib.Path, match: str, **options: Any) -> None:
  target = folder.parent / 'out'
  with pytest.raises(errors.CheckpointError, match=match):
    convert.convert(folder, target, **options)
  assert not target.exists()


def _transposed(end: str) -> Any:
  def change(tensors: dict[str, torch.Tensor]) -> None:
    (name,) = (n for n in tensors if n.endswith(f'layers.1.{end}'))
    tensors[name] = tensors[name].T.contiguous()

  return change


def test_transposed_scales_do_not_fit(tmp_path: pathlib.Path) -> None:
  _llama(
    tmp_path / 'hf', change=_transposed('self_attn.q_proj.weight_scale_inv')
  )
  _refused(
    tmp_path / 'hf',
    r'q_proj\.weight_scale_inv: shape \(2, 4\): must be \(4, 2\)',
  )


def test_a_swapped_block_does_not_fit(tmp_path: pathlib.Path) -> None:
  _llama(tmp_path / 'hf')
  path = tmp_path / 'hf' / 'config.json'
  config = json.loads(path.read_text())
  config['quantization_config']['weight_block_size'].reverse()
  path.write_text(json.dumps(config))
  _refused(tmp_path / 'hf', r'weight_scale_inv: shape \(\d, \d\): must be')


def _backwards(self: Any, reader: Any, start: int, rows: np.ndarray) -> None:
  _READ(self, reader, start, rows)
  rows[:] = rows[:, ::-1]


_READ = converter.Scales.read


def test_scales_that_are_of_others_are_noticed(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """What is stored is what was read, but stands for other numbers."""
  _llama(tmp_path / 'hf')
  monkeypatch.setattr(converter.Scales, 'read', _backwards)
  _refused(tmp_path / 'hf', 'stands for other numbers than', check=True)


def test_codes_of_another_kind_are_refused(tmp_path: pathlib.Path) -> None:
  def as_int8(tensors: dict[str, torch.Tensor]) -> None:
    name = 'model.layers.1.mlp.up_proj.weight'
    tensors[name] = tensors[name].view(torch.int8)

  _llama(tmp_path / 'hf', change=as_int8)
  _refused(tmp_path / 'hf', r'up_proj\.weight: dtype=I8: is not of what')


def test_a_code_that_is_no_number_is_refused(tmp_path: pathlib.Path) -> None:
  """CPUs' panels would read it as 480."""

  def with_nan(tensors: dict[str, torch.Tensor]) -> None:
    codes = tensors['model.layers.1.mlp.up_proj.weight'].view(torch.uint8)
    codes[3, 5] = 0xFF

  _llama(tmp_path / 'hf', change=with_nan)
  _refused(tmp_path / 'hf', r'up_proj\.weight \(1\)')


@pytest.mark.parametrize(
  ('end', 'match'),
  [
    ('mlp.up_proj.weight_scale_inv', r'lacks model\.layers\.1\.mlp\.up_proj'),
    ('mlp.up_proj.weight', r'holds .*up_proj\.weight_scale_inv, for which'),
  ],
)
def test_codes_and_scales_come_together(
  end: str, match: str, tmp_path: pathlib.Path
) -> None:
  _llama(
    tmp_path / 'hf', change=lambda tensors: tensors.pop(f'model.layers.1.{end}')
  )
  _refused(tmp_path / 'hf', match)


def test_asymmetric_codes_are_refused(tmp_path: pathlib.Path) -> None:
  name = 'model.layers.1.mlp.up_proj.weight_zero_point'
  _llama(
    tmp_path / 'hf',
    FORMATS['compressed int8, by channel'],
    change=lambda tensors: tensors[name].add_(1),
  )
  _refused(tmp_path / 'hf', 'weight_zero_point: is not 0')


def test_a_quantized_embedding_is_refused(tmp_path: pathlib.Path) -> None:
  _llama(tmp_path / 'hf', kept=('lm_head', 'norm'))
  _refused(tmp_path / 'hf', r'embed_tokens\.weight: dtype=F8_E4M3: only')


_COMPRESSED = FORMATS['compressed fp8, by channel'].config


def _with_weights(**fields: Any) -> dict[str, Any]:
  config = json.loads(json.dumps(_COMPRESSED))
  config['config_groups']['group_0']['weights'] |= fields
  return dict(config)


@pytest.mark.parametrize(
  ('config', 'match'),
  [
    ({'quant_method': 'awq', 'bits': 8}, 'bits=8'),
    ({'quant_method': 'awq', 'version': 'gemv'}, "version='gemv'"),
    ({'quant_method': 'awq', 'zero_point': False}, 'zero_point=False'),
    ({'quant_method': 'gptq', 'bits': 3}, 'bits=3'),
    ({'quant_method': 'gptq', 'group_size': 48}, 'group_size=48'),
    ({'quant_method': 'gptq', 'checkpoint_format': 'marlin'}, "'marlin'"),
    ({'quant_method': 'gptq', 'dynamic': {'a': {}}}, 'dynamic='),
    ({'quant_method': 'bitsandbytes'}, "quant_method='bitsandbytes'"),
    ({'quant_method': 'gguf'}, "quant_method='gguf'"),
    ({'quant_method': 'modelopt'}, "quant_method='modelopt'"),
    ({'quant_method': ['fp8']}, 'quant_method='),
    ({'bits': 4}, 'quant_method=None'),
    (_COMPRESSED | {'format': 'pack-quantized'}, "weights.type='float'"),
    (_COMPRESSED | {'format': 'nvfp4-pack-quantized'}, "format='nvfp4"),
    (_COMPRESSED | {'odd': 1}, 'odd=1'),
    (_COMPRESSED | {'sparsity_config': 'x'}, "sparsity_config='x'"),
    (
      _COMPRESSED | {'sparsity_config': {'format': 'sparse-24-bitmask'}},
      'sparsity_config=.*sparse-24',
    ),
    (_COMPRESSED | {'config_groups': {}}, 'config_groups='),
    (_with_weights(num_bits=4), 'weights.num_bits=4'),
    (_with_weights(symmetric=False), 'weights.symmetric=False'),
    (_with_weights(strategy='group'), "weights.strategy='group'"),
    (_with_weights(strategy='block'), 'weights.block=None'),
    (
      _with_weights(strategy='block', block_structure=f'{"9" * 5000}x128'),
      'weights.block=',
    ),
    (_with_weights(odd=1), 'weights.odd=1'),
    (BLOCKS.config | {'scale_fmt': 'ue8m0'}, "scale_fmt='ue8m0'"),
    (BLOCKS.config | {'fmt': 'e5m2'}, "fmt='e5m2'"),
    (BLOCKS.config | {'weight_block_size': [0, 128]}, r'block=\[0, 128\]'),
    ('fp8', "quantization_config='fp8'"),
  ],
)
def test_what_is_not_known_is_refused_by_name(
  config: Any, match: str, tmp_path: pathlib.Path
) -> None:
  folder = fake.llama(tmp_path / 'hf', quantization_config=config)
  _refused(folder, match)


def test_the_older_name_is_read_alike(tmp_path: pathlib.Path) -> None:
  folder = fake.llama(
    tmp_path / 'hf', compression_config={'format': 'marlin-24'}
  )
  _refused(folder, "compression_config.format='marlin-24': is not")


def test_what_is_said_to_be_quantized_must_be(tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf', quantization_config=BLOCKS.config)
  _refused(folder, 'no weights are in F8_E4M3')
  _llama(tmp_path / 'q')
  _refused(tmp_path / 'q', 'quantized already', quantize='int8')


def test_gguf_is_refused_by_name(tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf')
  (folder / 'model.safetensors').rename(folder / 'model.Q4_K.gguf')
  _refused(folder, 'GGUF is not supported')
