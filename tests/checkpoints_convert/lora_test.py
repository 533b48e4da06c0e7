# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters are merged into what they were made for, or refused by name."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from checkpoints_convert import convert
from sarathi_jax import checkpoint
from sarathi_jax import errors
from tests import source_tree
from tests.checkpoints_convert import fake_checkpoint as fake

RANK, ALPHA = 4, 6
PREFIX = 'base_model.model.'
LINEAR = {
  name.removesuffix('.weight'): shape
  for name, shape in fake.llama_shapes().items()
  if name.endswith('_proj.weight') or name == 'lm_head.weight'
}
RANKS_OF_LAYERS = {module: RANK for module in LINEAR if module != 'lm_head'}
K0 = 'model.layers.0.self_attn.k_proj'
# As PEFT 0.21 writes it.
CONFIG: dict[str, Any] = {
  'alora_invocation_tokens': None,
  'alpha_pattern': {},
  'arrow_config': None,
  'auto_mapping': None,
  'base_model_name_or_path': 'hf',
  'bias': 'none',
  'corda_config': None,
  'ensure_weight_tying': False,
  'eva_config': None,
  'exclude_modules': None,
  'fan_in_fan_out': False,
  'inference_mode': True,
  'init_lora_weights': True,
  'kasa_config': None,
  'layer_replication': None,
  'layers_pattern': None,
  'layers_to_transform': None,
  'loftq_config': {},
  'lora_alpha': ALPHA,
  'lora_bias': False,
  'lora_dropout': 0.1,
  'lora_ga_config': None,
  'megatron_config': None,
  'megatron_core': 'megatron.core',
  'modules_to_save': None,
  'monteclora_config': None,
  'peft_type': 'LORA',
  'peft_version': '0.21.2',
  'qalora_group_size': 16,
  'r': RANK,
  'rank_pattern': {},
  'revision': None,
  'target_modules': ['q_proj', 'k_proj'],
  'target_parameters': None,
  'task_type': 'CAUSAL_LM',
  'trainable_token_indices': None,
  'use_bdlora': None,
  'use_dora': False,
  'use_qalora': False,
  'use_rslora': False,
}

Matrices = dict[str, tuple[np.ndarray, np.ndarray]]


def matrices(ranks: dict[str, int], dtype: str = 'float32') -> Matrices:
  """Returns A and B of each module."""
  rng = np.random.default_rng(1)
  return {
    module: tuple(
      rng.standard_normal(shape).astype(fake.DTYPES[dtype])
      for shape in ((rank, LINEAR[module][1]), (LINEAR[module][0], rank))
    )
    for module, rank in ranks.items()
  }


def write(
  folder: pathlib.Path, of: Matrices, prefix: str = PREFIX, **fields: Any
) -> pathlib.Path:
  folder.mkdir()
  (folder / 'adapter_config.json').write_text(json.dumps(CONFIG | fields))
  safetensors_numpy.save_file(
    {
      f'{prefix}{module}.lora_{letter}.weight': matrix
      for module, pair in of.items()
      for letter, matrix in zip('AB', pair, strict=True)
    },
    folder / 'adapter_model.safetensors',
  )
  return folder


def merged(
  folder: pathlib.Path, of: Matrices, factors: dict[str, float], dtype: str
) -> pathlib.Path:
  """Writes the checkpoint that `fake.llama` does, with the sums in it."""
  tensors = fake.random_tensors(fake.llama_shapes(), dtype)
  for module, (a, b) in of.items():
    w = tensors[f'{module}.weight'].astype(np.float64)
    added = factors[module] * b.astype(np.float64) @ a.astype(np.float64)
    tensors[f'{module}.weight'] = (w + added).astype(fake.DTYPES[dtype])
  return fake.write(folder, fake.llama_config(), tensors)


