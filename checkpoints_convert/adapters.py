# SPDX-License-Identifier: Apache-2.0
"""Reads a LoRA adapter as the matrices that it adds to a model's own.

They are found by the rules that the model's tensors were found by; a linear
layer that the model has in several matrices has one A for all, and of B each
has its rows.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from checkpoints_convert import families
from checkpoints_convert import lora
from checkpoints_convert import nested
from checkpoints_convert import rules as rules_lib
from checkpoints_convert import source
from checkpoints_convert import transforms
from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.models import adapters as adapters_lib
from sarathi_jax.models import tree

Matrices = dict[str, tuple[np.ndarray, np.ndarray]]


def read(path: str, metadata: checkpoint.CheckpointMetadata) -> Matrices:
  """Reads an adapter of PEFT.

  Args:
    path: a folder, or a hub id.
    metadata: of the checkpoint that it was made for.

  Returns:
    By names of the model's matrices, such as 'layers.3.attn.q', A [in, rank]
    and B [rank, out], float32, with the scale in B.

  Raises:
    CheckpointError: it is none, or has what can't be served: by name.
  """
  architecture = str(metadata.source.get('architecture'))
  if architecture not in families.ARCHITECTURES:
    raise errors.CheckpointError(
      f'{path}: architecture={architecture}: the checkpoint does not say '
      'which names its tensors had; convert it again.'
    )
  rules = families.find(architecture).rules(metadata.model)
  # Whatever is quantized, the shapes are those of the whole matrices.
  plain = dataclasses.replace(metadata.model, quantization=None)
  shapes = {
    name: leaf.shape
    for name, leaf in tree.named_leaves(models.param_specs(plain)).items()
    if name.rpartition('.')[2] in adapters_lib.TARGETS
    and not leaf.is_of_experts
  }
  found: Matrices = {}
  with lora.Adapter(source.locate(path)) as adapter:
    for pair in adapter.pairs():
      module = f'{pair.module}.weight'
      if families.ARCHITECTURES[architecture].is_nested:
        module = next(iter(nested.take_text({module: pair.a})[0]), '')
      places = list(rules_lib.places(module, rules))
      if not places or not {name for _, name in places} <= shapes.keys():
        raise errors.CheckpointError(
          f'{adapter.folder}: {pair.a.name}: is not supported beside other '
          'adapters; must be of a linear layer of attention or of an MLP. '
          'checkpoints_convert --lora merges it.'
        )
      rows = sum(shapes[name][1] for _, name in places)
      in_width = shapes[places[0][1]][0]
      adapter.check(pair, (rows, in_width), module)
      found |= _matrices(adapter, pair, places)
  return found


def _matrices(
  adapter: lora.Adapter,
  pair: lora.Pair,
  places: list[tuple[rules_lib.Rule, str]],
) -> Matrices:
  a = _numbers(adapter, transforms.Part(pair.a, True, None))
  return {
    name: (
      a.T,
      _numbers(adapter, transforms.Part(pair.b, True, rule.select)).T
      * np.float32(pair.factor),
    )
    for rule, name in places
  }


def _numbers(adapter: lora.Adapter, part: transforms.Part) -> np.ndarray:
  """Reads rows of a tensor, [rows, columns] float32."""
  rows = np.empty((part.num_rows, *part.row_shape), part.tensor.numpy_dtype)
  part.read(adapter.reader, 0, rows)
  if transforms.count_nonfinite(rows):
    raise errors.CheckpointError(
      f'{adapter.folder}: {part.tensor.name}: has numbers that are NaN or '
      'infinite, which would reach requests without it.'
    )
  return rows.astype(np.float32)
