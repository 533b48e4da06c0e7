# SPDX-License-Identifier: Apache-2.0
"""Reads generation_config.json as a closed world.

As config.json, every name is honoured, harmless, or refused: what the makers
of a model recommend is never dropped without a word. Where there is no such
file, transformers takes the same names from config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
import functools
import json
import pathlib
from typing import Any, NamedTuple

from checkpoints_convert import harmless
from sarathi_jax import checkpoint
from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import json_file
from sarathi_jax import sampling_params

_FILE = 'generation_config.json'
_TOKENS = ('eos_token_id', 'bos_token_id', 'pad_token_id')

# Names that don't change which tokens are likely.
_HARMLESS = frozenset(
  (
    # How long an output may be, or take: each request sets that itself.
    'max_length',
    'max_new_tokens',
    'max_time',
    'max_tokens',
    # For beam search, which `num_beams` excludes, and for encoders.
    'decoder_start_token_id',
    'diversity_penalty',
    'early_stopping',
    'length_penalty',
    'num_beam_groups',
    # How it is computed, which we decide: caches, compilation, speculation.
    'assistant_confidence_threshold',
    'assistant_early_exit',
    'assistant_ensemble_weight',
    'assistant_lookbehind',
    'cache_config',
    'cache_implementation',
    'compile_config',
    'continuous_batching_config',
    'disable_compile',
    'is_assistant',
    'low_memory',
    'max_cache_len',
    'max_matching_ngram_size',
    'num_assistant_tokens',
    'num_assistant_tokens_schedule',
    'prefill_chunk_size',
    'prompt_lookup_num_tokens',
    'return_legacy_cache',
    'speculation_type',
    'target_lookbehind',
    'use_cache',
    'use_mtp',
    # Which values transformers returns.
    'output_attentions',
    'output_hidden_states',
    'output_logits',
    'output_scores',
    'return_dict_in_generate',
    # Softmax does it, and a request without finite logits ends with an error.
    'remove_invalid_values',
    'renormalize_logits',
    '_commit_hash',
    '_from_model_config',
    'transformers_version',
  )
)

# Name that is not honoured -> the values, beside null, that change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
  'bad_words_ids': ([],),
  'begin_suppress_tokens': ([],),
  'constraints': ([],),
  'dola_layers': (),
  'encoder_no_repeat_ngram_size': (0,),
  'encoder_repetition_penalty': (1,),
  'exponential_decay_length_penalty': (),
  'force_words_ids': ([],),
  'forced_bos_token_id': (),
  'forced_eos_token_id': (),
  'guidance_scale': (1,),
  'min_length': (0,),
  'min_new_tokens': (0,),
  'no_repeat_ngram_size': (0,),
  'num_beams': (1,),
  'num_return_sequences': (1,),
  'penalty_alpha': (0,),
  'sequence_bias': ({}, []),
  'stop_strings': ([],),
  'suppress_tokens': ([],),
  'token_healing': (False,),
  'watermarking_config': (),
}

# The same, for names that matter only where tokens are sampled.
_NEUTRAL_IF_SAMPLED: Mapping[str, tuple[Any, ...]] = {
  'epsilon_cutoff': (0,),
  'eta_cutoff': (0,),
  'top_h': (),
  'typical_p': (1,),
}

# The same by vLLM's names, which other files use.
_VLLM: Mapping[str, Any] = {
  **sampling_params.UNSUPPORTED,
  **sampling_params.DEFAULTS,
}

# Names that transformers would take from config.json; no model reads them.
NAMES = frozenset(
  (*_HARMLESS, *_NEUTRAL, *_NEUTRAL_IF_SAMPLED, *checkpoint.GENERATION_FIELDS)
)


class Generation(NamedTuple):
  """A checkpoint's advice on how to generate; see `CheckpointMetadata`."""

  eos_token_ids: tuple[int, ...]
  bos_token_id: int | None
  pad_token_id: int | None
  sampling: Mapping[str, Any]