def check(
  tmp_path: pathlib.Path,
  adapter: pathlib.Path,
  of: Matrices,
  factors: dict[str, float],
  dtype: str = 'float32',
  **options: Any,
) -> None:
  """Holds what is converted with an adapter to what is with its sums."""
  base = fake.llama(tmp_path / 'hf', dtype)
  convert.convert(base, tmp_path / 'out', lora=adapter, check=True, **options)
  other = merged(tmp_path / 'merged', of, factors, dtype)
  convert.convert(other, tmp_path / 'expected', **options)
  got, expected = (
    checkpoint.restore_params(tmp_path / name) for name in ('out', 'expected')
  )
  assert jax_leaves(got).keys() == jax_leaves(expected).keys()
  # Once rounded, a bit may differ: the product is summed in another order.
  step = {'float32': 1e-5, 'bfloat16': 2.0**-7}[dtype]
  for name, ours in jax_leaves(got).items():
    theirs = jax_leaves(expected)[name].astype(np.float32)
    np.testing.assert_allclose(
      ours.astype(np.float32), theirs, rtol=step, atol=step, err_msg=name
    )


def jax_leaves(params: Any) -> dict[str, np.ndarray]:
  from jax import tree_util

  return {
    tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in tree_util.tree_leaves_with_path(params)
  }


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('is_stabilized', [False, True])
def test_all_linear_layers(
  dtype: str, is_stabilized: bool, tmp_path: pathlib.Path
) -> None:
  of = matrices(dict.fromkeys(LINEAR, RANK), dtype)
  adapter = write(tmp_path / 'lora', of, use_rslora=is_stabilized)
  factor = ALPHA / (RANK**0.5 if is_stabilized else RANK)
  check(tmp_path, adapter, of, dict.fromkeys(LINEAR, factor), dtype)
  metadata = checkpoint.load_metadata(tmp_path / 'out')
  assert metadata.source['lora'] == 'lora'


def test_ranks_and_factors_of_their_own(tmp_path: pathlib.Path) -> None:
  v1 = 'model.layers.1.self_attn.v_proj'
  of = matrices({K0: 2, v1: 8, 'lm_head': RANK})
  adapter = write(
    tmp_path / 'lora',
    of,
    prefix='',
    rank_pattern={
      r'self_attn\.k_proj': 2,
      '^model.layers.1.self_attn.v_proj': 8,
    },
    alpha_pattern={'v_proj': 1, 'proj': 5, r'layers\..*': 9},
  )
  factors = {K0: 9 / 2, v1: 1 / 8, 'lm_head': ALPHA / RANK}
  check(tmp_path, adapter, of, factors)


def test_it_is_merged_before_it_is_rounded(tmp_path: pathlib.Path) -> None:
  of = matrices({K0: RANK})
  adapter = write(tmp_path / 'lora', of)
  check(tmp_path, adapter, of, {K0: ALPHA / RANK}, quantize='int8')


