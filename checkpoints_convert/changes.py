# SPDX-License-Identifier: Apache-2.0
"""The changes of a conversion's result, by version of the converter.

A conversion that is kept records in sarathi.json
(`CheckpointMetadata.source`) which version made it, and only that version uses
it again. Whoever changes the result of a conversion adds a line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Version -> what it changed, worded as the end of "since then, ...".
CHANGES: Mapping[int, str] = {
  2: 'recommendations of generation_config.json that are not supported are '
  'refused, and tokenizers made of tokenizer.model alone give the tokens '
  'of sentencepiece',
  3: 'how tokens choose experts is said otherwise',
}
VERSION = max(CHANGES)


def version_of(source: Mapping[str, Any]) -> int:
  """Returns the converter's version that made a checkpoint.

  Returns today's for a checkpoint that the converter did not make: it is never
  out of date.

  Args:
    source: the checkpoint's `CheckpointMetadata.source`.
  """
  if source.get('format') != 'huggingface':
    return VERSION
  version: int = source.get('converter', 1)  # The first one didn't say.
  return version


def since(version: int) -> str:
  """Returns what has changed since a version; '' if nothing has."""
  return '; '.join(text for newer, text in CHANGES.items() if newer > version)