def read(
  folder: pathlib.Path, config: Mapping[str, Any], *, sampling: bool = True
) -> Generation:
  """Reads what a Hugging Face checkpoint recommends.

  Args:
    folder: of the checkpoint.
    config: its decoded config.json.
    sampling: False leaves the sampling out, whatever it is.

  Raises:
    CheckpointError: it is damaged, or something in it can't be honoured, or is
      out of range; names the file, the field and its value.
  """
  path = folder / _FILE
  values = {name: value for name, value in config.items() if name in NAMES}
  if path.is_file():
    values = json_file.read(path)
  else:
    path = folder / 'config.json'
  tokens = {name: _token_ids(path, values, config, name) for name in _TOKENS}
  for name in _TOKENS[1:]:
    if len(tokens[name]) > 1:
      raise errors.CheckpointError(
        f'{path}: {name}={list(tokens[name])}: must be one token id.'
      )
  return Generation(
    tokens['eos_token_id'],
    next(iter(tokens['bos_token_id']), None),
    next(iter(tokens['pad_token_id']), None),
    _sampling(path, values) if sampling else {},
  )


def _token_ids(
  path: pathlib.Path,
  values: Mapping[str, Any],
  config: Mapping[str, Any],
  name: str,
) -> tuple[int, ...]:
  """Returns the ids of one kind: of the file, or else of config.json."""
  value = values.get(name)
  if value is None:
    path, value = path.parent / 'config.json', config.get(name)
  ids = [] if value is None else value if isinstance(value, list) else [value]
  if not all(map(config_lib.is_int, ids)):
    raise errors.CheckpointError(
      f'{path}: {name}={value!r}: must be a token id, or a list of them.'
    )
  size = config.get('vocab_size')
  if name == 'eos_token_id' and size and not all(0 <= i < size for i in ids):
    raise errors.CheckpointError(  # It would never end an output.
      f"{path}: {name}={value!r}: must be of the model's vocabulary, in [0, "
      f'{size}).'
    )
  return tuple(ids)


def _sampling(path: pathlib.Path, values: Mapping[str, Any]) -> dict[str, Any]:
  is_sampled = values.get('do_sample')
  if not isinstance(is_sampled, bool | None):
    raise _refusal(path, f'do_sample={is_sampled!r}: must be true or false')
  for name, value in values.items():
    if value is not None and not _is_known(
      name, value, is_sampled is not False
    ):
      raise _refusal(
        path,
        f'{name}={json.dumps(value)}: this recommendation is not supported',
      )
  kept = {
    name: values[name]
    for name in checkpoint.GENERATION_FIELDS
    if values.get(name) is not None
  }
  try:
    sampling_params.SamplingParams.from_dict(checkpoint.default_sampling(kept))
  except errors.InvalidRequestError as e:
    raise _refusal(path, str(e).rstrip('.')) from e
  return kept


def _refusal(path: pathlib.Path, message: str) -> errors.CheckpointError:
  return errors.CheckpointError(
    f'{path}: {message}; take it out of the file, or leave all the sampling '
    'that the file recommends out by --nosampling_defaults '
    '(sampling_defaults=False).'
  )


def _is_known(name: str, value: Any, is_sampled: bool) -> bool:
  """Says whether a recommendation is honoured, or changes nothing."""
  if name in _HARMLESS or name in checkpoint.GENERATION_FIELDS:
    return True
  if name in _NEUTRAL:
    return value in _NEUTRAL[name]
  if name in _NEUTRAL_IF_SAMPLED:
    return not is_sampled or value in _NEUTRAL_IF_SAMPLED[name]
  if name in _VLLM:
    return bool(
      _VLLM[name] == (tuple(value) if isinstance(value, list) else value)
    )
  return name in _TOKENS or name not in _read_by_transformers()


@functools.cache
def _read_by_transformers() -> frozenset[str]:
  return harmless.names_in(
    ('generation/*.py',), r'(?:config|self)\.(\w+)|["\'](\w+)["\']'
  )
