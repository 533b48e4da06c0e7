# SPDX-License-Identifier: Apache-2.0
"""Takes the tokenizer along, so that tokenizer.json alone is enough.

The engine reads tokenizer.json with the `tokenizers` library. Checkpoints from
before it have tokenizer.model only, and in some the flags in
tokenizer_config.json say whether to add bos and eos, against tokenizer.json:
for those, transformers builds the tokenizer, and what it built is saved.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

from sarathi_jax import errors

# Copied as they are, where they are.
FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
         'chat_template.jinja', 'chat_template.json', 'generation_config.json')

# What a tokenizer can be built from.
_SOURCES = ('tokenizer.model', 'vocab.json', 'merges.txt')


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
      shutil.copyfile(folder / name, target / name)
  if (folder / 'tokenizer.json').is_file():
    complete = _obeys_flags(folder)
  else:
    complete = not any((folder / name).is_file() for name in _SOURCES)
  if not complete:
    _build(folder, target)


def _obeys_flags(folder: pathlib.Path) -> bool:
  """Whether tokenizer.json adds what tokenizer_config.json says."""
  import tokenizers  # no other part needs it
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  except Exception as e:  # the library raises nothing narrower
    raise errors.CheckpointError(
      f'{folder / "tokenizer.json"}: can not be read: {e}') from e
  flags = _flags(folder / 'tokenizer_config.json')
  bare = tokenizer.encode('a', add_special_tokens=False).tokens
  full = tokenizer.encode('a', add_special_tokens=True).tokens
  for flag, token, edge in (('add_bos_token', 'bos_token', 0),
                            ('add_eos_token', 'eos_token', -1)):
    if flags.get(flag) is None:
      continue
    added = len(full) > len(bare) and full[edge] == _text(flags.get(token))
    if added != flags[flag]:
      return False
  return True


def _flags(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    flags = json.loads(path.read_bytes())
  except ValueError as e:
    raise errors.CheckpointError(f'{path}: can not be read: {e}.') from e
  return flags if isinstance(flags, dict) else {}


def _text(token: Any) -> Any:
  return token.get('content') if isinstance(token, dict) else token


def _build(folder: pathlib.Path, target: pathlib.Path) -> None:
  import transformers  # slow to import, and seldom needed
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    tokenizer.backend_tokenizer.save(str(target / 'tokenizer.json'))
  except Exception as e:  # whatever a tokenizer's own code raises
    raise errors.CheckpointError(
      f'{folder}: its tokenizer can not be converted: {e}') from e