def test_one_that_is_left_out_is_noticed(tmp_path: pathlib.Path) -> None:
  of = matrices({K0: RANK})
  adapter = write(tmp_path / 'lora', of)
  with pytest.raises(AssertionError, match='attn'):
    check(tmp_path, adapter, of, {K0: 1.01 * ALPHA / RANK})


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    ({'peft_type': 'LOHA'}, "peft_type='LOHA': only 'LORA' is supported"),
    ({'use_dora': True}, 'use_dora=True'),
    ({'bias': 'all'}, "bias='all'"),
    ({'fan_in_fan_out': True}, 'fan_in_fan_out=True'),
    (
      {'init_lora_weights': 'pissa_niter_4'},
      'init_lora_weights=.*as plain LoRA',
    ),
    ({'modules_to_save': ['lm_head']}, r"modules_to_save=\['lm_head'\]"),
    ({'lora_bias': True}, 'lora_bias=True'),
    ({'trainable_token_indices': [3]}, 'trainable_token_indices'),
    ({'something_new': 0.5}, 'something_new=0.5: is not supported'),
    ({'r': 0}, 'r=0: must be an integer'),
    ({'r': 8}, r'k_proj.*shape \(4, 16\); must be \(8, 16\)'),
    ({'lora_alpha': 'x'}, "lora_alpha='x': must be a number"),
    ({'lora_alpha': 10**400}, 'lora_alpha=1000.*must be a number'),
    ({'lora_alpha': float('nan')}, 'lora_alpha=nan: must be a number'),
    ({'rank_pattern': {'k_proj': 0}}, 'rank_pattern.*must be above 0'),
    ({'alpha_pattern': {'(': 1}}, 'alpha_pattern=.*is no pattern'),
    ({'alpha_pattern': {'x': None}}, r"alpha_pattern\['x'\]=None"),
    ({'rank_pattern': [1]}, 'rank_pattern=.*must be an object'),
  ],
)
def test_other_kinds_are_refused(
  fields: dict[str, Any], says: str, tmp_path: pathlib.Path
) -> None:
  base = fake.llama(tmp_path / 'hf')
  adapter = write(tmp_path / 'lora', matrices({K0: RANK}), **fields)
  with pytest.raises(errors.CheckpointError, match=says):
    convert.convert(base, tmp_path / 'out', lora=adapter)
  assert not (tmp_path / 'out').exists()


A, B = (np.zeros(shape, np.float32) for shape in ((RANK, 16), (8, RANK)))


@pytest.mark.parametrize(
  ('tensors', 'says'),
  [
    ({f'{K0}.lora_A.weight': A}, rf'lacks {K0}.lora_B.weight'),
    ({f'{K0}.lora_B.weight': B}, rf'lacks {K0}.lora_A.weight'),
    (
      {'model.x.lora_A.weight': A, 'model.x.lora_B.weight': B},
      'the checkpoint has no model.x.weight',
    ),
    (
      {f'{K0}.lora_A.weight': A, f'{K0}.lora_B.weight': B[:7]},
      r'shape \(8, 16\); must be \(7, 16\)',
    ),
    (
      {f'{K0}.lora_A.weight': A[:, :5], f'{K0}.lora_B.weight': B},
      r'must be \(8, 5\)',
    ),
    ({f'{K0}.lora_magnitude_vector': B}, 'lora_magnitude_vector: is not supp'),
    ({'model.embed_tokens.lora_embedding_A': A}, 'lora_embedding_A: is not'),
    (
      {
        f'{K0}.lora_A.weight': A.astype(np.int8),
        f'{K0}.lora_B.weight': B.astype(np.int8),
      },
      'lora_A.weight: dtype=I8',
    ),
  ],
)
def test_tensors_that_do_not_fit_are_refused(
  tensors: dict[str, np.ndarray], says: str, tmp_path: pathlib.Path
) -> None:
  base = fake.llama(tmp_path / 'hf')
  adapter = write(tmp_path / 'lora', {})
  safetensors_numpy.save_file(tensors, adapter / 'adapter_model.safetensors')
  with pytest.raises(errors.CheckpointError, match=says):
    convert.convert(base, tmp_path / 'out', lora=adapter)


def test_a_folder_without_an_adapter_is_named(tmp_path: pathlib.Path) -> None:
  base = fake.llama(tmp_path / 'hf')
  with pytest.raises(errors.CheckpointError, match='holds no adapter_config'):
    convert.convert(base, tmp_path / 'out', lora=base)


def test_the_command_says_what_is_merged(tmp_path: pathlib.Path) -> None:
  base = fake.llama(tmp_path / 'hf')
  adapter = write(tmp_path / 'terse', matrices({K0: RANK}))
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'checkpoints_convert', f'--source={base}'),
      *(f'--target={tmp_path / "out"}', f'--lora={adapter}', '--verify'),
    ],
    cwd=source_tree.ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert 'out: llama, float32, with terse merged, ' in done.stdout
