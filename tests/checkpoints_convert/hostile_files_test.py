# SPDX-License-Identifier: Apache-2.0
"""No file of a checkpoint ends in anything but its answer, or an error.

Each JSON file is tried as a whole, and with each of its values replaced. What
is taken must be fit to be calculated with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import copy
import errno
import itertools
import json
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert import convert
from checkpoints_convert import generation
from checkpoints_convert import hf_config
from checkpoints_convert import safetensors_reader
from checkpoints_convert import sentencepiece_model
from checkpoints_convert import tokenizer_files
from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.in_process import tokenizing
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import facts
from sarathi_jax.models import rope
from sarathi_jax.simulator import hardware
from sarathi_jax.text import chat
from tests import tokenizer_fixture
from tests.checkpoints_convert import fake_checkpoint as fake
from tests.checkpoints_convert import hostile_configs

Read = Callable[[pathlib.Path], Any]

VALUES: tuple[Any, ...] = (
  None,
  True,
  -1,
  0,
  1,
  1.5,
  5e-324,
  1e308,
  math.nan,
  10**9,
  10**30,
  10**400,
  'x',
  [],
  [[]],
  ['x'],
  [-1],
  3 * [10**30],
  {},
  {'a': {}},
)


def _replaced(whole: Any) -> Iterator[tuple[str, Any]]:
  """Yields a copy for each value within, and each of `VALUES`, with a name."""

  def places(value: Any, at: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if at:
      yield at
    inner = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
      inner = enumerate(value)
    for key, one in inner:
      yield from places(one, (*at, key))

  for at, value in itertools.product(list(places(whole, ())), VALUES):
    made = copy.deepcopy(whole)
    parent = made
    for key in at[:-1]:
      parent = parent[key]
    parent[at[-1]] = value
    yield f'{".".join(map(str, at))}={value!r:.40}', made


def _check_all(
  path: pathlib.Path, whole: Any, use: Callable[[], object]
) -> None:
  """Replaces each value of a file, which is then used or refused."""
  raw, num_taken, num_refused = [], 0, 0
  for name, fields in _replaced(whole):
    path.write_text(json.dumps(fields))
    try:
      use()
      num_taken += 1
    except errors.ConfigError:
      num_refused += 1
    except Exception as error:
      raw.append(f'{name}: {errors.describe(error)}')
  assert not raw
  assert num_taken and num_refused


def _calculate(model: config_lib.ModelConfig) -> None:
  assert 0 < model.context_len < 2**31
  for layer in (0, model.num_layers - 1):
    model.layer_kind(layer), facts.layer_size(model, layer)
  models.param_specs(model)
  assert config_lib.from_dict(model.to_dict()) == model


def _rotate(model: config_lib.ModelConfig) -> None:
  if model.head_dim > 64:
    return  # As much memory as they ask for.
  rotation = rope.tables(
    model.rope, model.head_dim, jnp.arange(2), jnp.full(2, 99)
  )
  assert all(jnp.isfinite(table).all() for table in jax.tree.leaves(rotation))


@pytest.mark.parametrize('config', hostile_configs.CONFIGS)
def test_config(config: dict[str, Any], tmp_path: pathlib.Path) -> None:
  rotated = set()

  def use() -> None:
    model = hf_config.read(tmp_path).model
    _calculate(model)
    if model.rope not in rotated:
      rotated.add(model.rope)
      with jax.disable_jit():
        _rotate(model)

  _check_all(tmp_path / 'config.json', config, use)
  assert rotated


@pytest.mark.parametrize('theta', [True, '10000', [1]])
@pytest.mark.parametrize('name', ['rope_theta', 'rope_parameters'])
def test_a_theta_that_is_no_number(
  name: str, theta: Any, tmp_path: pathlib.Path
) -> None:
  value = theta if name == 'rope_theta' else {'rope_theta': theta}
  with pytest.raises(errors.CheckpointError, match=r'rope_theta=.*a number'):
    hf_config.read(_folder(tmp_path, hostile_configs.LLAMA | {name: value}))


@pytest.mark.parametrize(
  ('config', 'field'),
  [
    (hostile_configs.LLAMA, 'num_key_value_heads'),
    (hostile_configs.LLAMA, 'head_dim'),
    (hostile_configs.CONFIGS[-1], 'num_kv_heads'),
    (hostile_configs.CONFIGS[-1], 'ffn_hidden_size'),
    (hostile_configs.CONFIGS[-1], 'num_ln_in_parallel_attn'),
    (hostile_configs.LLAMA, 'rope_theta'),
    (hostile_configs.LLAMA, 'rope_parameters'),
  ],
)
def test_zero_is_not_the_default(
  config: dict[str, Any], field: str, tmp_path: pathlib.Path
) -> None:
  value = {'rope_theta': 0} if field == 'rope_parameters' else 0
  with pytest.raises(errors.CheckpointError, match=r'=0(\.0)?: must'):
    hf_config.read(_folder(tmp_path, config | {field: value}))


# With the fields of each class of models; a push has the other families' files.
_WITH_MOST = ('Llama', 'Glm4Moe', 'Olmo3', 'Falcon')


@pytest.mark.parametrize(
  'config',
  [
    pytest.param(
      config,
      marks=()
      if config['architectures'][0].removesuffix('ForCausalLM') in _WITH_MOST
      else pytest.mark.slow,
    )
    for config in hostile_configs.CONFIGS
  ],
)
def test_metadata(config: dict[str, Any], tmp_path: pathlib.Path) -> None:
  (tmp_path / 'config.json').write_text(json.dumps(config))
  model = hf_config.read(tmp_path).model
  checkpoint.write_metadata(
    tmp_path,
    checkpoint.CheckpointMetadata(
      model=model,
      dtype='float32',
      eos_token_ids=(2, 28),
      bos_token_id=1,
      generation=dict(do_sample=True, temperature=0.5, top_k=5, top_p=0.5),
    ),
  )
  path = tmp_path / 'sarathi.json'

  def use() -> None:
    metadata = checkpoint.load_metadata(tmp_path)
    _calculate(metadata.model)
    assert metadata.default_sampling is not None
    assert all(
      0 <= i < metadata.model.vocab_size for i in metadata.eos_token_ids
    )

  _check_all(path, json.loads(path.read_text()), use)


def test_generation(tmp_path: pathlib.Path) -> None:
  whole = dict.fromkeys(
    (*generation.NAMES, *generation._TOKENS, *generation._VLLM), None
  )
  _check_all(
    tmp_path / 'generation_config.json',
    whole,
    lambda: generation.read(tmp_path, hostile_configs.LLAMA),
  )


@pytest.mark.parametrize('ids', [-5, 29, 10**30, [2, 29], [-1]])
@pytest.mark.parametrize('name', ['generation_config.json', 'config.json'])
def test_tokens_that_never_come_end_nothing(
  ids: Any, name: str, tmp_path: pathlib.Path
) -> None:
  """An output would go on without a word; the vocabulary has 29."""
  config = hostile_configs.LLAMA
  if name == 'config.json':
    config = hostile_configs.LLAMA | {'eos_token_id': ids}
  else:
    (tmp_path / name).write_text(json.dumps({'eos_token_id': ids}))
  with pytest.raises(
    errors.CheckpointError, match=rf'{name}: eos_token_id=.*\[0, 29\)'
  ):
    generation.read(tmp_path, config)
  model = hf_config.read(_folder(tmp_path, config))[0]
  with pytest.raises(
    errors.CheckpointError, match=r'eos_token_ids=.*\[0, 29\)'
  ):
    checkpoint.CheckpointMetadata(
      model=model,
      dtype='float32',
      eos_token_ids=ids if isinstance(ids, list) else [ids],
    )


def _folder(folder: pathlib.Path, config: Mapping[str, Any]) -> pathlib.Path:
  (folder / 'config.json').write_text(json.dumps(config))
  return folder


def _write_tensors(path: pathlib.Path, header: bytes, size: int = 16) -> None:
  path.write_bytes(len(header).to_bytes(8, 'little') + header + bytes(size))


def _tensors(folder: pathlib.Path) -> Any:
  with safetensors_reader.Reader(folder) as reader:
    for tensor in reader.tensors.values():
      assert all(type(size) is int and size >= 0 for size in tensor.shape)
      assert type(tensor.offset) is type(tensor.num_bytes) is int
    return reader.tensors


_HEADER = {
  'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]},
  'b': {'dtype': 'F32', 'shape': [1, 2], 'data_offsets': [8, 16]},
}


def test_headers_of_safetensors(tmp_path: pathlib.Path) -> None:
  header = tmp_path / 'header'

  def use() -> None:
    _write_tensors(tmp_path / 'model.safetensors', header.read_bytes())
    _tensors(tmp_path)

  _check_all(header, _HEADER | {'__metadata__': {'format': 'pt'}}, use)


@pytest.mark.parametrize(
  ('first', 'second', 'size'),
  [
    ([0, 8], [0, 8], 8),
    ([0, 8], [4, 12], 12),
    ([0, 8], [12, 20], 20),
    ([4, 12], [12, 20], 20),
    ([0, 8], [8, 16], 17),
  ],
)
def test_bytes_of_two_tensors_or_of_none(
  first: list[int], second: list[int], size: int, tmp_path: pathlib.Path
) -> None:
  """As safetensors' own library has it."""
  header = copy.deepcopy(_HEADER)
  header['a']['data_offsets'], header['b']['data_offsets'] = first, second
  path = tmp_path / 'model.safetensors'
  _write_tensors(path, json.dumps(header).encode(), size)
  with pytest.raises(errors.CheckpointError, match='damaged header'):
    _tensors(tmp_path)


