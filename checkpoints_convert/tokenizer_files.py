# SPDX-License-Identifier: Apache-2.0
"""Copies or makes tokenizer.json, which is all that the engine reads.

The engine reads it with the `tokenizers` library. Where a checkpoint has one it
is authoritative, as in transformers 5, which then ignores the flags
add_bos_token and add_eos_token of tokenizer_config.json. Where there is only
tokenizer.model, `sentencepiece_model` makes it by those flags. Where there are
only vocab.json and merges.txt, transformers makes it.
"""

from __future__ import annotations

import pathlib
import shutil

import tokenizers

from checkpoints_convert import sentencepiece_model
from sarathi_jax import errors
from sarathi_jax import json_file
from sarathi_jax.text import chat
from sarathi_jax.text import tokenizer as tokenizer_lib

# Files that are copied unchanged, where they exist.
FILES = (
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  chat.FILE,
  f'{chat.MORE_FILES}/tool_use.jinja',
  'chat_template.json',
  'generation_config.json',
)

# Tokenizers of other kinds, which are refused and not silently left out.
_FOREIGN = (
  'tekken.json',
  '*.tiktoken',
  'tokenizer.model.v*',
  '*.model',
  '*.spm',
  'encoder.json',
  'vocab.bpe',
  'vocab.txt',
  'tokenizer_config.json',  # of a tokenizer that is nowhere, or is code
)


def write(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Writes a checkpoint's tokenizer, if it has any.

  Args:
    folder: of the Hugging Face checkpoint.
    target: the folder to write to.

  Raises:
    CheckpointError: there is a tokenizer, but it can't be read, or is of
      another kind.
  """
  made = target / 'tokenizer.json'
  for name in FILES:
    if (folder / name).is_file():
      if name.endswith('.json') and name != made.name:
        json_file.read(folder / name)  # Refused now, and not when it is served.
      (target / name).parent.mkdir(exist_ok=True)
      shutil.copyfile(folder / name, target / name)
  chat.ChatTemplate.from_folder(folder)
  if made.is_file():
    _take(folder / made.name, made)
  elif (folder / sentencepiece_model.FILE).is_file():
    sentencepiece_model.build(folder).save(str(made))
  elif (folder / 'vocab.json').is_file():
    _build(folder, made)
  else:
    _refuse_foreign(folder)


def _take(path: pathlib.Path, made: pathlib.Path) -> None:
  """Checks tokenizer.json, and removes truncation and padding from the copy.

  The engine ignores these, but gateways read the copy, too.
  """
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as e:  # tokenizers raises nothing narrower
    raise errors.CheckpointError(f'{path}: can not be read: {e}') from e
  if tokenizer_lib.encode_all(tokenizer):
    tokenizer.save(str(made))


def _build(folder: pathlib.Path, made: pathlib.Path) -> None:
  if not (folder / 'merges.txt').is_file():
    raise errors.CheckpointError(
      f'{folder}: has vocab.json, but neither merges.txt nor tokenizer.json.'
    )
  import transformers  # slow to import, and seldom needed

  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    tokenizer.backend_tokenizer.save(str(made))
  except Exception as e:  # whatever a tokenizer's own code raises
    raise errors.CheckpointError(
      f'{folder}: transformers can not make tokenizer.json of vocab.json and '
      f'merges.txt: {e}'
    ) from e


def _refuse_foreign(folder: pathlib.Path) -> None:
  found = [path.name for glob in _FOREIGN for path in sorted(folder.glob(glob))]
  if found:
    raise errors.CheckpointError(
      f'{folder / found[0]}: a tokenizer of this kind can not be read. Put the '
      'tokenizer.json of the model beside it, or take the file away to serve '
      'token ids alone.'
    )
