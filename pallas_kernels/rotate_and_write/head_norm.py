# SPDX-License-Identifier: Apache-2.0
"""What heads are normalized by, before they are rotated."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class HeadNorm:
  """Divides each head by its root mean square, and multiplies its channels.

  In float32, by `offset` + `weight`.

  Attributes:
    weight: [h], any float.
    eps: added to the mean square.
    offset: added to `weight`.
  """

  weight: Any
  eps: float = dataclasses.field(metadata={'static': True})
  offset: int = dataclasses.field(default=0, metadata={'static': True})


HeadNorms = tuple[HeadNorm, HeadNorm]  # of queries, of keys