def test_a_number_in_a_name(tmp_path: pathlib.Path) -> None:
  name = f'model.layers.0.block_sparse_moe.experts.{"9" * 5000}.w1.weight'
  _write_tensors(
    tmp_path / 'model.safetensors', json.dumps({name: _HEADER['a']}).encode(), 8
  )
  _folder(
    tmp_path, hostile_configs.LLAMA | dict(architectures=['MixtralForCausalLM'])
  )
  with (
    safetensors_reader.Reader(tmp_path) as reader,
    pytest.raises(errors.CheckpointError, match='no use'),
  ):
    convert.make_plan(tmp_path, reader, None)


def test_a_disk_that_fails(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def fail(*args: Any) -> int:
    raise OSError(errno.EIO, 'Input/output error')

  _write_tensors(tmp_path / 'model.safetensors', json.dumps(_HEADER).encode())
  monkeypatch.setattr(os, 'preadv', fail)
  with (
    safetensors_reader.Reader(tmp_path) as reader,
    pytest.raises(errors.CheckpointError, match=r'model.*Input/output error'),
  ):
    reader.read_rows(reader.tensors['a'], 0, np.empty(2, np.float32))


def test_indexes(tmp_path: pathlib.Path) -> None:
  _write_tensors(tmp_path / 'x', json.dumps(_HEADER).encode())
  index = tmp_path / safetensors_reader.INDEX
  _check_all(
    index,
    {'metadata': {}, 'weight_map': {'a': 'x', 'b': 'x'}},
    lambda: _tensors(tmp_path),
  )
  for name in ('', '..', 'x\0', 'x' * 5000):
    index.write_text(json.dumps({'weight_map': {'a': name}}))
    with pytest.raises(errors.CheckpointError):
      _tensors(tmp_path)


def test_arrays(tmp_path: pathlib.Path) -> None:
  convert.convert(fake.llama(tmp_path / 'hf'), out := tmp_path / 'out')
  path = out / 'params' / 'layers.1.mlp.down' / '.zarray'

  def use() -> None:
    opened = checkpoint.open_converted(out)
    assert opened.read('layers.1.mlp.down', (slice(0, 2), slice(0, 2))).any()

  _check_all(path, json.loads(path.read_text()), use)


def test_tokenizer_config(tmp_path: pathlib.Path) -> None:
  whole = {
    'bos_token': {'content': '<s>'},
    'eos_token': '</s>',
    'chat_template': [{'name': 'default', 'template': 'x'}],
    'added_tokens_decoder': {'0': {'content': '<unk>'}},
    'additional_special_tokens': ['<a>'],
  }
  _check_all(
    tmp_path / 'tokenizer_config.json',
    whole,
    lambda: chat.ChatTemplate.from_folder(tmp_path),
  )


def _sentencepiece(folder: pathlib.Path) -> None:
  spm = pytest.importorskip('sentencepiece')
  with (
    contextlib.suppress(FileExistsError),
    (folder / 'text').open('x') as file,
  ):
    file.write('the cat sat on the mat\n' * 20)
    file.flush()
    spm.SentencePieceTrainer.train(
      input=file.name,
      model_prefix=str(folder / 'tokenizer'),
      vocab_size=24,
      model_type='bpe',
      minloglevel=9,
    )
  sentencepiece_model._read(folder)


def test_added_tokens(tmp_path: pathlib.Path) -> None:
  config = {
    'bos_token': '<s>',
    'added_tokens_decoder': {'0': {'content': '<unk>', 'special': True}},
    'additional_special_tokens': ['<unk>'],
  }
  _check_all(
    tmp_path / 'tokenizer_config.json', config, lambda: _sentencepiece(tmp_path)
  )
  (tmp_path / 'tokenizer_config.json').unlink()
  _check_all(
    tmp_path / 'added_tokens.json',
    {'<a>': 24},
    lambda: _sentencepiece(tmp_path),
  )


def test_a_token_around_texts_that_is_none(tmp_path: pathlib.Path) -> None:
  _sentencepiece(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text('{"bos_token": "<nosuch>"}')
  with pytest.raises(errors.CheckpointError, match=r"'<nosuch>'.*none of its"):
    sentencepiece_model.build(tmp_path)


def test_devices(tmp_path: pathlib.Path) -> None:
  whole = json.loads((hardware._FOLDER / 'a100.json').read_text())
  path = tmp_path / 'x.json'
  _check_all(path, whole, lambda: hardware.load(str(path)))
  path.write_text(json.dumps(whole | {'efficiencies_of': str(path)}))
  with pytest.raises(errors.ConfigError, match='x'):  # It is its own.
    hardware.load(str(path))


def _tokenizer_files(folder: pathlib.Path) -> None:
  (folder / 'made').mkdir(exist_ok=True)
  tokenizer_files.write(folder, folder / 'made')


# File -> who reads it.
READERS: Mapping[str, tuple[Read, ...]] = {
  'config.json': (hf_config.read,),
  'generation_config.json': (
    lambda folder: generation.read(folder, hostile_configs.LLAMA),
    _tokenizer_files,
  ),
  'sarathi.json': (checkpoint.load_metadata,),
  'tokenizer.json': (_tokenizer_files,),
  'tokenizer_config.json': (
    chat.ChatTemplate.from_folder,
    _tokenizer_files,
  ),
  'special_tokens_map.json': (
    chat.ChatTemplate.from_folder,
    _tokenizer_files,
  ),
  'chat_template.json': (
    chat.ChatTemplate.from_folder,
    _tokenizer_files,
  ),
  safetensors_reader.INDEX: (_tensors,),
  'x.json': (lambda folder: hardware.load(str(folder / 'x.json')),),
}


WHOLES: Mapping[str, bytes] = {
  'nothing': b'',
  'nested': b'[' * 200_000,
  'nested within': b'{"a": %s}' % (b'[' * 900 + b']' * 900),
  'not UTF-8': b'{"a": "\xff"}',
  'a list': b'[1]',
  'null': b'null',
  'twice': b'{"a": 1, "a": 2}',
}


@pytest.mark.parametrize('whole', WHOLES)
@pytest.mark.parametrize('name', READERS)
def test_whole_files(name: str, whole: str, tmp_path: pathlib.Path) -> None:
  (tmp_path / name).write_bytes(WHOLES[whole])
  for read in READERS[name]:
    with pytest.raises(errors.ConfigError, match=name.replace('.', r'\.')):
      read(tmp_path)


@pytest.mark.parametrize('whole', [w for w in WHOLES if w != 'nothing'])
def test_whole_headers(whole: str, tmp_path: pathlib.Path) -> None:
  _write_tensors(tmp_path / 'model.safetensors', WHOLES[whole])
  with pytest.raises(errors.CheckpointError, match='damaged header'):
    _tensors(tmp_path)


TEMPLATES: Mapping[str, str] = {
  'parentheses': '{{ ' + '(' * 5000 + '1' + ')' * 5000 + ' }}',
  'ifs': '{% if 1 %}' * 3000 + '{% endif %}' * 3000,
  'some ifs': '{% if x %}' * 150 + '{% endif %}' * 150,
  'loops': '{% for x in y %}' * 30 + '{% endfor %}' * 30,
  'sums': '{{ ' + '+'.join('x' * 5000) + ' }}',
  'filter': '{{ x | nosuch }}',
}


@pytest.mark.parametrize('name', TEMPLATES)
def test_templates(name: str, tmp_path: pathlib.Path) -> None:
  (tmp_path / chat.FILE).write_text(TEMPLATES[name])
  with contextlib.suppress(errors.CheckpointError):
    template = chat.ChatTemplate.from_folder(tmp_path)
    assert template is not None
    with contextlib.suppress(errors.InvalidRequestError):
      template.render([{'role': 'user', 'content': 'x'}])


def test_a_tokenizers_folder_says_where_to_stop(tmp_path: pathlib.Path) -> None:
  tokenizer_fixture.write(tmp_path)
  words = tokenizing.tokenizer_of(tmp_path)
  for whole in WHOLES.values():
    (tmp_path / 'generation_config.json').write_bytes(whole)
    with pytest.raises(
      errors.CheckpointError, match=r'generation_config\.json'
    ):
      tokenizing.eos_token_ids_of(None, tmp_path, words)
