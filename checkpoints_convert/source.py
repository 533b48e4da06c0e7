# SPDX-License-Identifier: Apache-2.0
"""Finds the folder of a Hugging Face checkpoint, here or on the hub."""

from __future__ import annotations

import pathlib
import re

from sarathi_jax import errors

_HUB_ID = re.compile(r'[\w.-]+(/[\w.-]+)?')
_FILES = (
  '*.json',
  '*.safetensors',
  '*.jinja',
  'tokenizer.model*',
  'merges.txt',
  '*.tiktoken',
)
# Not downloaded: the same weights for other programs, and subfolders.
_OTHERS = ('consolidated*', '*/*')


def locate(source: str) -> pathlib.Path:
  """Returns the folder that `source` names, downloading it if need be.

  Args:
    source: a folder, or a hub id such as 'org/name', which is downloaded to
      Hugging Face's own cache, or found there.

  Raises:
    CheckpointError: it is neither a folder nor a model on the hub.
  """
  folder = pathlib.Path(source).expanduser()
  if folder.is_dir():
    return folder.resolve()
  if folder.exists():
    raise errors.CheckpointError(f'{source}: is not a folder.')
  if not _HUB_ID.fullmatch(source):
    raise errors.CheckpointError(
      f'{source}: no such folder, and not a hub id (org/name).'
    )
  return _download(source)


def _download(hub_id: str) -> pathlib.Path:
  # Imported late: most conversions read a folder.
  import huggingface_hub

  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        hub_id, allow_patterns=list(_FILES), ignore_patterns=list(_OTHERS)
      )
    )
  except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
    reason = str(e).strip().splitlines()
    raise errors.CheckpointError(
      f'{hub_id}: no such folder, and the hub does not give it: '
      f'{reason[0] if reason else type(e).__name__}'
    ) from e
