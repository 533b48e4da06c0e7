# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint recommends is honoured, harmless, or refused by name."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import pytest
import transformers

from checkpoints_convert import convert
from checkpoints_convert import direct
from checkpoints_convert import generation
from sarathi_jax import checkpoint
from sarathi_jax import errors
from tests.checkpoints_convert import fake_checkpoint as fake

_SAMPLED = dict(do_sample=True, temperature=0.7, top_p=0.8, top_k=20)


def _write(folder: pathlib.Path, values: dict[str, Any]) -> pathlib.Path:
  (folder / 'generation_config.json').write_text(json.dumps(values))
  return folder


def _read(
  folder: pathlib.Path, values: dict[str, Any], **config: Any
) -> generation.Generation:
  return generation.read(_write(folder, values), config)


@pytest.mark.parametrize(
  'more',
  [
    dict(max_new_tokens=2048, max_length=4096, transformers_version='4.37.0'),
    dict(num_beams=1, min_length=0, typical_p=1.0),
    dict(renormalize_logits=True, use_cache=False),
    dict(
      length_penalty=0.5, early_stopping=True, cache_implementation='static'
    ),
    dict(bad_words_ids=[], suppress_tokens=[], stop_strings=None),
    dict(user_token_id=195, assistant_token_id=196, chat_format='chatml'),
    dict(presence_penalty=0.0, min_p=None),
    dict.fromkeys(transformers.GenerationConfig().to_dict()),
  ],
)
def test_harmless(more: dict[str, Any], tmp_path: pathlib.Path) -> None:
  assert _read(tmp_path, more | _SAMPLED).sampling == _SAMPLED


@pytest.mark.parametrize(
  'fields',
  [
    dict(encoder_repetition_penalty=1.1),
    dict(no_repeat_ngram_size=3),
    dict(num_beams=4),
    dict(min_length=5),
    dict(min_new_tokens=1),
    dict(typical_p=0.9),
    dict(epsilon_cutoff=3e-4),
    dict(eta_cutoff=3e-4),
    dict(top_h=0.4),
    dict(penalty_alpha=0.6),
    dict(bad_words_ids=[[5]]),
    dict(suppress_tokens=[1]),
    dict(begin_suppress_tokens=[1]),
    dict(forced_bos_token_id=1),
    dict(forced_eos_token_id=2),
    dict(sequence_bias=[[[1], -9.0]]),
    dict(exponential_decay_length_penalty=[5, 1.2]),
    dict(guidance_scale=1.5),
    dict(watermarking_config={}),
    dict(token_healing=True),
    dict(stop_strings=['x']),
    dict(num_return_sequences=2),
    dict(dola_layers='low'),
    dict(constraints=[1]),
    dict(presence_penalty=1.5),
    dict(frequency_penalty=0.1),
    dict(min_tokens=3),
    dict(seed=1),
    dict(stop=['x']),
    dict(logit_bias={'5': 1.0}),
  ],
)
def test_refused(fields: dict[str, Any], tmp_path: pathlib.Path) -> None:
  name, value = next(iter(fields.items()))
  with pytest.raises(errors.CheckpointError) as caught:
    _read(tmp_path, fields | _SAMPLED)
  for word in (
    'generation_config.json',
    f'{name}={json.dumps(value)}: ',
    '--nosampling_defaults',
  ):
    assert word in str(caught.value)


def test_every_name_that_transformers_knows_is_known() -> None:
  """A new one is to be thought about; until then it is refused."""
  known = transformers.GenerationConfig().to_dict().keys()
  assert known <= generation.NAMES | {
    'eos_token_id',
    'bos_token_id',
    'pad_token_id',
  }


@pytest.mark.parametrize(
  'fields',
  [dict(temperature=0.9, top_p=0.6), dict(typical_p=0.5)],
)
def test_without_sampling_its_parameters_are_for_nothing(
  fields: dict[str, Any], tmp_path: pathlib.Path
) -> None:
  """As in transformers; but a penalty counts there, too."""
  fields = fields | dict(do_sample=False)
  kept = _read(tmp_path, fields).sampling
  assert checkpoint.default_sampling(kept) == {}
  kept = _read(tmp_path, fields | dict(repetition_penalty=1.2)).sampling
  assert checkpoint.default_sampling(kept) == dict(repetition_penalty=1.2)


