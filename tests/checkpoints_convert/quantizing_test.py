# SPDX-License-Identifier: Apache-2.0
"""Matrices are rounded row by row, and what that loses is told."""

from __future__ import annotations

import io
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import rich.console
import torch

from checkpoints_convert import convert
from checkpoints_convert import quantizing
from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax.models import codes as codes_lib
from sarathi_jax.models import quantized
from tests.checkpoints_convert import fake_checkpoint as fake
from tests.models import hf_cases
from tests.models import hf_parity_test as parity

# Of numbers around 0, all alike likely: a step is 1/127 of the largest; of fp8,
# at most 1/16 of the number itself.
GROUPS = {'int4': 128, 'mxfp4': 32}
MOST_LOST = {'int8': 0.01, 'fp8': 0.03, 'int4': 0.1, 'mxfp4': 0.15}


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('codes', MOST_LOST)
def test_each_matrix_is_near_what_it_was(
  codes: str,
  dtype: str,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(quantizing, '_ROWS_BYTES', 3 * 4 * fake.WIDTH)
  folder = fake.llama(tmp_path / 'hf', dtype)
  convert.convert(folder, tmp_path / 'exact')
  plan = convert.convert(folder, tmp_path / 'out', quantize=codes, check=True)
  params = checkpoint.restore_params(tmp_path / 'out')
  exact = checkpoint.restore_params(tmp_path / 'exact')
  squares: dict[str, list[float]] = {}

  def compare(path: Any, w: Any, node: Any) -> None:
    if not isinstance(node, quantized.Quantized):
      np.testing.assert_array_equal(w, node)
      return
    assert node.codes == codes
    w = np.asarray(w).astype(np.float32)
    values, scale = codes_lib.encode(w, codes, GROUPS.get(codes))
    np.testing.assert_array_equal(
      np.asarray(node.values).view(np.uint8), values.view(np.uint8)
    )
    np.testing.assert_array_equal(node.scale, scale)
    lost = quantized.dequantize(node, np.float32, len(w)) - w
    squares[jax.tree_util.keystr(path)] = [(lost**2).sum(), (w**2).sum()]

  jax.tree.map_with_path(compare, exact, params)
  keeps_head = codes in GROUPS
  assert len(squares) == 2 * 7 + (not keeps_head)
  assert plan.lost is not None
  ratios = plan.lost.ratios()
  assert list(ratios) == [*['lm_head'] * (not keeps_head), '0', '1', 'all']
  assert list(ratios['0']) == ['q', 'all', 'k', 'v', 'o', 'gate', 'up', 'down']
  assert ratios['1']['k'] == pytest.approx(
    np.sqrt(np.divide(*squares["['layers'][1]['attn']['k']"])), rel=1e-3
  )
  total = np.sqrt(np.divide(*np.sum(list(squares.values()), axis=0)))
  assert ratios['all']['all'] == pytest.approx(total, rel=1e-3)
  assert 0 < total < MOST_LOST[codes]


def test_what_is_lost_is_a_table_that_fits_a_terminal(
  tmp_path: pathlib.Path,
) -> None:
  folder = fake.llama(tmp_path / 'hf')
  plan = convert.convert(folder, tmp_path / 'out', quantize='int8')
  assert plan.lost is not None
  console = rich.console.Console(width=80, record=True, file=io.StringIO())
  console.print(plan.lost.table('lost'))
  lines = [line.split() for line in console.export_text().splitlines()]
  assert ['layer', 'q', 'k', 'v', 'o', 'gate', 'up', 'down', 'all'] in lines
  assert [len(line) for line in lines if line[:1] == ['1']] == [9]


def test_experts_in_mxfp4_are_rounded_and_routers_are_not(
  tmp_path: pathlib.Path,
) -> None:
  """An expert's gate and up are rows by turns, in another format."""
  model = parity.make_model(hf_cases.gpt_oss())
  hf_cases.save_with_packed_experts(model, tmp_path / 'hf')
  plan = convert.convert(
    tmp_path / 'hf',
    tmp_path / 'out',
    dtype='float32',
    quantize='int8',
    check=True,
  )
  params = checkpoint.restore_params(tmp_path / 'out')
  moe = params['layers'][0]['moe']
  assert not isinstance(moe['router'], quantized.Quantized)
  exact = model.state_dict()['model.layers.0.mlp.experts.gate_up_proj'].numpy()
  for name, which in (('gate', 0), ('up', 1)):
    w = exact[..., which::2]
    values, scale = codes_lib.encode(w, 'int8')
    np.testing.assert_array_equal(moe[name].values, values)
    np.testing.assert_array_equal(moe[name].scale, scale)
  assert plan.lost is not None and 'gate_up' in plan.lost.ratios()['all']


def test_what_lies_the_other_way_is_refused(tmp_path: pathlib.Path) -> None:
  """transformers writes gpt-oss's experts as [in, out]."""
  parity.make_model(hf_cases.gpt_oss()).save_pretrained(tmp_path / 'hf')
  with pytest.raises(errors.CheckpointError, match=r'is \[in, out\]'):
    convert.convert(tmp_path / 'hf', tmp_path / 'out', quantize='int8')


def test_nan_has_no_code(tmp_path: pathlib.Path) -> None:
  tensors = fake.random_tensors(fake.llama_shapes())
  tensors['model.layers.1.mlp.up_proj.weight'][3, 5] = np.nan
  folder = fake.write(tmp_path / 'hf', fake.llama_config(), tensors)
  with pytest.raises(errors.CheckpointError, match=r'up_proj\.weight: holds 1'):
    convert.convert(
      folder, tmp_path / 'out', quantize='int8', allow_nonfinite=True
    )


def test_logits_are_near_those_of_16_bits(tmp_path: pathlib.Path) -> None:
  model = parity.make_model(hf_cases.llama())
  model.save_pretrained(tmp_path / 'hf')
  prompt = parity._prompt_of(model)
  with torch.no_grad():
    expected = model(prompt).logits[0].numpy()
  convert.convert(tmp_path / 'hf', tmp_path / 'out', quantize='int8')
  ours = parity._logits(
    checkpoint.load_metadata(tmp_path / 'out').model,
    checkpoint.restore_params(tmp_path / 'out'),
    prompt[0].numpy(),
  )
  error = np.abs(ours - expected).max() / np.abs(expected).max()
  assert 1e-4 < error < 0.05
