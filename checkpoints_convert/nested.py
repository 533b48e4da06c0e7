# SPDX-License-Identifier: Apache-2.0
"""Takes the text part of a model that takes images, too.

Its config.json has the text part's within, and its tensors have other names.
What is of images is left out, by name; what only might be is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints_convert import safetensors_reader
from sarathi_jax import errors

_TEXT = 'text_config'
# Attributes beside the text part's.
_OF_IMAGES = frozenset(
  (
    'boi_token_id',
    'boi_token_index',
    'eoi_token_id',
    'eoi_token_index',
    'image_token_id',
    'image_token_index',
    'mm_tokens_per_image',
    'multimodal_projector_bias',
    'projector_hidden_act',
    'spatial_merge_size',
    'vision_config',
    'vision_feature_layer',
  )
)
# How names of tensors begin -> how those of a text model do. On the hub,
# and as transformers 5 writes them.
_BEGINNINGS: Mapping[str, str | None] = {
  'language_model.lm_head.': 'lm_head.',
  'language_model.model.': 'model.',
  'model.language_model.': 'model.',
  'multi_modal_projector.': None,
  'model.multi_modal_projector.': None,
  'vision_tower.': None,
  'model.vision_tower.': None,
}


def flatten(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns config.json as that of a model of text alone.

  Args:
    raw: the decoded config.json.
    where: its path, for errors.

  Raises:
    CheckpointError: it has no text part.
  """
  text = raw.get(_TEXT)
  if not isinstance(text, dict):
    raise errors.CheckpointError(
      f'{where}: {_TEXT}={text!r}: must be an object.'
    )
  outer = {
    name: value
    for name, value in raw.items()
    if name != _TEXT and name not in _OF_IMAGES and value is not None
  }
  # Both know whether embeddings are tied; transformers goes by the outer one.
  return {
    **text,
    'tie_word_embeddings': True,
    **outer,
    'model_type': text.get('model_type'),
  }


def take_text(
  tensors: Mapping[str, safetensors_reader.Tensor],
) -> tuple[dict[str, safetensors_reader.Tensor], str]:
  """Returns the text part's tensors by a text model's names.

  Returns beside them a line that says what is left out; '' if nothing is.

  Raises:
    CheckpointError: two tensors have the same name then.
  """
  taken: dict[str, safetensors_reader.Tensor] = {}
  dropped = []
  for name, tensor in tensors.items():
    begins = next((b for b in _BEGINNINGS if name.startswith(b)), '')
    new = _BEGINNINGS.get(begins, '')
    if new is None:
      dropped.append(tensor)
      continue
    renamed = new + name.removeprefix(begins)
    if renamed in taken:
      raise errors.CheckpointError(
        f'{taken[renamed].name} and {name}: are the same tensor of the text '
        'part.'
      )
    taken[renamed] = tensor
  if not dropped:
    return taken, ''
  parts = sorted({t.name.removeprefix('model.').split('.')[0] for t in dropped})
  size = sum(tensor.num_bytes for tensor in dropped)
  return taken, (
    f'Only the text part is converted: {len(dropped):,} tensors of '
    f'{" and ".join(parts)}, {size:,} bytes, are left out, and no images are '
    'taken.'
  )
