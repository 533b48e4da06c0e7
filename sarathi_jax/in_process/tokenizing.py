# SPDX-License-Identifier: Apache-2.0
"""Takes a JAX program's tokenizer, and finds which tokens end a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import pathlib
from typing import Any

import tokenizers

from sarathi_jax import checkpoint
from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import json_file
from sarathi_jax.text import chat
from sarathi_jax.text import tokenizer as tokenizer_lib

# The files of Hugging Face that name the tokens that end an output; the first
# one that does counts.
_MODEL_FILES = ('generation_config.json', 'config.json')
_TOKENIZER_FILES = ('tokenizer_config.json', 'special_tokens_map.json')


def tokenizer_of(given: Any) -> tokenizer_lib.Tokenizer | None:
  """Returns our tokenizer for one that a caller gives.

  Args:
    given: one of ours, the folder of one, a fast one of transformers, or one
      of tokenizers; or None. Ours is a copy, so later changes of theirs don't
      matter.

  Raises:
    CheckpointError: there is none in the folder, or it is damaged.
    ConfigError: it is of another kind.
  """
  if given is None or isinstance(given, tokenizer_lib.Tokenizer):
    return given
  if isinstance(given, (str, pathlib.Path)):
    return tokenizer_lib.Tokenizer(given)
  if isinstance(given, tokenizers.Tokenizer):
    return tokenizer_lib.Tokenizer.copy_of(given)
  backend = getattr(given, 'backend_tokenizer', None)
  if isinstance(backend, tokenizers.Tokenizer):
    template = getattr(given, 'chat_template', None)
    if not isinstance(template, Mapping):  # Else several, by name.
      template = {'default': template}
    source = template.get('default')
    return tokenizer_lib.Tokenizer.copy_of(
      backend,
      source
      and chat.ChatTemplate(
        source, given.special_tokens_map, template.get('tool_use')
      ),
    )
  raise errors.ConfigError(
    f'tokenizer: is a {type(given).__module__}.{type(given).__name__}; must be '
    'the folder of a tokenizer.json, a fast tokenizer of transformers, or a '
    'tokenizers.Tokenizer.'
  )


def eos_token_ids_of(
  eos_token_ids: int | Iterable[int] | None,
  given: Any,
  tokenizer: tokenizer_lib.Tokenizer | None,
) -> tuple[int, ...]:
  """Returns the tokens that end a sequence.

  Args:
    eos_token_ids: what the caller says, if anything.
    given: the caller's tokenizer, see `tokenizer_of`. If the caller does not
      say, its folder does, or the folder where transformers found it, and its
      own token.
    tokenizer: what `tokenizer_of` made of `given`.

  Raises:
    ConfigError: none of them says.
  """
  if eos_token_ids is not None:
    try:
      return _ids(eos_token_ids)
    except TypeError:
      raise errors.ConfigError(
        f'eos_token_ids={eos_token_ids!r}: must be token ids.'
      ) from None
  found: tuple[int, ...] = ()
  if tokenizer is not None:
    folder = tokenizer.folder or getattr(given, 'name_or_path', None)
    if folder and pathlib.Path(folder).is_dir():
      found = _of_folder(pathlib.Path(folder), tokenizer)
    found += _ids(getattr(given, 'eos_token_id', None))
  if not found:
    raise errors.ConfigError(
      'eos_token_ids: must be given, for '
      + (
        'there is no tokenizer that says'
        if tokenizer is None
        else "the tokenizer doesn't say"
      )
      + ' which tokens end a sequence; () if '
      'none does.'
    )
  return tuple(dict.fromkeys(found))


def known_eos_token_ids(
  eos_token_ids: int | Iterable[int] | None,
  given: Any,
  tokenizer: tokenizer_lib.Tokenizer | None,
  vocab_size: int,
) -> tuple[int, ...]:
  """Returns `eos_token_ids_of`; raises ConfigError for one without a token."""
  ids = eos_token_ids_of(eos_token_ids, given, tokenizer)
  config_lib.check(
    all(0 <= token < vocab_size for token in ids),
    'eos_token_ids',
    ids,
    f"must be of the model's vocabulary, in [0, {vocab_size})",
  )
  return ids


def _of_folder(
  folder: pathlib.Path,
  tokenizer: tokenizer_lib.Tokenizer,
) -> tuple[int, ...]:
  if (folder / checkpoint.METADATA).is_file():
    return checkpoint.load_metadata(folder).eos_token_ids
  for name in _MODEL_FILES:
    value = json_file.read_if_there(folder / name).get('eos_token_id')
    try:
      ids = _ids(value)
    except TypeError:
      raise errors.CheckpointError(
        f'{folder / name}: eos_token_id={value!r}: must be a token id, or a '
        'list of them.'
      ) from None
    if ids:
      return ids
  for name in _TOKENIZER_FILES:
    text = chat.text_of(json_file.read_if_there(folder / name).get('eos_token'))
    if text and (found := tokenizer.token_id(text)) is not None:
      return (found,)
  return ()


def _ids(value: Any) -> tuple[int, ...]:
  if value is None:
    return ()
  if hasattr(value, 'tolist'):  # An array, or its scalar.
    value = value.tolist()
  ids = (value,) if isinstance(value, int) else tuple(value)
  if not all(type(token) is int for token in ids):
    raise TypeError('not all are integers')
  return ids
