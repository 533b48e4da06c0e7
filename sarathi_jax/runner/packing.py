# SPDX-License-Identifier: Apache-2.0
"""Packs named arrays into one int32 buffer: each transfer has a fixed cost.

Takes arrays of NumPy and of JAX alike; loads no JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np

FLOAT, INT = 'float32', 'int32'
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Packing:
  """The places of arrays in a buffer.

  Attributes:
    fields: name -> (shape, dtype), `INT` or `FLOAT`, in the buffer's order.
  """

  fields: Mapping[str, tuple[Shape, str]]

  @functools.cached_property
  def _spans(self) -> list[tuple[str, slice, Shape, bool]]:
    sizes = [math.prod(shape) for shape, _ in self.fields.values()]
    return [
      (name, slice(stop - size, stop), shape, dtype == FLOAT)
      for (name, (shape, dtype)), size, stop in zip(
        self.fields.items(), sizes, itertools.accumulate(sizes), strict=True
      )
    ]

  @property
  def size(self) -> int:
    """The number of int32 values in a buffer."""
    return self._spans[-1][1].stop

  def span(self, name: str) -> slice:
    """Returns where in a buffer an array is."""
    return next(span for field, span, *_ in self._spans if field == name)

  def split(self, buffer: Any) -> dict[str, Any]:
    """Returns the arrays in a [size] int32 buffer of NumPy or JAX, by name."""
    return {
      name: (as_float(buffer[span]) if is_float else buffer[span]).reshape(
        shape
      )
      for name, span, shape, is_float in self._spans
    }


def as_float(bits: Any) -> Any:
  """Returns int32 bits, an array, as the float32 values they stand for."""
  return bits.view(np.float32)
