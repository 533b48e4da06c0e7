# SPDX-License-Identifier: Apache-2.0
"""What comes out of a conversion, bit by bit."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from checkpoints_convert import convert
from checkpoints_convert import rules
from checkpoints_convert import safetensors_reader
from checkpoints_convert import transforms
from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.models import parallel
from tests.checkpoints_convert import bits
from tests.checkpoints_convert import fake_checkpoint as fake


def _bits(values: Any) -> np.ndarray:
  values = np.asarray(values)
  return values.view(f'u{values.itemsize}')


def _assert_llama(params: Any, tensors: dict[str, np.ndarray]) -> None:
  """The mapping, written out once more by hand."""

  def same(ours: Any, name: str, transpose: bool = True) -> None:
    theirs = tensors[name].T if transpose else tensors[name]
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(_bits(ours), _bits(theirs), name)

  same(params['embed'], 'model.embed_tokens.weight', transpose=False)
  same(params['lm_head'], 'lm_head.weight')
  same(params['final_norm']['scale'], 'model.norm.weight')
  for i, layer in enumerate(params['layers']):
    prefix = f'model.layers.{i}'
    same(layer['attn_norm']['scale'], f'{prefix}.input_layernorm.weight')
    same(
      layer['mlp_norm']['scale'], f'{prefix}.post_attention_layernorm.weight'
    )
    for name in 'qkvo':
      same(layer['attn'][name], f'{prefix}.self_attn.{name}_proj.weight')
    for name in ('gate', 'up', 'down'):
      same(layer['mlp'][name], f'{prefix}.mlp.{name}_proj.weight')


@pytest.mark.parametrize('dtype', fake.DTYPES)
@pytest.mark.parametrize('num_shards', [1, 3])
def test_equal_dtypes_are_bit_exact(
  dtype: str, num_shards: int, tmp_path: pathlib.Path
) -> None:
  tensors = fake.random_tensors(fake.llama_shapes(), dtype)
  # Not to be touched: a negative zero, a denormal, a NaN with a payload.
  bits = _bits(tensors['model.layers.1.mlp.up_proj.weight'])
  sign = 1 << (8 * bits.itemsize - 1)
  bits[:3, 0] = (sign, 1, sign - 2)
  folder = fake.write(tmp_path / 'hf', fake.llama_config(), tensors, num_shards)
  plan = convert.convert(
    folder, tmp_path / 'out', check=True, allow_nonfinite=True
  )
  assert plan.dtype == dtype
  assert checkpoint.load_metadata(tmp_path / 'out').dtype == dtype
  params = checkpoint.restore_params(tmp_path / 'out')
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
  _assert_llama(params, tensors)


@pytest.mark.parametrize('stored', fake.DTYPES)
@pytest.mark.parametrize('wanted', fake.DTYPES)
def test_other_dtypes_round_to_nearest(
  stored: str, wanted: str, tmp_path: pathlib.Path
) -> None:
  tensors = fake.random_tensors(fake.llama_shapes(), stored)
  folder = fake.write(tmp_path / 'hf', fake.llama_config(), tensors)
  convert.convert(folder, tmp_path / 'out', dtype=wanted, check=True)
  rounded = {
    name: tensor.astype(fake.DTYPES[wanted]) for name, tensor in tensors.items()
  }
  _assert_llama(checkpoint.restore_params(tmp_path / 'out'), rounded)


def test_numbers_too_large_for_float16_are_refused(
  tmp_path: pathlib.Path,
) -> None:
  tensors = fake.random_tensors(fake.llama_shapes(), 'bfloat16')
  tensors['model.layers.0.mlp.up_proj.weight'][2, 3] = 1e6
  folder = fake.write(tmp_path / 'hf', fake.llama_config(), tensors)
  with pytest.raises(errors.CheckpointError, match=r'layers\.0\.mlp\.up_proj'):
    convert.convert(folder, tmp_path / 'out', dtype='float16')
  assert os.listdir(tmp_path) == ['hf']


def test_orbax_restores_it_without_us(tmp_path: pathlib.Path) -> None:
  tensors = fake.random_tensors(fake.llama_shapes(), 'bfloat16')
  folder = fake.write(tmp_path / 'hf', fake.llama_config(), tensors)
  convert.convert(folder, tmp_path / 'out')
  with ocp.StandardCheckpointer() as checkpointer:
    _assert_llama(checkpointer.restore(tmp_path / 'out' / 'params'), tensors)


def test_chunks_do_not_show(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Chunks of a few rows, the last one smaller, give the same arrays."""
  monkeypatch.setattr(transforms, 'CHUNK_BYTES', 300)
  tensors = fake.random_tensors(fake.llama_shapes())
  folder = fake.write(tmp_path / 'hf', fake.llama_config(), tensors)
  convert.convert(folder, tmp_path / 'out', check=True)
  chunks = list((tmp_path / 'out/params/layers.0.mlp.up').glob('[0-9]*'))
  assert len(chunks) > 3
  _assert_llama(checkpoint.restore_params(tmp_path / 'out'), tensors)


