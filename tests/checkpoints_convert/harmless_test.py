# SPDX-License-Identifier: Apache-2.0
"""What of config.json changes nothing is no reason to refuse a model."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import transformers

from checkpoints_convert import families
from checkpoints_convert import hf_config
from sarathi_jax import errors
from sarathi_jax.models import config as config_lib
from tests.checkpoints_convert import fake_checkpoint as fake

# What transformers 4.40 wrote of every config, beside what is a family's own.
_WHOLE = dict(
  return_dict=True,
  output_hidden_states=False,
  output_attentions=False,
  torchscript=False,
  torch_dtype='bfloat16',
  use_bfloat16=False,
  tf_legacy_loss=False,
  pruned_heads={},
  chunk_size_feed_forward=0,
  is_encoder_decoder=False,
  is_decoder=False,
  add_cross_attention=False,
  cross_attention_hidden_size=None,
  tie_encoder_decoder=False,
  max_length=20,
  min_length=0,
  do_sample=False,
  early_stopping=False,
  num_beams=1,
  num_beam_groups=1,
  diversity_penalty=0.0,
  temperature=1.0,
  top_k=50,
  top_p=1.0,
  typical_p=1.0,
  repetition_penalty=1.0,
  length_penalty=1.0,
  no_repeat_ngram_size=0,
  encoder_no_repeat_ngram_size=0,
  bad_words_ids=None,
  num_return_sequences=1,
  output_scores=False,
  return_dict_in_generate=False,
  forced_bos_token_id=None,
  forced_eos_token_id=None,
  remove_invalid_values=False,
  exponential_decay_length_penalty=None,
  suppress_tokens=None,
  begin_suppress_tokens=None,
  finetuning_task=None,
  id2label={'0': 'LABEL_0', '1': 'LABEL_1'},
  label2id={'LABEL_0': 0, 'LABEL_1': 1},
  tokenizer_class=None,
  prefix=None,
  pad_token_id=None,
  sep_token_id=None,
  decoder_start_token_id=None,
  task_specific_params=None,
  problem_type=None,
  _name_or_path='',
  _attn_implementation_internal='sdpa',
  num_labels=2,
)


def _read(
  folder: pathlib.Path,
  config: dict[str, Any],
) -> config_lib.ModelConfig:
  (folder / 'config.json').write_text(json.dumps(config))
  return hf_config.read(folder)[0]


@pytest.mark.parametrize(
  'fields',
  [
    dict(use_mrope=False),  # Qwen2.5, and what was distilled into it
    dict(
      is_llama_config=True,
      rope_interleaved=False,
      **{'transformers.js_config': {'kv_cache_dtype': {'fp16': 'float16'}}},
    ),
    dict(max_sequence_length=4096),
    dict(tokenizer_class='LlamaTokenizer'),
    dict(_flash_attn_2_enabled=True, attn_implementation='sdpa'),
    dict(gradient_checkpointing=False),
    dict(task_specific_params={}),
    dict(neftune_noise_alpha=5.0),
    dict(prefix=''),
    _WHOLE,
  ],
)
def test_attributes_that_change_nothing(
  fields: dict[str, Any], tmp_path: pathlib.Path
) -> None:
  config = fake.llama_config()
  assert _read(tmp_path, config | fields) == _read(tmp_path, config)


def _config_of(architecture: str) -> Any:
  """Makes an architecture's config, in transformers."""
  model_type = families.ARCHITECTURES[architecture].model_type
  needed = {}
  if model_type == 'glm4_moe':  # By default, heads of 42 are half rotated.
    needed['head_dim'] = 128
  return transformers.CONFIG_MAPPING[model_type](**needed)


@pytest.mark.parametrize('architecture', families.ARCHITECTURES)
@pytest.mark.parametrize('more', [{}, _WHOLE], ids=['5', '4'])
def test_all_that_a_config_of_transformers_says(
  more: dict[str, Any], architecture: str, tmp_path: pathlib.Path
) -> None:
  """Its own defaults, as to_dict() writes them, and with the old ones."""
  config = _config_of(architecture)
  said = config.to_dict()
  assert transformers.PretrainedConfig().to_dict().keys() <= said.keys()
  whole = _read(tmp_path, more | said)
  del said['architectures']
  assert _read(tmp_path, said) == whole  # by its model type alone