@pytest.mark.parametrize('more', [{}, dict(do_sample=None)])
def test_a_recommendation_counts_unless_sampling_is_off(
  more: dict[str, Any], tmp_path: pathlib.Path
) -> None:
  """As in vLLM. Llama 2's first files were so."""
  said = dict(temperature=0.9, top_p=0.6)
  kept = _read(tmp_path, said | more).sampling
  assert checkpoint.default_sampling(kept) == said
  with pytest.raises(errors.CheckpointError, match=r'typical_p=0\.5'):
    _read(tmp_path, dict(typical_p=0.5) | more)
  with pytest.raises(errors.CheckpointError, match=r'top_p=0\.0'):
    _read(tmp_path, dict(top_p=0.0) | more)


_WRONG = (
  (dict(do_sample=True, top_p=0.0), 'top_p=0.0'),
  (dict(do_sample=True, temperature=-1), 'temperature=-1'),
  (dict(do_sample=True, temperature='0.7'), "temperature='0.7'"),
  (dict(do_sample=True, top_k=2.5), 'top_k=2.5'),
  (dict(do_sample=True, min_p=2), 'min_p=2'),
  (dict(do_sample='yes'), "do_sample='yes'"),
  (dict(do_sample=1), 'do_sample=1'),
  (dict(eos_token_id='</s>'), "eos_token_id='</s>'"),
  (dict(eos_token_id=[2, True]), r'eos_token_id=\[2, True\]'),
  (dict(bos_token_id=[1, 2]), r'bos_token_id=\[1, 2\]'),
)


@pytest.mark.parametrize(('fields', 'match'), _WRONG)
def test_out_of_range(
  fields: dict[str, Any], match: str, tmp_path: pathlib.Path
) -> None:
  """Found before a tensor is written, or read, and the file is named."""
  folder = _write(fake.llama(tmp_path / 'hf'), fields)
  match = f'generation_config.json: {match}: must be '
  with pytest.raises(errors.CheckpointError, match=match):
    convert.convert(folder, tmp_path / 'out')
  assert os.listdir(tmp_path) == ['hf']
  with pytest.raises(errors.CheckpointError, match=match):
    direct.DirectParams(folder)


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    (dict(do_sample=True, top_p=0.0), 'top_p=0.0'),
    (dict(repetition_penalty=0), 'repetition_penalty=0'),
    (dict(num_beams=2), 'num_beams'),
  ],
)
def test_a_converted_checkpoint_is_held_to_it_at_start(
  change: dict[str, Any], match: str, tmp_path: pathlib.Path
) -> None:
  convert.convert(fake.llama(tmp_path / 'hf'), tmp_path / 'out')
  path = tmp_path / 'out' / 'sarathi.json'
  fields = json.loads(path.read_text())
  path.write_text(json.dumps(fields | {'generation': change}))
  with pytest.raises(
    errors.CheckpointError, match=rf'sarathi\.json: generation.*{match}'
  ):
    checkpoint.load_metadata(tmp_path / 'out')


def test_the_way_to_go_on_without(tmp_path: pathlib.Path) -> None:
  """The tokens that end a text stay."""
  folder = _write(
    fake.llama(tmp_path / 'hf'),
    _SAMPLED | dict(repetition_penalty=1.05, top_p=0.0, eos_token_id=[2, 9]),
  )
  convert.convert(folder, tmp_path / 'out', sampling_defaults=False)
  metadata = checkpoint.load_metadata(tmp_path / 'out')
  assert metadata.default_sampling == {}
  assert metadata.eos_token_ids == (2, 9)


def test_config_json_says_it_where_there_is_no_file(
  tmp_path: pathlib.Path,
) -> None:
  """As transformers reads old checkpoints; else the file is what counts."""
  said = dict(do_sample=True, temperature=0.5, eos_token_id=7, top_k=None)
  got = generation.read(tmp_path, said)
  assert got.sampling == dict(do_sample=True, temperature=0.5)
  assert got.eos_token_ids == (7,)
  with pytest.raises(errors.CheckpointError, match=r'/config\.json: num_beams'):
    generation.read(tmp_path, said | dict(num_beams=5))
  assert _read(tmp_path, {}, num_beams=5, **said).sampling == {}


def test_null_leaves_the_end_to_config_json(tmp_path: pathlib.Path) -> None:
  got = _read(
    tmp_path,
    dict(eos_token_id=None, pad_token_id=0),
    eos_token_id=[2, 3],
    bos_token_id=1,
  )
  assert got == ((2, 3), 1, 0, {})