def test_for_a_mesh_no_file_holds_parts_of_two_devices(
  tmp_path: pathlib.Path,
) -> None:
  tensors = fake.random_tensors(fake.llama_shapes())
  folder = fake.write(tmp_path / 'hf', fake.llama_config(), tensors)
  mesh = parallel.Parallelism(tp=2, pp=2)
  plan = convert.convert(folder, tmp_path / 'out', check=True, parallelism=mesh)
  crossing: dict[str, set[str]] = {name: set() for name in ('one', 'mesh')}
  with safetensors_reader.Reader(folder) as reader:
    plans = {'one': convert.make_plan(folder, reader, None), 'mesh': plan}
  for kind, made in plans.items():
    for leaf, spec in zip(
      made.all_leaves(),
      jax.tree.leaves(models.param_specs(plan.model)),
      strict=True,
    ):
      size = mesh.part_len(spec.axes[-1], leaf.shape[-1])
      for chunk in leaf.chunks():
        columns = chunk.index[-1]
        if (
          leaf.parts[0].transpose
          and columns.start // size != (columns.stop - 1) // size
        ):
          crossing[kind].add(leaf.path)
  assert not crossing['mesh'] and 'layers.0.mlp.up' in crossing['one']
  _assert_llama(checkpoint.restore_params(tmp_path / 'out'), tensors)
  with pytest.raises(errors.ConfigError, match='tp=3'):
    convert.convert(
      folder, tmp_path / 'no', parallelism=parallel.Parallelism(tp=3)
    )


@pytest.mark.parametrize('differ', [False, True])
def test_tied_with_two_tables(differ: bool, tmp_path: pathlib.Path) -> None:
  """As transformers does: equal tables are one, different ones are two."""
  tensors = fake.random_tensors(fake.llama_shapes())
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'] + differ
  folder = fake.write(
    tmp_path / 'hf', fake.llama_config(tie_word_embeddings=True), tensors
  )
  convert.convert(folder, tmp_path / 'out')
  model = checkpoint.load_metadata(tmp_path / 'out').model
  assert model.tie_word_embeddings is not differ
  assert ('lm_head' in checkpoint.restore_params(tmp_path / 'out')) is differ


@pytest.mark.parametrize('tied', [True, False])
def test_lm_head_alone(tied: bool, tmp_path: pathlib.Path) -> None:
  """Tied, it is both tables; else one is missing."""
  tensors = fake.random_tensors(fake.llama_shapes(tied=True))
  table = tensors.pop('model.embed_tokens.weight')
  folder = fake.write(
    tmp_path / 'hf',
    fake.llama_config(tie_word_embeddings=tied),
    {**tensors, 'lm_head.weight': table},
  )
  if not tied:
    with pytest.raises(errors.CheckpointError, match=r'lacks.*embed_tokens'):
      convert.convert(folder, tmp_path / 'out')
    return
  convert.convert(folder, tmp_path / 'out', check=True)
  params = checkpoint.restore_params(tmp_path / 'out')
  assert 'lm_head' not in params
  np.testing.assert_array_equal(params['embed'], table)


