# SPDX-License-Identifier: Apache-2.0
"""Adapters that are served beside a model add what is merged into it."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest

from checkpoints_convert import adapters
from checkpoints_convert import convert
from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax.models import tree
from tests.checkpoints_convert import fake_checkpoint as fake
from tests.checkpoints_convert import lora_test

Shapes = dict[str, tuple[int, ...]]
_APART = ('q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj')


def _fused(apart: tuple[str, ...], **fused: int) -> Shapes:
  """The shapes of `fake.llama_shapes` with some matrices in one."""
  return {
    f'model.layers.{layer}.{name.replace("__", ".")}.weight': (rows, fake.WIDTH)
    for layer in range(fake.LAYERS)
    for name, rows in fused.items()
  } | {
    name: shape
    for name, shape in fake.llama_shapes().items()
    if name.split('.')[-2] not in apart
  }


_GATE_UP = {'mlp__gate_up_proj': 2 * fake.INNER}
_QKV = {'self_attn__qkv_proj': fake.WIDTH + 2 * fake.KV_HEADS * fake.HEAD_DIM}
# The config, and the tensors: as they are, in one, and with rows in pairs.
CASES: dict[str, tuple[dict[str, Any], Shapes]] = {
  'llama': (fake.llama_config(), fake.llama_shapes()),
  'phi3': (
    fake.llama_config(architectures=['Phi3ForCausalLM']),
    _fused(_APART, **_QKV, **_GATE_UP),
  ),
  'glm': (
    fake.llama_config(
      architectures=['GlmForCausalLM'],
      head_dim=fake.HEAD_DIM,
      attention_bias=False,
    ),
    _fused(_APART[3:], **_GATE_UP),
  ),
}


def _linear(shapes: Shapes) -> Shapes:
  return {
    name.removesuffix('.weight'): shape
    for name, shape in shapes.items()
    if '_proj' in name
  }


def _matrices(linear: Shapes, rank: int = 3) -> lora_test.Matrices:
  rng = np.random.default_rng(2)
  return {
    module: tuple(
      rng.standard_normal(shape).astype(np.float32)
      for shape in ((rank, columns), (rows, rank))
    )
    for module, (rows, columns) in linear.items()
  }


def _base(tmp_path: pathlib.Path, case: str = 'llama') -> pathlib.Path:
  config, shapes = CASES[case]
  return fake.write(tmp_path / 'hf', config, fake.random_tensors(shapes))


@pytest.mark.parametrize('case', CASES)
def test_what_is_added_is_what_is_merged(
  case: str, tmp_path: pathlib.Path
) -> None:
  of = _matrices(_linear(CASES[case][1]))
  folder = lora_test.write(tmp_path / 'lora', of, r=3, lora_alpha=7)
  base = _base(tmp_path, case)
  convert.convert(base, tmp_path / 'base')
  convert.convert(base, tmp_path / 'merged', lora=folder)
  found = adapters.read(
    str(folder), checkpoint.load_metadata(tmp_path / 'base')
  )
  assert len(found) == 7 * fake.LAYERS
  plain, merged = (
    tree.named_leaves(checkpoint.restore_params(tmp_path / name))
    for name in ('base', 'merged')
  )
  for name, whole in plain.items():
    a, b = found.pop(name, (np.zeros(1), np.zeros(1)))
    np.testing.assert_allclose(
      merged[name], whole + a @ b, atol=1e-4, err_msg=name
    )
  assert not found


def test_a_quantized_model_has_the_same_matrices(
  tmp_path: pathlib.Path,
) -> None:
  of = _matrices(_linear(CASES['phi3'][1]))
  folder = lora_test.write(tmp_path / 'lora', of, r=3)
  base = _base(tmp_path, 'phi3')
  found = []
  for name, options in (('a', {}), ('b', {'quantize': 'int8'})):
    convert.convert(base, tmp_path / name, **options)
    metadata = checkpoint.load_metadata(tmp_path / name)
    found.append(adapters.read(str(folder), metadata))
  plain, of_codes = found
  assert plain.keys() == of_codes.keys()
  for name, pair in plain.items():
    np.testing.assert_array_equal(pair[1], of_codes[name][1])


_K0 = 'model.layers.0.self_attn.k_proj'


@pytest.mark.parametrize(
  ('linear', 'change', 'says'),
  [
    ({'lm_head': (fake.VOCAB, 16)}, None, 'lm_head.*is not supported beside'),
    ({'model.layers.2.mlp.up_proj': (24, 16)}, None, r'layers\.2\.mlp.*beside'),
    ({'model.layers.0.mlp.router': (24, 16)}, None, 'router.*--lora merges'),
    ({_K0: (9, 16)}, None, r'shape \(8, 16\); must be \(9, 16\)'),
    ({_K0: (8, 15)}, None, r'shape \(8, 16\); must be \(8, 15\)'),
    ({_K0: (8, 16)}, np.nan, 'k_proj.*NaN or infinite, which would reach'),
  ],
)
def test_what_can_not_be_served_is_refused(
  linear: Shapes, change: float | None, says: str, tmp_path: pathlib.Path
) -> None:
  convert.convert(_base(tmp_path), tmp_path / 'base')
  of = _matrices(linear)
  for _, b in of.values():
    if change is not None:
      b[0, 0] = change
  folder = lora_test.write(tmp_path / 'lora', of, r=3)
  metadata = checkpoint.load_metadata(tmp_path / 'base')
  with pytest.raises(errors.CheckpointError, match=says):
    adapters.read(str(folder), metadata)


def test_a_checkpoint_has_to_say_what_it_was(tmp_path: pathlib.Path) -> None:
  convert.convert(_base(tmp_path), tmp_path / 'base')
  metadata = checkpoint.load_metadata(tmp_path / 'base')
  with pytest.raises(errors.CheckpointError, match='architecture=None: the'):
    adapters.read('x', dataclasses.replace(metadata, source={}))
