# SPDX-License-Identifier: Apache-2.0
"""Packed weights mean what their formats say, or are refused by name."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from checkpoints_convert import convert
from checkpoints_convert import direct
from checkpoints_convert import packed_tensors
from sarathi_jax import checkpoint
from sarathi_jax.models import quantized
from sarathi_jax.models import tree
from tests.checkpoints_convert import packed_formats
from tests.checkpoints_convert import packed_golden
from tests.checkpoints_convert import quantized_formats
from tests.checkpoints_convert import quantized_test as of_8_bits
from tests.models import hf_cases
from tests.models import hf_parity_test as parity

FORMATS = packed_formats.FORMATS
TOLERANCE = of_8_bits.TOLERANCE
UP = 'model.layers.1.mlp.up_proj'


def _llama(folder: pathlib.Path, name: str, **options: Any) -> Any:
  model = parity.make_model(hf_cases.llama())
  quantized_formats.save(model, folder, FORMATS[name], **options)
  return model


@pytest.mark.parametrize('name', packed_golden.LIBRARIES)
def test_ours_is_what_the_library_writes(name: str) -> None:
  stored = {
    key.removeprefix(f'{name}.'): array
    for key, array in safetensors_numpy.load_file(packed_golden.PATH).items()
    if key.startswith(f'{name}.')
  }
  grid = packed_golden.grid_of(name)
  dtype = packed_golden.LIBRARIES[name].dtype
  np.testing.assert_array_equal(stored.pop('weight'), grid.exact.astype(dtype))
  ours = FORMATS[name].write(grid, FORMATS[name].bits)
  # AutoGPTQ writes a bias where there is none, too.
  assert ours.keys() - {'bias'} == stored.keys()
  for end, array in stored.items():
    np.testing.assert_array_equal(ours[end], array)
    assert end.endswith(('scale', 'scales')) or ours[end].dtype == array.dtype


def _plain(node: Any, rows: int) -> np.ndarray:
  """A matrix [in, out], code by code, in NumPy."""
  values = np.asarray(node.values)
  scale = np.asarray(node.scale)
  plain = np.zeros((rows, values.shape[1]), np.float32)
  for k in range(rows):
    g = k // (node.group or rows)
    if node.codes == 'int8':
      codes = values[k].astype(np.float32)
    else:
      block, i = divmod(k, 32)
      codes = values[16 * block + i % 16] >> (4 * (i // 16)) & 15
      zero = 8 if node.zero is None else np.asarray(node.zero)[g]
      codes = codes.astype(np.float32) - zero
    plain[k if node.order is None else node.order[k]] = codes * scale[g]
  return plain


@pytest.mark.parametrize('name', FORMATS)
def test_each_number_is_what_the_format_says(
  name: str, tmp_path: pathlib.Path
) -> None:
  one = FORMATS[name]
  model = _llama(tmp_path / 'hf', name)
  plan = convert.convert(
    tmp_path / 'hf', tmp_path / 'out', dtype='float32', check=True
  )
  params = checkpoint.restore_params(tmp_path / 'out')
  state = model.state_dict()
  for i, layer in enumerate(params['layers']):
    for branch, theirs in (('attn', 'self_attn'), ('mlp', 'mlp')):
      for key, node in layer[branch].items():
        assert isinstance(node, quantized.Quantized)
        expected = state[f'model.layers.{i}.{theirs}.{key}_proj.weight']
        expected = expected.numpy().T
        np.testing.assert_array_equal(_plain(node, len(expected)), expected)
  how = plan.model.quantization
  assert how is not None and how.kept == ('lm_head',)
  assert how.codes == {4: 'int4', 8: 'int8'}[one.bits]
  assert how.group == one.group
  assert how.zeros == (not one.symmetric)
  assert how.reordered == one.is_reordered
  ours = checkpoint.load_metadata(tmp_path / 'out').model
  assert of_8_bits._error(ours, params, model) <= TOLERANCE
  unconverted = direct.DirectParams(tmp_path / 'hf')
  for key, leaf in tree.named_leaves(params).items():
    part = tuple(slice(size // 3, size - size // 4) for size in leaf.shape)
    np.testing.assert_array_equal(
      unconverted(key, part).astype(np.float32),
      np.asarray(leaf)[part].astype(np.float32),
    )
  unconverted.close()


@pytest.mark.parametrize(
  ('make', 'name'),
  [
    (of_8_bits._mixture, 'gptq, by activations'),
    (hf_cases._phi3, 'awq'),
    (hf_cases._phi3, 'compressed, by activations'),
  ],
  ids=['experts', 'fused', 'fused, reordered'],
)
def test_logits_are_those_of_the_dequantized_model(
  make: Any, name: str, tmp_path: pathlib.Path
) -> None:
  model = parity.make_model(make())
  quantized_formats.save(model, tmp_path / 'hf', FORMATS[name])
  convert.convert(
    tmp_path / 'hf', tmp_path / 'out', dtype='float32', check=True
  )
  ours = checkpoint.load_metadata(tmp_path / 'out').model
  params = checkpoint.restore_params(tmp_path / 'out')
  assert of_8_bits._error(ours, params, model) <= TOLERANCE
  if make is of_8_bits._mixture:  # as served, too
    theirs = parity.run_reference(model)
    assert len(set(theirs.tokens.tolist())) >= 5, 'proves nothing'
    done = parity.run_served(ours, params, theirs.prompt)
    parity.check_logprobs(
      done, parity.check_tokens(done.token_ids, theirs), theirs
    )


def _swapped(values: Any) -> Any:
  return values >> 4 | values << 4


def test_what_is_wrong_changes_logits(tmp_path: pathlib.Path) -> None:
  """The negative control: each is a way to misread a format."""
  model = _llama(tmp_path / 'hf', 'gptq, by activations')
  convert.convert(tmp_path / 'hf', tmp_path / 'out', dtype='float32')
  ours = checkpoint.load_metadata(tmp_path / 'out').model
  params = checkpoint.restore_params(tmp_path / 'out')
  right = params['layers'][0]['attn']['o']
  for name, array in (
    ('values', _swapped(right.values)),
    ('zero', right.zero + 1),
    ('zero', right.zero - 1),
    ('scale', right.scale[::-1]),
    ('scale', right.scale.T.reshape(right.scale.shape)),
    ('order', jnp.arange(64, dtype=jnp.int32)),
  ):
    fields = right.arrays() | {name: array}
    params['layers'][0]['attn']['o'] = quantized.Quantized(
      codes='int4', group=32, **fields
    )
    assert of_8_bits._error(ours, params, model) > 100 * TOLERANCE, name


@pytest.mark.parametrize(
  ('cls', 'method', 'wrong'),
  [
    (packed_tensors.Zeros, 'read', 'one less'),
    (packed_tensors.Order, 'read', 'in order'),
  ],
)
def test_what_stands_for_other_numbers_is_noticed(
  cls: Any,
  method: str,
  wrong: str,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  _llama(tmp_path / 'hf', 'gptq, by activations')
  read = cls.read

  def misread(self: Any, reader: Any, start: int, rows: np.ndarray) -> None:
    read(self, reader, start, rows)
    rows[:] = rows - 1 if wrong == 'one less' else np.sort(rows)

  monkeypatch.setattr(cls, method, misread)
  of_8_bits._refused(
    tmp_path / 'hf',
    'stands for other numbers than',
    check=True,
    dtype='float32',
  )


def _changed(end: str, how: Any) -> Any:
  def change(tensors: dict[str, Any]) -> None:
    tensors[f'{UP}.{end}'] = how(tensors[f'{UP}.{end}'])

  return change


@pytest.mark.parametrize(
  ('name', 'change', 'match'),
  [
    (
      'awq',
      _changed('scales', lambda x: x.T.contiguous()),
      r'up_proj\.scales: .*must be .* of shape \(2, 96\)',
    ),
    (
      'awq',
      lambda tensors: tensors.pop(f'{UP}.qzeros'),
      r'lacks .*up_proj\.qzeros, without which',
    ),
    (
      'awq',
      lambda tensors: tensors.pop(f'{UP}.qweight'),
      r'holds .*up_proj\.qzeros.* for which',
    ),
    (
      'awq',
      _changed('qweight', lambda x: x.T.contiguous()),
      r'up_proj\.(qzeros|scales|qweight): .*must be .* of shape',
    ),
    (
      'gptq, symmetric',
      _changed('qzeros', lambda x: x + 1),
      'zero points that are not 8: .*says that there are none',
    ),
    (
      'gptq',
      _changed('qzeros', lambda x: x | 15),
      'zero point of 16, which some readers',
    ),
    (
      'gptq, by activations',
      _changed('g_idx', lambda x: x.clamp(min=1)),
      r'up_proj\.g_idx: .*must have 32 columns of each of 2 groups',
    ),
    (
      'gptq',
      _changed('bias', lambda x: x + 1),
      r'holds .*up_proj\.bias, for which',
    ),
    (
      'compressed, symmetric',
      _changed('weight_shape', lambda x: x.flip(0)),
      r'up_proj\.weight_(packed|scale): .*must be',
    ),
    (
      'compressed, symmetric',
      _changed('weight_packed', lambda x: x.float()),
      r'up_proj\.weight_packed: F32 .*must be I32',
    ),
  ],
  ids=range(10),
)
def test_tensors_that_do_not_fit_are_refused(
  name: str, change: Any, match: str, tmp_path: pathlib.Path
) -> None:
  _llama(tmp_path / 'hf', name, change=change)
  of_8_bits._refused(tmp_path / 'hf', match, dtype='float32')


def test_gptqs_own_file_is_read(tmp_path: pathlib.Path) -> None:
  _llama(tmp_path / 'hf', 'gptq, symmetric')
  path = tmp_path / 'hf' / 'config.json'
  config = json.loads(path.read_text())
  said = config.pop('quantization_config')
  path.write_text(json.dumps(config))
  of_8_bits._refused(tmp_path / 'hf', 'qweight.* no use', dtype='float32')
  del said['quant_method']
  (tmp_path / 'hf' / 'quantize_config.json').write_text(json.dumps(said))
  plan = convert.convert(tmp_path / 'hf', tmp_path / 'out', dtype='float32')
  assert plan.model.quantization is not None