def test_verify_finds_a_flipped_bit(tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf', 'bfloat16')
  target = tmp_path / 'out'
  convert.convert(folder, target)
  bits.verify(folder, target)
  chunk = target / 'params' / 'layers.1.attn.k' / '0.0'
  stored = bytearray(chunk.read_bytes())
  stored[7] ^= 1
  chunk.write_bytes(stored)
  with pytest.raises(errors.CheckpointError, match=r'layers\.1\.attn\.k'):
    bits.verify(folder, target)


def test_verify_notices_a_change_while_converting(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """What --verify is for: whatever was written wrong leaves no target."""

  def wrong(rows: np.ndarray, result: np.ndarray) -> None:
    result[:] = rows.T[:, ::-1]

  monkeypatch.setattr(transforms, 'transpose', wrong)
  folder = fake.llama(tmp_path / 'hf')
  with pytest.raises(errors.CheckpointError, match='differs'):
    convert.convert(folder, tmp_path / 'out', check=True)
  assert os.listdir(tmp_path) == ['hf']


def test_metadata_and_generation_defaults(tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf', pad_token_id=0)
  (folder / 'generation_config.json').write_text(
    json.dumps(
      dict(
        eos_token_id=[2, 7],
        temperature=0.6,
        top_p=0.9,
        do_sample=True,
        transformers_version='5.0.0',
      )
    )
  )
  convert.convert(folder, tmp_path / 'out')
  metadata = checkpoint.load_metadata(tmp_path / 'out')
  assert metadata.eos_token_ids == (2, 7)
  assert (metadata.bos_token_id, metadata.pad_token_id) == (1, 0)
  assert metadata.generation == dict(temperature=0.6, top_p=0.9, do_sample=True)
  assert metadata.default_sampling == dict(temperature=0.6, top_p=0.9)
  assert metadata.source['architecture'] == 'LlamaForCausalLM'


def test_select_walks_the_groups() -> None:
  """Two groups of two queries, a key and a value, each of one row."""

  class Rows:
    def read_rows(self, tensor: Any, start: int, rows: np.ndarray) -> None:
      del tensor
      rows[:, 0] = range(start, start + len(rows))

  tensor = safetensors_reader.Tensor(
    'qkv', (8, 1), 'F32', pathlib.Path(), 0, 32
  )
  for select, rows in (
    ((4, 0, 2), [0, 1, 4, 5]),
    ((4, 2, 1), [2, 6]),
    ((4, 3, 1), [3, 7]),
  ):
    part = transforms.Part(tensor, True, transforms.Select(*select))
    assert part.num_rows == len(rows)
    for start in range(len(rows)):
      for stop in range(start + 1, len(rows) + 1):
        read = np.zeros((stop - start, 1))
        part.read(Rows(), start, read)  # type: ignore[arg-type]
        assert read[:, 0].tolist() == rows[start:stop]


@pytest.mark.parametrize('shape', [(1, 1), (16, 5), (17, 40), (50, 3)])
@pytest.mark.parametrize('dtype', fake.DTYPES)
def test_transpose(shape: tuple[int, int], dtype: str) -> None:
  rows = (
    np.arange(shape[0] * shape[1]).reshape(shape).astype(fake.DTYPES[dtype])
  )
  ours = np.zeros(shape[::-1], rows.dtype)
  transforms.transpose(rows, ours)
  np.testing.assert_array_equal(ours, rows.T)


def test_rules_say_which_tensor_is_missing() -> None:
  table = rules.linear('h.{layer}.o_proj', 'layers.{layer}.o')
  assert rules._missing('layers.3.o', table) == 'h.3.o_proj.weight'


def _main(*arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', 'checkpoints_convert', *arguments],
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )


def test_command_line(tmp_path: pathlib.Path) -> None:
  folder = fake.llama(tmp_path / 'hf', 'bfloat16')
  flags = (f'--source={folder}', f'--target={tmp_path / "out"}')
  done = _main(*flags, '--dtype=float32', '--verify')
  assert done.returncode == 0, done.stderr
  assert re.search(
    r'out: llama, float32, [\d.]+kB in [\d.]+ s, verified\n', done.stdout
  ), done.stdout
  assert 'converting: 100%' in done.stderr
  again = _main(*flags)
  assert again.returncode == 1
  assert again.stderr.startswith('error: ') and 'exists' in again.stderr
  assert 'Traceback' not in again.stderr
