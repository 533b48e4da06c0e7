# SPDX-License-Identifier: Apache-2.0
"""What conversion has come to make otherwise of the same files.

A conversion that was kept has the version that made it, in sarathi.json
(`CheckpointMetadata.source`), and is used again by that version alone. Whoever
changes what is made adds a line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The version that changed it -> what, as the end of "since then, ...".
CHANGES: Mapping[int, str] = {
  2: 'recommendations of generation_config.json that are not supported are '
     'refused, and tokenizers made of tokenizer.model alone give the tokens '
     'of sentencepiece',
}
VERSION = max(CHANGES)


def version_of(source: Mapping[str, Any]) -> int:
  """The version that made a checkpoint with such `CheckpointMetadata.source`.

  What the converter did not make is never old.
  """
  if source.get('format') != 'huggingface':
    return VERSION
  version: int = source.get('converter', 1)  # The first one didn't say.
  return version


def since(version: int) -> str:
  """Says what has changed since a version; '' if nothing has."""
  return '; '.join(text for newer, text in CHANGES.items() if newer > version)
