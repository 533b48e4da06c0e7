# SPDX-License-Identifier: Apache-2.0
"""Takes the tokenizer along, so that tokenizer.json alone is enough.

The engine reads tokenizer.json with the `tokenizers` library. Where there is
one it is authoritative, as in transformers 5, which no longer looks at the
flags add_bos_token and add_eos_token of tokenizer_config.json beside it. Where
there is only tokenizer.model, or vocab.json and merges.txt, transformers
builds the tokenizer, by those flags, and what it built is saved.
"""

from __future__ import annotations

import json
import pathlib
import shutil

from sarathi_jax import errors

# Copied as they are, where they are.
FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
         'chat_template.jinja', 'chat_template.json', 'generation_config.json')

# What a tokenizer can be built from.
_SOURCES = ('tokenizer.model', 'vocab.json')


def write(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Writes a checkpoint's tokenizer, if it has any.

  Args:
    folder: of the Hugging Face checkpoint.
    target: where to.

  Raises:
    CheckpointError: there is a tokenizer, but it can't be read.
  """
  for name in FILES:
    if (folder / name).is_file():
      _check(folder / name)
      shutil.copyfile(folder / name, target / name)
  has_sources = any((folder / name).is_file() for name in _SOURCES)
  if has_sources and not (folder / 'tokenizer.json').is_file():
    _build(folder, target)


def _check(path: pathlib.Path) -> None:
  """Finds a damaged file now, and not when the model is to be served."""
  try:
    if path.name == 'tokenizer.json':
      import tokenizers  # not needed without a tokenizer
      tokenizers.Tokenizer.from_file(str(path))
    elif path.suffix == '.json':
      json.loads(path.read_bytes())
  except Exception as e:  # tokenizers raises nothing narrower
    raise errors.CheckpointError(f'{path}: can not be read: {e}') from e


def _build(folder: pathlib.Path, target: pathlib.Path) -> None:
  import transformers  # slow to import, and seldom needed
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    tokenizer.backend_tokenizer.save(str(target / 'tokenizer.json'))
  except Exception as e:  # whatever a tokenizer's own code raises
    raise errors.CheckpointError(
      f'{folder}: transformers can not make tokenizer.json of its tokenizer '
      f'(for tokenizer.model it needs sentencepiece): {e}') from e
