# SPDX-License-Identifier: Apache-2.0
"""Decides whether a checkpoint has one table of embeddings, or two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from checkpoints_convert import rules as rules_lib
from checkpoints_convert import safetensors_reader
from checkpoints_convert import transforms
from sarathi_jax.models import config as config_lib


def settle(
  model: config_lib.ModelConfig,
  tensors: Mapping[str, safetensors_reader.Tensor],
  reader: safetensors_reader.Reader,
  rules: Sequence[rules_lib.Rule],
) -> tuple[config_lib.ModelConfig, dict[str, safetensors_reader.Tensor]]:
  """Decides if a checkpoint is tied whose config says so, but has lm_head.

  Decides as transformers does. Of two equal tables one is dropped; two
  different ones are kept as two; lm_head alone is used as both.

  Args:
    model: as config.json has it.
    tensors: of the checkpoint, by the names that rules have.
    reader: of the checkpoint.
    rules: the family's.

  Returns:
    The model, and its tensors by name.
  """
  tensors = dict(tensors)
  head = tensors.get('lm_head.weight')
  if not model.tie_word_embeddings or head is None:
    return model, tensors
  name = next(rule.tensor for rule in rules if rule.leaf == 'embed')
  embed = tensors.setdefault(name, head)
  if embed is head or _equal(embed, head, reader):
    del tensors['lm_head.weight']
    return model, tensors
  return dataclasses.replace(model, tie_word_embeddings=False), tensors


def _equal(
  a: safetensors_reader.Tensor,
  b: safetensors_reader.Tensor,
  reader: safetensors_reader.Reader,
) -> bool:
  if a.shape != b.shape or a.dtype != b.dtype or not (a.shape and a.num_bytes):
    return False  # Anything but a table is refused later on.
  step = max(1, transforms.CHUNK_BYTES * a.shape[0] // a.num_bytes)
  for start in range(0, a.shape[0], step):
    shape = (min(step, a.shape[0] - start), *a.shape[1:])
    ours, theirs = (np.empty(shape, a.numpy_dtype) for _ in range(2))
    a.read(reader, start, ours)
    b.read(reader, start, theirs)
    if not np.array_equal(ours.view(np.uint8), theirs.view(np.uint8)):
      return False
  return True
