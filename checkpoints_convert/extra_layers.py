# SPDX-License-Identifier: Apache-2.0
"""Leaves out layers behind the last one, which predict tokens further on.

They are of training, and of speculation; the model computes without them.
"""

from __future__ import annotations

from collections.abc import Mapping

from checkpoints_convert import safetensors_reader


def drop(
  tensors: Mapping[str, safetensors_reader.Tensor],
  num_layers: int,
  num_extra: int,
) -> tuple[dict[str, safetensors_reader.Tensor], str]:
  """Returns the tensors without those of layers from `num_layers` on.

  Returns beside them a line that says what is left out; '' if nothing is.

  Args:
    tensors: by their names.
    num_layers: of the model.
    num_extra: so many layers are left out; what is behind them stays.
  """
  prefixes = tuple(f'model.layers.{num_layers + i}.' for i in range(num_extra))
  kept = {n: t for n, t in tensors.items() if not n.startswith(prefixes)}
  dropped = [t for n, t in tensors.items() if n not in kept]
  if not dropped:
    return kept, ''
  size = sum(tensor.num_bytes for tensor in dropped)
  return kept, (
    f'Layers from model.layers.{num_layers} on, which predict further tokens, '
    f'are left out: {len(dropped):,} tensors, {size:,} bytes.'
  )