@pytest.mark.parametrize('architecture', families.ARCHITECTURES)
def test_null_is_as_good_as_absent(
  architecture: str, tmp_path: pathlib.Path
) -> None:
  kind = architecture.removesuffix('ForCausalLM')
  config = fake.llama_config(architectures=[architecture])
  config |= dict.fromkeys(
    (
      'rope_theta',
      'rope_scaling',
      'rope_parameters',
      'partial_rotary_factor',
      'quantization_config',
      'logit_scale',
      'head_dim',
      'attention_bias',
      'mlp_bias',
      'layer_types',
      'auto_map',
    )
  )
  if kind == 'Falcon':  # It has no such attributes, at other values.
    config = {
      name: value
      for name, value in config.items()
      if name
      not in (
        'intermediate_size',
        'num_key_value_heads',
        'rms_norm_eps',
        'hidden_act',
      )
    }
  if kind in ('Glm', 'Glm4', 'GptOss'):
    del config['attention_bias']  # Of these the default is true.
  absent = {name: v for name, v in config.items() if v is not None}
  if families.ARCHITECTURES[architecture].is_nested:
    config, absent = (
      {
        'architectures': [architecture],
        'text_config': text | {'model_type': 'mistral'},
      }
      for text in (config, absent)
    )
  assert _read(tmp_path, config) == _read(tmp_path, absent)


def test_a_window_that_is_null_is_none(tmp_path: pathlib.Path) -> None:
  assert (
    _read(
      tmp_path, fake.llama_config() | dict(sliding_window=None)
    ).sliding_window
    is None
  )


@pytest.mark.parametrize(
  'fields',
  [
    dict(logit_scale=1.0),
    dict(n_head=4),
    dict(qkv_bias=False),
    dict(final_logit_softcapping=30.0),
    dict(embedding_multiplier=12.0),
    dict(attention_multiplier=0.1),
    dict(resid_pdrop=0.1),
    dict(num_experts=8),
    dict(sliding_window=128),
    dict(chunk_size_feed_forward=1),
    dict(is_encoder_decoder=True),
    dict(prefix='x'),
    dict(pruned_heads={'0': [1]}),
    dict(add_cross_attention=True),
    dict(quantization={'bits': 4, 'group_size': 64}),
    # Code that comes along may read what no model of transformers does.
    dict(use_mrope=False, auto_map={'AutoModelForCausalLM': 'a.B'}),
    dict(tie_word_embeddings='no'),
    dict(attention_bias=1),
  ],
)
def test_what_any_model_reads_stays_closed(
  fields: dict[str, Any], tmp_path: pathlib.Path
) -> None:
  name, value = next(iter(fields.items()))
  with pytest.raises(errors.CheckpointError) as caught:
    _read(tmp_path, fake.llama_config() | fields)
  assert f'config.json: {name}={value!r}: ' in str(caught.value)


@pytest.mark.parametrize(
  'architecture',
  [name for name, it in families.ARCHITECTURES.items() if not it.is_nested],
)
def test_other_names_of_attributes_are_closed(
  architecture: str, tmp_path: pathlib.Path
) -> None:
  """transformers would take them for those that they are names of."""
  config = _config_of(architecture)
  for name in config.attribute_map:
    with pytest.raises(errors.CheckpointError, match=f'{name}=3'):
      _read(
        tmp_path,
        config.to_dict() | {name: 3, 'architectures': [architecture]},
      )


@pytest.mark.parametrize(
  'fields',
  [
    dict(architectures=None, model_type='gpt9'),
    dict(architectures=[]),
    dict(architectures=None, model_type=None),
  ],
)
def test_no_architecture_that_is_known(
  fields: dict[str, Any], tmp_path: pathlib.Path
) -> None:
  config = {**fake.llama_config(), 'model_type': None} | fields
  with pytest.raises(errors.CheckpointError, match='architecture'):
    _read(tmp_path, config)
